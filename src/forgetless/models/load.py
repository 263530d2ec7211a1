"""Base models: find, load, and name the layers that an adapter may sit on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from forgetless.core.errors import UserError, first_line, unknown
from forgetless.models.gguf import is_gguf, unpacked
from forgetless.models.heads import add_head, divided, is_of_new_head, name_classes, start_head
from forgetless.models.hub import HubName, commit_of
from forgetless.models.pocket import POCKETS
from forgetless.models.quantised import Format, quantisation, unavailable, unpacked_dtype
from forgetless.models.state import base_of
from forgetless.models.trust import is_trusted
from forgetless.models.weights import hold_packing

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Head:
    """What a model answers with, which decides how it is loaded and what it reads.

    Attributes:
        modality: `forgetless.data.<modality>` prepares what it reads, see
            `forgetless.data.modality`.
        noun: such a model, in messages.
        auto_class: of transformers, which loads one.
        processor_class: of transformers, which loads what prepares its inputs.
        classes: model type -> class of the model, or several, as transformers has them.
    """

    modality: str
    noun: str
    auto_class: Any
    processor_class: Any
    classes: Mapping[str, str | tuple[str, ...]]

    @property
    def names(self) -> set[str]:
        """Of all classes."""
        each = ((found,) if isinstance(found, str) else found for found in self.classes.values())
        return set(chain.from_iterable(each))


HEADS = (
    Head(
        "language",
        "a causal language model",
        AutoModelForCausalLM,
        AutoTokenizer,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    Head(
        "images",
        "an image classifier",
        AutoModelForImageClassification,
        AutoImageProcessor,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    Head(
        "sentences",
        "a text classifier",
        AutoModelForSequenceClassification,
        AutoTokenizer,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
)
"""What a base may have: one line a modality."""

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resolve_base(base: str, *, weights: bool = True) -> str:
    """The folder or the name on the hub that `base` stands for; no weights are downloaded.

    Args:
        base: "pocket" or "pocket-vision" for a shipped model, a folder with config.json and
            weights, a GGUF file, which is unpacked into a folder when it is asked for first, or the
            name of a model on the Hugging Face hub, see `forgetless.models.hub`.
        weights: whether a folder must hold them; for shapes its config.json is enough.

    Raises:
        UserError: a folder that is no model, a path that does not exist, or a name of which there
            is no model on the hub or, where that does not answer, in the local cache.
    """
    if base in POCKETS:
        return str(POCKETS[base]())
    folder = Path(base).expanduser()
    if folder.is_dir():
        _check_model_folder(folder, weights)
        return str(folder)
    hint = "Give 'pocket', a folder with config.json and *.safetensors, a .gguf file or a hub id."
    if folder.is_file():
        if is_gguf(base):
            return str(unpacked(folder))
        raise UserError(f"base {base!r} is a file, not a model folder. {hint}")
    hub = HubName.find(base)
    if hub is None:
        raise UserError(f"base {base!r} does not exist. {hint}")
    try:
        commit_of(hub)
    except UserError as problem:
        raise UserError(f"base {problem}") from problem
    return base


def _source(base: str, *, weights: bool = True) -> dict[str, Any]:
    """The arguments by which transformers reads the files of a base."""
    resolved = resolve_base(base, weights=weights)
    found: dict[str, Any] = {"trust_remote_code": is_trusted(base)}
    if hub := HubName.find(resolved):
        resolved, found["revision"] = hub.repository, commit_of(hub)
    return found | {"pretrained_model_name_or_path": resolved}


def _check_model_folder(folder: Path, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        holds = f"; it holds {_some_names(folder)}"
        raise UserError(f"folder {str(folder)!r} is no model: it has no config.json{holds}")
    if weights and not _holds_weights(folder):
        raise UserError(
            f"folder {str(folder)!r} has a config.json but no weights ({' or '.join(_WEIGHTS[:2])})"
        )


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def has_weights(base: str) -> bool:
    """Whether a base can be loaded; a folder may hold a config alone.

    Raises:
        UserError: as `resolve_base`.
    """
    folder = Path(resolve_base(base, weights=False))
    return not folder.is_dir() or _holds_weights(folder)


def _some_names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return shown or "nothing"


def load_model(
    base: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    new_classes: Sequence[str] = (),
    quantise: Format | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The base with its own head, see `HEADS`, in evaluation mode.

    Args:
        base: see `resolve_base`.
        dtype: "auto" keeps the number format of the stored weights; or float32, bfloat16,
            float16, float64.
        device: "auto" is the first accelerator, or the CPU where there is none; or a torch device.
        new_classes: of a new head, see `forgetless.models.heads`; an encoder without a head of its
            own must be given one.
        quantise: pack the linear layers by bitsandbytes, see `forgetless.models.quantised`; all
            else, and what is computed with 4-bit weights, has the `dtype`, for "auto" bfloat16.
        device_map: transformers' placing of the modules on several devices, instead of `device`.
        attn_implementation: transformers' name of what computes the attention; None for its choice.

    Raises:
        UserError: `base` has none of the heads, its files cannot be read, or weights that the
            architecture needs are missing from them.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    config, head = _load_config(base)
    bare, is_packed = is_bare(config), is_stored_packed(config)
    if bare:
        _require_head(base, config, new_classes)
        name_classes(config, [], new_classes)
    more: dict[str, Any] = {"config": config} if bare else {}
    if attn_implementation is not None:
        more["attn_implementation"] = attn_implementation
    if quantise is not None:
        if is_packed:
            raise UserError(f"base {base!r} is stored in fewer bits already; leave quantise out")
        if problem := unavailable(device_of(device)):
            raise UserError(f"quantise: {quantise!r} {problem}")
        dtype = unpacked_dtype(dtype, quantise)
        more["quantization_config"] = quantisation(quantise, getattr(torch, dtype))
    if device_map is None and (quantise is not None or is_packed):
        device_map = {"": str(device_of(device))}  # a packed weight is not moved later
    if device_map is not None:
        more["device_map"] = device_map
    try:
        model, loading = head.auto_class.from_pretrained(
            dtype=dtype,
            output_loading_info=True,
            **_source(base),
            **more,
        )
    except Exception as problem:  # whatever a library raises for a bad file
        raise UserError(f"cannot load base {base!r}: {first_line(problem)}") from problem
    missing = sorted(name for name in loading["missing_keys"] if not is_of_new_head(model, name))
    if missing:
        raise UserError(
            f"the weights of base {base!r} are incomplete: {len(missing)} missing, "
            f"{missing[0]!r} among them"
        )
    model = (start_head if bare else divided)(model)
    model = model.to(device_of(device)) if device_map is None else model
    hold_packing(model)
    if (hub := HubName.find(base)) and hub.revision:
        model.hub_revision = hub.revision  # see `source_of`
    return (add_head(model, new_classes) if new_classes else model).eval()


def device_of(device: str = "auto") -> torch.device:
    """The device of a name; of "auto" the first accelerator, or the CPU where there is none."""
    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def is_stored_packed(config: PretrainedConfig) -> bool:
    """Whether the weights of a base lie on the disk in fewer bits."""
    return getattr(config, "quantization_config", None) is not None


def _load_config(base: str, *, weights: bool = True) -> tuple[PretrainedConfig, Head]:
    """The config of a base and its head; one with none of `HEADS` is refused by name.

    Of an encoder alone it is the head that its architecture can have, still without a class.
    """
    source = _source(base, weights=weights)
    try:
        config = AutoConfig.from_pretrained(**source)
    except Exception as problem:  # whatever a library raises for a bad file
        if "trust_remote_code" in str(problem):
            raise _needs_trust(base) from None
        raise UserError(f"cannot read the config of base {base!r}: {first_line(problem)}") from None
    stored = getattr(config, "architectures", None) or []
    if not (isinstance(stored, list) and all(isinstance(name, str) for name in stored)):
        raise UserError(
            f"cannot read the config of base {base!r}: architectures must be a list of names, got "
            f"{stored!r}"
        )
    for head in HEADS:
        if config.model_type in head.classes and (not stored or head.names.intersection(stored)):
            return config, head
    if of_its_own := _head_of_own_code(config):
        if is_trusted(base):
            return config, of_its_own
        raise _needs_trust(base)
    for head in HEADS:
        fits = head.modality != "language" and config.model_type in head.classes
        if fits and not config.is_encoder_decoder:
            return name_classes(config, [], []), head
    raise UserError(
        f"base {base!r} is a {stored[0] if stored else config.model_type}, not "
        f"{' or '.join(head.noun for head in HEADS)} with a trained head, and none is put on it; "
        "load such a model yourself and use forgetless.attach on it"
    )


def is_bare(config: PretrainedConfig) -> bool:
    """Whether `config_of` found an encoder without a head."""
    return getattr(config, "own_classes", None) == 0 and config.num_labels == 0


def _require_head(base: str, config: PretrainedConfig, new_classes: Sequence[str]) -> None:
    if not new_classes:
        raise UserError(
            f"base {base!r} is a {(config.architectures or [config.model_type])[0]}, which has no "
            "trained head of classes; set 'adapter.head: new' in the recipe to train one on it"
        )


def config_of(base: str, *, weights: bool = True) -> PretrainedConfig:
    """The config of a base; an encoder without a head has no class there.

    Raises:
        UserError: as `load_model`.
    """
    return _load_config(base, weights=weights)[0]


def head_of(base: str | nn.Module) -> Head | None:
    """The head of a base by its name; or of a model by its class, None where it has none of these.

    Raises:
        UserError: as `load_model`, for a name.
    """
    if isinstance(base, str):
        return _load_config(base, weights=False)[1]
    names = {parent.__name__ for parent in type(base_of(base)).__mro__}
    known = next((head for head in HEADS if head.names & names), None)
    return known or _head_of_own_code(getattr(base_of(base), "config", None))


def _head_of_own_code(config: Any) -> Head | None:
    """The head that the code beside a base's weights has, where the config names such code."""
    own = getattr(config, "auto_map", None) or {}
    return next((head for head in HEADS if head.auto_class.__name__ in own), None)


def _needs_trust(base: str) -> UserError:
    return UserError(
        f"base {base!r} comes with Python code of its own, which is not run unasked; read it, "
        "and if you trust it set 'trust_remote_code: true' in the recipe"
    )


def load_tokenizer(base: str, *, weights: bool = True) -> PreTrainedTokenizerBase:
    """The base's tokenizer, always with a padding token.

    Where the base has none, its end-of-text token pads (padding is masked, so it is never
    learned); then its unknown or its beginning-of-text token.

    Raises:
        UserError: the base comes without a tokenizer, or the tokenizer has no special token.
    """
    tokenizer: PreTrainedTokenizerBase = _load_beside(base, AutoTokenizer, "tokenizer", weights)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(
            f"the tokenizer of base {base!r} has model_max_length "
            f"{str(tokenizer.model_max_length)[:40]!r}, which is no number of tokens"
        )
    if tokenizer.pad_token is None:
        pad = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if pad is None:
            raise UserError(
                f"the tokenizer of base {base!r} has neither a padding nor any other special "
                "token; set tokenizer.pad_token and save it again"
            )
        tokenizer.pad_token = pad
    return tokenizer


def load_tuned(folder: str | Path, base: nn.Module) -> PreTrainedModel:
    """The model of a folder in the number format of the base that it was tuned from."""
    return load_model(str(folder), dtype=str(next(base.parameters()).dtype).removeprefix("torch."))


def load_image_processor(base: str, *, weights: bool = True) -> BaseImageProcessor:
    """What resizes and normalises pictures for the base; with PIL where no torchvision is.

    Raises:
        UserError: the base comes without one.
    """
    found: BaseImageProcessor = _load_beside(base, AutoImageProcessor, "image processor", weights)
    return found


def _load_beside(base: str, auto_class: Any, noun: str, weights: bool) -> Any:
    """What lies beside a base's weights, by transformers' class that loads it."""
    source = _source(base, weights=weights)
    try:
        return auto_class.from_pretrained(**source)
    except Exception as problem:  # whatever a library raises for a bad file
        if "trust_remote_code" in str(problem):
            raise _needs_trust(base) from None
        raise UserError(
            f"base {base!r} has no {noun} that can be loaded ({first_line(problem)}); "
            f"save one into the folder with {noun.replace(' ', '_')}.save_pretrained"
        ) from problem


def meta_model(
    base: str, *, weights: bool = True, bare: bool = False, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The base's architecture on the meta device: every shape, not one weight.

    A folder without any is refused unless `weights` is off; where `bare`, an encoder without a head
    gets a new one of two classes.

    Raises:
        UserError: as `load_model`.
    """
    config, head = _load_config(base, weights=weights)
    if is_bare(config):
        classes = ["", " "] if bare else []
        _require_head(base, config, classes)
        name_classes(config, [], classes)
    more = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        found: PreTrainedModel = divided(
            head.auto_class.from_config(config, trust_remote_code=is_trusted(base), **more)
        )
    return found
