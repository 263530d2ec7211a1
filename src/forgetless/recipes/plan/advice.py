"""What a plan is made for, and the advised settings, each with its reason and its source.

A rule of thumb is called one. Nothing here is a promise: a number from a paper is what the paper
measured on its models, and one from the pilot is one seed on the small pocket model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.data.held import EVERY
from forgetless.data.modality import modality_of
from forgetless.data.texts import SELF
from forgetless.models.load import head_of, meta_model
from forgetless.models.quantised import FORMATS, Format
from forgetless.models.targets import target_layers
from forgetless.models.text import positions_of
from forgetless.models.weights import weight_shape
from forgetless.recipes.recipe import Recipe

# ---- what it is for ------------------------------------------------------------------------------

LONGEST_ROW = 2048
"""Tokens of a row of raw text, and of the longest example, beyond which nothing is advised."""

COVERED = 0.99
"""Share of the examples that are not to be cut."""

TOO_MUCH_PADDING = 0.4
"""Share of padding in a batch from which packing is advised."""


@dataclass(frozen=True)
class Base:
    """A base by its config.

    Attributes:
        model: its shapes, on the meta device, in the number format of the stored weights.
    """

    name: str
    model: Any

    @classmethod
    def find(cls, name: str, attn_implementation: str | None = None) -> Base:
        """The base of a name, as `meta_model` finds it; a folder needs no weights for this.

        Raises:
            UserError: as `meta_model`; or no causal language model, for which all advice is.
        """
        model = meta_model(name, weights=False, attn_implementation=attn_implementation)
        head = head_of(model)
        if head is not None and head.modality != "language":
            raise UserError(f"plans are for causal language models, and {name!r} is {head.noun}")
        return cls(name, model)

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def width(self) -> int:
        """Its hidden size."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def positions(self) -> int | None:
        """Most tokens of a sequence; None where the architecture has no limit."""
        return positions_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored weights."""
        found: torch.dtype = next(self.model.parameters()).dtype
        return found

    @property
    def largest_rank(self) -> int:
        """The shortest side of the layers that an adapter is for."""
        return min(min(weight_shape(layer)) for layer in target_layers(self.model).values())


@dataclass(frozen=True)
class Rows:
    """Training data as its base's tokens.

    Attributes:
        kind: ``text``, ``prompt_completion`` or ``messages``.
        padding: share of padding in batches of 8 without packing.
        lengths: tokens of each row, packed where that is advised.
        several: whether a row holds several sequences.
    """

    kind: str
    examples: int
    max_length: int
    pack: bool
    padding: float
    lengths: Sequence[int]
    several: bool

    @property
    def is_text(self) -> bool:
        """Whether it is raw text."""
        return self.kind == "text"

    @classmethod
    def of(cls, path: str, base: Base) -> Rows:
        """The rows of a file or of another source of training data.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: broken data, or a base without a processor.
        """
        examples, modality = load_examples(path), modality_of(base.model)
        if examples.kind == "preference":
            raise UserError(f"{path} has pairs of answers, without advice: see training.preference")
        processor = modality.load_processor(base.name, weights=False)

        def read(max_length: int, pack: bool) -> tuple[list[int], bool]:
            rows = modality.rows(examples, processor, max_length=max_length, pack=pack)
            return [sum(rows[index]["lengths"]) for index in range(len(rows))], rows.several

        most = min(base.positions or LONGEST_ROW, LONGEST_ROW)
        whole, _ = read(base.positions or 2**30, False)
        can_pack = _takes_masks(base.model)
        if examples.kind == "text":
            length = max(2, min(most, sum(whole) if can_pack else max(whole)))
            padding, pack = 0.0, can_pack
        else:
            covering = sorted(whole)[math.ceil(COVERED * len(whole)) - 1]
            step = 64 if covering > 64 else 8
            length = min(most, step * math.ceil(covering / step))
            padding = _padding([min(n, length) for n in whole])
            pack = can_pack and padding > TOO_MUCH_PADDING
        lengths, several = read(length, pack)
        return cls(examples.kind, len(examples), length, pack, padding, lengths, several)

    @classmethod
    def asked(cls, recipe: Recipe, base: Base) -> Rows:
        """The rows of the new task as a recipe has them.

        Raises:
            FileNotFoundError, UserError: as `of`.
        """
        data, modality = recipe.data, modality_of(base.model)
        examples = load_examples(data.sources[0][0], **data.reading)
        processor = modality.load_processor(base.name, weights=False)
        rows = modality.rows(examples, processor, max_length=data.max_length, pack=data.pack)
        lengths = [sum(rows[index]["lengths"]) for index in range(len(rows))]
        padding = 0.0 if rows.several else _padding(lengths)
        return cls(
            examples.kind,
            len(examples),
            data.max_length,
            rows.several,
            padding,
            lengths,
            rows.several,
        )


def _takes_masks(model: Any) -> bool:
    """Whether the attention of a model without weights takes a mask of tokens by tokens.

    Packed sequences need one. Where the shapes alone do not tell, a run does, which asks the model.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")

    def runs(**more: Any) -> bool:
        try:
            model(input_ids=tokens, use_cache=False, **more)
        except Exception:  # whatever a model raises over shapes that it does not know
            return False
        return True

    with torch.no_grad():
        return runs(attention_mask=tokens.new_ones(1, 1, 2, 2, dtype=torch.bool)) or not runs()


def _padding(lengths: Sequence[int]) -> float:
    """Share of padding in random batches of 8."""
    drawn = random.Random(0).sample(lengths, len(lengths))
    parts = [drawn[start : start + 8] for start in range(0, len(drawn), 8)]
    return 1 - sum(lengths) / sum(max(part) * len(part) for part in parts)


# ---- the advice ----------------------------------------------------------------------------------

GOALS = ("learn", "balance", "keep")

BIDERMAN = "Biderman et al. 2024, arXiv:2405.09673"
REPLICATION = (
    "a replication of July 2026 (1,035 runs, Llama-2-7B and Qwen2.5-7B; known from notes of it)"
)
PILOT = "docs/results/pocket-pilot.md (1.2 M weights, one seed)"
CURVES = "docs/results/pocket-curves.md (1.2 M weights, three seeds)"
AFTERCARE = "docs/results/aftercare.md (one seed)"
RULE = "rule of thumb"
OWN = "docs/plan.md"
ASKED = "as asked"

WIDTH = 4096
"""Hidden size of Llama-2-7B, on which the papers measured."""

RATE = 2e-4
"""LoRA's rate at that width."""

RATE_POWER = 0.8
"""How the rate falls with the width; through LoRA's and full fine-tuning's rates in the pilot."""

_RATE_OF = {"full": 0.1, "lora_null_v2": 10 / 3, "pissa": 1 / 3, "intermediate": 1 / 3}
"""The rate chosen in the pilot over LoRA's; 1 where it was the same or is not known."""

_MEASURED_RATES = {*_RATE_OF, "lora", "milora", "lora_null_v1"}

RANK = {"learn": 256, "balance": 256, "keep": 16}
"""Ranks at that width."""

LEAST_RANK = 16

SAMPLE_TOKENS = 256
"""Tokens of a text whose activations are collected."""

TOKENS_A_DIRECTION = 10
"""Tokens for each direction of the widest input, so that those hardly used are told."""

LEAST_SAMPLES = 32


@dataclass(frozen=True)
class Advice:
    """One setting.

    Attributes:
        key: of the recipe, such as ``training.epochs``.
    """

    key: str
    value: Any
    reason: str
    source: str


@dataclass(frozen=True)
class Wishes:
    """What the user wants of a plan.

    Attributes:
        goal: ``learn`` as much as can be, ``keep`` what the base knew, or a ``balance``.
        method: None for the advised one.
        rank: None for the advised one.
        keep: text of the knowledge to keep; None where there is none.
        test: held-out examples of the new task, or the share of its data to hold out, such as
            "0.1"; None where there are none.
        memory: bytes that the run may take; None for as many as it needs.
        quantise: what the base is packed in, see `forgetless.models.quantised`.
    """

    goal: str = "balance"
    method: str | None = None
    rank: int | None = None
    keep: str | None = None
    test: str | None = None
    memory: int | None = None
    quantise: Format | None = None

    @property
    def share(self) -> float | None:
        """What is to be held out of the data."""
        try:
            share = float(self.test or "")
        except ValueError:
            return None
        return share if 0 < share < 1 else None


def advise(base: Base, rows: Rows, wishes: Wishes) -> list[Advice]:
    """The settings that follow from base, data and wishes; what they cost decides the rest."""
    method = _method(rows, wishes)
    adapter = [] if method.value == "full" else _adapter(base, method.value, wishes)
    rank = adapter[0].value if adapter else 0
    return [
        method,
        *adapter,
        _rate(base, method.value, rank),
        *_duration(rows, wishes),
        _weight_decay(method.value, wishes),
        _replay(wishes),
        *_repair(base, method.value, rows, wishes),
        *_rows(base, rows),
        *_number_formats(base, method.value, wishes.quantise),
    ]


def _method(rows: Rows, wishes: Wishes) -> Advice:
    value, source = "lora", BIDERMAN
    if rows.is_text and wishes.goal == "learn" and wishes.quantise is None:
        value = "full"
        reason = (
            "on raw text full fine-tuning learned more than any LoRA (HumanEval .263 against .224 "
            "of rank 256 after 20B tokens of code), and forgot more"
        )
    elif rows.is_text:
        reason = (
            "on raw text LoRA of rank 256 learned less than full fine-tuning (HumanEval .224 "
            "against .263) and forgot less (.617 against .545 kept of .671); --goal learn advises "
            "full"
        )
    elif wishes.goal == "keep" and wishes.keep is not None:
        value, source = "lora_null_v2", CURVES
        reason = (
            "on the pocket model it kept 99 % or more of the facts that its text named, LoRA 12 to "
            "90 %; elsewhere LoRA with weight decay was ahead of LoRA-Null, so compare the two"
        )
    else:
        reason = (
            "on instructions LoRA of high rank learned code as well as full fine-tuning (HumanEval "
            ".498 and .497 at best) and forgot less"
        )
    if wishes.method is not None and wishes.method != value:
        return Advice("adapter.method", wishes.method, f"{ASKED}; advised is {value}", ASKED)
    return Advice("adapter.method", value, reason, source)


def _adapter(base: Base, method: str, wishes: Wishes) -> list[Advice]:
    """Rank, alpha and layers."""
    if wishes.rank is not None:
        rank = Advice("adapter.rank", wishes.rank, ASKED, ASKED)
    else:
        asked = RANK[wishes.goal]
        share = asked * min(1.0, base.width / WIDTH)
        value = min(max(LEAST_RANK, 2 ** int(math.log2(share))), base.largest_rank)
        reason = "rank 256 learned most; 16 to 64 were not enough for code"
        if wishes.goal == "keep":
            reason = "rank 16 forgot least, and learned least"
        if value != asked:
            reason += f"; {asked} at width {WIDTH}, here in proportion, at least {LEAST_RANK}: "
            reason += RULE
        rank = Advice("adapter.rank", value, reason, BIDERMAN)
    alpha, source = float(rank.value), "arXiv:2404.02948, 2406.09044, 2503.02659"
    reason = "scaling 1, as the papers of the starts from an SVD have it"
    if method == "lora":
        alpha, source = 2.0 * rank.value, BIDERMAN
        reason = "twice the rank was best at rank 256, at every learning rate"
    layers = "all layers or the MLPs alone learned more than attention, at every rank"
    return [
        rank,
        Advice("adapter.alpha", alpha, reason, source),
        Advice("adapter.target_modules", "all-linear", layers, BIDERMAN),
    ]


def _rate(base: Base, method: str, rank: int) -> Advice:
    value = RATE * (WIDTH / base.width) ** RATE_POWER * _RATE_OF.get(method, 1.0)
    reason = "2e-4 (4096 / width)^0.8 for LoRA, fitted to the rates at 7B and in the pilot"
    if method in _RATE_OF:
        reason += f"; times {_RATE_OF[method]:.2g} for {method}, as in the pilot"
    elif method not in _MEASURED_RATES:
        reason += f"; LoRA's own for {method}, of which no rate is known here"
    if rank >= RANK["learn"]:
        value /= 2
        reason += "; half at rank 256, where 2e-4 was unstable"
    least, most = rounded(value / 5), rounded(value * 5)
    reason += f". Sweep {least:g} to {most:g}: the highest stable rate learned most (--find-lr)"
    source = f"{RULE}; {BIDERMAN}; {PILOT}"
    return Advice("training.learning_rate", rounded(value), reason, source)


def rounded(rate: float) -> float:
    """The nearest of 1, 2, 3 and 5 times a power of ten, on a logarithmic scale."""
    power = math.floor(math.log10(rate))
    steps = [digit * 10.0**p for p in (power, power + 1) for digit in (1, 2, 3, 5)]
    nearest = min(steps, key=lambda step: abs(math.log(step / rate)))
    return float(f"{nearest:.0e}")


def _duration(rows: Rows, wishes: Wishes) -> list[Advice]:
    """Epochs and schedule."""
    if rows.is_text:
        once = "one pass: the more tokens, the more was forgotten, by every rank and by full"
        falls = "inverse square root, then a cool-down over the last 20 %"
        return [
            Advice("training.epochs", 1.0, once, BIDERMAN),
            Advice("training.schedule", "inverse_sqrt", falls, BIDERMAN),
            Advice("training.cooldown_ratio", 0.2, "see schedule", BIDERMAN),
            Advice("training.warmup_ratio", 0.05, "see schedule; the share is ours", RULE),
        ]
    epochs = 4.0
    reason = "LoRA was best at 4 epochs of code and near its best of mathematics; more forgot more"
    if wishes.goal == "keep":
        epochs = 2.0
        reason = (
            "longer training forgot more: of .671, LoRA of rank 64 kept .651 at 2 epochs, .580 at 8"
        )
    return [
        Advice("training.epochs", epochs, reason, BIDERMAN),
        Advice("training.schedule", "cosine", "after a warm-up over 10 %", BIDERMAN),
        Advice("training.warmup_ratio", 0.1, "see schedule", BIDERMAN),
    ]


def _weight_decay(method: str, wishes: Wishes) -> Advice:
    key = "training.weight_decay"
    if method == "full":
        reason = "on the weights themselves it neither learned nor forgot less, and harmed later"
        return Advice(key, 0.0, reason, BIDERMAN)
    if wishes.goal == "learn":
        return Advice(key, 0.0, "as the paper trained LoRA", BIDERMAN)
    reason = (
        "pulls the adapter's move towards the base: no other start was better in both learning and "
        "keeping than LoRA with 0.3 in 25 of 26 comparisons; on the pocket model it kept 3 to 4 "
        "points more and learned as much"
    )
    return Advice(key, 0.3, reason, f"{REPLICATION}; {CURVES}")


def _repair(base: Base, method: str, rows: Rows, wishes: Wishes) -> list[Advice]:
    """The repair after the training, and how much text it looks at."""
    if not rows.is_text and rows.examples < EVERY:  # none could be held out to choose a strength
        return []
    if wishes.goal == "learn" or method in ("full", "lora_null_v2"):
        return []
    reason = (
        "after the training, what the text to keep uses is taken out of the update: on "
        "SmolLM2-135M that took off three quarters of the drift for 0.7 % of what was learned"
    )
    text = "your text" if wishes.keep else "what the base writes itself, which did nearly as well"
    most = "the strongest that gives up no more than this share of what was learned is taken"
    advice = [
        Advice("repair.strength", [0.3, 1.0], reason, AFTERCARE),
        Advice("repair.max_drop", 0.02, most, RULE),
        Advice("repair.keep", wishes.keep or SELF, text, AFTERCARE),
    ]
    if wishes.keep is None:  # the base writes as much as it takes
        return advice
    widest = max(weight_shape(layer)[1] for layer in target_layers(base.model).values())
    samples = max(LEAST_SAMPLES, math.ceil(TOKENS_A_DIRECTION * widest / SAMPLE_TOKENS))
    words = (
        f"so many texts of {SAMPLE_TOKENS} tokens are {TOKENS_A_DIRECTION} times the widest input"
    )
    return [*advice, Advice("calibration.samples", samples, words, RULE)]


REPLAYED = 0.1


def _replay(wishes: Wishes) -> Advice:
    if wishes.keep is None:
        reason = "there is no old text to replay; --keep FILE names some"
        return Advice("data.train", 0.0, reason, RULE)
    reason = (
        "old text in every epoch: on the pocket model LoRA kept 98 to 99 % of the facts with "
        "it, 93 to 96 % with a share of 0.01, and 82 % without"
    )
    return Advice("data.train", REPLAYED, reason, CURVES)


def _rows(base: Base, rows: Rows) -> list[Advice]:
    """Length and packing."""
    if rows.is_text:
        most = f"the model's positions, at most {LONGEST_ROW}; the paper's rows had 4096"
        fills = "raw text fills whole rows; no document sees another"
        if not rows.pack:
            fills = "a document a row: this model does not keep the documents of a row apart"
        return [
            Advice("data.max_length", rows.max_length, most, RULE),
            Advice("data.pack", rows.pack, fills, "this package"),
        ]
    length = "holds 99 % of the examples whole"
    if rows.max_length in (LONGEST_ROW, base.positions):
        length = f"the most that the model ({base.positions} positions) or memory should take"
    padding = f"{rows.padding:.0%} of a batch would be padding"
    padding += "; no example sees another" if rows.pack else ""
    return [
        Advice("data.max_length", rows.max_length, length, "the data"),
        Advice("data.pack", rows.pack, padding, "the data"),
    ]


def _number_formats(base: Base, method: str, quantise: Format | None) -> list[Advice]:
    if quantise is not None:
        packed = f"{FORMATS[quantise]} by bitsandbytes; what is trained stays float32"
        bf16 = "packed weights are computed with in bfloat16"
        return [
            Advice("quantise", quantise, packed, ASKED),
            Advice("training.precision", "bf16", bf16, "QLoRA, arXiv:2305.14314"),
        ]
    if base.dtype not in (torch.float16, torch.bfloat16):
        plain = "the weights are stored in 32 bits; bf16 is faster where the device has it"
        return [Advice("training.precision", "float32", plain, "the model")]
    bf16 = "the weights are stored in 16 bits; what is trained stays float32"
    found = [Advice("training.precision", "bf16", bf16, "the model")]
    if method == "full":
        reason = "trained weights of 16 bits lose small updates"
        found.append(Advice("dtype", "float32", reason, "this package"))
    elif base.dtype == torch.float16:
        reason = "rounds the stored float16; else each step makes bfloat16 copies of all weights"
        found.append(Advice("dtype", "bfloat16", reason, OWN))
    return found


def batch_advice(rows: int, epochs: float, examples: float = 1.0) -> Advice:
    """Sequences of an optimiser step: about a hundred steps or more, 8 to 128 examples a step.

    A row holds several `examples` where they are packed.
    """
    wanted = max(1.0, rows * epochs / 100)
    least = 2 ** max(0, round(math.log2(8 / examples)))
    value = min(max(least, 2 ** int(math.log2(wanted))), 128)
    value = min(value, 2 ** int(math.log2(rows)))
    reason = "at least about 100 steps; the papers took 16 (MiLoRA) to 192 (Biderman et al.)"
    if examples > 1.5:
        reason += f"; a row holds {examples:.2g} examples"
    return Advice("batch", value, reason, RULE)
