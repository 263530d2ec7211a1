"""Bases in fewer bits: what bitsandbytes packs of a model, how, and how many bytes that takes."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from forgetless.models.weights import weight_shape

Format = Literal["nf4", "int8"]

FORMATS: dict[Format, str] = {
    "nf4": "4 bits (nf4, double quantisation)",
    "int8": "8 bits (LLM.int8())",
}
"""What a base can be packed in, and its name in words."""

NF4_BLOCK, NF4_SCALES = 64, 256
"""Weights that share a scale, and scales that share one of their own."""


def quantisation(quantise: Format, compute: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is told; ``compute`` is the number format of products with 4-bit weights.

    nf4 with double quantisation is that of QLoRA (Dettmers et al. 2023, arXiv:2305.14314); int8 is
    LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339).
    """
    if quantise == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def unpacked_dtype(dtype: str, quantise: Format | None) -> str:
    """The number format of all that is not packed: QLoRA's bfloat16 where none is asked for."""
    return "bfloat16" if quantise is not None and dtype == "auto" else dtype


def unavailable(device: torch.device) -> str | None:
    """Why bitsandbytes cannot pack weights on a device, and what to do; None where it can."""
    if find_spec("bitsandbytes") is None:
        return "needs bitsandbytes, which is not installed: pip install 'forgetless[quantised]'"
    if find_spec("accelerate") is None:
        return "needs accelerate, which is not installed: pip install 'forgetless[train]'"
    import bitsandbytes  # optional, and takes seconds

    runs_on = getattr(bitsandbytes, "supported_torch_devices", {device.type})
    if device.type not in runs_on:
        return (
            f"does not run on {device.type} in bitsandbytes {bitsandbytes.__version__}, which "
            f"takes {', '.join(sorted(runs_on))}"
        )
    return None


def packing_of(model: Any) -> str | None:
    """What the weights of a loaded model are packed in, in words; None where they are not."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    if getattr(config, "load_in_8bit", False):
        return FORMATS["int8"]
    if getattr(config, "load_in_4bit", False):
        twice = ", double quantisation" if config.bnb_4bit_use_double_quant else ""
        return f"4 bits ({config.bnb_4bit_quant_type}{twice})"
    given = config if isinstance(config, dict) else vars(config)
    return str(getattr(given.get("quant_method"), "value", given.get("quant_method")))


def packed_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model that bitsandbytes packs when it is loaded, by name.

    All Linear and Conv1D but the output head, what is tied to the embeddings, and what the
    architecture keeps in float32.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    for name, module in model.named_modules():
        is_plain = type(module) is nn.Linear or isinstance(module, Conv1D)
        if is_plain and should_convert_module(name, kept):
            yield name, module


def bytes_as_loaded(model: Any, quantise: Format | None = None) -> int:
    """Bytes of a model's parameters and buffers, its packed layers as they are packed.

    The model is as it is before anything is packed, in the number format of the rest.
    """
    sizes = {w: w.numel() * w.element_size() for w in (*model.parameters(), *model.buffers())}
    if quantise is not None:
        for _, layer in packed_layers(model):
            sizes[layer.weight] = _packed_bytes(*weight_shape(layer), quantise)
    return sum(sizes.values())


def _packed_bytes(out_features: int, in_features: int, quantise: Format) -> int:
    """Bytes of one weight with its scales.

    int8: a byte a number and a float32 a row. nf4: half a byte a number, a byte for the scale of 64
    numbers, a float32 for that of 256 scales, and their tables of 16 and 256 values.
    """
    numbers = out_features * in_features
    if quantise == "int8":
        return numbers + 4 * out_features
    scales = -(-numbers // NF4_BLOCK)
    tables = 4 * (16 + 256 + 1)  # and the mean of the scales
    return -(-numbers // 2) + scales + 4 * -(-scales // NF4_SCALES) + tables
