"""The verbs for what is done: merged, asked, uploaded, and what studies keep."""

from __future__ import annotations

import io
import json
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import forgetless as fl
from forgetless.adapters.rounding import nf4
from forgetless.cli.commands import sharing
from forgetless.core.files import lock
from forgetless.data.language import MODALITY
from forgetless.models.load import load_model, load_tokenizer
from forgetless.models.targets import target_layers
from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run as run_recipe
from forgetless.studies.study import study
from forgetless.tasks.generation import generate
from tests.cli.test_cli import forgetless  # noqa: F401 - a fixture
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with one run, anchored."""
    recipe = recipe_of(tiny_base, tiny_files, spectra=True)
    recipe["adapter"]["method"] = "pissa"
    recipe["training"]["learning_rate"] = 3e-2
    out = tmp_path_factory.mktemp("runs")
    done = study({"name": "one", "recipe": recipe, "arms": [{"seed": 0}, {"seed": 1}]}, out)
    assert not done.failed
    return Path(done.folder)


def run_of(folder: Path) -> Path:
    return min(folder.glob("pissa-*"))


def test_a_merged_model_says_what_the_adapter_says(
    forgetless: Any,  # noqa: F811
    trained: Path,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    run, out = run_of(trained), tmp_path / "merged"
    told = forgetless("merge", run, "--out", out)
    assert told.code == 0
    assert "the adapter is in 14 of its weights" in told.out
    assert "0.0 % of the update vanished in rounding" in " ".join(told.out.split())
    assert "already merged" not in told.err
    assert "--dtype float32" not in told.out
    ids = {"input_ids": torch.arange(3, 11)[None]}
    with torch.no_grad():
        model = fl.load(load_model(str(tiny_base)), run / "native")
        merged, base = load_model(str(out)), load_model(str(tiny_base))
        assert torch.allclose(merged(**ids).logits, model(**ids).logits, atol=1e-5)
        assert not torch.equal(merged(**ids).logits, base(**ids).logits)
    assert load_tokenizer(str(out))("abc") == load_tokenizer(str(tiny_base))("abc")
    assert "is not empty" in forgetless("merge", run, "--out", out).err
    assert "is a whole model" in forgetless("merge", out, "--out", tmp_path / "again").err


def save_adapter(base: Any, folder: Path, size: float = 0.1, **settings: Any) -> PeftModel:
    """A plain LoRA of PEFT whose every weight was moved, in a folder."""
    torch.manual_seed(0)
    usual: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on tied embeddings
        model = get_peft_model(base, LoraConfig(**usual | settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(size * torch.randn(weight.shape))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["embeddings", "both", "adapted head", "head"],
)
def test_a_merged_model_with_tied_embeddings_says_the_same_in_a_new_process(
    settings: dict[str, Any],
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tmp_path: Path,
    python: str,
) -> None:
    ids = torch.arange(3, 11)[None]
    adapted = save_adapter(load_model(str(tiny_base)), tmp_path / "adapter", **settings)
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
    told = forgetless(
        "merge", tmp_path / "adapter", "--base", tiny_base, "--out", tmp_path / "merged"
    )
    assert told.code == 0, told.err
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M; "
        "from safetensors.torch import save_file; "
        "model = M.from_pretrained(sys.argv[1]).eval(); "
        "logits = model(input_ids=torch.arange(3, 11)[None]).logits.detach(); "
        "save_file({'logits': logits}, sys.argv[2])"
    )
    file = tmp_path / "logits.safetensors"
    subprocess.run([python, "-c", script, tmp_path / "merged", file], check=True)
    torch.testing.assert_close(load_file(file)["logits"], wanted, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*lora_B.bias")  # PEFT takes it for a broken matrix
def test_what_cannot_be_merged_is_refused_in_words(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    save_adapter(load_model(str(tiny_base)), tmp_path / "adapter", lora_bias=True)
    words = ["merge", tmp_path / "adapter", "--base", tiny_base, "--out", tmp_path / "merged"]
    told = forgetless(*words)
    assert told.code == 2
    assert "cannot be merged" in told.err
    assert "serve it beside the base" in told.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("size", "left"), [(1e-5, False), (1.0, True)])
def test_merging_says_how_much_of_the_update_rounding_left(
    size: float,
    left: bool,
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    """Of entries below half a step of bfloat16 nothing is left where the base has that format."""
    base = load_model(str(tiny_base), dtype="bfloat16")
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tiny_base)).save_pretrained(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", size=size)
    merge = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out"]
    found = json.loads(forgetless(*merge, tmp_path / "one", "--json").out)
    told = " ".join(forgetless(*merge, tmp_path / "two").out.split())
    assert (found["stored"]["kept"] > 0.9) == left
    assert ("Merge with --dtype float32" in told) == (not left)
    assert f"{100 * (1 - found['stored']['kept']):.1f} % of the update vanished" in told
    assert found["layers"].keys() == set(target_layers(base, ["q_proj", "v_proj"]))
    assert (found["four_bits"]["error"] > 1) == (not left)
    wide = json.loads(forgetless(*merge, tmp_path / "wide", "--dtype", "float32", "--json").out)
    assert wide["stored"]["kept"] == pytest.approx(1, abs=1e-3)
    assert wide["difference"] < 1e-5 <= 1e-5 + found["difference"]


@pytest.mark.filterwarnings("ignore:.* says that i")
def test_merging_onto_another_base_says_how_far_apart_the_two_are(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after QLoRA: trained on weights of 4 bits, merged into those of 16."""
    rounded = load_model(str(tiny_base))
    with torch.no_grad():
        for layer in target_layers(rounded).values():
            weight: Any = layer.weight
            weight.copy_(nf4(8 * weight))  # so much that it shows in a tiny model
    rounded.save_pretrained(tmp_path / "four_bits")
    load_tokenizer(str(tiny_base)).save_pretrained(tmp_path / "four_bits")
    save_adapter(load_model(str(tmp_path / "four_bits")), tmp_path / "adapter")
    merge = ["merge", tmp_path / "adapter", "--json", "--out"]
    same = json.loads(forgetless(*merge, tmp_path / "same").out)
    other = json.loads(forgetless(*merge, tmp_path / "other", "--base", tiny_base).out)
    assert same["kl"] is None
    logits = []
    for base in (rounded, load_model(str(tiny_base))):
        with torch.no_grad():
            logits.append(fl.load(base, tmp_path / "adapter")(**MODALITY.probe(base)).logits)
    p, q = (each.double().log_softmax(-1) for each in logits)
    assert other["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    monkeypatch.setattr(sharing, "KL_OF_ANOTHER_BASE", other["kl"] / 2)
    merge.remove("--json")
    told = forgetless(*merge, tmp_path / "told", "--base", tiny_base)
    assert "not the base that the adapter was trained on" in " ".join(told.out.split())
    assert "which is much; measure both" in " ".join(told.out.split())


def test_an_adapter_of_a_base_in_4_bits_is_merged_into_the_one_in_16(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("bitsandbytes")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    packed = LlamaForCausalLM.from_pretrained(
        tiny_base, quantization_config=how, dtype=torch.float32
    )
    packed.save_pretrained(tmp_path / "packed")
    load_tokenizer(str(tiny_base)).save_pretrained(tmp_path / "packed")
    save_adapter(load_model(str(tmp_path / "packed")), tmp_path / "adapter")
    merge = ["merge", tmp_path / "adapter", "--json", "--out", tmp_path / "merged", "--base"]
    assert "are packed; merge into the base before" in forgetless(*merge, tmp_path / "packed").err
    found = json.loads(forgetless(*merge, tiny_base).out)
    assert found["stored"]["kept"] == pytest.approx(1, abs=1e-6)
    assert 0 < found["kl"] < 1e-3


@pytest.mark.parametrize("quantise", ["nf4", "int8"])
def test_a_run_in_4_bits_is_merged_into_the_base_as_it_is_stored(
    forgetless: Any,  # noqa: F811
    quantise: str,
    tiny_base: Path,
    tiny_files: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = recipe_of(tiny_base, tiny_files, quantise=quantise, dtype="float32")
    done = run_recipe({**recipe, "tasks": {}}, tmp_path, evaluate=False)
    merge = ["merge", done.folder, "--json", "--out", tmp_path / "merged"]
    found = json.loads(forgetless(*merge).out)
    assert 0 < found["kl"] < 1
    card = (done.folder / "adapter" / "README.md").read_text()
    bits = {"nf4": "4 bits (nf4, double quantisation)", "int8": "8 bits (LLM.int8())"}[quantise]
    assert f"| base in | {bits} |" in card
    assert f"It was trained on the base in {bits}" in card
    model = fl.load(load_model(str(tiny_base), quantise=quantise), done.folder / "native")  # type: ignore[arg-type]
    fl.export(model, tmp_path / "alone")
    assert f"| base in | {bits} |" in (tmp_path / "alone" / "README.md").read_text()


def test_base_and_adapter_answer_the_same_question(
    forgetless: Any,  # noqa: F811
    trained: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["chat", run_of(trained), "1+1=", "--max-new-tokens", 8]
    base, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    (alone,) = generate(base, tokenizer, ["1+1="], max_new_tokens=8, stop=())
    model = fl.load(base, run_of(trained) / "adapter")
    (after,) = generate(model, tokenizer, ["1+1="], max_new_tokens=8, stop=())
    told = {"prompt": "1+1=", "base": alone.strip(), "adapter": after.strip()}
    assert json.loads(forgetless(*asked, "--json").out) == told
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1=\n1+1=\n"))
    lines = forgetless(*asked[:2], *asked[3:], "--json").out.splitlines()
    assert [json.loads(line) for line in lines] == [told, told]
    assert "needs a chat template" in forgetless(*asked, "--system", "Be brief.").err
    assert "unknown template" in forgetless(*asked, "--template", "of").err


def test_a_chat_template_opens_the_answer_and_begins_once(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = sharing.Pair.load(run_of(trained))
    pair.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    asked: list[tuple[str, bool]] = []

    def answers(model: Any, tokenizer: Any, prompts: list[str], **how: Any) -> list[str]:
        asked.extend((prompt, how["rendered"]) for prompt in prompts)
        return ["x"]

    monkeypatch.setattr(sharing, "generate", answers)
    assert pair.answers("hi", 4, system="brief") == ("x", "x")
    assert asked == [("<s>s:brief;u:hi;a:", True)] * 2
    pair.answers("hi", 4, template="off")
    assert asked[-1] == ("hi", False)


class Hub:
    """What stands for the hub, and sees what it is given."""

    seen: ClassVar[dict[str, Any]] = {}

    def create_repo(self, repository: str, **how: Any) -> None:
        self.seen.update(how, repository=repository)

    def upload_folder(self, **how: Any) -> Any:
        self.seen.update(how, names={file.name for file in Path(how["folder_path"]).iterdir()})
        return SimpleNamespace(commit_url=f"https://hub/{how['repo_id']}/commit/1")


@pytest.mark.parametrize("lossless", [False, True])
def test_a_plain_adapter_and_its_card_are_uploaded_and_nothing_else(
    lossless: bool,
    forgetless: Any,  # noqa: F811
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = run_of(trained) / "native" if lossless else run_of(trained)
    with monkeypatch.context() as patched:
        patched.setattr(sharing, "HfApi", Hub)
        told = forgetless("push", source, "me/mine", "--private")
    assert told.out.strip() == "https://hub/me/mine/commit/1"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= Hub.seen["names"]
    assert not {"forgetless.json"} & set(Hub.seen["allow_patterns"])
    assert Hub.seen["private"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused = forgetless("push", source, "me/mine")
    assert refused.code
    assert "the hub did not take" in refused.err


def test_what_studies_keep_is_shown_and_deleted_unless_a_run_is_at_work(
    forgetless: Any,  # noqa: F811
    trained: Path,
) -> None:
    parts = json.loads(forgetless("clean", trained.parent, "--json").out)
    sizes = [part["bytes"] for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert {"scores", "aftercare"} <= {part["part"] for part in parts}
    with lock(run_of(trained) / ".lock"):
        refused = forgetless("clean", trained, "--delete", "aftercare")
    assert "is at work" in refused.err
    assert "unknown part" in forgetless("clean", trained, "--delete", "runs").err
    assert (trained / "shared/aftercare").exists()
    assert "deleted: " in forgetless("clean", trained, "--delete", "aftercare").out
    assert not (trained / "shared/aftercare").exists()
    assert (trained / "shared/scores").exists()


def test_a_new_recipe_is_right_as_written(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tiny_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["new", tiny_base, tiny_files / "train.jsonl", "--test", tiny_files / "test.jsonl"]
    assert "forgetless run train.yaml" in forgetless(*given).out
    assert check(Recipe.load("train.yaml")) == []
    assert "#" in Path("train.yaml").read_text()
    assert "is there already" in forgetless(*given).err
