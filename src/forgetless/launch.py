"""What `accelerate launch` or torchrun told this process about the others; knows no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from forgetless.errors import UserError

if TYPE_CHECKING:
    from forgetless.recipe import TrainingSettings

Strategy = Literal["DDP", "FSDP2"]

_SHARDED_OPTIMIZERS = ("adamw", "lion", "sgd")
"""Those that treat every number of a weight alike, wherever the others are."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of one launch.

    Attributes:
        processes: how many there are; 1 without a launcher.
        index: which one this is, from 0.
        strategy: how they train together: each with the whole model and a part of every batch
            (DDP), or with a shard of the weights too (FSDP2). None for one process.
    """

    processes: int = 1
    index: int = 0
    strategy: Strategy | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        """The launch that environment variables describe.

        Raises:
            UserError: a kind of launch in which nothing here would train rightly.
        """
        processes = int(environment.get("WORLD_SIZE", "1"))
        if processes == 1 or "RANK" not in environment:
            return cls()
        if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
            raise UserError(
                "forgetless does not train under DeepSpeed; use DDP, or FSDP2, which shards the "
                "weights too (accelerate launch --use_fsdp --fsdp_version 2), or train by a script "
                "of your own with transformers.Trainer"
            )
        index = int(environment["RANK"])
        if not _is_on(environment, "ACCELERATE_USE_FSDP"):
            return cls(processes, index, "DDP")
        if environment.get("FSDP_VERSION", "1") != "2":
            raise UserError("only the second version of FSDP is supported; add --fsdp_version 2")
        if _is_on(environment, "FSDP_OFFLOAD_PARAMS"):
            raise UserError(
                "FSDP2 with weights on the CPU is not supported; turn offload_params off"
            )
        return cls(processes, index, "FSDP2")

    def obstacles(
        self, settings: TrainingSettings, *, penalties: bool, probes: bool
    ) -> Iterator[str]:
        """What of a training does not go with this launch, each with the way out.

        Args:
            settings: of the training.
            penalties: whether the loss has any.
            probes: whether the training is measured on its way.
        """
        if settings.batch_size % self.processes:
            yield (
                f"training.batch_size: {settings.batch_size} rows, which are those of all "
                f"processes together, cannot be shared equally by {self.processes}; take a multiple"
            )
        if self.strategy != "FSDP2":
            return
        for key, asked in (("penalties", penalties), ("probes", probes)):
            if asked:
                yield (
                    f"{key}: they need the whole model in every process, and FSDP2 spreads it; "
                    "train under DDP, or without them"
                )
        if settings.optimizer not in _SHARDED_OPTIMIZERS:
            yield (
                f"training.optimizer: {settings.optimizer!r} cannot work on shards (FSDP2); take "
                f"one of {', '.join(_SHARDED_OPTIMIZERS)}, or train under DDP"
            )
        if settings.compile:
            yield "training.compile: not together with FSDP2; turn it off, or train under DDP"


@cache
def this_launch() -> Launch:
    """The launch of this process, as it was when first asked for."""
    return Launch.of(os.environ)


def process_index() -> int:
    """Which process of its launch this is, whatever else is wrong with the launch."""
    return int(os.environ.get("RANK", "0"))


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")
