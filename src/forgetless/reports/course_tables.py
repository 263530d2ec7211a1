"""The tables of scores over the steps, over the learning rates, and at matched learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forgetless.reports.arms import Arm
from forgetless.reports.durations import Course, Matched, Moment
from forgetless.reports.evidence import Evidence, Task
from forgetless.reports.markup import arm_name, estimate_cell, header, text
from forgetless.reports.words import amount, level_words, unit, unit_in_full
from forgetless.scores.seeds import Estimate

Pair = tuple[Estimate | None, Estimate | None]


def course_table(found: Course, places: Mapping[str, int]) -> str:
    """One row an arm, two columns a step: the first learning task, and what is kept."""
    learning, kept = found.learning[0], found.forgetting[0]
    rows = ""
    for track in found.tracks:
        by_step = {moment.step: moment for moment in track.moments}
        cells = "".join(
            _pair(_scores(by_step.get(step), learning, kept), learning, kept)
            for step in found.steps
        )
        rows += f'<tr><th scope="row">{arm_name(track.label, places[track.label])}</th>{cells}</tr>'
    base = next((m for t in found.tracks for m in t.moments if m.step == 0), None)
    about = " · ".join(
        f"{word}: {unit_in_full(task)}" + (f", base {amount(task, score.value)}" if score else "")
        for word, task, score in zip(
            ("learned", "kept"), (learning, kept), _scores(base, learning, kept), strict=True
        )
    )
    heads = _heads([f"step {step:,}" for step in found.steps], learning, kept)
    return f"<h3>Step by step <small>{text(about)}</small></h3>" + _scrolled(
        heads, rows, "Scores over the training"
    )


def rates_section(evidence: Evidence, arms: Sequence[Arm], places: Mapping[str, int]) -> str:
    """Every arm at every learning rate, the one it stands at marked; empty with one rate an arm."""
    learning, forgetting = evidence.first("learning"), evidence.first("forgetting")
    if learning is None or forgetting is None or all(len(arm.settings) < 2 for arm in arms):
        return ""
    rates = sorted({s.learning_rate for arm in arms for s in arm.settings if s.learning_rate})
    rows = ""
    for arm in arms:
        at = {setting.learning_rate: setting for setting in arm.settings}
        cells = ""
        for rate in rates:
            found = at.get(rate)
            pair = (found.final(learning), found.kept(forgetting)) if found else (None, None)
            cells += _pair(pair, learning, forgetting, is_chosen=found is arm.best)
        rows += f'<tr><th scope="row">{arm_name(arm.label, places[arm.label])}</th>{cells}</tr>'
    heads = _heads([f"{rate:g}" for rate in rates], learning, forgetting)
    return f"<h3>Learning rates</h3><p class=note>{_RATES}</p>" + _scrolled(
        heads, rows, "Scores over the learning rates"
    )


def matched_section(matched: Matched, places: Mapping[str, int]) -> str:
    """What the arms keep where they have learned equally much, with its heading."""
    learning, kept = matched.learning, matched.kept
    rows = ""
    for label, at in matched.kept_at.items():
        cells = "".join(estimate_cell(estimate, kept) for estimate in at)
        rows += f'<tr><th scope="row">{arm_name(label, places[label])}</th>{cells}</tr>'
    heads = header("arm", is_number=False)
    heads += "".join(header(level_words(learning, level)) for level in matched.levels)
    about = text(f"{unit_in_full(kept)} · by {unit(learning)}")
    several = any(estimate and estimate.seeds > 1 for at in matched.kept_at.values()
                  for estimate in at)  # fmt: skip
    note = _MATCHED.format(along=matched.along, interval=_SEVERAL if several else _ALONE)
    return (
        f"<h3>Forgetting at matched learning <small>{about}</small></h3><p class=note>{note}</p>"
        + _scrolled(f"<tr>{heads}</tr>", rows, "Forgetting at matched learning")
    )


_RATES = (
    "Learned and kept at each rate tried. An arm stands at the rate marked: of those whose "
    "interval on learning overlaps that of the rate that learned most, the one that kept most."
)
_MATCHED = (
    "Each seed is followed in straight lines between the {along} at which it was scored; where it "
    "passes a level more than once, the pass at which it kept most counts. {interval} A dash in "
    "place of a score is a level that not every seed of the arm reached: nothing is extrapolated."
)
_SEVERAL = "Under each mean its 95 % interval over the seeds."
_ALONE = "With one seed an arm there is no interval: small differences say nothing."


def _scores(moment: Moment | None, learning: Task, kept: Task) -> Pair:
    scores = moment.scores if moment else {}
    return scores.get(learning.name), scores.get(kept.name)


def _pair(pair: Pair, learning: Task, kept: Task, *, is_chosen: bool = False) -> str:
    mark = '<small class="best">best rate</small>' if is_chosen else ""
    learned = estimate_cell(pair[0], learning).replace("</td>", f"{mark}</td>")
    return learned + estimate_cell(pair[1], kept)


def _heads(groups: Sequence[str], learning: Task, kept: Task) -> str:
    over = "".join(f'<th scope="colgroup" colspan="2" class="group">{g}</th>' for g in groups)
    columns = header("learned", note=unit(learning)) + header("kept", note=unit(kept))
    arm = header("arm", is_number=False)
    return f"<tr><td></td>{over}</tr><tr>{arm}{columns * len(groups)}</tr>"


def _scrolled(heads: str, rows: str, label: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">'
        f"<table><thead>{heads}</thead><tbody>{rows}</tbody></table></div>"
    )
