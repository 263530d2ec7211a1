"""What text reaches of a model, and what its config says about the text part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    CTRLConfig,
    FalconMambaConfig,
    Gemma3ForSequenceClassification,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RobertaConfig,
    RwkvConfig,
    XLNetConfig,
)

from forgetless.adapters.attachment import attach
from forgetless.core.errors import UserError
from forgetless.models.targets import find_targets, target_layers
from forgetless.models.text import positions_of, vocabulary_of, without_cache
from tests.composites import COMPOSITE, SPECIAL, TEXT, VOCAB, built
from tests.families import FAMILIES


def called(model: PreTrainedModel, names: Any) -> set[str]:
    """The modules that run when the model reads text alone."""
    seen: set[str] = set()
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.add(name))
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", COMPOSITE)
def test_targets_are_the_layers_that_text_passes_through(name: str) -> None:
    model = built(COMPOSITE[name]())
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = find_targets(model)
    reached = called(model, linear)
    assert set(found.layers) == reached - {"lm_head", "output"}
    by_torch = {"model.vision_tower.head.attention.out_proj"}  # no target of anybody's
    assert set(found.unread) == linear - reached - by_torch
    assert found.skipped == []
    for part in ("attention", "mlp"):
        assert set(target_layers(model, part)) <= reached


def test_a_text_classifier_with_eyes_is_adapted_where_text_passes() -> None:
    config = COMPOSITE["gemma3"]()
    config.num_labels = 3
    model = Gemma3ForSequenceClassification(config).eval()
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = find_targets(model)
    assert set(found.layers) == called(model, linear)
    assert "score" in found.layers
    assert found.unread


def test_layers_of_the_eyes_are_adapted_where_they_are_named() -> None:
    model = built(COMPOSITE["gemma3"]())
    assert all("vision" in name for name in target_layers(model, ["out_proj", "fc1"]))
    assert len(target_layers(model, r".*vision_tower.*\.q_proj")) == 1


def test_a_model_that_writes_nothing_keeps_all_of_its_layers() -> None:
    for family in ("vit", "t5", "bert"):
        assert find_targets(FAMILIES[family].model()).unread == []


# ---- state-space models --------------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **SPECIAL}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def state_space(name: str) -> PretrainedConfig:
    """The config of one."""
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
    return {
        "mamba": lambda: MambaConfig(**SMALL, state_size=8),
        "falcon_mamba": lambda: FalconMambaConfig(**SMALL, state_size=8),
        "mamba2": lambda: Mamba2Config(
            **SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8
        ),
        "jamba": lambda: JambaConfig(
            **SMALL, **_HEADS, attn_layer_period=2, attn_layer_offset=1, num_experts=1
        ),
        "bamba": lambda: BambaConfig(**SMALL, **_HEADS, **mixer, attn_layer_indices=[1]),
    }[name]()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "jamba", "bamba"])
def test_of_a_state_space_mixer_the_first_layer_is_the_default(name: str) -> None:
    model = AutoModelForCausalLM.from_config(state_space(name)).eval()
    endings = {target.rpartition(".")[2] for target in target_layers(model)}
    assert "in_proj" in endings
    assert not endings & {"x_proj", "dt_proj", "out_proj"}
    adapted = attach(model, "lora", rank=2, alpha=2)
    adapted(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]]))[
        0
    ].backward()
    weights = {n: w for n, w in adapted.named_parameters() if "lora_B" in n}
    assert all(w.grad is not None and w.grad.any() for w in weights.values()), (
        "is trained by nothing"
    )


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_what_peft_refuses_of_a_mixer_is_refused_before_loading(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(state_space(name))
    with pytest.raises(
        UserError, match=r"out_proj', whose weight this state-space model reads past"
    ):
        find_targets(model, ["in_proj", "out_proj"])


def test_a_delta_net_keeps_its_layers() -> None:
    config = Qwen3NextConfig(
        **TEXT,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    with torch.device("meta"):
        found = find_targets(AutoModelForCausalLM.from_config(config))
    endings = {target.rpartition(".")[2] for target in found.layers}
    assert {"in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"} <= endings
    assert found.skipped
    assert all("experts" in name for name in found.skipped)


@pytest.mark.parametrize("name", ["recurrent_gemma", "rwkv", "jamba"])
def test_three_dimensions_make_no_expert(name: str) -> None:
    configs = {
        "recurrent_gemma": lambda: RecurrentGemmaConfig(
            **SMALL,
            block_types=["recurrent", "attention"],
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            lru_width=32,
            intermediate_size=48,
        ),
        "rwkv": lambda: RwkvConfig(**SMALL),
        "jamba": lambda: state_space("jamba"),
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configs[name]())
    assert find_targets(model).skipped == []


# ---- what the config says ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (MptConfig(d_model=32, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=VOCAB), 64),
        (XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48, vocab_size=VOCAB), None),
        (CTRLConfig(n_embd=32, n_layer=1, n_head=4, dff=48, n_positions=96, vocab_size=VOCAB), 96),
        (COMPOSITE["llava"](), 128),
        (COMPOSITE["gemma4"](), 128),
        (MambaConfig(**SMALL), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_context_length_and_vocabulary_by_any_name(
    config: PretrainedConfig, positions: int | None
) -> None:
    model: Any = nn.Module()
    model.config = config
    assert positions_of(model) == positions
    assert vocabulary_of(model) == VOCAB


def test_places_up_to_that_of_the_padding_are_of_no_token() -> None:
    """RoBERTa's table has two more rows than it reads tokens."""
    kwargs: dict[str, Any] = {"max_position_embeddings": 12, "num_hidden_layers": 1}
    config = RobertaConfig(
        vocab_size=20, hidden_size=16, num_attention_heads=2, is_decoder=True, **kwargs
    )
    model = AutoModelForCausalLM.from_config(config)
    assert positions_of(model) == 10
    model(torch.full((1, 10), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 11), 5))


def test_a_model_without_a_config_says_nothing() -> None:
    assert positions_of(nn.Linear(1, 1)) is None
    assert vocabulary_of(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "mllama"])
def test_no_part_of_a_composite_model_keeps_keys_and_values(name: str) -> None:
    model = built(COMPOSITE[name]())
    before = model.config.get_text_config().use_cache
    with without_cache(model):
        assert model(input_ids=torch.tensor([[5, 6, 7]])).past_key_values is None
    assert model.config.get_text_config().use_cache is before
    assert model(input_ids=torch.tensor([[5, 6, 7]])).past_key_values is not None
