"""Collecting statistics: which layers, in how many passes, and what to warn of."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from operator import length_hint
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from forgetless.core.errors import UserError
from forgetless.core.processes import Processes
from forgetless.core.progress import counted
from forgetless.models.state import as_base, as_trained
from forgetless.models.targets import target_layers
from forgetless.models.weights import weight_shape
from forgetless.statistics.checkpoint import Checkpoint, model_identity
from forgetless.statistics.collector import Batch, Collector
from forgetless.statistics.moments import Spilled, Statistics
from forgetless.statistics.padding import device_and_dtype
from forgetless.statistics.passes import parse_budget, passes
from forgetless.statistics.refusals import refuse_sharded, refuse_shared_out
from forgetless.statistics.stack import Leg, Relay, Stack, legs


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: str | Sequence[str] = "all-linear",
    memory_budget: int | str | None = None,
    *,
    skip_first: int = 0,
    checkpoint: str | Path | None = None,
    adapters_on: bool = False,
) -> Statistics:
    """Second moments of the inputs of every target layer, over all tokens that are not padding.

    Which rows of an input count:

    - inputs (batch, tokens, in), or the same flattened to (batch * tokens, in): those where
      `attention_mask` is 1. Without a mask (text of equal length, image patches) all of them.
    - in the decoder of an encoder-decoder: those where `decoder_attention_mask` is 1, without one
      those whose label is not -100; cross-attention's keys and values follow the encoder's mask.
    - pooled inputs (batch, in): one row a sequence.

    Batch size, padding side and the numbers of passes and processes do not change the result
    beyond the rounding of the model's own forward: 1e-12 relative in float64, about 1e-6 in
    float32. Where `torch.distributed` runs (`accelerate launch`, torchrun), every process passes
    the same batches and an unwrapped model, runs its share, and returns the same statistics.

    Args:
        model: any transformers model. It is left as it was found. Of a PeftModel the base is
            measured, adapters off, unless `adapters_on`.
        batches: keyword arguments of the model's forward. Left padding is moved to the right, so
            that every token has the position it has without padding. Arguments that the forward
            does not know are dropped, `labels` too unless the model is an encoder-decoder.
        target_modules: as in `target_layers`.
        memory_budget: bytes, or text such as "2GiB", for the matrices held at a time. The model
            then runs in several passes, each with as many layers as fit; a pass goes on from the
            hidden states that the one before kept on disk, or from the first block where a model
            does not allow that. Finished matrices wait on disk too (in the system's temporary
            folder). None holds all of them and needs one pass.
        skip_first: so many tokens at the beginning of every sequence are left out. The first one
            or few are attention sinks in many models: activations hundreds of times larger than
            the rest that hardly depend on the text.
        checkpoint: a folder for what is done so far, written once a minute. A later call with the
            same model, batches and options goes on from there to the same result, which reads
            its matrices from the folder; delete it once the statistics are saved.
        adapters_on: measure what reaches the layers of the trained model. `repair` wants that of
            the new task's text; every start wants the base.

    Returns:
        One entry a layer that was called. Warns of layers that never were, and of layers that
        saw fewer tokens than they have inputs.

    Raises:
        UserError: no batches or only padding, a budget too small for the largest layer, merged
            adapters, NaN or infinity in the inputs of a layer, rows that cannot be matched to
            the mask, a model that is sharded or wrapped, or a checkpoint of something else.
    """
    if skip_first < 0:
        raise UserError(f"skip_first must be 0 or more, got {skip_first}")
    refuse_sharded(model)
    refuse_shared_out(batches)
    layers = target_layers(model, target_modules)
    sizes = {name: weight_shape(layer)[1] for name, layer in layers.items()}
    shapes = {name: (size, size) for name, size in sizes.items()}
    budget = None if memory_budget is None else parse_budget(memory_budget, shapes)
    processes = Processes.current()
    with as_trained(model) if adapters_on else as_base(model) as base:
        collector = Collector(base, layers, skip_first)
        if budget is None and checkpoint is None and processes.count == 1:
            collector.run(_checked(batches), layers)
            matrices: Mapping[str, Tensor] = dict(collector.take())
        else:
            folder = None if checkpoint is None else Path(checkpoint)
            matrices = _Passes(collector, batches, processes).run(shapes, budget, folder)
        dtype = device_and_dtype(base)[1]
    leader = {name: collector.leader[name] for name in layers if name in collector.leader}
    tokens = {n: collector.tokens[first] for n, first in leader.items() if first in matrices}
    if not tokens:
        raise UserError(
            "no token reached a target layer: the batches are all padding, or the model's forward "
            "calls none of the layers"
        )
    _warn_of_gaps(layers, sizes, tokens)
    metadata = {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": max(tokens.values()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if skip_first:
        metadata["skip_first"] = skip_first
    return Statistics.of(matrices, {name: leader[name] for name in tokens}, tokens, metadata)


def _checked(batches: Iterable[Batch]) -> Iterable[tuple[int, Batch]]:
    """The batches with their numbers; there must be one."""
    number = -1
    for number, batch in enumerate(counted(batches, "statistics", "batches")):
        yield number, batch
    if number < 0:
        raise UserError("there are no batches to collect statistics from")


class _Passes:
    """Several passes over the batches: under a budget, with a checkpoint, or in many processes."""

    def __init__(
        self, collector: Collector, batches: Iterable[Batch], processes: Processes
    ) -> None:
        self.collector = collector
        self.batches = list(batches) if iter(batches) is batches else batches
        self.processes = processes
        stack = Stack.find(collector.base, collector.layers)
        self.relay = None if stack is None else Relay(stack)
        self.checkpoint: Checkpoint | None = None

    def run(
        self, shapes: Mapping[str, tuple[int, int]], budget: int | None, checkpoint: Path | None
    ) -> Mapping[str, Tensor]:
        """The matrices by leader, all of them on disk."""
        self._learn()
        done = self._open(checkpoint)
        groups = [group for group in self.collector.groups() if group[0] not in done]
        planned = passes(groups, shapes, budget)
        stack = self.relay.stack if self.relay else None
        spilled = Spilled()
        for number, (names, leg) in enumerate(zip(planned, legs(stack, planned), strict=True), 1):
            several = f", pass {number} of {len(planned)}" if len(planned) > 1 else ""
            self.work = f"statistics{several}"
            with self.processes.failing_together():
                self._sum(names, leg)
            self.collector.add_up(names, self.processes)
            for name, matrix in self.collector.take():
                if self.checkpoint is None:
                    spilled.add(name, matrix)
                else:
                    self.checkpoint.add(name, matrix, self.collector.tokens[name])
            if self.checkpoint is not None:
                self.checkpoint.finish_pass()
        return spilled if self.checkpoint is None else self.checkpoint.finished

    def _learn(self) -> None:
        """Order and sharing of the layers, from the first batch of this process."""
        with self.processes.failing_together():
            first = next(self.processes.share(self.batches), None)
            if first is not None:
                with self.relay.learning(first[0]) if self.relay else nullcontext():
                    self.collector.learn(*first)
        if not any(self.processes.gather(first is not None)):
            raise UserError("there are no batches to collect statistics from")
        self.collector.adopt(self.processes.gather(self.collector.lessons)[0])

    def _open(self, checkpoint: Path | None) -> set[str]:
        """Read the checkpoint; the leaders whose matrices are finished in every process."""
        if checkpoint is None:
            return set()
        with self.processes.failing_together():
            collector = self.collector
            identity = {
                "model": model_identity(collector.base, collector.layers),
                "skip_first": collector.skip_first,
            }
            self.checkpoint = Checkpoint(checkpoint, identity, self.processes)
        assert self.checkpoint is not None
        mine = set(self.checkpoint.finished)
        done = set.intersection(*self.processes.gather(mine))
        self.checkpoint.forget(mine - done)
        self.collector.tokens.update(self.checkpoint.tokens)
        return done

    def _sum(self, names: list[str], leg: Leg) -> None:
        """Run the batches of this process through one leg, or through the whole model."""
        if self.relay is not None and self.relay.possible:
            try:
                with self.relay.running(leg) as begin:
                    self.collector.run(self._left(names), names, begin)
                return
            except Exception:
                # A model that cannot skip blocks may fail in any way. Any other failure comes
                # again below.
                if leg.first == 0:
                    raise
                self.relay.works = False
                self.collector.drop()
        self.collector.run(self._left(names), names)

    def _left(self, names: list[str]) -> Iterable[tuple[int, Batch]]:
        """The batches of this process that a pass has not seen yet."""
        number = length_hint(self.batches) // self.processes.count
        mine = counted(self.processes.share(self.batches), self.work, "batches", number)
        return (
            mine if self.checkpoint is None else self.checkpoint.follow(mine, self.collector, names)
        )


def _warn_of_gaps(
    layers: Iterable[str], sizes: Mapping[str, int], tokens: Mapping[str, int]
) -> None:
    unseen = [name for name in layers if name not in tokens]
    if unseen:
        warnings.warn(
            f"no input reached {len(unseen)} of the target layers, {unseen[0]!r} among them; they "
            "have no statistics",
            stacklevel=3,
        )
    few = [name for name, count in tokens.items() if count < sizes[name]]
    if few:
        warnings.warn(
            f"{len(few)} of {len(tokens)} layers saw fewer tokens than they have inputs "
            f"({few[0]!r}: {tokens[few[0]]} tokens, {sizes[few[0]]} inputs), so part of their null "
            "space is arbitrary; use more or longer samples",
            stacklevel=3,
        )
