"""`export`, `save` and `load`: an adapter as a folder of safetensors and JSON."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetless.adapters.anchored import Anchor
from forgetless.adapters.card import CARD_FILE, is_ours, write_export_card
from forgetless.adapters.layer import (
    ANCHORED_TYPE,
    PREFIX,
    Start,
    StartConfig,
    adapted_layers,
    install,
)
from forgetless.adapters.plain import PlainLora, lora_config, plain_lora
from forgetless.adapters.tuner import add_adapter, check_addable, take_off
from forgetless.core.errors import UserError, first_few, reading
from forgetless.core.files import json_checksum, new_file, new_folder, read_json, write_json
from forgetless.core.tensors import read_tensors, write_tensors
from forgetless.models.heads import (
    add_head,
    divided_state,
    find_new_head,
    head_classes,
    heads_of,
    joined,
    last_layer,
    name_classes,
    new_modules,
)
from forgetless.models.hub import HubName, folder_of
from forgetless.models.load import config_of, head_of, is_bare, meta_model
from forgetless.models.origin import stored_config
from forgetless.models.quantised import packing_of
from forgetless.models.state import base_modules, base_of, source_of, unwrapped
from forgetless.models.weights import is_linear, weight_shape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
START_FILE = "forgetless.json"
HEADS_FILE = "config.json"
"""The base's config with the classes of both heads, beside an adapter that has a new one."""

REPLICATES_LAYERS = (
    "is for a model of more layers, which its layer_replication makes of the base, so that with "
    "the adapter off it is another model"
)
"""What is said of such an adapter."""

_CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""What PEFT's `init_lora_weights` begins with where it subtracts the start from the base."""


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote.

    Attributes:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`, a plain PEFT LoRA.
        rank: rank of the exported adapter; the largest where layers differ.
        relative_error: ||exported - trained||_F / ||trained||_F over all layers, 0.0 when exact.
        layer_errors: the same for each layer.
    """

    folder: Path
    rank: int
    relative_error: float
    layer_errors: dict[str, float]

    @property
    def exact(self) -> bool:
        """Whether nothing was cut off."""
        return self.relative_error == 0.0

    def __str__(self) -> str:
        error = "exact" if self.exact else f"relative error {self.relative_error:.3g}"
        return f"{self.folder}: rank {self.rank}, {error}"


def export(
    model: PeftModel,
    folder: str | Path,
    rank: Literal["exact", "requested"] | int = "exact",
    adapter_name: str = "default",
) -> ExportReport:
    """Write the adapter as a plain PEFT LoRA for the untouched base, with a model card.

    Of a classifier with a new head the file holds one last layer for the classes of both heads,
    the base's first, as PEFT's `modules_to_save`, and `config.json` their names: PEFT loads it on
    the base with that config and `ignore_mismatched_sizes=True`.

    Where the base was given tokens after it was loaded, the file holds its embeddings, as PEFT's
    own does, and is for a base that was given as many.

    Args:
        model: a PeftModel made by `attach` or `load`, or any PEFT LoRA.
        folder: where to; created.
        rank: "exact" keeps everything (rank 2r for an anchored adapter, r otherwise); "requested"
            cuts back to the adapter's own rank r, and a number to that rank, by the best
            approximation of B A in the Frobenius norm. A layer of a smaller rank keeps its own.
        adapter_name: which adapter.

    Returns:
        The rank that was written and the error of cutting, measured per layer.

    Raises:
        UserError: rank is not one of these, or the adapter has more than a plain LoRA can say.
    """
    plain = plain_lora(model, adapter_name, rank)
    if tied := _tied_targets(model, adapter_name):
        warnings.warn(
            f"{tied[0]!r} is an adapted layer, and its weight is that of {tied[1]!r} too: the "
            "export is exact beside the base, and merged into it would change both; untie the "
            "base's embeddings before merging",
            stacklevel=2,
        )
    state = plain.state | _given_embeddings(model)
    if (heads := heads_of(model)) and plain.config.modules_to_save:
        plain.config.modules_to_save = [_told_apart(heads[0], base_of(model))]
        state = joined(state, model)
    with _replaced(Path(folder)) as new:
        _write(new, plain.config, state, model)
        classes = head_classes(base_of(model).config) if new_modules(model) else ((), ())
        write_export_card(
            new,
            plain.config.base_model_name_or_path or "",
            start=getattr(model.peft_config[adapter_name], "start", None),
            error=plain.relative_error,
            tied=tied,
            head=head_of(model),
            new_classes=classes[1],
            own_classes=len(classes[0]),
            packing=packing_of(base_of(model)),
        )
    return ExportReport(
        folder=Path(folder),
        rank=plain.config.r,
        relative_error=plain.relative_error,
        layer_errors=plain.layer_errors,
    )


def _told_apart(name: str, base: nn.Module) -> str:
    """How PEFT's `modules_to_save` must call a module, since it takes all whose names end so.

    DistilBERT has a ``pre_classifier`` beside its ``classifier``.
    """
    others = (other for other, _ in base.named_modules() if other != name)
    return f"model.{name}" if any(other.endswith(name) for other in others) else name


def _given_tokens(model: PeftModel) -> tuple[int, int] | None:
    """How many tokens the base has and had when it was loaded, where the two differ."""
    base: Any = base_of(model)
    stored = stored_config(base) if isinstance(base, PreTrainedModel) else None
    if stored is None:
        return None
    rows, known = (
        getattr(config.get_text_config(), "vocab_size", 0)  # of what reads no words
        for config in (base.config, stored)
    )
    return None if rows == known else (rows, known)


def _given_embeddings(model: PeftModel) -> dict[str, Tensor]:
    """The embeddings of a base that has other tokens than it was loaded with, by PEFT's names."""
    base: Any = base_of(model)
    numbers = _given_tokens(model)
    if numbers is None:
        return {}
    rows, known = numbers
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    warnings.warn(
        f"the base has {rows} tokens, and {known} where it was loaded from: the export holds its "
        f"embeddings, and is for a base with base.resize_token_embeddings({rows})",
        stacklevel=3,
    )
    wanted = {unwrapped(end).weight: end for end in reversed(ends) if end is not None}
    held = {}
    for name, module in base_modules(model):
        weight = getattr(module, "weight", None)
        if weight is not None and (end := wanted.pop(weight, None)) is not None:
            inner = ".base_layer" if isinstance(end, LoraLayer) else ""
            if not isinstance(end, ModulesToSaveWrapper):  # of which the file has all
                held[f"{PREFIX}{name}{inner}.weight"] = weight.detach().clone().cpu()
    return held


def _tied_targets(model: PeftModel, adapter_name: str) -> tuple[str, str] | None:
    """An adapted layer whose weight another module has as well, and that module."""
    adapted = {
        getattr(module.get_base_layer(), "weight", None): name
        for name, module in adapted_layers(model, adapter_name).items()
    }
    for name, module in base_modules(model):
        weight = getattr(module, "weight", None)
        if weight is not None and adapted.get(weight, name) != name:
            return adapted[weight], name
    return None


def untie_adapted(model: PeftModel, adapter_name: str = "default") -> None:
    """Give each adapted layer that shares its weight with another module a weight of its own.

    For merging, which would change both. `declare_untied` is due afterwards.
    """
    while tied := _tied_targets(model, adapter_name):
        layer: Any = base_of(model).get_submodule(tied[0])
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def declare_untied(model: Any) -> None:
    """Say in a model's config that its embeddings are not tied, where they have come apart."""
    try:
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # it reads no words
        return
    if head is not None and words is not None and not torch.equal(head.weight, words.weight):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


_FILES = (WEIGHTS_FILE, START_FILE, HEADS_FILE, CARD_FILE, CONFIG_FILE)
"""Of an adapter's folder; without the last there is no adapter."""


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files become those of the adapter in ``folder``, all of them.

    Nothing of another adapter stays there, and what is of no adapter does. It happens in one step;
    in a folder that cannot be exchanged, file by file while there is no config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    card = folder / CARD_FILE
    names = set(_FILES) - ({CARD_FILE} if card.exists() and not is_ours(card) else set())
    if not (
        os.path.ismount(folder)
        or not os.access(folder.parent, os.W_OK)
        or Path.cwd().is_relative_to(folder)
        or any(entry.is_dir() for entry in folder.iterdir())
    ):
        with new_folder(folder, keep=lambda name: name not in names) as new:
            yield new
            for file in set(_FILES) - names:
                (new / file).unlink(missing_ok=True)
        return
    with TemporaryDirectory(prefix=".tmp-", dir=folder) as name:
        new = Path(name)
        yield new
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for file in filter(names.__contains__, _FILES):
            if (new / file).exists():
                (new / file).replace(folder / file)
            else:
                (folder / file).unlink(missing_ok=True)


def _write(
    folder: Path,
    config: LoraConfig,
    state: Mapping[str, Tensor],
    model: PeftModel,
    start: Any = None,
) -> None:
    """The files of an adapter, into a new folder.

    The config is PEFT's without what is at its default, since older versions of PEFT, and other
    readers, refuse keys that they do not know.
    """
    if start is not None:
        write_json(folder / START_FILE, start, checked=True)
    if config.modules_to_save and new_modules(model):
        base: Any = base_of(model)
        # Two classes without names of their own are transformers' default, which it leaves out.
        content = json.loads(base.config.to_json_string()) | {"id2label": base.config.id2label}
        write_json(folder / HEADS_FILE, content)
    usual, values = LoraConfig().to_dict(), {}
    for key, value in sorted(config.to_dict().items()):
        if key in _ALWAYS or value != usual.get(key):
            values[key] = sorted(value) if isinstance(value, set) else value
    write_json(folder / CONFIG_FILE, values)
    write_weights(state, folder)


def write_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors of an adapter after its other files, whose checksum is in their header."""
    known = {"format": "pt", _OTHERS: _checksum_of_others(folder)}
    with new_file(folder / WEIGHTS_FILE) as file:
        write_tensors(state, file, known)


_OTHERS = "settings_xxh3"


def _checksum_of_others(folder: Path) -> str:
    """Of config and start, but for the name of the base, which people change as they move it."""
    config = read_json(folder / CONFIG_FILE)
    for name in ("base_model_name_or_path", "revision"):
        config.pop(name, None)
    return json_checksum({"config": config, "start": read_json(folder / START_FILE)})


_ALWAYS = (
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"),
    *("modules_to_save", "lora_dropout", "bias", "fan_in_fan_out", "use_rslora", "use_dora"),
)
"""Settings that servers read without a default of their own."""


def save(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapter as it is, anchor and moves, so that `load` continues without any loss.

    Args:
        model: a PeftModel made by `attach` or `load`, or any PEFT LoRA.
        folder: where to; created.
        adapter_name: which adapter.
        weights: the model's by name where it has only shards of them itself.

    Returns:
        The folder. `adapter_model.safetensors` and `adapter_config.json` are PEFT's (an anchored
        adapter names a type of its own there, which PEFT alone refuses); `forgetless.json` says
        how the adapter started.
    """
    config = lora_config(model, adapter_name)
    state = get_peft_model_state_dict(
        model,
        state_dict=weights,
        adapter_name=adapter_name,
        save_embedding_layers=_given_tokens(model) is not None,
    )
    state = _apart({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()})
    with _replaced(Path(folder)) as new:
        start = config.start if isinstance(config, StartConfig) else None
        _write(new, config, state, model, start)
    return Path(folder)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, of which no two share memory, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    places = set[int]()
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return found


def save_plain(plain: PlainLora, folder: str | Path, model: PeftModel) -> Path:
    """Write a plain LoRA for the base of a model as it is, without a card."""
    with _replaced(Path(folder)) as new:
        _write(new, plain.config, plain.state, model)
    return Path(folder)


def load(
    base: nn.Module, folder: str | Path, trainable: bool = False, adapter_name: str = "default"
) -> PeftModel:
    """The base with the adapter of `folder` on it, exactly as it was saved.

    Args:
        base: the model that the adapter was made for, or a PeftModel on it.
        folder: written by `save`, by `export`, by a Trainer's checkpoint or by PEFT; or the name of
            a repository with one on the Hugging Face hub, see `forgetless.models.hub`.
        trainable: whether training goes on; what the method froze stays frozen.
        adapter_name: PEFT's name for the adapter.

    Raises:
        UserError: the folder is no LoRA adapter, its tensors do not fit the base, or it has biases
            and another adapter is there.
    """
    check_addable(base, adapter_name)
    folder = folder_of(folder)
    config = _read_config(folder)
    if config.bias != "none" and isinstance(base, PeftModel):
        raise UserError(
            f"{folder}: bias={config.bias!r} replaces the base's own biases, so that PEFT puts it "
            "beside no other adapter; put it on a fresh base"
        )
    state = read_tensors(folder / WEIGHTS_FILE, finite=True)
    with reading(f"the adapter in {folder}", "export or save it again"):
        _check_fits(folder, config, state, base)
        state = _with_its_head(folder, config, state, base)
        find_new_head(base)
        _keep_whole_modules_apart(folder, config, state, base)
        _name_base(folder, config, base)
        config.inference_mode = not trainable
        start, model = config.start, add_adapter(base, config, adapter_name)
        try:
            if start is not None:
                made = Start.from_dict(start)
                for name, module in adapted_layers(model, adapter_name).items():
                    parameters = _saved_parameters(state, name, made.anchored)
                    install(module, adapter_name, made, *parameters)
            _fill(model, adapter_name, state, folder)
        except Exception:
            take_off(model, adapter_name, base)
            raise
    model.set_requires_grad(adapter_name, requires_grad=trainable)
    return model.train(trainable)


def _fill(model: PeftModel, adapter_name: str, state: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors in their places; each must have one, and each place a tensor."""
    try:
        loaded = set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    except KeyError as problem:  # a module of modules_to_save
        raise UserError(f"{folder / WEIGHTS_FILE} lacks {problem}") from None
    missing = [k for k in loaded.missing_keys if ".lora_" in k and adapter_name in k.split(".")]
    for keys, fault in ((loaded.unexpected_keys, "fit nowhere"), (missing, "are missing")):
        if keys:
            raise UserError(
                f"the tensors and {CONFIG_FILE} of {folder} do not belong together: these "
                f"{fault}: {first_few(keys)}"
            )


def _keep_whole_modules_apart(
    folder: Path, config: StartConfig, state: dict[str, Tensor], base: nn.Module
) -> None:
    """Let modules that the folder holds whole be the adapter's, where PEFT overwrites the base.

    PEFT saves embeddings beside an adapter when they are targets, or were given more rows. Those
    that are the base's own are left out. The others become `modules_to_save`: copies that are used
    while the adapter is on.

    Raises:
        UserError: a part of a module only, such as its bias, one that has another shape here, or
            one that the base uses under several names.
    """
    modules, held = dict(base_modules(base)), dict[str, dict[str, str]]()
    for key in state:
        name, _, part = key.removeprefix(PREFIX).rpartition(".")
        name = name.removesuffix(".base_layer")
        if ".lora_" not in key and isinstance(getattr(modules.get(name), part, None), Tensor):
            held.setdefault(name, {})[part] = key
    sizes, parts, shared = [], [], []
    several = _with_several_names(base)
    for name, keys in held.items():
        own = {key: getattr(modules[name], part) for part, key in keys.items()}
        for key, tensor in own.items():
            if tensor.shape != state[key].shape:
                other = tuple(state[key].shape)
                sizes.append(f"{name!r} is {tuple(tensor.shape)} and {other} in the adapter")
        if sizes or any(f".{whole}." in f".{name}." for whole in config.modules_to_save or ()):
            continue
        if all(_is_same(tensor, state[key]) for key, tensor in own.items()):
            for key in own:
                del state[key]
        elif len(keys) < len(modules[name].state_dict()) or ".base_layer." in "".join(own):
            parts += [key.removeprefix(PREFIX) for key in own]
        else:
            for sharing, module in modules.items():  # the module itself, and a tied head
                if any(getattr(module, part, None) is own[key] for part, key in keys.items()):
                    shared += [sharing] if module in several else []
                    config.modules_to_save = sorted({*(config.modules_to_save or ()), sharing})
                    for part, key in keys.items():
                        state.setdefault(f"{PREFIX}{sharing}.{part}", state[key].clone())
    if sizes:
        head = head_of(base)
        hint = _RESIZE if head is None or head.modality == "language" else _RELABEL
        raise UserError(
            f"{folder} holds whole modules of other sizes than this base has: {first_few(sizes)}; "
            f"{hint}"
        )
    if shared:
        raise UserError(
            f"{folder} holds other weights of {first_few(shared)} than this base has, which uses "
            "that module under several names, and PEFT would keep it apart under one; give the "
            "base the weights that the adapter was trained on"
        )
    if parts:
        raise UserError(
            f"{folder} holds {first_few(parts)}, which would change the base itself; train whole "
            "modules with PEFT's modules_to_save, which keeps them apart"
        )


def _with_several_names(base: nn.Module) -> set[nn.Module]:
    """The modules that a model uses at several places, as T5 does its embeddings."""
    every = Counter(module for _, module in base_of(base).named_modules(remove_duplicate=False))
    return {module for module, count in every.items() if count > 1}


def _with_its_head(
    folder: Path, config: StartConfig, state: dict[str, Tensor], base: nn.Module
) -> dict[str, Tensor]:
    """Give the base the new head that the adapter was trained with, if any; the state for it.

    Raises:
        UserError: the base has another new head, or another own one than the file has.
    """
    classes = learned_classes(folder)
    if not classes:
        return state
    if read_json(folder / HEADS_FILE)["own_classes"] == 0:
        model: Any = base_of(base)
        if model.config.num_labels != len(classes) or heads_of(model):
            raise UserError(
                f"{folder} has a head of {len(classes)} classes for a base without one, and this "
                f"base gives {model.config.num_labels}; load it with that many (num_labels)"
            )
        name_classes(model.config, [], classes)
        return state
    add_head(base_of(base), classes)
    name, heads = heads_of(base)  # type: ignore[misc]
    config.modules_to_save = [f"{name}.new"]
    own, apart = divided_state(state, name, len(classes))
    if any(not _is_same(getattr(heads.own, part), tensor) for part, tensor in own.items()):
        raise UserError(
            f"{folder} was trained beside another head than this base has; give the base that it "
            "was trained on"
        )
    return apart


def learned_classes(folder: str | Path) -> list[str]:
    """The classes of the new head that an adapter of a folder has; none where it has no such."""
    config = read_json(Path(folder) / HEADS_FILE)
    names = config.get("id2label", {})
    own = config.get("own_classes", len(names))
    return [names[str(number)] for number in range(own, len(names))]


def classes_for(folder: str | Path, base: str) -> list[str]:
    """The classes of the new head that a base needs for an adapter in a folder; none without one.

    PEFT does not name the classes of a head that it trained on an encoder: they are numbers here.

    Raises:
        UserError: the base is an encoder without a head, and so is what was adapted.
    """
    folder = Path(folder)
    known = learned_classes(folder)
    if known or not is_bare(config_of(base)) or not (folder / WEIGHTS_FILE).is_file():
        return known
    head = f"{PREFIX}{last_layer(meta_model(base, bare=True))}.weight"
    with reading(folder / WEIGHTS_FILE), safe_open(folder / WEIGHTS_FILE, "pt") as weights:
        if head in weights.keys():  # noqa: SIM118 - it is no mapping
            return [str(number) for number in range(weights.get_slice(head).get_shape()[0])]
    raise UserError(
        f"{folder} adapts an encoder and holds no head of classes, and base {base!r} has none "
        "either; load both in Python, where any model will do: "
        f"forgetless.load(transformers.AutoModel.from_pretrained({base!r}), {str(folder)!r})"
    )


def without_new_head(keys: Iterable[str], folder: str | Path) -> list[str]:
    """Of an adapter's tensors by name those that are not of the new head of a classifier."""
    if not learned_classes(folder):
        return list(keys)
    heads = read_json(Path(folder) / CONFIG_FILE).get("modules_to_save") or []
    return [key for key in keys if not any(f".{head}." in key for head in heads)]


def _is_same(own: Tensor, given: Tensor) -> bool:
    return not own.is_meta and torch.equal(own.to(given).cpu(), given)


def _saved_parameters(
    state: Mapping[str, Tensor], name: str, anchored: bool
) -> tuple[Tensor, Tensor, Anchor | None]:
    key = f"{PREFIX}{name}.lora_"
    A, B = state[f"{key}A.weight"], state[f"{key}B.weight"]
    if not anchored:
        return A, B, None
    return A, B, Anchor(state[f"{key}anchor.anchor_A"], state[f"{key}anchor.anchor_B"])


def down_projections(folder: str | Path) -> dict[str, Tensor]:
    """Layer name -> A (rank, in) of the plain LoRA that the adapter of a folder amounts to.

    For an anchored adapter that is [A0 + dA ; dA], of twice its rank.

    Raises:
        UserError: the folder is no LoRA adapter.
    """
    folder = Path(folder)
    _read_config(folder)  # refuses what is no LoRA
    state = read_tensors(folder / WEIGHTS_FILE, finite=True)
    found = {}
    for key, A in state.items():
        name, is_A, _ = key.partition(".lora_A.")
        if is_A:
            A0 = state.get(f"{name}.lora_anchor.anchor_A")
            found[name.removeprefix(PREFIX)] = A if A0 is None else torch.cat([A0 + A, A])
    return found


def _read_config(folder: Path) -> StartConfig:
    values = read_json(folder / CONFIG_FILE)
    if not values:
        raise UserError(f"{folder} is no adapter: it has no {CONFIG_FILE}")
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; its adapter_model.bin is a pickle, so save it with safetensors" if pickled else ""
        raise UserError(f"{folder} is no complete adapter: it has no {WEIGHTS_FILE}{hint}")
    kind, said = values.pop("peft_type", None), folder / CONFIG_FILE
    if kind not in (ANCHORED_TYPE, "LORA"):
        raise UserError(f"{said} is of an adapter of type {kind!r}; only LoRA can be loaded")
    with reading(folder / WEIGHTS_FILE), safe_open(folder / WEIGHTS_FILE, "pt") as weights:
        known = (weights.metadata() or {}).get(_OTHERS)
    if known not in (None, _checksum_of_others(folder)):
        warnings.warn(
            f"{folder}: {CONFIG_FILE} or {START_FILE} is not as it was when these weights were "
            "written: it was edited, or it is damaged or gone",
            stacklevel=3,
        )
    if kind == "LORA" and (folder / START_FILE).is_file():
        # An anchored one says it in its config; a file that says so here is another adapter's.
        said = folder / START_FILE
        start = read_json(said)
        values["start"] = None if start.get("anchored") else start
    if values.get("start") is not None:
        with reading(said):
            values["start"] = asdict(Start.from_dict(values["start"]))
    if values.get("layer_replication"):
        raise UserError(f"{folder} {REPLICATES_LAYERS}")
    if str(values.get("init_lora_weights")).startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{folder} was saved with init_lora_weights={values['init_lora_weights']!r}: it is for "
            "a base that PEFT changes as it loads; in the tool that trained it, save it with "
            "path_initial_model_for_weight_conversion, which makes it a LoRA for the original base"
        )
    known = StartConfig.__dataclass_fields__
    if ignored := sorted(key for key in values.keys() - known.keys() if values[key]):
        warnings.warn(f"{folder}: this PEFT does not know {', '.join(ignored)}", stacklevel=3)
    with reading(folder / CONFIG_FILE):
        return StartConfig(**{key: value for key, value in values.items() if key in known})


def recorded_base(config: Mapping[str, Any]) -> str | None:
    """The base that an adapter's config names, as ``name@revision`` where it names that too."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{name}@{revision}" if revision and HubName.find(str(name)) else name


def _name_base(folder: Path, config: LoraConfig, base: nn.Module) -> None:
    """Name this base in the config, and say so where it was another; that may be a copy of it."""
    inner: Any = base_of(base)
    given, wanted = source_of(base), recorded_base(config.to_dict())
    if not given:
        return
    config.base_model_name_or_path = inner.name_or_path
    another = wanted and _is_another(given, wanted)
    if another or HubName.find(inner.name_or_path) is None:
        config.revision = None
    if another:
        warnings.warn(
            f"{folder} says that it is for the base {wanted}, and this is {given}; on another "
            "base than its own an adapter does something else",
            stacklevel=3,
        )


def _is_another(given: str, wanted: str) -> bool:
    """Whether two names of bases, hub ids or paths, are of models or revisions that differ."""
    (model, revision), (other, of_other) = _model_name(given), _model_name(wanted)
    return model != other or (revision != of_other and "" not in (revision, of_other))


def _model_name(path: str) -> tuple[str, str]:
    """The last part of a hub id or a path, or the model's name in the hub's cache; its revision."""
    parts = Path(path).parts
    if "snapshots" in parts[:-1]:
        place = parts.index("snapshots")
        return parts[place - 1].split("--")[-1], parts[place + 1]
    name, _, revision = (parts[-1] if parts else "").partition("@")
    return name, revision


def stacked_experts(parameters: Iterable[str]) -> str:
    """What an adapter of PEFT's `target_parameters` is, after the folder's name or "it"."""
    return (
        f"adapts stacked expert tensors ({first_few(sorted(parameters))}), which PEFT alone loads "
        "and merges: PeftModel.from_pretrained(base, folder)"
    )


_RESIZE = "where tokens were added, call base.resize_token_embeddings(...) before"
_RELABEL = (
    "where its head has other classes, load the base in Python with as many: from_pretrained(base, "
    "num_labels=..., ignore_mismatched_sizes=True), and put the adapter on that by forgetless.load"
)


def _check_fits(
    folder: Path, config: LoraConfig, state: Mapping[str, Tensor], base: nn.Module
) -> None:
    """Every adapted layer must be in the base, with the shape that the adapter was made for."""
    inner: Any = base_of(base)
    problems = []
    tokens = config.trainable_token_indices or []
    lists = tokens.values() if isinstance(tokens, dict) else [tokens]
    last = max((index for indices in lists for index in indices), default=-1)
    rows = unwrapped(inner.get_input_embeddings()).num_embeddings if last >= 0 else 0
    if last >= rows:
        problems.append(f"it trains token {last}, and the embeddings have {rows} rows; {_RESIZE}")
    for key, A in state.items():
        name, is_A, _ = key.removeprefix(PREFIX).partition(".lora_A.")
        if not is_A:
            continue
        try:
            layer = inner.get_submodule(name)
        except AttributeError:
            problems.append(f"this model has no layer {name!r}")
            continue
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if not is_linear(layer):
            problems.append(f"{name!r} is a {type(layer).__name__}, not a linear layer")
            continue
        shape = weight_shape(layer)
        wanted = (state[key.replace(".lora_A.", ".lora_B.")].shape[0], A.shape[1])
        if shape != wanted:
            head = getattr(inner, "get_output_embeddings", lambda: None)()
            hint = f"; {_RESIZE}" if inner.get_submodule(name) is head else ""
            problems.append(f"layer {name!r} is {shape}, the adapter was made for {wanted}{hint}")
    if problems and config.target_parameters:
        raise UserError(f"{folder} {stacked_experts(config.target_parameters)}")
    if problems:
        raise UserError(f"{folder} does not fit this base: {first_few(problems)}")
