"""An attached adapter is the base at step 0, a PeftModel in between, a plain LoRA at the end."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.anchored import plain_factors
from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export, load, save
from forgetless.adapters.layer import adapted_layers, delta_weights
from forgetless.core.errors import UserError
from forgetless.methods import METHODS
from forgetless.models.targets import target_layers
from forgetless.models.weights import linear_weight
from forgetless.statistics.collection import collect
from forgetless.statistics.moments import Statistics
from tests.families import FAMILIES

ATTACHABLE = [name for name, method in METHODS.items() if method.factors is not None]
ANCHORED = ["pissa", "milora", "intermediate", "random_slice", "lora_null_v1"]
ONE_OF_EACH = ["lora", "pissa", "lora_null_v2", "mica"]
"""Starts at zero, has an anchor, keeps A frozen, keeps B frozen."""
REPRESENTATIVES = [*ONE_OF_EACH, "lora_ga"]
"""These and one that is made of gradients: what is different about a family, they meet."""
RANK = 4


@cache
def statistics(family: str, first: int = 0) -> Statistics:
    """Of twelve rows; another `first` batch stands for another text."""
    known = FAMILIES[family]
    batches = [known.batch(rows=4, seed=seed) for seed in range(first, first + 3)]
    with warnings.catch_warnings():  # of whichever test asks first
        warnings.filterwarnings("ignore", ".*fewer tokens than they have inputs")
        return collect(known.model(), batches)


@cache
def gradients(family: str) -> dict[str, Tensor]:
    """Of one batch's loss with respect to every target weight, (out, in)."""
    model = FAMILIES[family].model()
    model(**FAMILIES[family].batch()).loss.backward()
    found = {}
    for name, layer in target_layers(model).items():
        assert isinstance(layer.weight, Tensor)
        assert layer.weight.grad is not None
        gradient = layer.weight.grad
        found[name] = gradient.T if isinstance(layer, Conv1D) else gradient
    return found


def attached(
    family: str, method: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> PeftModel:
    """A fresh model of the family with a fresh adapter."""
    return attach(
        FAMILIES[family].model(dtype),
        method,
        rank=RANK,
        alpha=6,
        stats=statistics(family),
        task_stats=statistics(family, first=20),
        gradients=gradients(family),
        dropout=dropout,
    )


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    model.eval()
    values = FAMILIES[family].batch(seed=7)
    dtype = next(model.parameters()).dtype
    if "pixel_values" in values:
        values["pixel_values"] = values["pixel_values"].to(dtype)
    result: Tensor = model(**values).logits
    return result


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def train(
    model: nn.Module,
    family: str,
    steps: int = 4,
    first: int = 0,
) -> list[float]:
    """Losses of a few AdamW steps; every step has its own batch."""
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    dtype = next(model.parameters()).dtype
    losses = []
    torch.manual_seed(first)  # some families have dropout
    model.train()
    for step in range(first, first + steps):
        values = FAMILIES[family].batch(seed=100 + step)
        if "pixel_values" in values:
            values["pixel_values"] = values["pixel_values"].to(dtype)
        loss = model(**values).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(family: str, method: str) -> PeftModel:
    """A model after two steps, for tests that only look at it."""
    return with_its_start(family, method)[1]


@cache
def with_its_start(family: str, method: str) -> tuple[Tensor, PeftModel, list[str]]:
    """The logits at step 0, the model after two steps, and what attaching warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = attached(family, method)
    start = logits(model, family)
    train(model, family, steps=2)
    return start, model, [str(w.message) for w in caught if issubclass(w.category, FutureWarning)]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# Weights that are stored (out, in) and (in, out) meet every method.
each_start = pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family in FAMILIES
        for method in (ATTACHABLE if family in ("llama", "gpt2") else REPRESENTATIVES)
    ],
)


@each_start
def test_step_zero_and_adapter_off_are_the_base_bit_for_bit(family: str, method: str) -> None:
    base = logits(FAMILIES[family].model(), family)
    start, model, _ = with_its_start(family, method)
    assert torch.equal(start, base)
    assert not torch.equal(logits(model, family), base)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), base)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((name, torch.bfloat16) for name in FAMILIES), ("llama", torch.float16)],
    ids=[*FAMILIES, "llama in float16"],
)
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_base_in_low_precision_is_the_base_at_step_zero_and_with_the_adapter_off(
    family: str, dtype: torch.dtype, method: str
) -> None:
    base = logits(FAMILIES[family].model(dtype), family)
    model = attached(family, method, dtype)
    assert torch.equal(logits(model, family), base)
    train(model, family, steps=1)
    assert all(weight.dtype == torch.float32 for weight in trainable(model))
    with model.disable_adapter():
        assert torch.equal(logits(model, family), base)


@each_start
def test_attaching_shows_no_warning_of_the_libraries(family: str, method: str) -> None:
    assert with_its_start(family, method)[2] == []


@each_start
def test_export_is_a_plain_lora_that_peft_loads_on_a_fresh_base(
    family: str, method: str, tmp_path: Path
) -> None:
    model = trained(family, method)
    report = export(model, tmp_path)
    alone = PeftModel.from_pretrained(FAMILIES[family].model(), tmp_path)
    assert report.exact
    assert report.rank == (2 * RANK if method_is_anchored(model) else RANK)
    torch.testing.assert_close(logits(alone, family), logits(model, family), atol=1e-5, rtol=0)


def method_is_anchored(model: PeftModel) -> bool:
    return bool(model.peft_config["default"].start["anchored"])


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_an_export_holds_factors_of_linear_layers_alone(
    family: str, method: str, tmp_path: Path
) -> None:
    """What converters to other formats read: llama.cpp's takes no whole embedding or head."""
    folder = export(trained(family, method), tmp_path).folder
    state = load_file(folder / "adapter_model.safetensors")
    layers = set(target_layers(FAMILIES[family].model()))
    wanted = {f"base_model.model.{n}.lora_{f}.weight" for n in layers for f in "AB"}
    assert state.keys() == wanted
    assert all(tensor.isfinite().all() for tensor in state.values())


@each_start
def test_save_and_load_lose_nothing(family: str, method: str, tmp_path: Path) -> None:
    model = trained(family, method)
    save(model, tmp_path)
    again = load(FAMILIES[family].model(), tmp_path)
    assert torch.equal(logits(again, family), logits(model, family))
    assert not trainable(again)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_training_goes_on_after_loading_as_if_nothing_had_happened(
    family: str, method: str, tmp_path: Path
) -> None:
    model = attached(family, method)
    train(model, family, steps=2)
    save(model, tmp_path)
    again = load(FAMILIES[family].model(), tmp_path, trainable=True)
    assert torch.equal(logits(again, family), logits(model, family))
    assert [p.shape for p in trainable(again)] == [p.shape for p in trainable(model)]
    assert train(again, family, 2, first=50) == train(model, family, 2, first=50)
    assert torch.equal(logits(again, family), logits(model, family))


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_merge_and_unload_is_the_trained_model(family: str, method: str) -> None:
    model = attached(family, method)
    train(model, family, steps=2)
    before = logits(model, family)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, PeftModel) for module in merged.modules())
    torch.testing.assert_close(logits(merged, family), before, atol=1e-4, rtol=1e-4)


def test_safe_merge_and_unmerge_return_to_the_base_up_to_rounding(family: str) -> None:
    model = attached(family, "pissa")
    base = logits(FAMILIES[family].model(), family)
    train(model, family)
    before = logits(model, family)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, family), before, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, family), base, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_gradient_checkpointing_gives_the_same_losses(method: str) -> None:
    family = "llama"
    plain, checkpointed = attached(family, method), attached(family, method)
    checkpointed.activation_checkpointing_enable()
    assert train(checkpointed, family) == train(plain, family)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_training_never_writes_the_base(method: str) -> None:
    family = "llama"
    model = attached(family, method)
    weights = {n: linear_weight(m) for n, m in target_layers(model).items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    train(model, family)
    assert all(torch.equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize("anchored", ANCHORED)
def test_gradients_are_those_of_the_papers_form(anchored: str) -> None:
    """PiSSA and its kin train A and B on W - scaling B0 A0; the moves get the same gradients."""
    family = "llama"
    model = attached(family, anchored)
    paper = attached(family, anchored)
    for module in adapted_layers(paper).values():
        anchor = module.lora_anchor["default"]
        residual = anchor.anchor_B @ anchor.anchor_A * module.scaling["default"]
        module.get_base_layer().weight.data -= residual
        module.lora_A["default"].weight.data.copy_(anchor.anchor_A)
        module.lora_B["default"].weight.data.copy_(anchor.anchor_B)
        del module.lora_variant["default"]
    for each in (model, paper):
        each.train()
        each(**FAMILIES[family].batch()).loss.backward()
    for ours, theirs in zip(trainable(model), trainable(paper), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ANCHORED)
def test_weight_decay_pulls_towards_the_base(name: str) -> None:
    family = "llama"
    model = attached(family, name)
    train(model, family)
    before = sum(float(delta.norm()) for _, _, delta in delta_weights(model))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, weight_decay=1.0)
    for _ in range(20):
        for weight in trainable(model):
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    after = sum(float(delta.norm()) for _, _, delta in delta_weights(model))
    assert after < 0.3 * before


def test_a_small_move_survives_bfloat16() -> None:
    """Stored in the weight itself it would be rounded away: 1e-4 of bfloat16 is below one step."""
    model = attached("llama", "pissa", torch.bfloat16)
    for module in adapted_layers(model).values():
        module.lora_B["default"].weight.data.fill_(1e-6)
    assert all(float(delta.norm()) > 0 for _, _, delta in delta_weights(model))


def test_the_frozen_factor_of_lora_null_v2_stays_frozen(tmp_path: Path) -> None:
    family = "llama"
    model = attached(family, "lora_null_v2")
    before = [m.lora_A["default"].weight.clone() for m in adapted_layers(model).values()]
    model.set_adapter("default")
    train(model, family)
    save(model, tmp_path)
    again = load(FAMILIES[family].model(), tmp_path, trainable=True)
    again.set_adapter("default")
    train(again, family)
    for each in (model, again):
        after = [m.lora_A["default"].weight for m in adapted_layers(each).values()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert not any(weight.requires_grad for weight in after)


def test_several_adapters_share_one_untouched_base() -> None:
    family = "llama"
    stats = statistics(family)
    base = logits(FAMILIES[family].model(), family)
    model = attach(FAMILIES[family].model(), "pissa", rank=RANK, adapter_name="first")
    train(model, family)
    first = logits(model, family)
    model = attach(model, "lora_null_v1", rank=2, stats=stats, adapter_name="second")
    assert torch.equal(logits(model, family), base)
    train(model, family)
    second = logits(model, family)
    model = attach(model, "lora", rank=3, adapter_name="third")
    train(model, family)
    model.set_adapter("first")
    assert torch.equal(logits(model, family), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, family), second)
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    with model.disable_adapter():
        assert torch.equal(logits(model, family), base)


def test_a_batch_may_mix_adapters_and_the_base() -> None:
    family = "llama"
    model = attach(FAMILIES[family].model(), "pissa", rank=RANK, adapter_name="first")
    train(model, family)
    values = {key: value for key, value in FAMILIES[family].batch().items() if key != "labels"}
    model.eval()
    with torch.no_grad():
        whole = model(**values).logits
        mixed = model(**values, adapter_names=["first", "__base__", "first"]).logits
        with model.disable_adapter():
            base = model(**values).logits
    torch.testing.assert_close(mixed, torch.stack([whole[0], base[1], whole[2]]))


def test_autocast_trains_in_bfloat16_and_starts_at_the_base() -> None:
    family = "llama"
    model = attached(family, "lora_null_v1")
    with torch.autocast("cpu", torch.bfloat16):
        base = logits(FAMILIES[family].model(), family)
        assert torch.equal(logits(model, family), base)
        losses = train(model, family, steps=8)
    assert losses[-1] < losses[0]
    assert all(weight.dtype == torch.float32 for weight in trainable(model))


@pytest.mark.parametrize("method", ATTACHABLE)
def test_dropout_touches_training_alone(method: str) -> None:
    """And not even that before the first step, when there is no move to drop inputs of."""
    model = attached("llama", method, dropout=0.5).train()
    values = FAMILIES["llama"].batch()
    assert model(**values).loss.item() == FAMILIES["llama"].model()(**values).loss.item()
    with torch.no_grad():
        for weight in trainable(model):
            weight.add_(0.05)
    assert model(**values).loss.item() != model(**values).loss.item()
    assert torch.equal(logits(model, "llama"), logits(model, "llama"))


def test_random_starts_depend_on_the_seed_and_the_layer_alone() -> None:
    family = "llama"
    torch.manual_seed(1)
    one = attach(FAMILIES[family].model(), "lora", rank=RANK, seed=3)
    state = torch.get_rng_state()
    two = attach(FAMILIES[family].model(), "lora", rank=RANK, target_modules=["q_proj"], seed=3)
    other = attach(FAMILIES[family].model(), "lora", rank=RANK, seed=4)
    name = "model.layers.1.self_attn.q_proj"
    first, second, third = (adapted_layers(each)[name] for each in (one, two, other))
    assert torch.equal(first.lora_A["default"].weight, second.lora_A["default"].weight)
    assert not torch.equal(first.lora_A["default"].weight, third.lora_A["default"].weight)
    torch.manual_seed(0)  # what FAMILIES[family].model() did last
    FAMILIES[family].build()
    assert state.shape == torch.get_rng_state().shape


@pytest.mark.parametrize("rank", ["requested", 2, 1])
def test_a_shorter_export_is_the_best_of_its_rank(rank: Any, tmp_path: Path) -> None:
    family = "gpt2"
    model = attached(family, "pissa")
    train(model, family)
    report = export(model, tmp_path, rank=rank)
    kept = RANK if rank == "requested" else rank
    assert report.rank == kept
    alone = PeftModel.from_pretrained(FAMILIES[family].model(), tmp_path)
    cut = {name: delta for name, _, delta in delta_weights(alone)}
    lost = total = 0.0
    for name, _, delta in delta_weights(model):
        values = torch.linalg.svdvals(delta.double())
        lost += float((values[kept:] ** 2).sum())
        total += float((values**2).sum())
        error = float((cut[name] - delta).norm() / delta.norm())
        assert error == pytest.approx(report.layer_errors[name], rel=1e-3)
        assert error == pytest.approx(float(values[kept:].norm() / values.norm()), rel=1e-3)
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert report.relative_error > 0


def test_peft_alone_refuses_an_anchored_folder(tmp_path: Path) -> None:
    """Loading the moves as a whole LoRA would be silently wrong."""
    family = "llama"
    save(attached(family, "pissa"), tmp_path)
    with pytest.raises(UserError, match=r"anchored adapter of forgetless: forgetless\.load\(base"):
        PeftModel.from_pretrained(FAMILIES[family].model(), tmp_path)
    with pytest.raises(UserError, match=r"anchored adapter of forgetless: forgetless\.load\(base"):
        FAMILIES[family].model().load_adapter(str(tmp_path))


def test_a_lora_trained_elsewhere_is_loaded(tmp_path: Path) -> None:
    family = "llama"
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_rslora=True)
    theirs = get_peft_model(FAMILIES[family].model(), config)
    train(theirs, family)
    theirs.save_pretrained(tmp_path)
    ours = load(FAMILIES[family].model(), tmp_path)
    assert torch.equal(logits(ours, family), logits(theirs, family))
    assert export(ours, tmp_path / "again").rank == 3


def test_relative_updates_come_from_the_whole_product() -> None:
    model = attached("gpt2", "pissa")
    train(model, "gpt2")
    for name, weight, delta in delta_weights(model):
        module = adapted_layers(model)[name]
        A, B = plain_factors(module, "default")
        assert weight.shape == delta.shape == (B.shape[0], A.shape[1])
        x = torch.randn(2, A.shape[1])
        torch.testing.assert_close(
            module(x) - module.get_base_layer()(x), x @ delta.T, atol=1e-5, rtol=1e-4
        )


class TestMistakes:
    """Each gives one line that says what to do, before anything is changed."""

    def model(self) -> PreTrainedModel:
        return FAMILIES["llama"].model()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"method": "pisa"}, "unknown method 'pisa'; did you mean 'pissa'"),
            ({"method": "full"}, "trains the weights themselves"),
            ({"method": "lora_null_v1"}, "needs statistics"),
            ({"method": "pissa", "rank": 33}, r"rank must be in 1\.\.16 .* got 33"),
            ({"method": "pissa", "rank": 0}, "rank"),
            ({"method": "pissa", "position": 0.3}, "position"),
            ({"method": "intermediate", "position": 1.5}, "position"),
            ({"method": "lora", "target_modules": ["w_qkv"]}, "w_qkv"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        model = self.model()
        with pytest.raises(UserError, match=message):
            attach(model, **arguments)
        assert not any("lora" in name for name, _ in model.named_modules())

    def test_statistics_of_another_model(self) -> None:
        with pytest.raises(UserError, match="no second_moment of layer"):
            attach(self.model(), "lora_null_v1", RANK, stats=statistics("gpt2"))

    @pytest.mark.parametrize("method", ATTACHABLE)
    def test_the_text_to_keep_is_not_taken_for_the_new_tasks(self, method: str) -> None:
        model, keep = self.model(), statistics("llama")
        if "task_moment" in METHODS[method].needs:
            with pytest.raises(UserError, match=r"knowledge to keep\); pass task_stats="):
                attach(model, method, RANK, stats=keep)
            assert not any("lora" in name for name, _ in model.named_modules())

    def test_a_second_adapter_of_the_same_name(self) -> None:
        model = attach(self.model(), "lora", RANK)
        with pytest.raises(UserError, match="already has an adapter 'default'"):
            attach(model, "lora", RANK)

    @pytest.mark.parametrize("rank", ["exakt", 0, 1.5, True])
    def test_export_rank(self, rank: Any, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="rank must be 'exact', 'requested' or a number"):
            export(attach(self.model(), "lora", RANK), tmp_path, rank=rank)

    def test_a_folder_that_is_no_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no adapter_config\.json"):
            load(self.model(), tmp_path)
        (tmp_path / "adapter_config.json").write_text("{")
        with pytest.raises(UserError, match="is damaged"):
            load(self.model(), tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
            load(self.model(), tmp_path)

    def test_an_adapter_of_another_base(self, tmp_path: Path) -> None:
        save(attached("gpt2", "pissa"), tmp_path)
        model = self.model()
        with pytest.raises(UserError, match=r"no layer 'transformer\.h\.0"):
            load(model, tmp_path)
        assert not any("lora" in name for name, _ in model.named_modules())

    def test_an_adapter_that_is_no_lora(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match="'IA3'; only LoRA"):
            load(self.model(), tmp_path)

    def test_an_unknown_adapter_name(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="unknown adapter 'defalt'; did you mean 'default'"):
            save(attach(self.model(), "lora", RANK), tmp_path, adapter_name="defalt")
