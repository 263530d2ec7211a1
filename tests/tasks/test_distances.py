"""Distances between a model and its base: each against its formula, and within its memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from forgetless.core.errors import UserError
from forgetless.tasks import distances as module
from forgetless.tasks import logits
from forgetless.tasks.distances import distances
from forgetless.tasks.kl import KL
from forgetless.tasks.logits import has_a_head
from forgetless.tasks.perplexity import Perplexity
from forgetless.tasks.texts import Piece
from tests.families import FAMILIES, VOCAB
from tests.tiny import tokenizer as characters

CAUSAL = ["llama", "qwen2", "gpt2"]
ROWS = [[5, 6, 7, 8, 9, 10, 11], [30, 31], list(range(3, 60)), [9]]


class Table(nn.Module):
    """A language model whose next token depends on the last one alone: logits = table[token]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(is_encoder_decoder=False, vocab_size=len(table))

    def can_generate(self) -> bool:
        return True

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def adapted(family: str = "llama", *, moved: bool, targets: Any = "all-linear") -> PeftModel:
    peft = get_peft_model(FAMILIES[family].model(), LoraConfig(r=4, target_modules=targets))
    if moved:
        torch.manual_seed(1)
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.3)
    return peft.eval()


def log_softmax_of(model: nn.Module, ids: list[int]) -> Tensor:
    """(tokens, vocabulary), in float64."""
    with torch.no_grad():
        given = torch.tensor([ids])
        logits = model(given, attention_mask=torch.ones_like(given)).logits[0]
        return torch.as_tensor(logits.double().log_softmax(-1))


def formulas(log_p: Tensor, log_q: Tensor, ids: list[int]) -> dict[str, float]:
    """What a piece adds up, as the definitions say it."""
    p, q, following = log_p.exp(), log_q.exp(), torch.tensor(ids[1:], dtype=torch.long)
    places = torch.arange(len(ids) - 1)
    return {
        "tokens": len(ids),
        "kl": float((p * (log_p - log_q)).sum()),
        "reverse_kl": float((q * (log_q - log_p)).sum()),
        "cross_entropy": float(-(p * log_q).sum()),
        "base_entropy": float(-(p * log_p).sum()),
        "agreeing": float((log_p.argmax(-1) == log_q.argmax(-1)).sum()),
        "targets": len(ids) - 1,
        "base_loss": float(-log_p[places, following].sum()),
        "loss": float(-log_q[places, following].sum()),
    }


@pytest.mark.parametrize("family", CAUSAL)
def test_every_distance_is_its_formula_whatever_the_batch(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = FAMILIES[family].model(), FAMILIES[family].model(seed=1)
    expected = [formulas(log_softmax_of(base, r), log_softmax_of(tuned, r), r) for r in ROWS]
    for batch_size, chunk in [(1, 1 << 23), (3, 200), (None, 1), (None, 1 << 23)]:
        monkeypatch.setattr(logits, "_CHUNK_LOGITS", chunk)
        found = distances(tuned, ROWS, max_length=64, reference=base, batch_size=batch_size)
        for text, (piece, by_hand) in enumerate(zip(found, expected, strict=True)):
            assert (piece.text, piece.start) == (text, 0)
            for name, value in by_hand.items():
                assert piece.sums[name] == pytest.approx(value, abs=1e-6 * piece.sums["tokens"])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_float32_logits_give_the_divergence_of_float64(scale: float) -> None:
    torch.manual_seed(0)
    base = 5 * torch.randn(40, 3000)
    tuned = base + scale * torch.randn(40, 3000)
    log_p, log_q = base.double().log_softmax(-1), tuned.double().log_softmax(-1)
    following = torch.randint(3000, (40,))
    found = module._compare(base, tuned, following, torch.ones(40, dtype=torch.bool))
    for i in range(40):
        by_hand = formulas(log_p[i : i + 1], log_q[i : i + 1], [0])
        wanted = [by_hand[k] for k in ("kl", "reverse_kl", "cross_entropy", "base_entropy")]
        assert found[i, :4].tolist() == pytest.approx(wanted, abs=1e-6, rel=1e-6)
    assert torch.allclose(found[:, 5], -log_p[range(40), following], atol=1e-5)


def test_divergence_by_hand_and_where_something_is_never_said() -> None:
    base = Table(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log())
    tuned = Table(torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log())
    (piece,) = distances(tuned, [[0, 1, 0]], max_length=8, reference=base)
    assert piece.sums["kl"] == pytest.approx(2 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5)))
    assert piece.sums["cross_entropy"] == pytest.approx(3 * math.log(2))
    assert piece.sums["base_loss"] == pytest.approx(-math.log(0.75) - math.log(0.5))
    never = Table(torch.tensor([[0.0, 1.0], [0.5, 0.5]]).log())
    (piece,) = distances(tuned, [[0]], max_length=8, reference=never)
    assert piece.sums["kl"] == pytest.approx(math.log(2))
    assert piece.sums["base_entropy"] == 0
    assert piece.sums["reverse_kl"] == math.inf
    assert (piece.sums["targets"], piece.sums["loss"], piece.sums["base_loss"]) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_at_a_distance_of_exactly_zero(dtype: torch.dtype) -> None:
    found = distances(adapted(moved=False).to(dtype), ROWS, max_length=16)
    assert all((piece.sums["kl"], piece.sums["reverse_kl"]) == (0, 0) for piece in found)
    assert all(piece.sums["agreeing"] == piece.sums["tokens"] for piece in found)
    assert all(piece.sums["loss"] == piece.sums["base_loss"] for piece in found)


def test_a_base_reads_once_how_far_it_is_from_itself() -> None:
    base: Any = FAMILIES["llama"].model()
    passes: list[int] = []
    base.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    found = distances(base, ROWS, max_length=64, reference=base)
    assert len(passes) == 1
    assert found == distances(base, ROWS, max_length=64, reference=FAMILIES["llama"].model())
    assert all(piece.sums["kl"] == 0 for piece in found)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_the_reference_of_an_adapter_is_the_model_without_it(targets: Any) -> None:
    model = adapted("qwen2", moved=True, targets=targets)
    without = distances(model, ROWS, max_length=64)
    with_base = distances(model, ROWS, max_length=64, reference=FAMILIES["qwen2"].model())
    for one, other in zip(without, with_base, strict=True):
        assert one[:2] == other[:2]
        assert one.sums == pytest.approx(other.sums, rel=1e-5)
    assert min(piece.sums["kl"] for piece in without) > 1e-3


def test_what_a_model_does_to_its_logits_is_done() -> None:
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.05,
    )
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Gemma2ForCausalLM(config).eval())
    base, tuned = models
    assert has_a_head(base)
    (found,) = distances(tuned, ROWS[:1], max_length=64, reference=base)
    by_hand = formulas(log_softmax_of(base, ROWS[0]), log_softmax_of(tuned, ROWS[0]), ROWS[0])
    assert found.sums["kl"] == pytest.approx(by_hand["kl"], abs=1e-6)


class _LargestWithVocabulary(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most tokens for which numbers over the vocabulary were made at once; weights are none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = 0
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        made = function(*arguments, **(options or {}))
        wide = isinstance(made, Tensor) and made.ndim > 1 and made.shape[-1] == VOCAB
        if wide and made.untyped_storage().data_ptr() not in self.weights:
            self.tokens = max(self.tokens, made.numel() // VOCAB)
        return made


def test_logits_are_made_for_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(moved=True)
    monkeypatch.setattr(logits, "_CHUNK_LOGITS", 5 * VOCAB)
    with _LargestWithVocabulary(model) as largest:
        found = distances(model, [[5] * 20] * 7, max_length=20)
    assert len(found) == 7
    # One token of each row, with which the model was read; at most 5 tokens that are compared.
    assert largest.tokens == 7


def test_batches_are_smaller_where_a_head_cannot_be_asked_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    model = Table(torch.randn(VOCAB, VOCAB))
    model.register_forward_hook(lambda *call: seen.append(call[2].logits.numel()))
    monkeypatch.setattr(module, "_BATCH_NUMBERS", 2 * 20 * VOCAB)
    assert len(distances(model, [[5] * 20] * 7, max_length=20, reference=model)) == 7
    assert max(seen) <= 2 * 20 * VOCAB


def test_tokens_that_an_adapter_puts_before_the_text_do_not_count() -> None:
    base = FAMILIES["llama"].model()
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(FAMILIES["llama"].model(), config).eval()
    (found,) = distances(model, ROWS[:1], max_length=64)
    log_q = log_softmax_of(model, ROWS[0])[3:]
    by_hand = formulas(log_softmax_of(base, ROWS[0]), log_q, ROWS[0])
    assert found.sums["kl"] == pytest.approx(by_hand["kl"], abs=1e-5)
    assert found.sums["loss"] == pytest.approx(by_hand["loss"], abs=1e-5)


@contextmanager
def _forward_left_alone(model: nn.Module) -> Iterator[None]:
    before = {name: set(part.__dict__) for name, part in model.named_modules()}
    yield
    assert {name: set(part.__dict__) for name, part in model.named_modules()} == before


def test_the_model_is_put_together_again() -> None:
    model = adapted(moved=True)
    with _forward_left_alone(model):
        distances(model, ROWS, max_length=16)
    broken = Table(torch.zeros(4, 4))
    with _forward_left_alone(model), pytest.raises(UserError, match="4 tokens in its vocabulary"):
        distances(model, [[1, 2]], max_length=8, reference=broken)


def test_distances_need_the_base_a_model_was_made_from() -> None:
    model = FAMILIES["llama"].model()
    with pytest.raises(UserError, match=r"pass reference=base, or a PeftModel.* got LlamaFor"):
        distances(model, ROWS, max_length=8)
    with pytest.raises(UserError, match=f"has 4 tokens in its vocabulary and the model {VOCAB}"):
        distances(model, [[1, 2]], max_length=8, reference=Table(torch.zeros(4, 4)))


@pytest.mark.parametrize("family", ["t5", "bert", "vit"])
def test_models_that_do_not_continue_text_are_refused(family: str) -> None:
    model = FAMILIES[family].model()
    with pytest.raises(UserError, match=f"causal language model, got {type(model).__name__}"):
        distances(model, [[1, 2]], max_length=8, reference=model)


# ---------------------------------------------------------------------------------- the task


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = ["one", "a second prompt", "and a third one"]
    path.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return path


def tiny(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(characters()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def test_long_texts_are_cut_and_short_ones_are_items(texts: Path) -> None:
    base, tuned = tiny(0), tiny(1)
    result = KL(texts, max_length=5).evaluate(tuned, characters(), reference=base)
    assert [item.prompt for item in result.items] == ["one", "a second prompt", "and a third one"]
    assert [item.weight for item in result.items] == [3, 15, 15]
    assert (result.metric, result.n, result.extra["tokens"]) == ("kl", 3, 33)


def test_one_pass_gives_every_distance(texts: Path) -> None:
    base, tuned = tiny(0), tiny(1)
    result = KL(texts).evaluate(tuned, characters(), reference=base)
    extra = result.extra
    backwards = KL(texts).evaluate(base, characters(), reference=tuned)
    assert extra["reverse_kl"] == pytest.approx(backwards.value, abs=1e-6)
    assert backwards.extra["reverse_kl"] == pytest.approx(result.value, abs=1e-6)
    assert extra["reverse_kl_stderr"] == pytest.approx(backwards.stderr, abs=1e-6)
    assert result.value == pytest.approx(extra["soft_cross_entropy"] - extra["base_entropy"])
    for name, model in (("loss", tuned), ("base_loss", base)):
        loss = Perplexity(texts).evaluate(model, characters())
        assert extra[name] == pytest.approx(loss.value, abs=1e-6)
    ratio = extra["perplexity"] / extra["base_perplexity"]
    assert extra["perplexity_ratio"] == pytest.approx(ratio)
    assert extra["loss_change"] == pytest.approx(math.log(ratio))
    assert KL(texts).evaluate(base, characters(), reference=base).extra["top1_agreement"] == 1
    assert extra["top1_agreement"] < 1


def test_a_distance_that_is_infinite_is_left_out() -> None:
    from forgetless.tasks.kl import _further

    sums = {"tokens": 2, "targets": 0, "kl": 0.5, "reverse_kl": math.inf, "agreeing": 1.0}
    piece = Piece(0, 0, sums | {"cross_entropy": 1.5, "base_entropy": 1.0})
    extra = _further([piece])
    assert extra == {
        "tokens": 2,
        "soft_cross_entropy": 0.75,
        "base_entropy": 0.5,
        "top1_agreement": 0.5,
    }
