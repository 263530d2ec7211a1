"""The harness's view of a model in memory, whose finished batches are kept. Imports lm_eval."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import nn
from transformers import PreTrainedTokenizerBase

from forgetless.core.errors import UserError
from forgetless.data.chat import Chat
from forgetless.models.state import base_of, evaluating
from forgetless.tasks.continuations import continuation_logps
from forgetless.tasks.generation import Decoder
from forgetless.tasks.inference import padding_of, pads_left, require_numbers, rows_with_cache
from forgetless.tasks.journal import in_batches

# Texts that transformers writes together.
_ROWS = 32

_IDLE_WHEN_GREEDY = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens"),
    *("use_cache", "cache_implementation", "transformers_version", "_from_model_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}
"""Settings of a model's generation that no greedy answer depends on, or that a task sets anew."""

Request = tuple[Any, list[int], list[int]]
"""The texts of a request or None, and the tokens of its context and of its continuation."""


class InMemory(HFLM):
    """lm-eval's `HFLM` around a model object, batch by batch.

    Texts are made into tokens, cut and ended as `HFLM` does it. Continuations of one context share
    its forward, so their log-probabilities are those of `HFLM` but for rounding; a greedy answer is
    what `HFLM` gives to its prompt alone, and leaves the batch where it ends. A batch that an
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
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
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
        groups: dict[str, list[int]] = {}
        for place, setting in enumerate(settings):
            groups.setdefault(json.dumps(setting, sort_keys=True, default=str), []).append(place)
        longest = max(lengths) + max(self._new_tokens(setting) for setting in settings)
        together = self.chosen or rows_with_cache(self.model, longest)
        size = together if pads_left(self.model) else 1
        batches = []
        for group in groups.values():
            order = sorted(group, key=lambda place: (-lengths[place], prompts[place]))
            batches += [order[i : i + size] for i in range(0, len(order), size)]

        def one_batch(places: Sequence[int]) -> list[str]:
            setting = settings[places[0]]
            if self._is_plain(setting):
                return self._written([prompts[i] for i in places], setting)
            own = super(InMemory, self).generate_until
            parts = [places[i : i + _ROWS] for i in range(0, len(places), _ROWS)]
            return [
                text
                for part in parts
                for text in own([requests[i] for i in part], disable_tqdm=True)
            ]

        with evaluating(self.model):
            how: dict[str, Any] = {"divisible": True}
            return in_batches("generate_until", prompts, batches, one_batch, settings, **how)

    def _new_tokens(self, setting: dict[str, Any]) -> int:
        return int(normalize_gen_kwargs(setting, self.max_gen_toks)["max_gen_toks"])

    def _is_plain(self, setting: dict[str, Any]) -> bool:
        """Whether each token is the most probable one, and nothing changes the logits."""
        asked: dict[str, Any] = dict(normalize_gen_kwargs(setting, self.max_gen_toks))
        plain = {"until", "max_gen_toks", "do_sample", "temperature"}
        own = getattr(base_of(self.model), "generation_config", None)
        changed = set() if own is None else set(own.to_diff_dict()) - _IDLE_WHEN_GREEDY
        return not (asked["do_sample"] or asked.get("temperature") or set(asked) - plain or changed)

    def _written(self, prompts: Sequence[str], setting: dict[str, Any]) -> list[str]:
        """What the model writes after prompts, ended as `HFLM` ends each alone."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(setting, self.max_gen_toks))
        until = handle_stop_sequences(kwargs["until"], eos=eos)
        steps = kwargs["max_gen_toks"]
        room = self.max_length - steps
        rows = [
            self.tok_batch_encode([prompt], left_truncate_len=room)[0][0].tolist()
            for prompt in prompts
        ]
        decoder = Decoder(self.model, self.tokenizer, steps, [text for text in until if text])
        texts = map(self.tok_decode, decoder.continuations(rows))
        return [postprocess_generated_text(text, until, self.think_end_token) for text in texts]

    def _count_too_long(self, lengths: Sequence[int], settings: Sequence[dict[str, Any]]) -> None:
        new = [self._new_tokens(setting) for setting in settings]
        if max(new) >= self.max_length:
            raise UserError(
                f"an answer may have {max(new)} tokens, and the model reads {self.max_length} at "
                "most, so nothing is left for the question; give a smaller max_new_tokens"
            )
        self.too_long += sum(
            length > self.max_length - steps for length, steps in zip(lengths, new, strict=True)
        )
