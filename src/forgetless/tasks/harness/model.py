"""The harness's view of a model in memory, whose finished batches are kept. Imports lm_eval."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import nn
from transformers import PreTrainedTokenizerBase

from forgetless.core.errors import UserError
from forgetless.data.chat import Chat
from forgetless.tasks.continuations import continuation_logps
from forgetless.tasks.inference import padding_of, pads_left, require_numbers
from forgetless.tasks.journal import in_batches

__all__ = ["InMemory"]

# Texts that are written together.
_ROWS = 32

Request = tuple[Any, list[int], list[int]]
"""The texts of a request or None, and the tokens of its context and of its continuation."""


class InMemory(HFLM):
    """lm-eval's `HFLM` around a model object, batch by batch.

    Texts are made into tokens, cut and ended as `HFLM` does it. Continuations of one context share
    its forward, so their log-probabilities are those of `HFLM` but for rounding. A batch that an
    interrupted evaluation finished is not computed again (see `forgetless.tasks.journal`), there is
    one progress bar, of ours, and requests that did not fit into the model are counted.

    Attributes:
        too_long: how many requests were cut on the left.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int | None
    ) -> None:
        # It may be given a padding token, which must be one that the model embeds.
        own = copy.deepcopy(tokenizer)
        if own.pad_token_id and padding_of(model, own) != own.pad_token_id:
            own.pad_token = own.eos_token or own.convert_ids_to_tokens(0)
        if (chat := Chat(own)).is_own:
            own.chat_template = chat.template  # which does not ask for today's date
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size or _ROWS)
        self.chosen = batch_size
        self.too_long = 0

    # ------------------------------------------------------------------------------ likelihoods

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text."""
        return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        rows = [[*context, *rest] for _, context, rest in requests]
        most = self.max_length + 1  # the last token is not read
        self.too_long += sum(len(row) > most for row in rows)
        found = continuation_logps(
            self.model,
            [row[-most:] for row in rows],
            [len(rest) for *_, rest in requests],
            batch_size=override_bs or self.chosen,
        )
        require_numbers([value for value, _ in found])
        return found

    # ------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each prompt up to its stop texts."""
        prompts = [request.args[0] for request in requests]
        settings = [request.args[1] for request in requests]
        lengths = [len(self.tok_encode(prompt)) for prompt in prompts]
        self._count_too_long(lengths, settings)
        compute = super().generate_until
        size = self.batch_size if pads_left(self.model) else 1
        groups: dict[str, list[int]] = {}
        for place, setting in enumerate(settings):
            groups.setdefault(json.dumps(setting, sort_keys=True, default=str), []).append(place)
        batches = []
        for group in groups.values():
            order = sorted(group, key=lambda place: (-lengths[place], prompts[place]))
            batches += [order[i : i + size] for i in range(0, len(order), size)]

        def one_batch(places: Sequence[int]) -> list[str]:
            return list(compute([requests[i] for i in places], disable_tqdm=True))

        return in_batches("generate_until", prompts, batches, one_batch, settings)

    def _count_too_long(self, lengths: Sequence[int], settings: Sequence[dict[str, Any]]) -> None:
        new = [
            int(normalize_gen_kwargs(setting, self.max_gen_toks)["max_gen_toks"])
            for setting in settings
        ]
        if max(new) >= self.max_length:
            raise UserError(
                f"an answer may have {max(new)} tokens, and the model reads {self.max_length} at "
                "most, so nothing is left for the question; give a smaller max_new_tokens"
            )
        self.too_long += sum(
            length > self.max_length - steps for length, steps in zip(lengths, new, strict=True)
        )
