"""Who kept most, who learned most, who is on the front: as `seeds.rank` tells them apart."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forgetless.core.metrics import pareto_front
from forgetless.reports.arms import Arm, Setting
from forgetless.reports.evidence import Evidence, TaskInfo
from forgetless.scores.files import Phase
from forgetless.scores.seeds import Ranking, Sample, improved, rank


@dataclass(frozen=True)
class Standing:
    """Who stands where, each arm at its best learning rate, on the first task of either kind.

    Attributes:
        placed: arms measured on every task that the study compares.
        learned: how the placed arms rank in learning.
        kept: how they rank in keeping.
        idle: arms whose learning cannot be told apart from the base's score.
        front: arms with a setting that no other setting beats on both, by rising share kept.
        front_settings: those settings, in the same order.
    """

    learning: TaskInfo | None
    forgetting: TaskInfo | None
    placed: tuple[Arm, ...]
    learned: Ranking
    kept: Ranking
    idle: tuple[Arm, ...] = ()
    front: tuple[Arm, ...] = ()
    front_settings: tuple[Setting, ...] = ()

    @property
    def none_learned(self) -> bool:
        """Whether every arm is idle, so that none learned or kept most of anything."""
        return len(self.idle) == len(self.placed) > 0

    @property
    def learners(self) -> tuple[Arm, ...]:
        """The arm that learned most, then those not told apart."""
        return tuple(self.placed[i] for i in self.learned.leaders())

    @property
    def keepers(self) -> tuple[Arm, ...]:
        """The arm that kept most among those that learned, then those not told apart."""
        awake = [arm for arm in self.placed if arm not in self.idle]
        return self.keepers_of(awake or self.placed)

    def keepers_of(self, arms: Iterable[Arm]) -> tuple[Arm, ...]:
        """Of these arms the one that kept most, then those not told apart from it."""
        places = [self.placed.index(arm) for arm in arms]
        return tuple(self.placed[i] for i in self.kept.leaders(places))

    @property
    def beaten(self) -> list[tuple[Arm, Arm]]:
        """(arm, by which): clearly worse on one axis and no better on the other."""
        axes = (self.kept, self.learned)
        found: dict[int, int] = {}
        for i, j in sorted(self.kept.better | self.learned.better):
            values = [(axis.values[i], axis.values[j]) for axis in axes]
            if all(one is not None and other is not None and one >= other for one, other in values):
                found.setdefault(j, i)
        return [(self.placed[j], self.placed[found[j]]) for j in sorted(found)]


def standing(evidence: Evidence, arms: Sequence[Arm]) -> Standing:
    """The standing of the arms; empty positions where a kind of task was not measured."""
    learning, forgetting = evidence.first("learning"), evidence.first("forgetting")
    placed = tuple(
        arm
        for arm in arms
        if (learning or forgetting)
        and (learning is None or arm.best.final(learning))
        and (forgetting is None or arm.best.kept(forgetting))
    )
    if not placed:
        return Standing(learning, forgetting, (), Ranking(()), Ranking(()))
    places = [arm.best.place(learning, forgetting) for arm in placed]
    of_learning, of_keeping = rank(
        ([learned for learned, _ in places], _samples(placed, learning, "final")),
        ([kept for _, kept in places], _samples(placed, forgetting, "final")),
    )
    finals, bases = (_samples(placed, learning, phase) for phase in ("final", "base"))
    base = next((sample for sample in bases if sample), None)
    better = improved([sample for sample in finals if sample], base) if base else ()
    owners, points = [], []
    for arm in arms:
        for setting in arm.settings:
            learned, kept = setting.place(learning, forgetting)
            if learned is not None and kept is not None:
                owners.append((arm, setting))
                points.append((kept, learned))
    front = [owners[i] for i in pareto_front(points)]
    return Standing(
        learning,
        forgetting,
        placed,
        of_learning,
        of_keeping,
        idle=tuple(arm for arm, is_better in zip(placed, better, strict=False) if not is_better),
        front=tuple({id(arm): arm for arm, _ in front}.values()),
        front_settings=tuple(setting for _, setting in front),
    )


def _samples(arms: Sequence[Arm], task: TaskInfo | None, phase: Phase) -> list[Sample | None]:
    return [arm.best.measured[task.name].samples.get(phase) if task else None for arm in arms]
