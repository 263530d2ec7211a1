"""Every base: quantised, mixtures of experts, shared, offloaded, sharded, not loaded."""

from __future__ import annotations

import gc
import json
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export, load, save
from forgetless.adapters.foreign import require_usable
from forgetless.adapters.layer import adapted_layers, delta_weights
from forgetless.core.errors import UserError
from forgetless.models.targets import find_targets, target_layers
from forgetless.models.weights import hold_packing, is_quantised, linear_weight, weight_shape
from forgetless.statistics.collection import collect
from forgetless.training import loop
from forgetless.training.settings import TrainingSettings
from tests.adapters.test_attachment import logits, statistics, train
from tests.families import FAMILIES, SPECIAL, VOCAB

# ---- quantised -----------------------------------------------------------------------------------


def nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )


def llm_int8() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from transformers import TorchAoConfig

    four_bit: Any = vars(torch)["int4"]  # which the type stubs do not know
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four_bit))


QUANTISED = {
    "bitsandbytes 4 bit": ("bitsandbytes", nf4),
    "bitsandbytes 8 bit": ("bitsandbytes", llm_int8),
    "torchao int8": ("torchao", torchao_int8),
    "torchao int4": ("torchao", torchao_int4),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    FAMILIES["llama"].model().save_pretrained(folder)
    return folder


@pytest.fixture(params=QUANTISED)
def quantised(request: pytest.FixtureRequest, saved: Path) -> Iterator[Callable[[], Any]]:
    """Loads the same quantised base at every call."""
    package, config = QUANTISED[request.param]
    pytest.importorskip(package)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def base() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LlamaForCausalLM.from_pretrained(
                saved, quantization_config=config(), dtype=torch.float32
            )
        hold_packing(model)
        return model.eval()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt|.*get_apply_tensor_subclass")
        yield base


def stored(model: nn.Module) -> list[Tensor]:
    """Every number that the quantised layers hold."""
    found = []
    for layer in target_layers(model).values():
        weight: Any = layer.weight
        names = getattr(weight, "tensor_data_names", None)
        parts = [getattr(weight, name) for name in names] if names else [weight.data]
        found += [part.clone() for part in parts]
    return found


@pytest.mark.parametrize(
    ("method", "switches"),
    [("lora_null_v1", {}), ("lora_null_v1", {"use_dora": True}), ("mica", {})],
    ids=["anchored", "anchored dora", "plain"],
)
def test_a_quantised_base_is_trained_on_and_never_written(
    quantised: Callable[[], Any], method: str, switches: dict[str, Any], tmp_path: Path
) -> None:
    base = quantised()
    before, untouched = logits(base, "llama"), stored(base)
    assert all(is_quantised(layer) for layer in target_layers(base).values())
    model = attach(base, method, 4, 6, stats=statistics("llama"), **switches)
    assert torch.equal(logits(model, "llama"), before)
    losses = train(model, "llama", steps=3)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), before)
    assert all(torch.equal(a, b) for a, b in zip(stored(model), untouched, strict=True))

    now = logits(model, "llama")
    export(model, tmp_path / "plain")
    alone = PeftModel.from_pretrained(quantised(), tmp_path / "plain")
    torch.testing.assert_close(logits(alone, "llama"), now, atol=1e-5, rtol=0)
    save(model, tmp_path / "native")
    assert torch.equal(logits(load(quantised(), tmp_path / "native"), "llama"), now)


def test_the_start_comes_from_the_values_that_the_layer_computes_with(
    quantised: Callable[[], Any],
) -> None:
    base = quantised()
    model = attach(quantised(), "olora", 4, 4)
    for name, layer in target_layers(base).items():
        weight = linear_weight(layer)
        assert weight.shape == weight_shape(layer)
        Q, R = torch.linalg.qr(weight.double())
        anchor = adapted_layers(model)[name].lora_anchor["default"]
        product = (Q[:, :4] @ R[:4]).float()
        torch.testing.assert_close(anchor.anchor_B @ anchor.anchor_A, product, atol=1e-5, rtol=1e-4)
    assert all(float(delta.norm()) == 0 for _, _, delta in delta_weights(model))


def test_an_anchored_adapter_is_not_merged_into_packed_numbers(
    quantised: Callable[[], Any], request: pytest.FixtureRequest
) -> None:
    model: Any = attach(quantised(), "pissa", 4, 4)
    if "torchao" in request.node.name:
        with pytest.raises(UserError, match="cannot be merged into torchao's quantised weights"):
            model.merge_and_unload()
        return
    train(model, "llama", steps=1)
    now = logits(model, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()  # by PEFT: dequantised, merged, quantised again
    assert float((logits(merged, "llama") - now).norm() / now.norm()) < 0.5


def test_a_layer_that_bitsandbytes_repacked_for_inference_is_refused(saved: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = LlamaForCausalLM.from_pretrained(saved, quantization_config=nf4())
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match=r"up_proj' was repacked by bitsandbytes for inference"):
        attach(model, "lora", 4)


class Packed(nn.Module):
    """What a layer of another quantiser looks like from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def test_other_quantisers_are_refused_by_name() -> None:
    model: Any = FAMILIES["llama"].model()
    model.model.layers[0].mlp.up_proj = Packed()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match=r"quantised with GPTQ: the weight of 'model\.layers\.0"):
        attach(model, "pissa", 4)
    del model.config.quantization_config
    with pytest.raises(UserError, match=r"quantised with Packed.*load the unquantised model"):
        attach(model, "pissa", 4)


def test_an_8_bit_float_weight_without_its_scale_is_refused() -> None:
    model: Any = FAMILIES["llama"].model()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match=r"up_proj' is quantised \(torch.float8_e4m3fn\)"):
        attach(model, "pissa", 4)


# ---- mixtures of experts -------------------------------------------------------------------------

MOE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SPECIAL,
}


def mixtral() -> PreTrainedModel:
    """Its targets are rewritten by PEFT."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4)).eval()


def qwen3_moe() -> PreTrainedModel:
    """Likewise, with other names."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **MOE, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(params=[mixtral, qwen3_moe])
def experts(request: pytest.FixtureRequest) -> Callable[[], PreTrainedModel]:
    found: Callable[[], PreTrainedModel] = request.param
    return found


def test_all_linear_says_which_expert_tensors_it_leaves_out(
    experts: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    base = logits(experts(), "llama")
    stats = collect(experts(), [FAMILIES["llama"].batch(seed=seed) for seed in range(3)])
    with pytest.warns(UserWarning, match=r"'all-linear' does not adapt: model\.layers\.\*\.mlp\.e"):
        model = attach(experts(), "lora_null_v1", 4, 6, stats=stats)
    endings = {name.rpartition(".")[2] for name in adapted_layers(model)}
    assert endings == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert torch.equal(logits(model, "llama"), base)
    train(model, "llama", steps=2)
    now = logits(model, "llama")
    export(model, tmp_path / "plain")
    alone = PeftModel.from_pretrained(experts(), tmp_path / "plain")
    torch.testing.assert_close(logits(alone, "llama"), now, atol=1e-5, rtol=0)
    save(model, tmp_path / "native")
    assert torch.equal(logits(load(experts(), tmp_path / "native"), "llama"), now)


def llama4() -> PreTrainedModel:
    """A linear layer by its class chooses the experts, and gives two tensors."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **MOE, head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1
    )
    return Llama4ForCausalLM(config).eval()


def phimoe() -> PreTrainedModel:
    """Likewise, with three."""
    torch.manual_seed(0)
    return PhimoeForCausalLM(PhimoeConfig(**MOE, num_local_experts=4)).eval()


@pytest.mark.parametrize("base", [llama4, phimoe])
@pytest.mark.filterwarnings("ignore:.*'all-linear' does not adapt")
def test_a_router_is_no_linear_layer(base: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    before = logits(base(), "llama")
    model = attach(base(), "pissa", 4, 6)
    assert not any("router" in name for name in adapted_layers(model))
    assert torch.equal(logits(model, "llama"), before)
    train(model, "llama", steps=2)
    export(model, tmp_path)
    alone = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(
        logits(alone, "llama"), logits(model.eval(), "llama"), atol=1e-5, rtol=0
    )
    with pytest.raises(UserError, match=r"'router'.* which is a \w+Router; only linear layers"):
        find_targets(base(), ["q_proj", "router"])


def test_linear_layers_of_a_class_of_their_own_are_adapted() -> None:
    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = FalconForCausalLM(config).to(torch.bfloat16)
    assert len(target_layers(model)) == 4


def test_experts_that_are_asked_for_by_name_are_refused(
    experts: Callable[[], PreTrainedModel],
) -> None:
    for targets in (["q_proj", "down_proj"], ["gate_up_proj"], ["gate"]):
        with pytest.raises(UserError, match="reach the stacked expert tensors"):
            attach(experts(), "lora", 4, target_modules=targets)
    assert find_targets(experts(), ["q_proj"]).skipped == []


@pytest.mark.parametrize("rank", [2, 4], ids=["fewer", "as many as experts"])
def test_an_adapter_of_stacked_experts_is_refused_by_name(
    rank: int, experts: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """Its factors of all experts lie in one matrix, whose order no shape tells."""
    wanted = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    config = LoraConfig(r=rank, target_modules=["q_proj"], target_parameters=wanted)
    get_peft_model(experts(), config).save_pretrained(str(tmp_path))
    named = r"adapts stacked expert tensors \(mlp\.experts\.down_proj; .*PeftModel\.from_pretrained"
    with pytest.raises(UserError, match=named):
        load(experts(), tmp_path)
    with pytest.raises(UserError, match=named):
        require_usable(tmp_path, experts())


# ---- shared, tied --------------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(6, 6)
        self.one, self.two = nn.Sequential(layer), nn.Sequential(layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.two(self.one(x)))


class SharedBlock(nn.Module):
    """One block under two names, as models with shared layers have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_shared_block_starts_once_and_every_use_of_it_is_adapted() -> None:
    x = torch.ones(2, 6)
    model = attach(SharedBlock(), "pissa", 2, 2)
    (module,) = adapted_layers(model).values()
    assert torch.equal(model(x), SharedBlock()(x))
    module.lora_B["default"].weight.data.normal_()
    adapted = model(x)
    torch.testing.assert_close(adapted, module(module(x).tanh()).tanh())
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


def test_a_layer_under_two_names_is_named() -> None:
    with pytest.warns(UserWarning, match=r"'two\.0' is the same module as 'one\.0'"):
        model = attach(Shared(), "pissa", 2, 2)
    assert list(adapted_layers(model)) == ["one.0"]
    x = torch.ones(2, 6)
    assert torch.equal(model(x), Shared()(x))


def test_tied_embeddings_stay_tied_when_the_head_is_adapted() -> None:
    base = logits(FAMILIES["llama"].model(), "llama")
    model: Any = attach(FAMILIES["llama"].model(), "pissa", 4, target_modules=["lm_head", "q_proj"])
    assert torch.equal(logits(model, "llama"), base)
    train(model, "llama", steps=2)
    inner = model.get_base_model()
    assert inner.lm_head.get_base_layer().weight is inner.model.embed_tokens.weight
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), base)


def test_the_trainer_trains_on_a_quantised_base(
    quantised: Callable[[], Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if "torchao int4" in request.node.name:
        pytest.skip("transformers' Trainer refuses torchao below 8 bits; a loop by hand trains it")
    base = quantised()
    untouched = stored(base)
    rows = [list(range(3 + i, 11 + i)) for i in range(6)]
    model = attach(base, "lora_null_v1", 4, 6, stats=statistics("llama"))
    trained = loop.train(
        model,
        cast(Any, SimpleNamespace(pad_token_id=0)),
        Dataset.from_dict({"input_ids": rows, "labels": rows}),
        TrainingSettings(steps=4, batch_size=6, learning_rate=1e-2, log_every=1),
        tmp_path,
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert trained.final_loss < lines[0]["loss"]
    assert all(torch.equal(a, b) for a, b in zip(stored(base), untouched, strict=True))


# ---- weights that are not there ------------------------------------------------------------------


def test_a_base_is_freed_as_soon_as_nobody_needs_it() -> None:
    base = FAMILIES["llama"].build()
    released = weakref.ref(base)
    gc.disable()  # on a GPU the next model may need the room before the next collection
    try:
        model = attach(base, "pissa", rank=2)
        del base, model
        assert released() is None
    finally:
        gc.enable()


def test_a_model_on_the_meta_device_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"\(and 13 more\) has no weights: it is on the meta device"
    ):
        attach(FAMILIES["llama"].model().to("meta"), "lora", 4)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_base_is_trained_on_like_a_whole_one(place: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    whole, model = FAMILIES["llama"].model(), FAMILIES["llama"].model()
    before, stats = logits(whole, "llama"), statistics("llama")
    here = torch.device("cpu")
    if place == "disk":
        disk_offload(model, tmp_path / "weights", execution_device=here)
    else:
        cpu_offload(model, execution_device=here)
    with pytest.raises(UserError, match="is offloaded, and DoRA needs its weight at any time"):
        attach(model, "lora", 4, use_dora=True)
    expected = attach(whole, "lora_null_v1", 4, 6, stats=stats)
    adapted = attach(model, "lora_null_v1", 4, 6, stats=stats)
    assert torch.equal(logits(adapted, "llama"), before)
    losses = train(adapted, "llama", steps=3)
    assert losses[-1] < losses[0]
    assert losses == train(expected, "llama", steps=3)
    assert all(weight.is_meta != weight.requires_grad for weight in adapted.parameters())
    for (_, W, delta), (_, wanted, move) in zip(
        delta_weights(adapted), delta_weights(expected), strict=True
    ):
        assert torch.equal(W, wanted)
        assert torch.equal(delta, move)
    save(adapted, tmp_path / "saved")
    again = load(FAMILIES["llama"].model(), tmp_path / "saved")
    assert torch.equal(logits(again, "llama"), logits(adapted, "llama"))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, so that a model can be sharded."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    store = HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_is_refused_with_the_way_out() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = FAMILIES["llama"].model()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UserError, match=r"is sharded \(FSDP2.*attach before the model is wrapped"):
        attach(model, "lora", 4)


def test_zero_3_and_fsdp_are_refused_with_the_way_out() -> None:
    model: Any = FAMILIES["llama"].model()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 1
    with pytest.raises(UserError, match=r"ZeRO-3.*attach before the model is wrapped"):
        attach(model, "lora", 4)
    wrapper = type("FullyShardedDataParallel", (nn.Module,), {})()
    wrapper.module = FAMILIES["llama"].model()
    with pytest.raises(UserError, match="sharded by FSDP; attach before"):
        attach(wrapper, "lora", 4)
