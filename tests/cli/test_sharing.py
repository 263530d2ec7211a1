"""The verbs for what is done: merged, asked, uploaded, and what studies keep."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import forgetless as fl
from forgetless.cli.commands import sharing
from forgetless.core.files import lock
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe
from forgetless.studies.study import study
from forgetless.tasks.generation import generate
from tests.cli.test_cli import forgetless  # noqa: F401 - a fixture
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]


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
    assert forgetless("merge", run, "--out", out).code == 0
    ids = {"input_ids": torch.arange(3, 11)[None]}
    with torch.no_grad():
        model = fl.load(load_model(str(tiny_base)), run / "native")
        merged, base = load_model(str(out)), load_model(str(tiny_base))
        assert torch.allclose(merged(**ids).logits, model(**ids).logits, atol=1e-5)
        assert not torch.equal(merged(**ids).logits, base(**ids).logits)
    assert load_tokenizer(str(out))("abc") == load_tokenizer(str(tiny_base))("abc")
    assert "is not empty" in forgetless("merge", run, "--out", out).err
    assert "is a whole model" in forgetless("merge", out, "--out", tmp_path / "again").err


def test_base_and_adapter_answer_the_same_question(
    forgetless: Any,  # noqa: F811
    trained: Path,
    tiny_base: Path,
) -> None:
    asked = ["chat", run_of(trained), "1+1=", "--max-new-tokens", 8]
    base, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    (alone,) = generate(base, tokenizer, ["1+1="], max_new_tokens=8, stop=())
    model = fl.load(base, run_of(trained) / "adapter")
    (after,) = generate(model, tokenizer, ["1+1="], max_new_tokens=8, stop=())
    told = {"prompt": "1+1=", "base": alone.strip(), "adapter": after.strip()}
    assert json.loads(forgetless(*asked, "--json").out) == told
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
