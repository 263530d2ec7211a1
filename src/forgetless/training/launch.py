"""What `accelerate launch` or torchrun told this process about the others; knows no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from forgetless.core.errors import UserError
from forgetless.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from forgetless.training.settings import TrainingSettings

Strategy = Literal["DDP", "FSDP2", "ZeRO-1", "ZeRO-2"]


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of one launch.

    Attributes:
        processes: how many there are; 1 without a launcher.
        index: which one this is, from 0.
        strategy: how they train together: each with the whole model and a part of every batch
            (DDP), with a part of the optimiser's state too (ZeRO-1) and of the gradients (ZeRO-2),
            or with a shard of the weights (FSDP2). None for one process.
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
        index = int(environment["RANK"])
        if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
            return cls(processes, index, _zero_strategy(environment))
        if not _is_on(environment, "ACCELERATE_USE_FSDP"):
            return cls(processes, index, "DDP")
        if environment.get("FSDP_VERSION", "1") != "2":
            raise UserError("only the second version of FSDP is supported; add --fsdp_version 2")
        if _is_on(environment, "FSDP_OFFLOAD_PARAMS"):
            raise UserError(
                "FSDP2 with weights on the CPU is not supported; turn offload_params off"
            )
        return cls(processes, index, "FSDP2")

    @property
    def zero_stage(self) -> int | None:
        """Of DeepSpeed's ZeRO; None where it does not train."""
        stages: dict[Strategy | None, int] = {"ZeRO-1": 1, "ZeRO-2": 2}
        return stages.get(self.strategy)

    def obstacles(
        self, settings: TrainingSettings, *, penalties: bool, probes: bool
    ) -> Iterator[str]:
        """What of a training does not go with this launch, each with the way out."""
        if settings.batch_size % self.processes:
            yield (
                f"training.batch_size: {settings.batch_size} rows, which are those of all "
                f"processes together, cannot be shared equally by {self.processes}; take a multiple"
            )
        if self.strategy in (None, "DDP"):
            return
        if self.zero_stage and find_spec("deepspeed") is None:
            yield (
                f"{self.strategy} needs DeepSpeed, which is not installed: "
                "pip install 'forgetless[deepspeed]'"
            )
        for key, asked in (("penalties", penalties), ("probes", probes)):
            if asked and self.strategy == "FSDP2":
                yield (
                    f"{key}: they need the whole model in every process, and FSDP2 spreads it; "
                    "train under DDP, or without them"
                )
        if not OPTIMIZERS[settings.optimizer].by_entry:
            fit = ", ".join(name for name, kind in OPTIMIZERS.items() if kind.by_entry)
            yield (
                f"training.optimizer: {settings.optimizer!r} cannot work on shards "
                f"({self.strategy}); take one of {fit}, or train under DDP"
            )
        if settings.compile:
            yield (
                f"training.compile: not together with {self.strategy}; turn it off, or train under "
                "DDP"
            )


@cache
def this_launch() -> Launch:
    """The launch of this process, as it was when first asked for."""
    return Launch.of(os.environ)


def process_index() -> int:
    """Which process of its launch this is, whatever else is wrong with the launch."""
    return int(os.environ.get("RANK", "0"))


def _zero_strategy(environment: Mapping[str, str]) -> Strategy:
    if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise UserError(
            "a configuration file of DeepSpeed is not read, for the recipe says what it would; "
            "leave it out and give --zero_stage 1 or 2"
        )
    for kept in ("optimizer", "param"):
        name = f"ACCELERATE_DEEPSPEED_OFFLOAD_{kept.upper()}_DEVICE"
        if environment.get(name, "none") != "none":
            raise UserError(
                "DeepSpeed's ZeRO is supported without offloading; leave "
                f"--offload_{kept}_device out"
            )
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # accelerate's own default
    if stage == "1":
        return "ZeRO-1"
    if stage == "2":
        return "ZeRO-2"
    raise UserError(
        f"DeepSpeed's ZeRO is supported in the stages 1 and 2, not {stage}; give --zero_stage 2, "
        "or take FSDP2, which shards the weights too (accelerate launch --use_fsdp "
        "--fsdp_version 2)"
    )


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")
