"""Loading bases, and which layers an adapter goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedTokenizerFast,
    SiglipConfig,
)
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export
from forgetless.adapters.layer import adapted_layers
from forgetless.core.errors import UserError
from forgetless.models.load import load_model, load_tokenizer, meta_model, resolve_base
from forgetless.models.parts import shortest_endings
from forgetless.models.state import as_base
from forgetless.models.targets import find_targets, target_layers
from forgetless.models.weights import linear_weight
from tests.families import FAMILIES
from tests.images import VIT_SIZES

pytest_plugins = ["tests.quick_python"]

FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    FAMILIES["llama"].model().save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, **special: str) -> None:
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", "a", "b"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


# ---- target layers -------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("targets", ["all-linear", r".*(q_proj|c_attn|query|\.q)"])
def test_target_layers_are_those_that_peft_adapts(family: str, targets: str) -> None:
    model = FAMILIES[family].model()
    layers = target_layers(model, targets)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    adapted = [
        name for name, m in wrapped.get_base_model().named_modules() if isinstance(m, LoraLayer)
    ]
    assert list(layers) == adapted


@FAMILY
def test_all_linear_leaves_the_output_head_out(family: str) -> None:
    model = FAMILIES[family].model()
    head = model.get_output_embeddings()
    assert head is None or all(layer is not head for layer in target_layers(model).values())


@FAMILY
def test_a_peft_model_gives_the_layers_of_its_base(family: str) -> None:
    model = FAMILIES[family].model()
    plain = target_layers(model)
    some = [next(iter(plain)).rpartition(".")[2]]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=some))
    wrapped.add_adapter("second", LoraConfig(r=3, target_modules="all-linear"))
    found = target_layers(wrapped)
    assert list(found) == list(plain)
    assert all(found[name] is plain[name] for name in plain)


PARTS_OF = {
    "llama": ("k_proj o_proj q_proj v_proj", "down_proj gate_proj up_proj"),
    "qwen2": ("k_proj o_proj q_proj v_proj", "down_proj gate_proj up_proj"),
    "gpt2": ("attn.c_proj c_attn", "c_fc mlp.c_proj"),
    "t5": ("k o q v", "wi wo"),
    "bert": (
        "attention.output.dense key query value",
        "0.output.dense 1.output.dense intermediate.dense",
    ),
    "vit": ("k_proj o_proj q_proj v_proj", "fc1 fc2"),
}
PART = pytest.mark.parametrize("part", ["attention", "mlp"])


@FAMILY
@PART
def test_a_part_of_a_block_is_a_list_that_peft_alone_understands(family: str, part: str) -> None:
    model = FAMILIES[family].model()
    found = find_targets(model, part)
    assert found.given == PARTS_OF[family][part == "mlp"].split()
    assert target_layers(model, found.given) == found.layers
    outside = {"bert": ["cls.predictions.transform.dense"], "vit": ["classifier"]}
    parts = [name for each in ("attention", "mlp") for name in target_layers(model, each)]
    assert sorted(parts + outside.get(family, [])) == sorted(target_layers(model))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=found.given))
    modules = wrapped.get_base_model().named_modules()
    assert [name for name, m in modules if isinstance(m, LoraLayer)] == list(found.layers)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("kind", "attention", "mlp"),
    [
        ("gemma", "k_proj o_proj q_proj v_proj", "down_proj gate_proj up_proj"),
        ("phi", "dense k_proj q_proj v_proj", "fc1 fc2"),
        ("gpt_neox", "dense query_key_value", "dense_4h_to_h dense_h_to_4h"),
        ("opt", "k_proj out_proj q_proj v_proj", "fc1 fc2"),
        ("qwen2_moe", "k_proj o_proj q_proj v_proj", "gate_proj shared_expert.down_proj up_proj"),
        ("jamba", "k_proj o_proj q_proj v_proj", "feed_forward.down_proj gate_proj up_proj"),
    ],
)
def test_other_families_have_both_parts(kind: str, attention: str, mlp: str) -> None:
    more = {"num_hidden_layers": 6} if kind == "jamba" else {}  # the fifth is its first attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more))
    assert find_targets(model, "attention").given == attention.split()
    assert find_targets(model, "mlp").given == mlp.split()
    assert bool(find_targets(model, "mlp").skipped) == (kind in ("qwen2_moe", "jamba"))


@PART
def test_a_model_whose_blocks_cannot_be_told_apart_is_refused(part: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **SMALL))
    with pytest.raises(UserError, match=f"{part!r}: no linear layer.*end in: in_proj"):
        target_layers(model, part)


def test_only_routers_beside_stacked_experts_are_no_mlp() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **SMALL))
    with pytest.raises(UserError, match=r"experts are stacked tensors: model.layers.\*.mlp.exp"):
        target_layers(model, "mlp")


def test_an_exported_adapter_names_the_modules(tmp_path: Path) -> None:
    export(attach(FAMILIES["gpt2"].model(), "pissa", 2, 2, target_modules="mlp"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["c_fc", "mlp.c_proj"]


def test_the_shortest_endings_name_nothing_else() -> None:
    everything = ["0.a.x", "0.b.x", "0.b.y", "1.a.x", "1.b.x", "1.b.y", "x"]
    assert shortest_endings(["0.b.y", "1.b.y"], everything) == ["y"]
    assert shortest_endings(["0.b.x", "1.b.x", "1.b.y"], everything) == ["1.b.y", "b.x"]


def test_modules_to_save_keep_their_plain_names() -> None:
    model = FAMILIES["vit"].model()
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    assert list(target_layers(get_peft_model(model, config), ["classifier"])) == ["classifier"]


def test_what_torchs_own_attention_reads_past_an_adapter_is_no_target() -> None:
    """SigLIP's head has such an attention; an adapter of its out_proj is trained by nothing."""
    config = SiglipConfig(vision_config=VIT_SIZES, num_labels=2)
    model = AutoModelForImageClassification.from_config(config)
    past = "vision_model.head.attention.out_proj"
    for targets in ("all-linear", ["q_proj", "out_proj"], r".*\.(fc1|out_proj)"):
        layers = target_layers(model, targets)
        assert past not in layers
        assert "vision_model.encoder.layers.0.self_attn.out_proj" in layers
        adapted = attach(model, "lora", rank=1, target_modules=targets)
        assert list(adapted_layers(adapted)) == list(layers)
        model = adapted.unload()
    with pytest.raises(UserError, match="match no layer"):
        target_layers(model, ["head.attention.out_proj"])
    assert list(target_layers(model, [past])) == [past]


def test_a_list_holds_endings_or_whole_names() -> None:
    model = FAMILIES["llama"].model()
    name = "model.layers.1.mlp.up_proj"
    assert list(target_layers(model, [name])) == [name]
    assert len(target_layers(model, ("q_proj", "up_proj"))) == 4
    assert list(target_layers(model, ["lm_head"])) == ["lm_head"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_attn"], "match no layer.*down_proj, gate_proj"),
        ("q_prj", "match no layer"),
        (["q_proj", "c_attn"], r"\['c_attn'\] match no layer"),
        ([], "match no layer"),
        (["embed_tokens"], "is a Embedding; only linear"),
        (".*self_attn", "is a LlamaAttention; only linear"),
        ("(q_proj", "no regular expression"),
    ],
)
def test_targets_that_do_not_fit_are_named(targets: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        target_layers(FAMILIES["llama"].model(), targets)


def test_linear_weight_is_out_by_in_and_not_a_copy() -> None:
    linear, conv = nn.Linear(3, 5), Conv1D(5, 3)
    for layer in (linear, conv):
        weight = linear_weight(layer)
        assert weight.shape == (5, 3)
        assert weight.data_ptr() == layer.weight.data_ptr()
    torch.testing.assert_close(conv(torch.eye(3)) - conv.bias, linear_weight(conv).T)


def test_linear_weight_refuses_other_layers() -> None:
    with pytest.raises(TypeError, match="Embedding"):
        linear_weight(nn.Embedding(3, 4))
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"quantised \(torch.uint8\)"):
        linear_weight(packed)


# ---- the base as it was found --------------------------------------------------------------------


def test_as_base_restores_everything_even_after_an_error() -> None:
    model = get_peft_model(
        FAMILIES["llama"].model(),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.train()
    model.base_model.model.model.layers[0].eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    ids = torch.arange(3, 9)[None]

    def state() -> list[object]:
        training = [module.training for module in model.modules()]
        return [training, [parameter.requires_grad for parameter in model.parameters()]]

    before = state()
    expected = FAMILIES["llama"].model()(input_ids=ids).logits

    def use() -> None:
        with as_base(model) as base:
            assert not any(module.training for module in model.modules())
            assert torch.equal(base(input_ids=ids).logits, expected)
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert state() == before
    assert torch.is_grad_enabled()
    assert not torch.equal(model(input_ids=ids).logits, expected)


def test_as_base_refuses_merged_adapters() -> None:
    model = get_peft_model(FAMILIES["llama"].model(), LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge_adapter"), as_base(model):
        pass


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "float64"])
def test_load_model_gives_the_saved_weights(llama_folder: Path, dtype: str) -> None:
    model = load_model(str(llama_folder), dtype=dtype, device="cpu")
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert not model.training
    assert model.dtype is kind
    expected = FAMILIES["llama"].model().state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].to(kind)), name


def test_meta_model_has_the_shapes_and_no_weights(llama_folder: Path) -> None:
    shapes = {
        name: layer.weight.shape
        for name, layer in target_layers(meta_model(str(llama_folder))).items()
    }
    loaded = target_layers(load_model(str(llama_folder)))
    assert shapes == {name: layer.weight.shape for name, layer in loaded.items()}
    assert all(parameter.is_meta for parameter in meta_model(str(llama_folder)).parameters())


def test_pocket_is_the_shipped_model() -> None:
    from forgetless.models.pocket import base_path

    assert resolve_base("pocket") == str(base_path())


def test_a_hub_id_that_is_not_cached_is_refused_offline() -> None:
    with pytest.raises(UserError, match=r"no model of that name.*HF_HUB_OFFLINE"):
        resolve_base("nobody/nothing")


def test_paths_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        resolve_base("./not/here")
    with pytest.raises(UserError, match=r"no config\.json; it holds nothing"):
        resolve_base(str(tmp_path))
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"is a file, not a model"):
        resolve_base(str(tmp_path / "data.jsonl"))
    with pytest.raises(UserError, match=r"it holds data\.jsonl"):
        resolve_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no weights \(model\.safetensors"):
        load_model(str(tmp_path))


def test_broken_models_are_refused_in_one_line(tmp_path: Path, llama_folder: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot read the config") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    config = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load base") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unknown dtype 'float23'; did you mean"):
        load_model(str(llama_folder), dtype="float23")


@pytest.mark.parametrize("stored", [7, "LlamaForCausalLM", [7], {"a": 1}])
def test_architectures_that_are_no_names_are_one_clear_line(
    stored: object, llama_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": stored}))
    with pytest.raises(UserError, match="architectures must be a list of names, got"):
        load_model(str(folder))


def test_missing_weights_are_not_made_up(tmp_path: Path, llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((llama_folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"incomplete: 9 missing, 'model\.layers\.2\."):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "words"), [("t5", "not a causal"), ("bert", "which has no trained head")]
)
def test_other_kinds_of_model_are_refused_by_name(family: str, words: str, tmp_path: Path) -> None:
    model = FAMILIES[family].model()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is a {type(model).__name__}, .*{words}"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match=words):
        meta_model(str(tmp_path))


def test_a_tokenizer_always_has_a_padding_token(llama_folder: Path, tmp_path: Path) -> None:
    for path in llama_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path))
    save_tokenizer(tmp_path, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    assert load_tokenizer(str(tmp_path)).pad_token == "<pad>"
    save_tokenizer(tmp_path, unk_token="<unk>", eos_token="<eos>")
    assert load_tokenizer(str(tmp_path)).pad_token == "<eos>"
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match="neither a padding"):
        load_tokenizer(str(tmp_path))


def test_a_real_model_loads(shared_data: Path) -> None:
    folder = str(shared_data / "stories260K" / "hf")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert len(target_layers(model)) == 5 * 7
    ids = torch.tensor([tokenizer("Once upon a time, there was a little").input_ids])
    said = model.generate(ids.to(model.device), max_new_tokens=6, do_sample=False)
    assert "girl named" in tokenizer.decode(said[0])


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_that_comes_with_a_base_never_runs_and_nobody_is_asked(
    part: str, llama_folder: Path, tmp_path: Path, python: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(llama_folder, folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    if part == "config":
        config |= {"auto_map": names, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Own"}
        )
    )
    script = (
        "import sys\n"
        "def hook(event, given):\n"
        "    if event.startswith('builtins.input'):\n"
        "        print('ASKED')\n"
        "sys.addaudithook(hook)\n"
        "from forgetless.models.load import load_model, load_tokenizer\n"
        f"load_{'model' if part == 'config' else 'tokenizer'}({str(folder)!r})\n"
    )
    done = subprocess.run(
        [python, "-c", script], input="y\n" * 9, capture_output=True, text=True, check=False
    )
    assert "ASKED" not in done.stdout
    assert "UserError" in done.stderr, done.stderr
    assert "comes with Python code of its own" in done.stderr
    assert not (tmp_path / "ran").exists()
