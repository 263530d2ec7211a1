"""Everything that a report tells of a study, computed once from its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetless.reports.arms import Arm, gather
from forgetless.reports.changes import Pictures, TaskChanges, find_changes, find_pictures
from forgetless.reports.durations import Course, Matched, course, matched
from forgetless.reports.evidence import Evidence, read
from forgetless.reports.standing import Standing, standing
from forgetless.reports.words import Answer, answer


@dataclass(frozen=True)
class Findings:
    """What the page and the terminal show.

    Attributes:
        course: the scores over the steps, where runs were scored on the way.
        matched: what the arms keep at equal learning, where that can be told.
        pictures: of what was lost and gained, where that are images.
    """

    evidence: Evidence
    arms: Sequence[Arm]
    place: Standing
    course: Course | None
    matched: Matched | None
    changes: Sequence[TaskChanges]
    pictures: Pictures
    words: Answer


def find(study_folder: str | Path) -> Findings:
    """The findings in a study folder; raises as `evidence.read`."""
    evidence = read(study_folder)
    arms = gather(evidence)
    place, over_steps = standing(evidence, arms), course(evidence, arms)
    equal, changes = matched(evidence, arms, over_steps), find_changes(evidence, arms)
    words = answer(evidence, arms, place, equal)
    pictures = find_pictures(changes)
    return Findings(evidence, arms, place, over_steps, equal, changes, pictures, words)
