"""Every public method of PEFT on adapters of ours: right, or refused with the way to do it.

The table is the decorator `of`: what PEFT's classes have, and no test is of, fails the last test.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter
from peft.utils.save_and_load import get_base_model_state_dict
from torch import Tensor

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export, load
from forgetless.adapters.layer import adapted_layers, delta_weights
from forgetless.core.errors import UserError
from forgetless.models.state import checkpoint_activations
from tests.adapters.test_attachment import ONE_OF_EACH, gradients, logits, statistics, trainable
from tests.families import FAMILIES

Test = TypeVar("Test", bound=Callable[..., None])

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"method": "lora"},
    "anchored": {"method": "pissa"},
    "A frozen": {"method": "lora_null_v2"},
    "B frozen": {"method": "mica"},
    "anchored rslora": {"method": "pissa", "use_rslora": True},
    "anchored dora": {"method": "pissa", "use_dora": True},
    "anchored, several ranks": {"method": "pissa", "rank_pattern": {"up_proj": 3}},
}
NO_DORA = [kind for kind, settings in KINDS.items() if not settings.get("use_dora")]
UNANCHORED = ["plain", "A frozen", "B frozen"]
TARGETS = ["q_proj", "up_proj"]

_covered: dict[str, set[str]] = {"PeftModel": set(), "LoraModel": set(), "Linear": set()}


def of(**methods: str) -> Callable[[Test], Test]:
    """Note what a test is of: PeftModel="add_adapter delete_adapter", and so on."""
    for kind, names in methods.items():
        _covered[kind].update(names.split())
    return lambda test: test


def put_on(model: Any, method: str, seed: int = 1, name: str = "default", **settings: Any) -> Any:
    """The model with one more adapter that has been trained, one could say."""
    model = attach(
        model,
        method,
        rank=2,
        alpha=3,
        target_modules=TARGETS,
        stats=statistics("llama"),
        task_stats=statistics("llama", first=20),
        gradients=gradients("llama"),
        adapter_name=name,
        **settings,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(model):
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@cache
def _first(kind: str, seed: int) -> Any:
    return put_on(FAMILIES["llama"].model(), seed=seed, **KINDS[kind])


def adapted(kind: str, seed: int = 1) -> Any:
    return copy.deepcopy(_first(kind, seed))


def base_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(FAMILIES["llama"].model(dtype), "llama")


def close(model: Any, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(logits(model, "llama"), wanted, atol=atol, rtol=1e-4)


def merged_by_hand(model: Any, **weights: float) -> Any:
    """The base with so much of each adapter's delta_W in its weights."""
    base = FAMILIES["llama"].model()
    for name, much in weights.items():
        for layer, _, delta in delta_weights(model, name):
            base.get_submodule(layer).weight.data.add_(delta, alpha=much)
    return base


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def two_adapters(kind: str, other: str = "milora") -> Any:
    return put_on(adapted(kind), other, seed=2, name="second")


# ---- copies and formats --------------------------------------------------------------------------


@of(PeftModel="forward generate get_base_model", LoraModel="forward get_model_config")
@of(Linear="forward get_base_layer get_base_weight resolve_lora_variant")
def test_copies_are_exact(kind: str) -> None:
    model = adapted(kind)
    before = logits(model, "llama")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # a process's copy
        assert torch.equal(logits(again, "llama"), before)
        assert {type(m).__name__ for m in again.modules()} == {
            type(m).__name__ for m in model.modules()
        }
    ids = FAMILIES["llama"].batch()["input_ids"][:1]
    assert model.generate(input_ids=ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2
    for layer in adapted_layers(model).values():
        assert torch.equal(layer.get_base_weight(), layer.get_base_layer().weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_moves_to_another_dtype(kind: str, dtype: torch.dtype) -> None:
    wanted = logits(adapted(kind), "llama")
    model = adapted(kind).to(dtype)
    close(model, wanted.to(dtype), atol=1e-5 if dtype == torch.float64 else 0.2)
    with model.disable_adapter():
        assert torch.equal(
            logits(model, "llama"), logits(FAMILIES["llama"].model().to(dtype), "llama")
        )


@of(Linear="merge unmerge set_base_weight", LoraModel="merge_adapter unmerge_adapter")
@of(LoraModel="merge_and_unload unload tuner_layer_cls")
def test_it_is_merged_and_taken_off(kind: str) -> None:
    model, base = adapted(kind), base_logits()
    wanted = logits(model, "llama")
    assert model.base_model.tuner_layer_cls is LoraModel.tuner_layer_cls
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        close(model, wanted)
        model.unmerge_adapter()
        close(model, wanted)
    assert torch.equal(logits(adapted(kind).unload(), "llama"), base)
    close(adapted(kind).merge_and_unload(), wanted)


# ---- several adapters ----------------------------------------------------------------------------


@of(PeftModel="set_adapter delete_adapter disable_adapter", Linear="set_adapter enable_adapters")
@of(LoraModel="set_adapter delete_adapter disable_adapter_layers enable_adapter_layers")
@of(Linear="delete_adapter")
def test_adapters_are_switched_summed_and_deleted(kind: str) -> None:
    first, base = logits(adapted(kind), "llama"), base_logits()
    model = two_adapters(kind)
    second = logits(model, "llama")
    for names in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(names)
        close(model, logits(merged_by_hand(model, default=1, second=1), "llama"))
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), first)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, "llama"), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, "llama"), first)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.active_adapter == "second"
    assert torch.equal(logits(model, "llama"), second)
    assert not any(".default" in name for name in model.state_dict())
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), base)


@pytest.mark.parametrize("kind", NO_DORA)
def test_a_batch_of_several_adapters(kind: str) -> None:
    model = two_adapters(kind)
    values = {key: value for key, value in FAMILIES["llama"].batch().items() if key != "labels"}
    names = ["default", "__base__", "second"]
    with torch.no_grad():
        mixed = model(**values, adapter_names=names).logits
        model.set_adapter("default")
        first = model(**values).logits
        model.set_adapter("second")
        second = model(**values).logits
        with model.disable_adapter():
            base = model(**values).logits
    wanted = torch.stack([first[0], base[1], second[2]])
    torch.testing.assert_close(mixed, wanted, atol=1e-5, rtol=1e-4)


@of(PeftModel="add_adapter", LoraModel="inject_adapter")
def test_peft_adds_its_own_adapter_beside(kind: str) -> None:
    model, base = adapted(kind), base_logits()
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), base)
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), logits(adapted(kind), "llama"))


def test_a_reference_with_the_config_of_an_adapter_starts_and_becomes_as_that_one(
    kind: str,
) -> None:
    """TRL makes the reference of DPO, KTO and GRPO so, of an adapter that is trained already."""
    model, base = adapted(kind), base_logits()
    wanted = logits(model, "llama")
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(logits(model, "llama"), base)
    for name, weight in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(weight.data)
    assert torch.equal(logits(model, "llama"), wanted)
    frozen = {
        n.replace(".ref.", ".default.") for n, w in model.named_parameters() if w.requires_grad
    }
    model.set_adapter("default")
    assert frozen == {name for name, weight in model.named_parameters() if weight.requires_grad}
    config = copy.deepcopy(model.peft_config["default"])
    config.r = 3
    if kind != "plain":
        with pytest.raises(
            UserError, match=r"cannot put on: attach a new one with forgetless\.att"
        ):
            model.add_adapter("third", config)
        assert "third" not in model.peft_config


COMBINATIONS = (
    *("svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear"),
    *("dare_ties_svd", "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd"),
)


@of(LoraModel="add_weighted_adapter")
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_weighted_sum_of_one_adapter_gives_it_back(method: str) -> None:
    model = put_on(FAMILIES["llama"].model(), method)
    wanted = logits(model, "llama")
    for combination in ("svd", "linear", "cat"):
        model.add_weighted_adapter(["default"], [1.0], combination, combination_type=combination)
        model.set_adapter(combination)
        close(model, wanted)
    assert set(model.peft_config) == {"default", "svd", "linear", "cat"}
    model.add_weighted_adapter(["default"], [-0.5], "halved", combination_type="cat")
    model.set_adapter("halved")
    close(model, logits(merged_by_hand(model, default=-0.5), "llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_not_rounded_to_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    model = put_on(FAMILIES["llama"].model(dtype), "pissa")
    wanted = {name: delta for name, _, delta in delta_weights(model)}
    for combination in ("svd", "linear", "cat"):
        model.add_weighted_adapter(["default"], [1.0], combination, combination_type=combination)
        for name, _, delta in delta_weights(model, combination):
            torch.testing.assert_close(delta, wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "combination"),
    [
        *(("anchored", combination) for combination in COMBINATIONS),
        *((kind, how) for kind in ("A frozen", "anchored rslora") for how in COMBINATIONS[:5]),
    ],
)
def test_a_weighted_sum_is_that_of_the_exports(kind: str, combination: str, tmp_path: Path) -> None:
    """What PEFT makes of the plain LoRAs that the adapters amount to."""
    ours = two_adapters(kind, KINDS[kind]["method"])
    theirs: Any = None
    for name in ("default", "second"):
        folder = export(ours, tmp_path / name, adapter_name=name).folder
        if theirs is None:
            theirs = PeftModel.from_pretrained(FAMILIES["llama"].model(), folder)
        else:
            theirs.load_adapter(folder, name)
    for model in (ours, theirs):
        torch.manual_seed(0)  # DARE drops entries at random
        model.add_weighted_adapter(
            ["default", "second"],
            [0.7, -0.4],
            "both",
            combination_type=combination,
            density=None if combination in ("svd", "linear", "cat") else 0.6,
            svd_rank=8 if combination.endswith("svd") else None,
        )
        model.set_adapter("both")
    close(ours, logits(theirs, "llama"), atol=1e-4)
    if combination in ("svd", "cat"):
        close(ours, logits(merged_by_hand(ours, default=0.7, second=-0.4), "llama"), atol=1e-4)
    report = export(ours, tmp_path / "both", adapter_name="both")
    alone = PeftModel.from_pretrained(FAMILIES["llama"].model(), report.folder)
    close(alone, logits(ours, "llama"))


def test_no_weighted_sum_has_a_dora_or_a_head_in_it() -> None:
    model = adapted("anchored dora")
    with pytest.raises(UserError, match=r"'default' is a DoRA, which stretches the weights"):
        model.add_weighted_adapter(["default"], [1.0], "halved")
    with pytest.raises(UserError, match="adapter_name 'half' cannot be used"):
        model.add_weighted_adapter(["default"], [1.0], "half")
    headed = adapted("anchored")
    config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"])
    headed.add_adapter("second", config)
    with pytest.raises(UserError, match="'second' trains lm_head whole"):
        headed.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    assert set(headed.peft_config) == {"default", "second"}


# ---- what is trained -----------------------------------------------------------------------------


@of(PeftModel="set_requires_grad print_trainable_parameters get_nb_trainable_parameters")
@of(LoraModel="set_requires_grad", Linear="set_requires_grad")
@of(PeftModel="get_layer_status get_model_status")
def test_what_the_method_freezes_stays_frozen(kind: str) -> None:
    model = adapted(kind)
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    switches: list[Callable[[], Any]] = [
        lambda: model.set_requires_grad("default", False) or model.set_requires_grad("default"),
        lambda: model.set_adapter("default"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.add_adapter("more", LoraConfig(r=1, target_modules=TARGETS)),
        lambda: model.set_adapter("more"),
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("more"),
    ]
    for number, switch in enumerate(switches):
        switch()
        if number not in (2, 5):
            found = {name for name, weight in model.named_parameters() if weight.requires_grad}
            assert found == wanted
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == sum(weight.numel() for weight in trainable(model))
    model.print_trainable_parameters()
    assert model.get_model_status().available_adapters == ["default"]
    assert len(model.get_layer_status()) == len(adapted_layers(model))


@of(PeftModel="prepare_model_for_gradient_checkpointing")
def test_checkpointed_gradients_are_the_same(kind: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = adapted(kind).train()
        if checkpointed:
            model.prepare_model_for_gradient_checkpointing(model)
            checkpoint_activations(model.base_model.model)
        model(**FAMILIES["llama"].batch()).loss.backward()
        found.append([weight.grad for weight in trainable(model)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_training_everything_is_right_too() -> None:
    """Nothing is wrong with a factor that the user lets train against the method's word."""
    for kind in KINDS:
        model = adapted(kind)
        before = logits(model, "llama")
        model.requires_grad_(True)
        assert torch.equal(logits(model, "llama"), before)
        for layer in adapted_layers(model).values():
            assert not any(part.requires_grad for part in layer.buffers())


# ---- the scaling ---------------------------------------------------------------------------------


@of(Linear="set_scale scale_layer unscale_layer get_delta_weight")
@pytest.mark.parametrize("kind", NO_DORA)
def test_the_scale_is_that_of_the_product(kind: str) -> None:
    model = adapted(kind)
    wanted = logits(model, "llama")
    layers = adapted_layers(model).values()
    half = logits(merged_by_hand(model, default=0.5), "llama")
    against = logits(merged_by_hand(model, default=-1), "llama")
    switches: list[tuple[Callable[[Any], None], Callable[[Any], None]]] = [
        (lambda each: each.set_scale("default", 0.5), lambda each: each.set_scale("default", 1)),
        (lambda each: each.scale_layer(0.5), lambda each: each.unscale_layer(0.5)),
        (lambda each: each.scale_layer(0.5), lambda each: each.unscale_layer()),
    ]
    for scaled, back in switches:
        for layer in layers:
            scaled(layer)
        close(model, half)
        for layer in layers:
            back(layer)
        close(model, wanted)
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits(model, "llama"), base_logits())
    with rescale_adapter_scale(model, -1.0):
        close(model, against)
    assert torch.equal(logits(model, "llama"), wanted)


def test_the_delta_of_a_layer_is_the_whole_one(kind: str) -> None:
    for family in ("llama", "gpt2"):
        if family == "gpt2":
            model = attach(
                FAMILIES["gpt2"].model(),
                KINDS[kind]["method"],
                rank=2,
                alpha=3,
                stats=statistics("gpt2"),
                use_dora=KINDS[kind].get("use_dora", False),
            )
            for weight in trainable(model):
                weight.data.add_(0.1)
        else:
            model = adapted(kind)
        layers = adapted_layers(model)
        for name, _, delta in delta_weights(model):
            said = layers[name].get_delta_weight("default")
            torch.testing.assert_close(said.mT if family == "gpt2" else said, delta)


STARTS = ("corda", "loftq", "lora_ga", "mica", "olora", "orthogonal", "pissa")


@of(Linear="reset_lora_parameters update_layer " + " ".join(f"{name}_init" for name in STARTS))
def test_pefts_own_starts_leave_no_anchor_behind() -> None:
    model = adapted("anchored")
    wanted = logits(model, "llama")
    config = model.peft_config["default"]
    for layer in adapted_layers(model).values():
        for name in STARTS:
            with pytest.raises(UserError, match=f"{name}_init would leave the anchor"):
                getattr(layer, f"{name}_init")("default", config)
        with pytest.raises(UserError, match=r"attach it again with forgetless\.attach"):
            layer.reset_lora_parameters("default", True)
        with pytest.raises(UserError, match="update_layer would leave the anchor"):
            layer.update_layer("default", r=2, lora_alpha=2, config=config)
    assert torch.equal(logits(model, "llama"), wanted)


# ---- files and states ----------------------------------------------------------------------------


@of(PeftModel="save_pretrained from_pretrained load_adapter create_or_update_model_card")
def test_what_peft_saves_is_loaded_or_refused(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    wanted = logits(model, "llama")
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(load(FAMILIES["llama"].model(), tmp_path), "llama"), wanted)
    base = FAMILIES["llama"].model()
    if kind in UNANCHORED:
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), "llama"), wanted)
        return
    with pytest.raises(UserError, match=r"anchored adapter.*forgetless\.load\(base, "):
        PeftModel.from_pretrained(base, tmp_path)
    other = adapted("plain")
    with pytest.raises(UserError, match=r"forgetless\.export makes a plain LoRA"):
        other.load_adapter(str(tmp_path), "second")
    assert torch.equal(logits(other, "llama"), logits(adapted("plain"), "llama"))


def test_a_state_goes_back_to_where_it_came_from(kind: str) -> None:
    model, other = adapted(kind), adapted(kind, seed=5)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))
    assert set(get_base_model_state_dict(model)) == set(FAMILIES["llama"].model().state_dict())


def test_a_state_of_another_kind_is_refused_or_warned_of() -> None:
    anchored, plain = adapted("anchored"), adapted("plain")
    with pytest.raises(RuntimeError, match=r"load the anchored adapter with forgetless\.load"):
        set_peft_model_state_dict(plain, get_peft_model_state_dict(anchored))
    with pytest.warns(UserWarning, match="loaded without an anchor, so they must be moves"):
        set_peft_model_state_dict(anchored, get_peft_model_state_dict(plain))


@of(LoraModel="subtract_mutated_init")
def test_nothing_is_taken_out_of_a_start_that_was_never_in_the_base(tmp_path: Path) -> None:
    model = adapted("anchored")
    model.save_pretrained(str(tmp_path / "start"))
    config = (tmp_path / "start" / "adapter_config.json").read_text()
    with pytest.raises(UserError, match=r"forgetless\.export writes the plain LoRA"):
        model.save_pretrained(
            str(tmp_path / "plain"),
            path_initial_model_for_weight_conversion=str(tmp_path / "start"),
        )
    assert (tmp_path / "start" / "adapter_config.json").read_text() == config
    with pytest.raises(UserError, match=r"forgetless\.export writes it"):
        model.base_model.subtract_mutated_init(get_peft_model_state_dict(model), "default")


def test_a_plain_adapter_is_swapped_in(tmp_path: Path) -> None:
    """PEFT sets what the new adapter has not got to zero: the anchor."""
    wanted = adapted("plain", seed=5)
    folder = export(wanted, tmp_path / "plain").folder
    for kind in ("plain", "anchored", "A frozen", "B frozen"):
        model = adapted(kind)
        hotswap_adapter(model, str(folder), "default")
        close(model, logits(wanted, "llama"))
    adapted("anchored").save_pretrained(str(tmp_path / "anchored"))
    with pytest.raises(UserError, match="holds an anchored adapter"):
        hotswap_adapter(adapted("plain"), str(tmp_path / "anchored"), "default")


@of(PeftModel="supports_lora_conversion", LoraModel="supports_lora_conversion")
@of(Linear="supports_lora_conversion")
def test_a_conversion_is_of_the_whole_update(kind: str) -> None:
    model = adapted(kind)
    wanted = logits(model, "llama")
    if kind == "anchored dora":
        assert not model.supports_lora_conversion()
        return
    with pytest.warns(UserWarning, match="that is already a LoRA adapter"):
        config, state = convert_to_lora(model, rank=8)
    again = get_peft_model(FAMILIES["llama"].model(), config)
    set_peft_model_state_dict(again, state)
    close(again, wanted)


def test_intruders_are_taken_out_of_the_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or export that one and load the export"):
        reduce_intruder_dimension(adapted("anchored"), logging_sink=None)
    folder = export(adapted("anchored"), tmp_path).folder
    again = load(FAMILIES["llama"].model(), folder)
    reduce_intruder_dimension(again, logging_sink=None)
    assert set(again.peft_config) == {"default", "intruder_reduced"}


# ---- the table -----------------------------------------------------------------------------------

of(PeftModel="get_prompt get_prompt_embedding_to_save")  # of prompt learning, which has no LoRA


def public(kind: type) -> set[str]:
    """The methods that PEFT gives a class, not those of PyTorch or transformers."""
    own = [parent for parent in kind.__mro__ if parent.__module__.startswith("peft.")]
    names = {name for parent in own for name in vars(parent) if not name.startswith("_")}
    return {name for name in names if callable(getattr(kind, name))}


@pytest.mark.parametrize("kind", [PeftModel, LoraModel, Linear])
def test_every_public_method_of_peft_has_a_test(kind: type) -> None:
    assert public(kind) == _covered[kind.__name__]
