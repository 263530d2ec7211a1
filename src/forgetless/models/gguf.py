"""A base in one GGUF file, unpacked into the folder of a model that everything else reads."""

from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forgetless.core.errors import UserError, first_line
from forgetless.core.files import folder_name, lock, new_folder
from forgetless.core.hashing import content_hash


def is_gguf(base: str) -> bool:
    """Whether the name of a base is that of a GGUF file, which may not be there."""
    return base.lower().endswith(".gguf")


def unpacked(file: Path) -> Path:
    """The model folder of a GGUF file: config, weights in float32 and tokenizer.

    It is made when it is asked for first, in the cache of Hugging Face (``HF_HOME``), one for each
    content. Weights of 4 bits take eight times the file.

    Raises:
        UserError: it is no GGUF file, it is damaged, its architecture is none that transformers
            reads from such a file, or the package gguf is missing.
    """
    with file.open("rb") as content:
        if content.read(4) != b"GGUF":
            raise UserError(f"base {str(file)!r} does not hold what a GGUF file does; download it")
    name = f"{folder_name(file.stem)}-{content_hash(file)[:16]}"
    folder = Path(constants.HF_HOME) / "forgetless" / "gguf" / name
    if not folder.is_dir():
        if find_spec("gguf") is None:
            raise UserError(f"base {str(file)!r} needs gguf: pip install 'forgetless[gguf]'")
        with lock(folder.with_name(f".{name}.lock")):
            if not folder.is_dir():
                _unpack(file, folder)
    return folder


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file in float32, an ordinary one that can be saved, and its tokenizer.

    Raises:
        UserError: as `unpacked`.
    """
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as problem:  # whatever a library raises for a bad file
        raise UserError(f"cannot unpack base {str(file)!r}: {first_line(problem)}") from problem
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"base {str(file)!r} is incomplete: {len(missing)} weights are missing, {missing[0]!r} "
            "among them"
        )
    # With the settings of its quantisation transformers would not save it as an ordinary one.
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def _unpack(file: Path, folder: Path) -> None:
    model, tokenizer = load_gguf(file)
    with new_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
