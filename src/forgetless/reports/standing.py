"""Who kept most, who learned most, who is on the front: with intervals, not by a hair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forgetless.reports.arms import Arm, Setting, best_of, clearly_better, pareto
from forgetless.reports.evidence import Evidence, Task
from forgetless.scores.seeds import Estimate


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

    @property
    def none_learned(self) -> bool:
        """Whether every arm is idle, so that none learned or kept most of anything."""
        return len(self.idle) == len(self.placed) > 0


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
        leaders(forgetting, awake, lambda arm: arm.best.kept(forgetting)),
        leaders(learning, placed, lambda arm: arm.best.final(learning)),
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


def leaders(
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
