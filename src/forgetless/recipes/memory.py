"""What a run takes in memory, from a recipe's settings and the shapes of its base alone.

A training step is run on tensors that have shapes and no content (`FakeTensorMode`), and every
storage that is alive is counted. So activations, logits and their gradients are those of the
model's own code, for any architecture, and nothing large is ever held.

Only tensors are counted. A process holds more: the interpreter with its libraries, and what the
allocator keeps of memory that was freed.
"""

import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.anchored import Anchor
from forgetless.adapters.layer import Start, StartConfig, adapted_layers, install
from forgetless.adapters.settings import AdapterSettings
from forgetless.adapters.tuner import add_adapter
from forgetless.data.texts import SELF, cached_bytes, sampled_together
from forgetless.methods import find
from forgetless.methods.table import entries
from forgetless.models.quantised import Format, bytes_as_loaded, packed_layers
from forgetless.models.state import checkpoint_activations
from forgetless.models.targets import find_targets, target_layers
from forgetless.models.weights import weight_shape
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.own_text import spread
from forgetless.statistics.passes import matrix_bytes, parse_budget
from forgetless.training.optimizers import OPTIMIZERS
from forgetless.training.settings import TrainingSettings

START_MATRICES = 7
"""Float64 matrices, of the widest input squared, that the start of one layer holds at a time."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a training step, by part.

    Attributes:
        weights: of the base model.
        adapter: trained matrices, frozen ones, and the start that they move away from.
        gradients: of what is trained.
        optimizer: its state.
        activations: what is alive besides at the peak, logits included. Where no gradient is kept
            from one batch to the next, those of the weights are not there yet when the forward
            pass ends, and the peak is less than the two together: that much is taken off here.
        trained: how many numbers are trained.
        operations: floating-point operations of the matrix products of a batch, forward and
            backward.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    trained: int
    operations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class RunMemory:
    """Bytes at the peak of each stage of a run that holds a model.

    Attributes:
        statistics: collecting the activations of the text to keep; 0 where neither the method nor
            a repair needs them.
        start: computing the adapter's start; 0 where there is no adapter.
        step: training.
        matrices: float64 matrices that the statistics hold at a time, a part of `statistics`.
    """

    statistics: int
    start: int
    step: StepMemory
    matrices: int

    @property
    def peak(self) -> int:
        """The most of them."""
        return max(self.statistics, self.start, self.step.total)


def around_step(model: Any, recipe: Recipe, step: StepMemory) -> RunMemory:
    """The memory of a run whose training step is known; measuring and penalties are left out.

    The base is on the meta device, in the number format that the recipe loads it in.
    """
    method, adapter, needs = find(recipe.adapter.method), recipe.adapter, statistics_needs(recipe)
    if method.factors is None:
        return RunMemory(0, 0, step, 0)
    start = step.weights + step.adapter
    if not needs:
        return RunMemory(0, start, step, 0)
    layers = target_layers(model, adapter.target_modules)
    squares = {name: (weight_shape(layer)[1],) * 2 for name, layer in layers.items()}
    matrices = max(sum(statistics_matrices(model, adapter, need)) for need in needs)
    if recipe.calibration.memory_budget is not None:
        matrices = min(matrices, parse_budget(recipe.calibration.memory_budget, squares))
    return RunMemory(
        statistics=_statistics(model, recipe, matrices),
        start=start + (START_MATRICES * matrix_bytes(max(squares.values())) if method.needs else 0),
        step=step,
        matrices=matrices,
    )


# ---- a training step -----------------------------------------------------------------------------


def step_memory(
    model: Any,
    adapter: AdapterSettings,
    training: TrainingSettings,
    *,
    length: int,
    masked: bool = False,
    quantise: Format | None = None,
) -> StepMemory:
    """The memory of a training step on batches of `training.batch_size` x `length` tokens.

    Args:
        model: a causal language model, on the meta device or not; it gets adapters of its own, so
            give one that is not needed otherwise. Its number format is that of the base.
        adapter: what is trained; method `full` for the weights themselves.
        training: how.
        length: tokens of each row.
        masked: whether attention gets a mask of tokens by tokens, as between packed sequences.
        quantise: what the base's layers are packed in. The largest of them, unpacked, is then
            counted among the activations.
    """
    plain, weights = bytes_as_loaded(model), bytes_as_loaded(model, quantise)
    unpacked = _largest_unpacked(model, quantise)
    if training.gradient_checkpointing:
        checkpoint_activations(model)
    if find(adapter.method).factors is not None:
        model = _adapted(model, adapter)
        if training.gradient_checkpointing:
            model.enable_input_require_grads()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = _bytes(trained)
    # Moments have the number format of their weights, unless they have 8 bits.
    kind = OPTIMIZERS[training.optimizer]
    moments = sum(w.numel() * (4 if kind.in_8_bits else w.element_size()) for w in trained)
    accumulates = training.gradient_accumulation > 1
    most, operations = _most_alive(
        _Step(model.train()),
        torch.Size((training.batch_size, length)),
        bf16=training.precision == "bf16",
        gradients=accumulates,
        masked=masked,
    )
    return StepMemory(
        weights=weights,
        adapter=bytes_as_loaded(model) - plain,
        gradients=gradients,
        optimizer=moments * kind.state_bytes // 4,
        activations=unpacked + (most if accumulates else max(0, most - gradients)),
        trained=sum(weight.numel() for weight in trained),
        operations=operations,
    )


def _largest_unpacked(model: Any, quantise: Format | None) -> int:
    """Bytes of the largest packed weight as it is computed with, forwards and backwards."""
    if quantise is None:
        return 0
    return max(_bytes([layer.weight]) for _, layer in packed_layers(model))


def _adapted(model: nn.Module, settings: AdapterSettings) -> Any:
    """The model with an adapter of the right shapes, whose values mean nothing."""
    method, targets = find(settings.method), find_targets(model, settings.target_modules)
    start = Start(settings.method, method.trains, anchored=settings.method in _anchored_methods())
    config = StartConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets.given,
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in targets.layers.values()),
        task_type=TaskType.CAUSAL_LM,
        start=asdict(start),
    )
    adapted = add_adapter(model, config, "default")
    for module in adapted_layers(adapted).values():
        A, B = (getattr(module, f"lora_{name}")["default"].weight.data for name in ("A", "B"))
        anchor = Anchor(A.clone(), B.clone()) if start.anchored else None
        install(module, "default", start, A, B, anchor)
    return adapted


@cache
def _anchored_methods() -> frozenset[str]:
    """Methods whose start is kept beside what is trained, and doubles the rank of the export."""
    return frozenset(entry.name for entry in entries() if entry.export_rank == "2r")


class _Step(nn.Module):
    """Forward and backward in one call, since checkpointing calls the layers in both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, **more: Any) -> None:
        found = self.model(input_ids=tokens, labels=tokens, use_cache=False, **more)
        if torch.is_autocast_enabled("cpu"):
            found.logits = found.logits.float()  # so does accelerate
        loss = found.loss
        del found
        loss.backward()


# ---- statistics ----------------------------------------------------------------------------------


def statistics_needs(recipe: Recipe) -> set[str]:
    """What is collected on texts in a run, for the start and for a repair."""
    repair = {"second_moment", "task_moment"} if recipe.repair is not None else set()
    return {*find(recipe.adapter.method).needs, *repair}


def statistics_matrices(model: nn.Module, adapter: AdapterSettings, need: str) -> list[int]:
    """Bytes of the float64 matrices that one need of the method comes to.

    Layers of a block that get the same input share a matrix, which only a run of the model can
    tell; here those do that are called q, k and v, or gate and up, as in most models.
    """
    shapes, seen = [], set()
    for name, layer in target_layers(model, adapter.target_modules).items():
        out_features, in_features = weight_shape(layer)
        block, _, ending = name.rpartition(".")
        shared = next((group for group in _SAME_INPUT if ending in group), None)
        if need == "gradient":
            shapes.append((out_features, in_features))
        elif (block, shared) not in seen or shared is None:
            shapes.append((in_features, in_features))
            seen.add((block, shared))
    return [matrix_bytes(shape) for shape in shapes]


_SAME_INPUT = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"gate_proj", "up_proj"}),
)


def _statistics(model: Any, recipe: Recipe, matrices: int) -> int:
    """The most of: sampling text from the base, a whole forward pass, a pass with the matrices."""
    settings, weights = recipe.calibration, bytes_as_loaded(model, recipe.quantise)
    weights += _largest_unpacked(model, recipe.quantise)
    shape = torch.Size((settings.batch_size, settings.max_length))
    whole, _ = _most_alive(_Forward(model), shape)
    inner, _ = _most_alive(_Forward(model.base_model), shape)
    sampling = probed = 0
    keeps = "second_moment" in find(recipe.adapter.method).needs
    kept = [source for source, _ in settings.sources] if keeps else []
    kept += [recipe.text_to_keep] if recipe.repair is not None else []
    if SELF in kept:
        together = sampled_together(model, settings.max_length)
        if settings.samples != "auto":
            together = min(settings.samples, together)
        else:  # the matrices by which enough is told are those of two halves
            names = list(spread(target_layers(model, recipe.adapter.target_modules)))
            few = recipe.adapter.model_copy(update={"target_modules": names})
            probed = 2 * sum(statistics_matrices(model, few, "second_moment"))
        sampling = cached_bytes(model) * settings.max_length * together
    return int(weights) + max(whole, inner + matrices, max(inner, sampling) + probed)


class _Forward(nn.Module):
    """A forward pass without gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> None:
        with torch.no_grad():
            self.model(input_ids=tokens, use_cache=False)


# ---- counting ------------------------------------------------------------------------------------


def _most_alive(
    work: nn.Module,
    shape: torch.Size,
    *,
    bf16: bool = False,
    gradients: bool = False,
    masked: bool = False,
) -> tuple[int, int]:
    """Most bytes alive at once while `work` runs on tokens (batch, tokens), its weights aside; and
    the floating-point operations of its matrix products.

    Where `gradients` of the weights are there before, these are not counted either. A mask is
    (batch, 1, tokens, tokens).
    """
    with FakeTensorMode():
        content = {name: _fake(p, p.requires_grad) for name, p in work.named_parameters()}
        content |= {name: _fake(b, False) for name, b in work.named_buffers()}
        for weight in content.values():
            if gradients and weight.requires_grad:
                weight.grad = torch.empty_like(weight)
        tokens = torch.zeros(shape, dtype=torch.long)
        more = {}
        if masked:
            more["attention_mask"] = torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool)
        there = [*content.values(), *(w.grad for w in content.values() if w.grad is not None)]
        with _Alive(there) as alive, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            functional_call(work, content, (tokens,), more)
    return alive.most, alive.operations


def _fake(like: Tensor, trained: bool) -> Tensor:
    """A weight of that shape without content, where the CPU would hold it."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu").requires_grad_(trained)


_GROUPED = torch.ops.aten._grouped_mm.default
"""The products of a mixture of experts."""


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage, from when it is made to when it is freed, and operations.

    What is there `before` is not counted, and neither are views of it. Operations are those of
    matrix products: `FlopCounterMode` counts the same ones, and keeps tensors alive for it.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self.operations: int = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _GROUPED:  # without content it is defined in bfloat16 alone
            half = (tensor.bfloat16() for tensor in args[:2])
            result = func(*half, *args[2:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        if (product := getattr(func, "_overloadpacket", None)) in flop_registry:
            self.operations += flop_registry[product](*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
