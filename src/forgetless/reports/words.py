"""The answer in words, computed from the numbers; arms are named between backticks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.reports.arms import Arm
from forgetless.reports.durations import Matched
from forgetless.reports.evidence import Evidence, TaskInfo
from forgetless.reports.numbers import (
    NOT_MEASURED,
    amount,
    count_words,
    interval_words,
    level_words,
    listed,
    percent,
)
from forgetless.reports.standing import Standing
from forgetless.scores.seeds import MARGIN, Estimate


@dataclass(frozen=True)
class Answer:
    """The headline, what follows from the numbers, and how far they carry."""

    title: str
    sentences: tuple[str, ...]
    caveats: tuple[str, ...]


# ---------------------------------------------------------------------------------------- words


def answer(
    evidence: Evidence, arms: Sequence[Arm], place: Standing, matched: Matched | None = None
) -> Answer:
    """The answer to the question of the study, with the caveats that belong to it."""
    caveats = tuple(_caveats(evidence, arms, place))
    if not place.placed:
        title, said = _nothing(evidence, arms, place)
        return Answer(title, (*said, *_budgets(arms)), caveats)
    if len(place.placed) == 1:
        return Answer(_one_arm(place), (*_budgets(arms), *_about(place)), caveats)
    if place.none_learned:
        title, best = _none_learned(place)
        sentences = (best, *_compared(place), *_budgets(arms), *_about(place))
        return Answer(title, sentences, caveats)
    if place.learning is None or place.forgetting is None:
        return Answer(_one_side(place), (*_budgets(arms), *_about(place)), caveats)
    title = _most_kept(place, place.forgetting, place.learning)
    cost = _most_learned(place, place.forgetting, place.learning)
    equal = _at_equal_learning(matched) if matched else []
    sentences = (*cost, *_compared(place), *equal, *_budgets(arms), *_about(place))
    return Answer(title, sentences, caveats)


def named(arms: Iterable[Arm]) -> str:
    """`a`, `b` and `c`."""
    return listed([f"`{arm.label}`" for arm in arms])


def arm_words(label: str) -> str:
    """An arm's name within a sentence: in quotes where its own words would run into the others."""
    return f"“{label}”" if re.search(r",|\band\b", label) else label


def kept_words(task: TaskInfo, *arms: Arm) -> str:
    """How much these arms kept: shares of the base's score, or the scores themselves."""
    unit = "of what the base knew" if task.is_share else f"{task.metric} on {task.name}"
    return f"{_amounts(task, [arm.best.kept(task) for arm in arms])} {unit}"


def learned_words(task: TaskInfo, *arms: Arm) -> str:
    """What these arms reached on the new task."""
    unit = f"on {task.name}" if task.is_share else f"{task.metric} on {task.name}"
    return f"{_amounts(task, [arm.best.final(task) for arm in arms])} {unit}"


def _amounts(task: TaskInfo, estimates: Sequence[Estimate | None]) -> str:
    return listed([amount(task, e.value) if e else NOT_MEASURED for e in estimates])


def _nothing(
    evidence: Evidence, arms: Sequence[Arm], place: Standing
) -> tuple[str, tuple[str, ...]]:
    if arms and place.learning and place.forgetting:
        return (
            "No arm was measured on both learning and forgetting yet.",
            (f"The plane needs {place.learning.name} and {place.forgetting.name} of the same arm; "
             "the table below has what there is.",),
        )  # fmt: skip
    failed = len(evidence.with_status("failed"))
    left = len(evidence.runs) - failed - len(evidence.with_status("done"))
    parts = [f"{count_words(failed, 'run')} failed"] if failed else []
    parts += [f"{count_words(left, 'run')} not finished"] if left else []
    state = f" ({', '.join(parts)})" if parts else ""
    return "Nothing has been measured yet.", (f"No finished run has a score{state}.",)


def _one_arm(place: Standing) -> str:
    arm, parts = place.placed[0], []
    if place.forgetting:
        verb = "kept" if place.forgetting.is_share else "ended at"
        parts.append(f"{verb} {kept_words(place.forgetting, arm)}")
    if place.learning:
        parts.append(
            f"reached {learned_words(place.learning, arm)}{_from_base(arm, place.learning)}"
        )
    return f"`{arm.label}` {' and '.join(parts)}."


def _one_side(place: Standing) -> str:
    if place.learning:
        leader, verb, tied = place.learners[0], "learned", place.learners
        what = learned_words(place.learning, leader)
    else:
        assert place.forgetting is not None
        leader, verb, tied = place.keepers[0], "kept", place.keepers
        what = kept_words(place.forgetting, leader)
    if len(tied) == 1:
        return f"`{leader.label}` {verb} the most: {what}."
    return f"{named(tied)} {verb} the most and are not distinguishable; the highest is {what}."


def _none_learned(place: Standing) -> tuple[str, str]:
    assert place.learning is not None
    best = place.learners[0]
    return (
        "No arm learned anything that can be told apart from the base.",
        f"The best score is that of `{best.label}`, {learned_words(place.learning, best)}"
        f"{_from_base(best, place.learning)}.",
    )


def _most_kept(place: Standing, forgetting: TaskInfo, learning: TaskInfo) -> str:
    leader, *tied = place.keepers
    kept, learned = kept_words(forgetting, leader), learned_words(learning, leader)
    if not tied:
        both = " and learned the most" if place.learners == (leader,) else ""
        return f"`{leader.label}` kept the most{both}: {kept}, with {learned}."
    if len(place.keepers) == len(place.placed) == len(place.learners):
        return f"The {len(place.placed)} arms are not distinguishable, in keeping or in learning."
    if len(tied) > 1:
        return (
            f"{named(place.keepers)} kept the most and are not distinguishable; "
            f"the highest is {kept}, with {learned}."
        )
    return (
        f"{named(place.keepers)} kept the most and are not distinguishable: "
        f"{kept_words(forgetting, *place.keepers)}, with {learned_words(learning, *place.keepers)}."
    )


def _most_learned(place: Standing, forgetting: TaskInfo, learning: TaskInfo) -> list[str]:
    leader, *tied = place.learners
    sentences = []
    if place.keepers[:1] != place.learners[:1]:
        sentences.append(
            f"`{leader.label}` learned the most, {learned_words(learning, leader)}"
            f"{_from_base(leader, learning)}, {_cost(leader, forgetting)}."
        )
    if tied:
        best, *equal = place.keepers_of(place.learners)
        also = f", not distinguishable from {named(equal)}" if equal else ""
        sentences.append(
            f"In learning, {named(tied)} {_is(tied)} not distinguishable from `{leader.label}`; "
            f"of these, `{best.label}` kept the most ({kept_words(forgetting, best)}){also}."
        )
    return sentences


def _cost(arm: Arm, forgetting: TaskInfo) -> str:
    estimate = arm.best.kept(forgetting)
    if estimate is not None and forgetting.is_share:
        if estimate.value >= 1:
            return "and kept all of what the base knew"
        return f"at the cost of {percent(1 - estimate.value)} of what the base knew"
    return f"with {kept_words(forgetting, arm)}"


def _compared(place: Standing) -> list[str]:
    sentences = []
    if place.front:
        sentences.append(
            f"On the Pareto front, where nothing else is better on both: {named(place.front)}."
        )
    if place.beaten:
        pairs = ", ".join(f"`{arm.label}` (by `{by.label}`)" for arm, by in place.beaten)
        sentences.append(f"Clearly beaten on one side and no better on the other: {pairs}.")
    if place.idle and not place.none_learned:
        sentences.append(
            f"{named(place.idle)} learned nothing that can be told apart from the base, "
            f"so what {'it' if len(place.idle) == 1 else 'they'} kept is not counted as a win."
        )
    return sentences


def _at_equal_learning(matched: Matched) -> list[str]:
    """Who keeps most where most arms have learned as much; of arms with several seeds alone."""
    known = [sum(value is not None for value in at.values) for at in matched.rankings]
    most = max(range(len(known)), key=lambda i: (known[i], i))
    if known[most] < 2:
        return []
    labels = list(matched.kept_at)
    leader, *tied = (labels[i] for i in matched.rankings[most].leaders())
    top = matched.kept_at[leader][most]
    assert top is not None
    level = f"{level_words(matched.learning, matched.levels[most])} on {matched.learning.name}"
    average = "average over " if matched.kept.mean_of else ""
    kept = f"{amount(matched.kept, top.value)} on {average}{matched.kept.name}"
    names = [f"`{label}`" for label in tied]
    also = f", not distinguishable from {listed(names)}" if names else ""
    return [
        f"At equal learning, {level}, `{leader}` kept the most of the {known[most]} arms that got "
        f"there with several seeds: {kept} ({interval_words(top, matched.kept)}){also}."
    ]


def _about(place: Standing) -> list[str]:
    """What the two words of the headline were measured by."""
    sentences = []
    task = place.forgetting
    if task:
        base = place.placed[0].best.measured[task.name].base
        if base and task.is_share:
            sentences.append(
                f"Kept is measured by {task.name}: the {task.metric} after training as a share of "
                f"the base’s {percent(base.value)}."
            )
        elif base:
            better = "higher" if task.higher_is_better else "lower"
            sentences.append(
                f"Kept is measured by {task.name}: the {task.metric} after training, {better} is "
                f"better; the base has {amount(task, base.value)}."
            )
    else:
        sentences.append("No forgetting task was measured, so nothing is known of what was lost.")
    if place.learning is None:
        sentences.append("No learning task was measured, so nothing is known of what was learned.")
    return sentences


def _from_base(arm: Arm, task: TaskInfo) -> str:
    base = arm.best.measured[task.name].base
    return f" (base {amount(task, base.value)})" if base else ""


def _budgets(arms: Sequence[Arm]) -> list[str]:
    """Which trainings ended because they had forgotten more than they were allowed."""
    found = []
    for arm in arms:
        for run in arm.best.runs:
            if event := run.exceeded:
                seed = f" (seed {run.settings.get('seed')})" if len(arm.best.runs) > 1 else ""
                end = (
                    "was stopped there"
                    if event.get("action") == "stop"
                    else f"went back to step {event.get('kept_step')}, the last one inside"
                )
                found.append(
                    f"`{arm.label}`{seed} went over its budget of forgetting at step "
                    f"{event.get('step')}, {_exceeded(event)}, and {end}."
                )
    return found


def _exceeded(event: Mapping[str, Any]) -> str:
    value, allowed = event.get("value", 0.0), event.get("allowed", 0.0)
    if event.get("limit") == "max_kl":
        what = f"a distance from the base of {value:.3f}"
    else:
        what = f"{value:.3f} worse than the base"
    return f"with {what} on {event.get('probe')} where {allowed:g} was allowed"


# -------------------------------------------------------------------------------------- caveats


def _caveats(evidence: Evidence, arms: Sequence[Arm], place: Standing) -> Iterable[str]:
    if evidence.evaluations:
        yield (
            "The intervals (95 %) show the noise of the questions asked, not how another training "
            "would have turned out."
        )
    elif place.placed:
        yield from _about_seeds(place.placed)
    if len(place.placed) > 1:
        yield (
            "“Not distinguishable” means that the difference of two arms on the same questions and "
            "seeds may be chance (5 %, with Holm’s correction for all pairs of arms); two arms "
            "called so may still differ by a little."
        )
        if not evidence.evaluations:
            yield _about_rates(arms)
    more = [task.name for task in evidence.tasks if task not in (place.learning, place.forgetting)]
    if place.placed and more:
        names = ", ".join(more)
        yield f"The words above are about the first task of either kind; also measured: {names}."
    yield from _about_gaps(evidence, arms, place)


def _about_seeds(placed: Sequence[Arm]) -> Iterable[str]:
    counts = sorted({len(arm.best.runs) for arm in placed})
    if counts == [1]:
        yield (
            "One seed an arm: the intervals (95 %), and what is told apart, show the noise of the "
            "questions asked, not how another seed would have turned out. Do not rank arms on "
            "small differences."
        )
        return
    told = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    yield (
        f"{told} seeds an arm; intervals are 95 %, over the seeds and the questions"
        f"{', over these alone where there is one seed' if counts[0] == 1 else ''}."
    )


def _about_rates(arms: Sequence[Arm]) -> str:
    tried = [len(arm.settings) for arm in arms]
    if max(tried) == 1:
        return "Each arm ran at one learning rate; at another the order may differ."
    return (
        "Each arm stands at one learning rate of "
        f"{min(tried)}{f' to {max(tried)}' if max(tried) > min(tried) else ''} tried: of those "
        f"with at least {100 * (1 - MARGIN):.0f} % of the best one’s gain in learning, the one "
        "that kept most. It was chosen by the scores shown, which flatters every arm a little."
    )


def _about_gaps(evidence: Evidence, arms: Sequence[Arm], place: Standing) -> Iterable[str]:
    failed, runs = evidence.with_status("failed"), len(evidence.runs)
    if failed:
        yield f"{count_words(len(failed), 'run')} of {runs} failed and {_is(failed)} left out."
    left = [run for run in evidence.runs if run.status not in ("done", "failed")]
    if left:
        yield f"{count_words(len(left), 'run')} of {runs} {_is(left)} not finished."
    missing = [arm for arm in arms if arm not in place.placed]
    if missing and place.placed:
        yield f"{named(missing)} {_is(missing)} not compared: a task was not measured there."
    moved = [arm for arm in arms if _starts_elsewhere(arm)]
    if moved:
        yield f"{named(moved)} did not start at the base: its scores at step 0 are not the base’s."


def _starts_elsewhere(arm: Arm) -> bool:
    return any(
        measured.base and measured.step0 and measured.base.value != measured.step0.value
        for measured in arm.best.measured.values()
    )


def _is(things: Sequence[object]) -> str:
    return "is" if len(things) == 1 else "are"
