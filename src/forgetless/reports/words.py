"""The answer in words, computed from the numbers; arms are named between backticks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from forgetless.reports import numbers
from forgetless.reports.arms import Arm
from forgetless.reports.durations import Matched
from forgetless.reports.evidence import Evidence, TaskInfo
from forgetless.reports.standing import Standing
from forgetless.scores.seeds import MARGIN, Estimate


@dataclass(frozen=True)
class Answer:
    """The headline, what follows from the numbers, and how far they carry."""

    title: str
    sentences: tuple[str, ...]
    caveats: tuple[str, ...]


def answer(
    evidence: Evidence, arms: Sequence[Arm], place: Standing, matched: Matched | None = None
) -> Answer:
    """The answer to the question of the study, with the caveats that belong to it."""
    measured = [(arm, m) for arm in arms for m in arm.best.measured.values() if m.base and m.step0]
    moved = {id(arm): arm for arm, m in measured if m.base.value != m.step0.value}  # type: ignore[union-attr]
    words = environment().get_template("answer.txt").make_module({
        "evidence": evidence,
        "arms": arms,
        "place": place,
        "placed": place.placed,
        "learning": place.learning,
        "forgetting": place.forgetting,
        "learners": place.learners,
        "keepers": place.keepers,
        "matched": matched,
        "equal": _at_equal_learning(matched) if matched else None,
        "seeds": _ends(len(arm.best.runs) for arm in place.placed),
        "rates": _ends(len(arm.settings) for arm in arms),
        "more": [t.name for t in evidence.tasks if t not in (place.learning, place.forgetting)],
        "failed": evidence.with_status("failed"),
        "left": [run for run in evidence.runs if run.status not in ("done", "failed")],
        "missing": [arm for arm in arms if arm not in place.placed],
        "moved": list(moved.values()),
    })  # fmt: skip
    parts = (getattr(words, part)() for part in ("title", "sentences", "caveats"))
    title, sentences, caveats = (tuple(part.strip("\n").split("\n")) for part in parts)
    return Answer(title[0], *(tuple(filter(None, part)) for part in (sentences, caveats)))


@cache
def environment() -> Environment:
    """The templates of the report, with the numbers' words; text in HTML is escaped."""
    found = Environment(
        loader=PackageLoader("forgetless.reports"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
    )
    found.globals.update({name: getattr(numbers, name) for name in numbers.__all__})
    found.globals.update(amounts=_amounts, named=_named, enough=f"{100 * (1 - MARGIN):.0f} %")
    return found


def _named(arms: Iterable[Arm]) -> str:
    """`a`, `b` and `c`."""
    return numbers.listed([f"`{arm.label}`" for arm in arms])


def _amounts(task: TaskInfo, arms: Iterable[Arm]) -> str:
    """What these arms reached on a new task, or kept of an old one."""
    scores = [
        arm.best.kept(task) if task.kind == "forgetting" else arm.best.final(task) for arm in arms
    ]
    return numbers.listed(
        [numbers.amount(task, e.value) if e else numbers.NOT_MEASURED for e in scores]
    )


def _ends(counts: Iterable[int]) -> list[int]:
    """The least and the most, once where they are the same."""
    found = sorted(set(counts))
    return [found[0], found[-1]] if len(found) > 1 else found


def _at_equal_learning(matched: Matched) -> tuple[float, int, list[str], Estimate] | None:
    """Where most arms have learned as much: the level, their number, who keeps most, how much.

    Of arms with several seeds alone; the leader is followed by those not told apart from it.
    """
    known = [sum(value is not None for value in at.values) for at in matched.rankings]
    most = max(range(len(known)), key=lambda i: (known[i], i))
    labels = list(matched.kept_at)
    leaders = [labels[i] for i in matched.rankings[most].leaders()]
    top = matched.kept_at[leaders[0]][most] if leaders else None
    if known[most] < 2 or top is None:
        return None
    return matched.levels[most], known[most], [f"`{label}`" for label in leaders], top
