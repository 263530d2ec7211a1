"""The loss of a step is the mean over its learned tokens, on every base and however it is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BlenderbotConfig,
    CTRLConfig,
    LlamaForCausalLM,
    MBartConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    RwkvConfig,
    XLNetConfig,
)

from forgetless.adapters.attachment import attach
from forgetless.core.errors import UserError
from forgetless.data.losses import own_loss, token_loss
from forgetless.data.packing import IGNORED, TokenRow, packed
from forgetless.models.load import load_tokenizer
from forgetless.models.targets import target_layers
from forgetless.statistics.gradients import collect_gradients
from forgetless.training.loop import train
from forgetless.training.settings import TrainingSettings
from tests.composites import COMPOSITE, SPECIAL, TEXT, VOCAB, built
from tests.families import FAMILIES

pytest_plugins = ["tests.tiny_fixtures"]

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "is_decoder": True,
    "is_encoder_decoder": False,
    **SPECIAL,
}


class CustomCode(LlamaForCausalLM):
    """As code on the hub often is: it takes any argument and divides by its own tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **_: Any):  # type: ignore[no-untyped-def]
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return output


def custom_code() -> PreTrainedModel:
    torch.manual_seed(0)
    return CustomCode(FAMILIES["llama"].model().config).eval()


def _of(config: Callable[[], PretrainedConfig]) -> Callable[[], PreTrainedModel]:
    return lambda: built(config())


BASES: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "gemma3": (_of(COMPOSITE["gemma3"]), ["q_proj", "v_proj"]),
    "gemma4": (_of(COMPOSITE["gemma4"]), ["per_layer_projection"]),
    "qwen2_5_vl": (_of(COMPOSITE["qwen2_5_vl"]), ["q_proj", "v_proj"]),
    "mbart": (_of(lambda: MBartConfig(**DECODER)), ["q_proj", "v_proj"]),
    "blenderbot": (_of(lambda: BlenderbotConfig(**DECODER)), ["q_proj", "v_proj"]),
    "custom code": (custom_code, ["q_proj", "v_proj"]),
    "ctrl": (
        _of(lambda: CTRLConfig(**SMALL, dff=48)),
        ["Wq"],
    ),
    "openai-gpt": (
        _of(lambda: OpenAIGPTConfig(**SMALL)),
        ["c_attn"],
    ),
    "rwkv": (
        _of(lambda: RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, **SPECIAL)),
        ["key"],
    ),
}


def rows() -> list[TokenRow]:
    """Sequences of different lengths, of which more or less is learned."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, learned in ((20, 1), (6, 4), (15, 12), (9, 2), (30, 3), (7, 5), (12, 11), (25, 2)):
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()
        made.append(
            TokenRow(ids, [IGNORED] * (length - learned) + ids[length - learned :], [length])
        )
    return made


def dataset(found: list[TokenRow]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({n: [getattr(r, n) for r in found] for n in TokenRow._fields})


@torch.no_grad()
def by_hand(model: Any) -> float:
    """Every sequence alone, every token from the logits before it."""
    losses: list[float] = []
    for row in rows():
        known = model(input_ids=torch.tensor([row.input_ids])).logits[0].float().log_softmax(-1)
        losses += [
            -known[i - 1, label].item() for i, label in enumerate(row.labels) if label != IGNORED
        ]
    return sum(losses) / len(losses)


def first_step(
    model: PeftModel, data: datasets.Dataset, tokenizer: Any, folder: Path, size: int, batches: int
) -> dict[str, float]:
    settings = TrainingSettings(
        learning_rate=1e-3,
        steps=1,
        batch_size=size,
        gradient_accumulation=batches,
        log_every=1,
        warmup_ratio=0.0,
    )
    train(model, tokenizer, data, settings, folder)
    line: dict[str, float] = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    return line


@pytest.mark.parametrize("base", BASES)
def test_a_step_is_the_mean_over_its_tokens_however_it_is_spread(
    base: str, tiny_base: Path, tmp_path: Path
) -> None:
    make, targets = BASES[base]
    right, norms = by_hand(make()), []
    for size, batches in ((8, 1), (3, 3)):
        model = attach(make(), "lora", rank=2, alpha=4, target_modules=targets)
        tokenizer, folder = load_tokenizer(str(tiny_base)), tmp_path / str(size)
        data = dataset(rows()[:8])
        line = first_step(model, data, tokenizer, folder, size, batches)
        assert line["loss"] == pytest.approx(right, rel=2e-4), (size, batches)
        norms.append(line["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 2, rel=1e-3)


@pytest.mark.parametrize("base", ["mbart", "blenderbot"])
def test_gradients_are_those_of_the_next_tokens(base: str) -> None:
    make, targets = BASES[base]
    assert not any("encoder_attn" in name for name in target_layers(make()))
    targets = [f"self_attn.{target}" for target in targets]
    batches = [
        {"input_ids": torch.tensor([r.input_ids]), "labels": torch.tensor([r.labels])}
        for r in rows()
    ]
    found = collect_gradients(make(), batches, targets)
    model = make()
    total, count = torch.zeros(()), 0
    for batch in batches:
        learned = int((batch["labels"] != IGNORED).sum())
        logits = model(input_ids=batch["input_ids"])
        total = total + token_loss(logits, batch["labels"], 1)
        count += learned
    mean: Any = total / count
    mean.backward()
    assert found.metadata["loss"] == pytest.approx(by_hand(make()), rel=1e-4)
    for name, gradient in found.items():
        wanted = model.get_submodule(name).weight.grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        lambda: built(XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=VOCAB)),
        lambda: BertLMHeadModel(
            BertConfig(
                vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, intermediate_size=48,
                num_hidden_layers=2,
            )
        ),
    ],
    ids=["xlnet", "bert"],
)  # fmt: skip
def test_a_model_that_sees_what_it_is_to_predict_is_refused(
    model: Callable[[], PreTrainedModel], tiny_base: Path, tmp_path: Path
) -> None:
    adapted = attach(model(), "lora", rank=2, alpha=2)
    with pytest.raises(UserError, match="sees the tokens that it is to predict"):
        first_step(adapted, dataset(rows()), load_tokenizer(str(tiny_base)), tmp_path, 4, 1)


def test_the_models_own_loss_is_kept_where_it_is_right() -> None:
    for family in ("llama", "gpt2", "qwen2"):
        assert own_loss(FAMILIES[family].model(), several=True, divides=True) is None
    for family in ("t5", "bert", "vit"):  # of which it is no matter
        assert own_loss(FAMILIES[family].model(), several=True) is None
    # A mean of one batch is right, the mean of several means is not.
    model = custom_code()
    assert own_loss(model) is None
    assert own_loss(model, several=True) is token_loss
    assert own_loss(model, divides=True) is token_loss


def test_what_a_router_adds_is_kept() -> None:
    base = {k: v for k, v in TEXT.items() if k != "head_dim"}
    config = MixtralConfig(**base, num_local_experts=2, output_router_logits=True)
    assert own_loss(AutoModelForCausalLM.from_config(config), several=True, divides=True) is None


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "qwen2_5_vl", "mllama", "idefics2"])
def test_packed_sequences_of_a_composite_model_do_not_see_each_other(
    name: str, tiny_base: Path, tmp_path: Path
) -> None:
    """Where they would, it is refused: what is tried is what training does."""
    right = by_hand(built(COMPOSITE[name]()))
    several = packed(rows(), 48)
    assert len(several) < 8
    model = attach(built(COMPOSITE[name]()), "lora", rank=2, alpha=4, target_modules=["q_proj"])
    model.config.get_text_config().use_cache = True
    tokenizer = load_tokenizer(str(tiny_base))
    if name == "qwen2_5_vl":
        with pytest.raises(UserError, match="would see each other"):
            first_step(model, dataset(several), tokenizer, tmp_path, len(several), 1)
    else:
        line = first_step(model, dataset(several), tokenizer, tmp_path, len(several), 1)
        assert line["loss"] == pytest.approx(right, rel=1e-4)
    assert model.config.get_text_config().use_cache is True
