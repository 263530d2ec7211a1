"""New heads of classifiers: classes that are learned, and the known ones untouched.

The last layer of a classifier, `own`, and the layer of the new classes, `new`, read the same
features. The model then gives the logits of both, (rows, own + new), the own ones first, and takes
as its loss - log p of a row's class under the head that has the class: a training on new classes
does not see the own head, and rows that are replayed do not see the new one. `learn_among` leaves
out classes of the new head that a training has nothing of. Beside a model that is saved its config
says how many classes are its own (`own_classes`); its weights then hold one last layer for both
heads, as transformers and PEFT read it.

A base that is an encoder alone has no own head (`own_classes` is 0). Its new head is all that its
architecture's classifier has beside the encoder, a layer before the last one too, and is trained
whole.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cache, wraps
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from forgetless.core.errors import UserError
from forgetless.models.origin import stored_config
from forgetless.models.weights import is_linear, linear_weight, weight_shape

_PEFTS = re.compile(r"\.(lora_\w+|modules_to_save)\.")
"""What PEFT puts beside a layer."""

_HEADED = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering)")
"""In the names of transformers' classes of a model with a head beside an encoder."""

_IGNORED = -100
"""The label of what is not learned."""


class Heads(nn.Module):
    """Two last layers on the same features.

    Attributes:
        own: the base's, frozen.
        new: of the new classes, of at least float32.
    """

    def __init__(self, own: nn.Module, new: nn.Module) -> None:
        super().__init__()
        self.own, self.new = own.requires_grad_(False), new

    def forward(self, features: Tensor, *args: Any) -> Tensor:
        """The logits of both, (..., own + new). Those of the own head are the base's, bit for bit,
        since no larger product is taken.
        """
        wide = features.to(next(self.new.parameters()).dtype)
        return torch.cat([self.own(features, *args), self.new(wide)], dim=-1)


def heads_of(model: Any) -> tuple[str, Heads] | None:
    """Name and module of a model's two heads, below an adapter too; None where it has but one."""
    for name, module in model.named_modules():
        if isinstance(module, Heads):
            return name.removeprefix("base_model.model."), module
    return None


def new_modules(model: Any) -> list[str]:
    """The modules of a model's new head, by name, below an adapter too; none where it has none.

    They are trained whole and not adapted. Without an own head they are all that the model has
    beside its largest part, the encoder.
    """
    if found := heads_of(model):
        return [f"{found[0]}.new"]
    if not is_without_own(base := _base_of(model)):
        return []
    sizes = {n: sum(w.numel() for w in part.parameters()) for n, part in base.named_children()}
    encoder = max(sizes, key=lambda name: sizes[name])
    return [name for name, size in sizes.items() if size and name != encoder]


def find_new_head(model: Any) -> None:
    """Say in a classifier's config that its head is new, where what it was loaded from has none.

    transformers draws a head that the stored weights lack, or have of another number of classes, at
    random: no adapter on it means anything anywhere else, and it is trained whole. A model whose
    origin is not known, or is not on this machine, is left as it is.
    """
    base = _base_of(model)
    config: Any = getattr(base, "config", None)
    kinds = {kind.__name__ for kind in type(base).__mro__}
    if hasattr(config, "own_classes") or not any(map(_HEADED.search, kinds)):
        return
    stored = stored_config(base)
    if stored is None:
        return
    made_as = set(stored.architectures or kinds)
    if not made_as & kinds or stored.num_labels != config.num_labels:
        name_classes(config, [], head_classes(config)[0])


def is_of_new_head(model: Any, weight: str) -> bool:
    """Whether a weight, by its name in the model or below an adapter, is the new head's."""
    name = weight.removeprefix("base_model.model.")
    return any(name.startswith(f"{part}.") for part in new_modules(model))


def _base_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_without_own(base: Any) -> bool:
    """Whether a model, without adapters, is an encoder whose head is all new."""
    return getattr(getattr(base, "config", None), "own_classes", None) == 0


def features(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """What a model makes of each row whatever its head, (rows, features).

    That is what its last layer reads; of a text encoder without an own head, whose layers before
    the last may be as new, `mean_states`.
    """
    base = _base_of(model)
    if "attention_mask" in batch and is_without_own(base):
        return mean_states(model, batch)
    found = heads_of(model)
    layer = base.get_submodule(found[0] if found else last_layer(base))
    hook = layer.register_forward_hook(lambda module, given, logits: given[0])
    try:
        read: Tensor = model(**batch).logits
        return read
    finally:
        hook.remove()


def mean_states(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean of an encoder's last hidden states over the tokens of each row, (rows, width)."""
    states: Tensor = _base_of(model).base_model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states)
    return (states * mask).sum(1) / mask.sum(1)


def head_classes(config: Any) -> tuple[list[str], list[str]]:
    """The names of the classes of the own head and of the new one, in the order of their logits."""
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    own = getattr(config, "own_classes", None)
    own = len(names) if own is None else own
    return names[:own], names[own:]


def own_logits(model: Any, logits: Tensor) -> Tensor:
    """Of a model's logits (..., classes) those of its own head.

    Raises:
        UserError: it has none.
    """
    if is_without_own(_base_of(model)):
        raise UserError("the base is an encoder without a head of its own, which could be compared")
    own = getattr(model.config, "own_classes", None)
    return logits if own is None else logits[..., :own]


@torch.no_grad()
def add_head(model: Any, classes: Sequence[str]) -> Any:
    """Give a classifier, in place, a new head for these classes; its own stays as it is.

    The new weights are small random numbers that are always the same, its biases zeros. A model,
    which may be on the meta device, that has these very classes already is left as it is.

    Raises:
        UserError: no classes or some twice, another new head, or a model without one last linear
            layer.
    """
    if not classes or len(set(classes)) != len(classes):
        raise UserError(f"a new head needs classes, each once, got {list(classes)!r}")
    known, new = head_classes(model.config)
    if new_modules(model):
        if list(classes) != new:
            raise UserError(
                f"the model has a new head already, for {new}, and these are {list(classes)}"
            )
        return model
    name = last_layer(model)
    own = model.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(classes), weight_shape(own)[1], generator=generator) * 0.02
    bias = None if getattr(own, "bias", None) is None else torch.zeros(len(classes))
    kept: Any = own.weight
    dtype = torch.promote_types(kept.dtype, torch.float32)  # also of a packed weight
    made = _linear(start, bias)
    _put(model, name, own, made.to("meta") if kept.is_meta else made.to(kept.device, dtype))
    model.config = name_classes(copy.deepcopy(model.config), known, classes)
    model.num_labels = model.config.num_labels
    return model


def learn_among(model: Any, classes: Sequence[str]) -> Any:
    """Let a row of one of these classes be learned against them alone, and not the whole new head.

    Rows of its other classes have the loss over the whole of it, as all rows have without this. It
    is for this model in memory: nothing of it is saved.
    """
    own, new = head_classes(model.config)
    if not isinstance(model, _WithHeads):  # without an own head the loss was transformers' own
        kind: Any = type(model)
        model.__class__ = _with_heads(kind)
    model.learned_among = [len(own) + new.index(name) for name in classes]
    return model


def name_classes(config: Any, own: Sequence[str], new: Sequence[str]) -> Any:
    """The config of a model, changed to that with these classes."""
    config.id2label = dict(enumerate([*own, *new]))
    config.label2id = {label: n for n, label in reversed(config.id2label.items())}
    config.own_classes = len(own)
    return config


@torch.no_grad()
def start_head(model: Any) -> Any:
    """Start the head of a model without an own one, in place, at what `add_head` starts at.

    Its weights are of at least float32, to which what it reads is converted.

    Raises:
        UserError: it has more than linear layers and norms.
    """
    generator = torch.Generator().manual_seed(0)
    for name in new_modules(model):
        part = model.get_submodule(name)
        for module in part.modules():
            if is_linear(module):
                start = torch.randn(module.weight.shape, generator=generator) * 0.02
                module.weight.copy_(start)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif next(module.parameters(recurse=False), None) is not None:
                raise UserError(
                    f"the head of {type(model).__name__} has a {type(module).__name__}, for which "
                    "there is no start; give a base with a trained head"
                )
        part.to(torch.promote_types(next(part.parameters()).dtype, torch.float32))
        part.register_forward_pre_hook(_widened)
    return model


def _widened(part: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(part.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in given)


@torch.no_grad()
def divided(model: Any) -> Any:
    """A model whose last layer was saved for both heads, in place with two; another as it is."""
    own = getattr(model.config, "own_classes", None)
    if own and heads_of(model) is None:
        name = last_layer(model)
        layer = model.get_submodule(name)
        bias = [None, None] if layer.bias is None else [layer.bias[:own], layer.bias[own:]]
        parts = [layer.weight[:own], layer.weight[own:]]
        _put(model, name, *(_linear(part, b) for part, b in zip(parts, bias, strict=True)))
    return model


@torch.no_grad()
def joined(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The tensors of a model with two heads, or of an adapter on it, with one last layer for both.

    It has the dtype of the new head, which holds the numbers of the own one too.
    """
    found, heads = dict(state), heads_of(model)
    if heads is None:
        return found
    name, own = heads[0], heads[1].own
    for key in state:
        before, is_new, part = key.partition(f"{name}.new.")
        if is_new:
            learned = found.pop(key)
            first: Any = linear_weight(own) if part == "weight" else own.bias
            found[f"{before}{name}.{part}"] = torch.cat([first.to(learned), learned])
            found.pop(f"{before}{name}.own.{part}", None)
    return found


def divided_state(
    state: Mapping[str, Tensor], name: str, new: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of the own head, and the tensors with the new head alone: what `joined` joined.

    The heads are called `name` in the model, and the new one has `new` classes; tensors of other
    names stay as they are.
    """
    own, found = {}, dict(state)
    for key in state:
        before, _, part = key.rpartition(f"{name}.")
        if part in ("weight", "bias") and (not before or before.endswith(".")):
            both = found.pop(key)
            own[part] = both[:-new]
            found[f"{before}{name}.new.{part}"] = both[-new:].clone()
    return own, found


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


def _put(model: Any, name: str, own: nn.Module, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Heads(own, new))
    kind: Any = type(model)
    model.__class__ = _with_heads(kind)


def last_layer(model: Any) -> str:
    """The name of the linear layer that a classifier ends in, without adapters.

    Raises:
        UserError: there are several, or none.
    """
    inner = f"{model.base_model_prefix}."
    wide = [
        name.removesuffix(".base_layer").removesuffix(".original_module")
        for name, module in model.named_modules()
        if is_linear(module)
        and weight_shape(module)[0] == model.config.num_labels
        and not _PEFTS.search(name)
    ]
    outside = [name for name in wide if not name.startswith(inner)] or wide[-1:]
    if len(outside) != 1:
        raise UserError(
            f"{type(model).__name__} has no single linear layer from which its "
            f"{model.config.num_labels} classes come ({', '.join(outside) or 'none fits'}), so no "
            "new head can be put beside it"
        )
    last: str = outside[0]
    return last


class _WithHeads:
    """What is other about a classifier with two heads."""

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, with one last layer for both heads; see `divided`.

        Weights that are to keep their names, as in a Trainer's checkpoint, stay apart.
        """
        if kwargs.get("save_original_format", True):
            kwargs["state_dict"] = joined(kwargs.get("state_dict") or self.state_dict(), self)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


@cache
def _with_heads(kind: Any) -> Any:
    """A model's class whose loss is that of the head which has a row's class."""

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        found = kind.forward(self, *args, **kwargs)
        if labels is None:
            return found
        among = getattr(self, "learned_among", [])
        loss = _loss(found.logits, labels.to(found.logits.device), self.config.own_classes, among)
        return type(found)(**{**found, "loss": loss})

    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": forward}
    return type(kind.__name__, (_WithHeads, kind), members)


def _loss(logits: Tensor, labels: Tensor, own: int, among: Sequence[int]) -> Tensor:
    """Mean of - log p of the labels (rows,), each under its own head; _IGNORED are left out.

    Labels of ``among``, of the new head, are told apart from these alone.
    """
    numbers = torch.arange(logits.shape[-1], device=logits.device)
    others = (numbers >= own) != (labels >= own)[:, None]
    if among:
        asked = torch.tensor(among, device=logits.device)
        others |= torch.isin(labels, asked)[:, None] & ~torch.isin(numbers, asked)
    under_its_own = logits.float().masked_fill(others, -torch.inf)
    return cross_entropy(under_its_own, labels, ignore_index=_IGNORED)
