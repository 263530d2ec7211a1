"""The answer in words, computed from the numbers; arms are named between backticks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from forgetless.report.arms import Arm, Setting, best_of, clearly_better, pareto
from forgetless.report.evidence import Evidence, Task
from forgetless.report.intervals import Estimate

NOT_MEASURED = "–"


@dataclass(frozen=True)
class Standing:
    """Who stands where, each arm at its best learning rate, on the first task of either kind.

    Attributes:
        placed: arms measured on every task that the study compares.
        idle: arms whose learning cannot be told apart from the base's score.
        keepers: the arm that kept most among those that learned, then those not told apart.
        learners: the arm that learned most, then those not told apart.
        front: arms with a setting that no other setting beats on both, by rising share kept.
        front_settings: those settings, in the same order.
        beaten: (arm, by which): clearly worse on one axis and no better on the other.
    """

    learning: Task | None
    forgetting: Task | None
    placed: tuple[Arm, ...]
    idle: tuple[Arm, ...] = ()
    keepers: tuple[Arm, ...] = ()
    learners: tuple[Arm, ...] = ()
    front: tuple[Arm, ...] = ()
    front_settings: tuple[Setting, ...] = ()
    beaten: tuple[tuple[Arm, Arm], ...] = ()


@dataclass(frozen=True)
class Answer:
    """The headline, what follows from the numbers, and how far they carry."""

    title: str
    sentences: tuple[str, ...]
    caveats: tuple[str, ...]


# ------------------------------------------------------------------------------------- standing


def standing(evidence: Evidence, arms: Sequence[Arm]) -> Standing:
    """The standing of the arms; empty positions where a kind of task was not measured."""
    learning, forgetting = evidence.first("learning"), evidence.first("forgetting")
    placed = tuple(arm for arm in arms if _has(arm, learning, forgetting))
    if not placed:
        return Standing(learning, forgetting, ())
    idle = tuple(arm for arm in placed if learning and not _learned(arm, learning))
    awake = [arm for arm in placed if arm not in idle] or list(placed)
    front = _front(arms, forgetting, learning)
    return Standing(
        learning,
        forgetting,
        placed,
        idle,
        _leaders(forgetting, awake, lambda arm: arm.best.kept(forgetting)),
        _leaders(learning, placed, lambda arm: arm.best.final(learning)),
        tuple({id(arm): arm for arm, _ in front}.values()),
        tuple(setting for _, setting in front),
        _beaten(placed, forgetting, learning),
    )


def _has(arm: Arm, learning: Task | None, forgetting: Task | None) -> bool:
    learned = learning is None or arm.best.final(learning) is not None
    kept = forgetting is None or arm.best.kept(forgetting) is not None
    return learned and kept and (learning is not None or forgetting is not None)


def _learned(arm: Arm, learning: Task) -> bool:
    base, final = arm.best.measured[learning.name].base, arm.best.final(learning)
    return base is None or (final is not None and clearly_better(learning, final, base))


def _leaders(
    task: Task | None, arms: Sequence[Arm], estimate: Callable[[Arm], Estimate | None]
) -> tuple[Arm, ...]:
    """The best arm, then those whose interval overlaps its interval."""
    found = [(arm, value) for arm in arms if (value := estimate(arm)) is not None]
    if task is None or not found:
        return ()
    best = best_of(task, [value for _, value in found])
    leader, top = found[best]
    return (leader, *(arm for arm, value in found if arm is not leader and value.overlaps(top)))


def _front(
    arms: Sequence[Arm], forgetting: Task | None, learning: Task | None
) -> list[tuple[Arm, Setting]]:
    if forgetting is None or learning is None:
        return []
    owners, points = [], []
    for arm in arms:
        for setting in arm.settings:
            kept, learned = setting.kept(forgetting), setting.final(learning)
            if kept is not None and learned is not None:
                owners.append((arm, setting))
                points.append((kept, learned))
    return [owners[i] for i in pareto(points, forgetting, learning)]


def _beaten(
    placed: Sequence[Arm], forgetting: Task | None, learning: Task | None
) -> tuple[tuple[Arm, Arm], ...]:
    if forgetting is None or learning is None:
        return ()
    pairs = []
    for arm in placed:
        over = [rival for rival in placed if _beats(rival, arm, forgetting, learning)]
        if over:
            pairs.append((arm, over[0]))
    return tuple(pairs)


def _beats(one: Arm, other: Arm, forgetting: Task, learning: Task) -> bool:
    """Clearly better on one axis, and not worse on the other by its value."""
    clear, worse = False, False
    for task, pair in (
        (forgetting, (one.best.kept(forgetting), other.best.kept(forgetting))),
        (learning, (one.best.final(learning), other.best.final(learning))),
    ):
        own, rival = pair
        if own is None or rival is None:
            return False
        clear = clear or clearly_better(task, own, rival)
        worse = worse or (best_of(task, [rival, own]) == 0 and rival.value != own.value)
    return clear and not worse


# ---------------------------------------------------------------------------------------- words


def answer(evidence: Evidence, arms: Sequence[Arm], place: Standing) -> Answer:
    """The answer to the question of the study, with the caveats that belong to it."""
    caveats = tuple(_caveats(evidence, arms, place))
    if not place.placed:
        return Answer(*_nothing(evidence, arms, place), caveats)
    if len(place.placed) == 1:
        return Answer(_one_arm(place), tuple(_about(place)), caveats)
    if place.learning is None or place.forgetting is None:
        return Answer(_one_side(place), tuple(_about(place)), caveats)
    title = _most_kept(place, place.forgetting, place.learning)
    cost = _most_learned(place, place.forgetting, place.learning)
    return Answer(title, (*cost, *_compared(place), *_about(place)), caveats)


def amount(task: Task, value: float) -> str:
    """A score as people read it: a share as per cent, anything else to three decimals."""
    if task.is_share:
        return percent(value)
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def percent(share: float) -> str:
    """A share as per cent with one decimal."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def named(arms: Iterable[Arm]) -> str:
    """`a`, `b` and `c`."""
    return listed([f"`{arm.label}`" for arm in arms])


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def kept_words(task: Task, *arms: Arm) -> str:
    """How much these arms kept: shares of the base's score, or the scores themselves."""
    unit = "of what the base knew" if task.is_share else f"{task.metric} on {task.name}"
    return f"{_amounts(task, [arm.best.kept(task) for arm in arms])} {unit}"


def learned_words(task: Task, *arms: Arm) -> str:
    """What these arms reached on the new task."""
    unit = f"on {task.name}" if task.is_share else f"{task.metric} on {task.name}"
    return f"{_amounts(task, [arm.best.final(task) for arm in arms])} {unit}"


def _amounts(task: Task, estimates: Sequence[Estimate | None]) -> str:
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
    parts = [f"{_count(failed, 'run')} failed"] if failed else []
    parts += [f"{_count(left, 'run')} not finished"] if left else []
    state = f" ({', '.join(parts)})" if parts else ""
    return "Nothing has been measured yet.", (f"No finished run has a score{state}.",)


def _one_arm(place: Standing) -> str:
    arm, parts = place.placed[0], []
    if place.forgetting:
        parts.append(f"kept {kept_words(place.forgetting, arm)}")
    if place.learning:
        parts.append(f"reached {learned_words(place.learning, arm)}{_from_base(arm, place.learning)}")
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


def _most_kept(place: Standing, forgetting: Task, learning: Task) -> str:
    leader, *tied = place.keepers
    if len(place.idle) == len(place.placed):
        return "No arm learned anything that can be told apart from the base."
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


def _most_learned(place: Standing, forgetting: Task, learning: Task) -> list[str]:
    leader, *tied = place.learners
    sentences = []
    if place.keepers[:1] != place.learners[:1]:
        sentences.append(
            f"`{leader.label}` learned the most, {learned_words(learning, leader)}"
            f"{_from_base(leader, learning)}, {_cost(leader, forgetting)}."
        )
    if tied:
        best, *equal = _leaders(forgetting, place.learners, lambda arm: arm.best.kept(forgetting))
        also = f", not distinguishable from {named(equal)}" if equal else ""
        sentences.append(
            f"In learning, {named(tied)} {_is(tied)} not distinguishable from `{leader.label}`; "
            f"of these, `{best.label}` kept the most ({kept_words(forgetting, best)}){also}."
        )
    return sentences


def _cost(arm: Arm, forgetting: Task) -> str:
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
            f"On the Pareto front, where nothing else is better on both: "
            f"{named(place.front)}."
        )
    if place.beaten:
        pairs = ", ".join(f"`{arm.label}` (by `{by.label}`)" for arm, by in place.beaten)
        sentences.append(f"Clearly beaten on one side and no better on the other: {pairs}.")
    if place.idle and len(place.idle) < len(place.placed):
        sentences.append(
            f"{named(place.idle)} learned nothing that can be told apart from the base, "
            f"so what {'it' if len(place.idle) == 1 else 'they'} kept is not counted as a win."
        )
    return sentences


def _about(place: Standing) -> list[str]:
    """What the two words of the headline were measured by."""
    sentences = []
    if place.forgetting:
        base = place.placed[0].best.measured[place.forgetting.name].base
        if place.forgetting.is_share and base:
            sentences.append(
                f"Kept is measured by {place.forgetting.name}: the {place.forgetting.metric} after "
                f"training as a share of the base’s {percent(base.value)}."
            )
    else:
        sentences.append("No forgetting task was measured, so nothing is known of what was lost.")
    if place.learning is None:
        sentences.append("No learning task was measured, so nothing is known of what was learned.")
    return sentences


def _from_base(arm: Arm, task: Task) -> str:
    base = arm.best.measured[task.name].base
    return f" (base {amount(task, base.value)})" if base else ""


# -------------------------------------------------------------------------------------- caveats


def _caveats(evidence: Evidence, arms: Sequence[Arm], place: Standing) -> Iterable[str]:
    if place.placed:
        yield from _about_seeds(place.placed)
    if len(place.placed) > 1:
        yield (
            "“Not distinguishable” means that two 95 % intervals overlap, a cautious rule: two "
            "arms called so may still differ by a little."
        )
        yield _about_rates(arms)
    more = [task.name for task in evidence.tasks if task not in (place.learning, place.forgetting)]
    if place.placed and more:
        yield f"The words above are about the first task of either kind; also measured: {', '.join(more)}."
    yield from _about_gaps(evidence, arms, place)


def _about_seeds(placed: Sequence[Arm]) -> Iterable[str]:
    counts = sorted({len(arm.best.runs) for arm in placed})
    if counts == [1]:
        yield (
            "One seed an arm: the intervals (95 %) show the noise of the questions asked, not how "
            "another seed would have turned out. Do not rank arms on small differences."
        )
        return
    told = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    yield (
        f"{told} seeds an arm; intervals are 95 %, Student’s t over the seeds"
        f"{', and over the questions where there is one seed' if counts[0] == 1 else ''}."
    )


def _about_rates(arms: Sequence[Arm]) -> str:
    tried = [len(arm.settings) for arm in arms]
    if max(tried) == 1:
        return "Each arm ran at one learning rate; at another the order may differ."
    return (
        "Each arm stands at the learning rate with its best learning score, of "
        f"{min(tried)}{f' to {max(tried)}' if max(tried) > min(tried) else ''} tried; it was chosen "
        "by the scores shown, which flatters every arm a little."
    )


def _about_gaps(evidence: Evidence, arms: Sequence[Arm], place: Standing) -> Iterable[str]:
    failed = evidence.with_status("failed")
    if failed:
        yield f"{_count(len(failed), 'run')} of {len(evidence.runs)} failed and {_is(failed)} left out."
    left = len(evidence.runs) - len(failed) - len(evidence.with_status("done"))
    if left:
        yield f"{_count(left, 'run')} of {len(evidence.runs)} {'is' if left == 1 else 'are'} not finished."
    missing = [arm for arm in arms if arm not in place.placed]
    if missing and place.placed:
        yield f"{named(missing)} {_is(missing)} not compared: a task was not measured there."
    moved = [arm for arm in arms if _starts_elsewhere(arm)]
    if moved:
        yield f"{named(moved)} did not start at the base: the scores at step 0 differ from the base’s."


def _starts_elsewhere(arm: Arm) -> bool:
    return any(
        measured.base and measured.step0 and measured.base.value != measured.step0.value
        for measured in arm.best.measured.values()
    )


def _is(things: Sequence[object]) -> str:
    return "is" if len(things) == 1 else "are"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
