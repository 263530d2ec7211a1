"""rsLoRA, DoRA and ranks of single layers combine with every kind of start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export, load, save
from forgetless.adapters.layer import adapted_layers, delta_weights
from forgetless.adapters.ranks import LayerRank, layer_ranks, patterns
from forgetless.core.errors import UserError
from forgetless.methods.eva import redistribute_ranks
from forgetless.models.weights import linear_weight
from tests.adapters.test_attachment import (
    ATTACHABLE,
    gradients,
    logits,
    statistics,
    train,
    trainable,
)
from tests.families import FAMILIES

KINDS = ["lora", "pissa", "lora_null_v2", "mica"]
"""Starts at zero, has an anchor, keeps A frozen, keeps B frozen."""

BLOCKS = r".*\.0\.(self_attn|mlp)\..*"
SWITCHES: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {BLOCKS: 2, "up_proj": 6}, "alpha_pattern": {"o_proj": 9}},
}


def attached(
    method: str, family: str = "llama", dtype: torch.dtype = torch.float32, **switches: Any
) -> PeftModel:
    return attach(
        FAMILIES[family].model(dtype),
        method,
        stats=statistics(family),
        task_stats=statistics(family, first=20),
        gradients=gradients(family),
        **{"rank": 4, "alpha": 6, **switches},
    )


@pytest.fixture(params=SWITCHES)
def switches(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = SWITCHES[request.param]
    return found


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), ("pissa", torch.bfloat16)],
    ids=[*KINDS, "pissa in bfloat16"],
)
def test_step_zero_and_adapter_off_are_the_base(
    method: str, switches: dict[str, Any], dtype: torch.dtype
) -> None:
    base = logits(FAMILIES["llama"].model(dtype), "llama")
    model = attached(method, dtype=dtype, **switches)
    assert torch.equal(logits(model, "llama"), base)
    train(model, "llama", steps=2)
    assert not torch.equal(logits(model, "llama"), base)
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), base)


@pytest.mark.parametrize("method", KINDS)
def test_export_save_and_load_are_exact(
    method: str, switches: dict[str, Any], tmp_path: Path
) -> None:
    model = attached(method, **switches)
    train(model, "llama", steps=2)
    now = logits(model, "llama")
    assert export(model, tmp_path / "plain").exact
    alone = PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path / "plain")
    torch.testing.assert_close(logits(alone, "llama"), now, atol=1e-5, rtol=0)
    ours = {name: delta for name, _, delta in delta_weights(model)}
    for name, _, delta in delta_weights(alone):
        torch.testing.assert_close(ours[name], delta, atol=1e-6, rtol=1e-5)
    save(model, tmp_path / "native")
    again = load(FAMILIES["llama"].model(), tmp_path / "native", trainable=True)
    assert torch.equal(logits(again, "llama"), now)
    assert train(again, "llama", 2, first=50) == train(model, "llama", 2, first=50)


@pytest.mark.parametrize("method", KINDS)
def test_merging_gives_the_trained_model_and_unmerging_the_base(
    method: str, switches: dict[str, Any]
) -> None:
    model = attached(method, "gpt2" if "rank_pattern" not in switches else "llama", **switches)
    family = "gpt2" if "rank_pattern" not in switches else "llama"
    train(model, family, steps=2)
    now = logits(model, family)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, family), now, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, family), now, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ATTACHABLE)
def test_rslora_divides_by_the_root_of_the_rank(method: str) -> None:
    """The start that a scaling of alpha / √r decomposes to, and so the same product."""
    with_it = attached(method, use_rslora=True)
    assert all(m.scaling["default"] == 6 / 4**0.5 for m in adapted_layers(with_it).values())
    plain = attach(
        FAMILIES["llama"].model(),
        method,
        rank=4,
        alpha=12,
        stats=statistics("llama"),
        task_stats=statistics("llama", first=20),
        gradients=gradients("llama"),
    )
    ours, theirs = with_it.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_pattern_decides_by_name_ending_or_expression_and_the_first_one_counts() -> None:
    model = attached(
        "pissa",
        rank_pattern={"layers.1.mlp.up_proj": 3, "up_proj": 5, r".*layers\.0\.self_attn\..*": 2},
        alpha_pattern={"up_proj": 10},
    )
    layers = adapted_layers(model)
    ranks = {
        name.removeprefix("model.layers."): (m.r["default"], m.scaling["default"])
        for name, m in layers.items()
    }
    assert ranks["1.mlp.up_proj"] == (3, 10 / 3)
    assert ranks["0.mlp.up_proj"] == (5, 2)
    assert ranks["0.self_attn.k_proj"] == (2, 3)
    assert ranks["1.self_attn.k_proj"] == (4, 1.5)


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_null_v2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_layer_that_is_narrower_than_the_rank_gets_what_it_can_hold_at_the_same_scaling(
    method: str, use_rslora: bool, tmp_path: Path
) -> None:
    base: Any = FAMILIES["llama"].model()
    narrow = min(base.model.layers[0].self_attn.k_proj.weight.shape)
    with pytest.warns(UserWarning, match=rf"4 layers are narrower than rank .* has {narrow}"):
        model = attached(method, rank=narrow + 3, use_rslora=use_rslora)
    layers = adapted_layers(model)
    ranks = {name.rpartition(".")[2]: m.r["default"] for name, m in layers.items()}
    assert {ranks["k_proj"], ranks["v_proj"]} == {narrow}
    assert set(ranks.values()) == {narrow, narrow + 3}
    assert len({round(m.scaling["default"], 12) for m in layers.values()}) == 1
    train(model, "llama", steps=2)
    export(model, tmp_path)
    plain = PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path)
    torch.testing.assert_close(logits(plain, "llama"), logits(model, "llama"))


def test_a_layer_whose_name_ends_in_an_exceptions_keeps_its_own_rank() -> None:
    ranks = {"proj": LayerRank(4, 8), "inner.proj": LayerRank(8, 8), "mlp": LayerRank(8, 8)}
    written = patterns(ranks, 8, 8)
    assert written == {"rank_pattern": {r"inner\.proj": 8, "proj": 4}, "alpha_pattern": {}}
    assert layer_ranks(ranks, 8, 8, **written) == ranks


def test_a_layers_own_rank_is_the_start_of_that_rank() -> None:
    name = "model.layers.0.mlp.up_proj"
    mixed = adapted_layers(attached("pissa", rank_pattern={name: 2}, alpha_pattern={name: 3}))
    alone = attach(FAMILIES["llama"].model(), "pissa", rank=2, alpha=3, target_modules=[name])
    ours, theirs = mixed[name], adapted_layers(alone)[name]
    for part in ("anchor_A", "anchor_B"):
        found, wanted = (getattr(m.lora_anchor["default"], part) for m in (ours, theirs))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("rank", ["exact", "requested", 3])
def test_an_export_of_several_ranks_has_one_that_every_reader_takes_alike(
    rank: Any, tmp_path: Path
) -> None:
    """PEFT, vLLM and llama.cpp divide different alphas by different ranks; here all are equal."""
    model = attached("pissa", rank_pattern={"up_proj": 6, "k_proj": 1}, alpha_pattern={"q_proj": 3})
    train(model, "llama", steps=2)
    report = export(model, tmp_path, rank=rank)
    assert report.rank == {"exact": 12, "requested": 6, 3: 3}[rank]
    assert report.exact == (rank == "exact")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (report.rank, report.rank)
    assert not {"rank_pattern", "alpha_pattern"} & set(config)
    wanted = {name: delta for name, _, delta in delta_weights(model)}
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert report.rank in tensor.shape
        layer, is_A, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if is_A:
            B = load_file(tmp_path / "adapter_model.safetensors")[name.replace("_A.", "_B.")]
            lost = (B @ tensor - wanted[layer]).norm() / wanted[layer].norm()
            assert lost == pytest.approx(report.layer_errors[layer], abs=1e-5)
            own = {"exact": len(tensor), "requested": 1, 3: 2}[rank]  # an exact k_proj has rank 2
            assert "k_proj" not in layer or not tensor[own:].any()


def test_dora_trains_the_length_of_every_row() -> None:
    """W' has the trained lengths, whatever the low-rank part does to the directions."""
    model = attached("pissa", use_dora=True)
    train(model, "llama", steps=3)
    for name, weight, delta in delta_weights(model):
        magnitude = adapted_layers(model)[name].lora_magnitude_vector["default"].weight
        assert magnitude.requires_grad
        torch.testing.assert_close((weight + delta).norm(dim=1), magnitude.detach())
        assert not torch.equal(magnitude, weight.norm(dim=1))


def test_dora_is_pefts_dora() -> None:
    """The same losses from the same A, in PEFT's own layer and here."""
    theirs = get_peft_model(
        FAMILIES["llama"].model(),
        LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=True),
    )
    ours = attached("lora", use_dora=True)
    for name, module in adapted_layers(ours).items():
        peft_layer = theirs.base_model.model.get_submodule(name)
        module.lora_A["default"].weight.data.copy_(peft_layer.lora_A["default"].weight)
    assert train(ours, "llama") == pytest.approx(train(theirs, "llama"), rel=1e-5)


def test_dropout_goes_with_dora() -> None:
    base = logits(FAMILIES["llama"].model(), "llama")
    model = attached("pissa", use_dora=True, dropout=0.3)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**FAMILIES["llama"].batch(seed=7)).logits, base)
    assert train(model, "llama", steps=2)[0] > 0


class TestMistakes:
    """Each gives one line that says what is wrong, before anything is changed."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank_pattern": {"qq_proj": 2}}, r"rank_pattern 'qq_proj' matches no target layer"),
            ({"alpha_pattern": {"w": 2.0}}, "alpha_pattern 'w' matches no target layer"),
            ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' must be a whole number"),
            ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern 'q_proj' must be a whole number"),
            ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern 'q_proj' must be a number above 0"),
            ({"alpha": 0}, "alpha must be a number above 0, got 0"),
            ({"rank_pattern": {"(q_proj": 2}}, "no regular expression"),
            ({"rank_pattern": {"k_proj": 17}}, r"rank must be in 1\.\.16 .*k_proj.* got 17"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        model = FAMILIES["llama"].model()
        with pytest.raises(UserError, match=message):
            attach(model, "pissa", **{"rank": 4, **arguments})
        assert not any("lora" in name for name, _ in model.named_modules())

    def test_a_row_of_zeros_has_no_direction(self) -> None:
        model = FAMILIES["llama"].model()
        layer: Any = model.get_submodule("model.layers.1.mlp.up_proj")
        linear_weight(layer).data[3] = 0
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj' has a row of zeros"):
            attach(model, "lora", 4, use_dora=True)
        assert trainable(attach(model, "lora", 4))

    def test_a_dora_adapter_is_merged_first_or_not_at_all(self) -> None:
        model: Any = attached("lora")
        train(model, "llama", steps=1)
        model = attach(model, "pissa", 4, use_dora=True, adapter_name="second")
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(UserError, match="can only be merged first"):
            model.merge_adapter()


def test_a_frozen_factor_stays_frozen_with_dora() -> None:
    model = attached("lora_null_v2", use_dora=True)
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any("lora_A" in name for name in names)
    assert any("lora_magnitude_vector" in name for name in names)
    assert isinstance(model, nn.Module)


def test_eva_may_move_ranks_between_layers_and_keeps_the_scaling(tmp_path: Path) -> None:
    stats = statistics("llama", first=20)
    base = logits(FAMILIES["llama"].model(), "llama")
    model = attach(FAMILIES["llama"].model(), "eva", 4, 6, task_stats=stats, rho=2.0)
    layers = adapted_layers(model)
    ranks = {name: m.r["default"] for name, m in layers.items()}
    assert sum(ranks.values()) == 4 * 14
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    shares = {
        name: sorted((torch.linalg.eigvalsh(stats[name].second_moment)), reverse=True)
        for name in stats
    }
    wanted = redistribute_ranks({n: torch.stack(v) for n, v in shares.items()}, 4)
    assert ranks == {name: rank for name, rank in wanted.items() if rank}
    assert all(m.scaling["default"] == pytest.approx(1.5) for m in layers.values())
    assert torch.equal(logits(model, "llama"), base)
    train(model, "llama", steps=2)
    export(model, tmp_path / "plain")
    alone = PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path / "plain")
    torch.testing.assert_close(logits(alone, "llama"), logits(model, "llama"), atol=1e-5, rtol=0)
    save(model, tmp_path / "native")
    again = load(FAMILIES["llama"].model(), tmp_path / "native")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_eva_leaves_the_ranks_alone_unless_it_is_asked() -> None:
    model = attached("eva")
    assert {m.r["default"] for m in adapted_layers(model).values()} == {4}
    with pytest.raises(UserError, match=r"rho must be a number of at least 1, got 0\.5"):
        attached("eva", rho=0.5)
