"""Gradients of a text's loss with respect to the weights, exact and without a copy of the model."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetless.core.errors import UserError, reading
from forgetless.core.processes import Processes
from forgetless.core.progress import counted
from forgetless.data.losses import loss_of
from forgetless.models.state import as_base
from forgetless.models.targets import target_layers
from forgetless.models.weights import weight_shape
from forgetless.statistics.collector import Batch
from forgetless.statistics.files import FileFormat
from forgetless.statistics.moments import OnDisk, Spilled, shape_of
from forgetless.statistics.padding import device_and_dtype, prepare
from forgetless.statistics.passes import parse_budget, passes
from forgetless.statistics.refusals import refuse_sharded, refuse_shared_out

_FORMAT = FileFormat("gradients", version=1, make="forgetless.statistics.collect_gradients")
_IGNORED = -100


class Gradients(Mapping[str, Tensor]):
    """Layer name -> gradient of the loss with respect to its weight, (out, in).

    What was loaded, or collected under a memory budget, stays on disk until a layer is asked for.

    Attributes:
        metadata: the `loss` of the model on the text, `tokens` that were predicted, the `dtype` of
            the model, and the versions of `torch` and `transformers`.
    """

    def __init__(self, matrices: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        self._matrices = matrices
        self.metadata = dict(metadata)

    def __getitem__(self, layer: str) -> Tensor:
        return self._matrices[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def shape(self, layer: str) -> tuple[int, ...]:
        """(out, in) of one, without reading it."""
        return shape_of(self._matrices, layer)

    def __repr__(self) -> str:
        return f"<Gradients of {len(self)} layers, {self.metadata.get('tokens')} tokens>"

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; an older one is replaced in one step.

        Args:
            path: a file that ends in .safetensors, or a folder, which is made if need be and gets
                `gradients.safetensors`.

        Returns:
            The file.
        """
        return _FORMAT.write(path, self, metadata=json.dumps(self.metadata))

    @classmethod
    def load(cls, path: str | Path) -> Gradients:
        """What `save` wrote.

        Raises:
            UserError: there is no such file, or it does not hold gradients.
        """
        header, names = _FORMAT.header(path)
        file = _FORMAT.file(path)
        with reading(file, "make it again"):
            return cls(OnDisk(dict.fromkeys(names, file)), json.loads(header["metadata"]))


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: str | Sequence[str] = "all-linear",
    memory_budget: int | str | None = None,
) -> Gradients:
    """Gradient of the mean loss of all learned tokens, with respect to each target layer's weight.

        gradient = (sum over layer calls and tokens of dL/dy xᵀ) / (number of learned tokens)

    with L the summed cross-entropy, x a layer's input and y its output at one token, adapters and
    dropout off. So batches of any size give the same, up to the rounding of the model's own forward
    and backward. The base's weights, their `requires_grad` and `grad` are not touched, and they may
    be quantised, since no gradient of a weight is left to PyTorch. Products are of at least
    float32, sums of float64. Processes share the batches as in `collect`.

    Args:
        model: any transformers model that computes a loss from `labels`.
        batches: keyword arguments of the forward with `labels`, -100 where nothing is learned.
        target_modules: as in `target_layers`.
        memory_budget: bytes, or text such as "2GiB", for the sums held at a time (8 bytes a
            weight). The batches then run several times, and each backward ends at the first layer
            that it is for. Beside them a forward's activations are held, as in any training: make
            the batches small.

    Returns:
        One gradient a layer that was called, float32, or float64 for a float64 model.

    Raises:
        UserError: no batches, no labels, nothing to learn, a loss or a gradient that is NaN or
            infinite, a budget too small, or a model that is sharded, wrapped or merged.
    """
    refuse_sharded(model)
    refuse_shared_out(batches)
    layers = target_layers(model, target_modules)
    shapes = {name: weight_shape(layer) for name, layer in layers.items()}
    budget = None if memory_budget is None else parse_budget(memory_budget, shapes)
    planned = passes([[name] for name in layers], shapes, budget)
    if len(planned) > 1 and iter(batches) is batches:
        batches = list(batches)
    processes = Processes.current()
    with as_base(model) as base, torch.enable_grad():
        for weight in base.parameters():
            weight.requires_grad_(False)  # `as_base` restores it
        dtype = device_and_dtype(base)[1]
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        found: dict[str, Tensor] = {}
        spilled = Spilled()
        for names in planned:
            run = _Pass(base, {name: layers[name] for name in names}, shapes)
            with processes.failing_together():
                number = length_hint(batches) // processes.count
                run.over(counted(processes.share(batches), "gradients", "batches", number))
            run.add_up(processes)
            for name, gradient in run.means():
                if len(planned) == 1:
                    found[name] = gradient.to(kept)
                else:
                    spilled.add(name, gradient.to(kept))
    matrices: Mapping[str, Tensor] = found if len(planned) == 1 else spilled
    unseen = [name for name in layers if name not in matrices]
    if unseen:
        warnings.warn(
            f"the loss does not depend on {len(unseen)} of the target layers, {unseen[0]!r} among "
            "them; they have no gradient",
            stacklevel=2,
        )
    metadata = {
        "loss": run.total / run.tokens,
        "tokens": run.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Gradients(matrices, metadata)


class _Pass:
    """Sums of the gradients of some layers over the batches."""

    def __init__(
        self,
        base: nn.Module,
        layers: Mapping[str, nn.Module],
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        self.base, self.loss = base, loss_of(base)
        self.layers = layers
        self.shapes = shapes
        self.total = 0.0
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()

    def over(self, batches: Iterable[tuple[int, Batch]]) -> None:
        """Add the gradients of these batches' summed losses."""
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hook = self._layer_hook(name)
                hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            for number, batch in batches:
                self._one(number, batch)

    def add_up(self, processes: Processes) -> None:
        """Add up over all processes what they have."""
        parts = processes.gather((self.total, self.tokens, set(self.sums)))
        self.total, self.tokens = sum(part[0] for part in parts), sum(part[1] for part in parts)
        if not self.tokens:
            raise UserError("there is nothing to learn: no batches, or every label is -100")
        for name in [name for name in self.layers if any(name in part[2] for part in parts)]:
            self.sums[name] = processes.sum(self._sum(name, "cpu"))

    def means(self) -> Iterator[tuple[str, Tensor]]:
        """Each layer's gradient of the mean loss; the sum is let go."""
        for name in [name for name in self.layers if name in self.sums]:
            yield name, self.sums.pop(name).div_(self.tokens).cpu()

    def _one(self, number: int, batch: Batch) -> None:
        if "labels" not in batch:
            raise UserError(
                f"batch {number} has no 'labels', which the loss needs: the token ids where they "
                "are learned, -100 elsewhere"
            )
        arguments, _ = prepare(batch, self.base, set(), for_loss=True)
        learned = _learned(self.base, arguments["labels"])
        if not learned:
            return
        loss: Any = self.loss(self.base(**arguments), labels=arguments["labels"]) * learned
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(f"the loss of batch {number} is {value}; check the weights")
        if loss.requires_grad:
            loss.backward()
        self.total += value
        self.tokens += learned
        for name, total in self.sums.items():
            if not bool(total.sum().isfinite()):
                raise UserError(
                    f"the gradient of layer {name!r} holds NaN or infinity in batch {number}; use "
                    "float32 or bfloat16 instead of float16"
                )

    def _layer_hook(self, name: str) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
        ) -> Tensor | None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            version = x._version
            begins = not y.requires_grad
            if begins:  # the graph begins here: nothing before it is needed
                y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)

            def backward(gradient: Tensor) -> None:
                if x._version != version:
                    raise RuntimeError(
                        f"the input of layer {name!r} is changed in place after the layer ran, so "
                        "its gradient cannot be computed; leave it out of target_modules"
                    )
                self._add(name, gradient, x)

            y.register_hook(backward)  # type: ignore[no-untyped-call]
            return y if begins else None

        return hook

    @torch.no_grad()
    def _add(self, name: str, gradient: Tensor, x: Tensor) -> None:
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        g = gradient.reshape(-1, gradient.shape[-1]).to(precise)
        product = g.mT @ x.reshape(-1, x.shape[-1]).to(precise)
        if product.device.type == "mps":  # has no float64
            product = product.cpu()
        self._sum(name, product.device).add_(product)

    def _sum(self, name: str, device: torch.device | str) -> Tensor:
        """The sum of a layer's gradients so far; a matrix of zeros there where it has none yet."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(self.shapes[name], dtype=torch.float64, device=device)
        return self.sums[name]


def _learned(base: nn.Module, labels: Tensor) -> int:
    """Of how many tokens (or examples) the model's loss is the mean."""
    # transformers predicts the next token where a model's class name says nothing else.
    causal = isinstance(base, PreTrainedModel) and base.loss_type in (None, "ForCausalLM")
    if causal and labels.ndim == 2:
        labels = labels[:, 1:]
    return int((labels != _IGNORED).sum())
