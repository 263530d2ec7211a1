"""The logits of some tokens of a batch, made from its last hidden states.

All logits of a batch, (rows, tokens, vocabulary), are often its largest tensor, and few are looked
at.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from forgetless.models.text import vocabulary_of
from forgetless.tasks.inference import accepts, device_of

# Logits (tokens x vocabulary) that are looked at in one go: 32 MB in float32.
_CHUNK_LOGITS = 1 << 23

# Tokens that a model reads at once: enough to be busy, and few enough for a CPU's caches. A GPU is
# waited for after every batch, so it gets larger ones.
_TOKENS = {"cpu": 1 << 10, "gpu": 1 << 15}
# Logits of all of them, where the head cannot be asked apart.
_LOGITS = {"cpu": 1 << 26, "gpu": 1 << 28}

Reader = Callable[[Tensor], Tensor]
"""Positions in the flattened batch -> logits (positions, vocabulary)."""


def rows_of_logits(model: nn.Module) -> int:
    """Of how many tokens the logits are looked at in one go."""
    return max(1, _CHUNK_LOGITS // (vocabulary_of(model) or 1 << 17))


def tokens_at_once(model: nn.Module) -> int:
    """How many tokens a batch may have that is read by `read`."""
    place = "cpu" if device_of(model).type == "cpu" else "gpu"
    if has_a_head(model):
        return _TOKENS[place]
    return min(_TOKENS[place], _LOGITS[place] // (vocabulary_of(model) or 1 << 17))


def read(model: nn.Module, batch: Mapping[str, Tensor], *, apart: bool | None = None) -> Reader:
    """What gives the logits of some tokens of a batch, which the model reads once.

    Of inputs (rows, tokens). The head is asked for these tokens alone where `apart`; None where it
    can be.
    """
    apart = has_a_head(model) if apart is None else apart
    return _read_in_parts(model, batch) if apart else _read_whole(model, batch)


def _read_whole(model: nn.Module, batch: Mapping[str, Tensor]) -> Reader:
    """From all logits of the batch, for models whose head cannot be asked alone.

    Prompt-learning adapters put tokens of their own before the text; these are not of the batch.
    """
    inputs = {key: value.to(device_of(model)) for key, value in batch.items()}
    length = inputs["input_ids"].shape[1]
    logits: Tensor = model(**inputs, use_cache=False).logits[:, -length:].flatten(0, 1)
    return lambda places: logits[places.to(logits.device)]


def _read_in_parts(model: nn.Module, batch: Mapping[str, Tensor]) -> Reader:
    """From the last hidden states, through the model's own head, whatever it does to its logits.

    The model reads the batch once, with the logits of one token. For others it is called again
    with its decoder standing still: it gives the hidden states that it gave before.
    """
    device, decoder = device_of(model), _decoder(model)
    inputs = {key: value.to(device) for key, value in batch.items()}
    outputs: list[Any] = []
    hook = decoder.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    if not outputs or not hasattr(outputs[0], "last_hidden_state"):
        return _read_whole(model, batch)
    output = outputs[0]
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)
    one = {key: value[:1, :1] for key, value in inputs.items()}

    def read(places: Tensor) -> Tensor:
        answer = copy.copy(output)
        answer.last_hidden_state = hidden[places.to(hidden.device)][None]
        with _standing_still(decoder, answer):
            logits: Tensor = model(**one, use_cache=False).logits[0]
        return logits

    return read


def has_a_head(model: nn.Module) -> bool:
    """Whether logits can be had from hidden states, as in transformers' decoder-only models."""
    plain = _plain(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    if not (hasattr(plain, "get_decoder") and accepts(model, "logits_to_keep")):
        return False
    decoder = plain.get_decoder()
    return isinstance(decoder, nn.Module) and decoder is not plain


def adapts_head(model: nn.Module) -> bool:
    """Whether any part of a model that has a head, but its decoder, is adapted."""
    inside = set(_decoder(model).modules())
    adapted = BaseTunerLayer | AuxiliaryTrainingWrapper
    return any(isinstance(part, adapted) for part in model.modules() if part not in inside)


def _plain(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _decoder(model: nn.Module) -> nn.Module:
    decoder: nn.Module = _plain(model).get_decoder()
    return decoder


@contextmanager
def _standing_still(decoder: nn.Module, output: Any) -> Iterator[None]:
    """Inside, the decoder gives `output` to whatever it is asked."""
    own = decoder.__dict__.get("forward")
    decoder.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
