"""What is read from a hub: one commit a process, whatever names it, and without a network too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor

import forgetless as fl
from forgetless.cli.commands.folders import Trained
from forgetless.core.errors import UserError
from forgetless.data.sources import read_rows
from forgetless.models.hashes import base_hash
from forgetless.models.hub import HubName, commit_of, snapshot
from forgetless.models.load import load_model, load_tokenizer
from forgetless.models.state import source_of
from tests.cli.test_cli import forgetless  # noqa: F401
from tests.hub import Hub, ask_again
from tests.tiny import save_base

pytest_plugins = ["tests.hub", "tests.tiny_fixtures"]

IDS = torch.arange(4, 16)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.fixture
def two(hub: Hub, tiny_base: Path, tmp_path: Path) -> Hub:
    """A base of two states: ``v1``, and a later one on the main branch."""
    hub.put("models/acme/base", tiny_base, "v1")
    hub.put("models/acme/base", save_base(tmp_path / "later", seed=1), "main")
    return hub


def tuned(base: str, folder: Path) -> Path:
    """A trained adapter, one could say, for that base."""
    model: Any = fl.attach(load_model(base), "pissa", rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    fl.export(model, folder)
    return folder


def test_a_revision_is_a_model_of_its_own(two: Hub, tiny_base: Path) -> None:
    first = logits(load_model("acme/base@v1"))
    assert torch.equal(first, logits(load_model(str(tiny_base))))
    assert not torch.equal(first, logits(load_model("acme/base")))
    commit = commit_of(HubName("acme/base", "v1"))
    assert base_hash("acme/base@v1") == base_hash(f"acme/base@{commit}") != base_hash("acme/base")


def test_all_files_are_of_one_commit_though_somebody_uploads_in_between(
    two: Hub, tmp_path: Path
) -> None:
    before = base_hash("acme/base")
    two.put("models/acme/base", save_base(tmp_path / "latest", seed=2))
    model, expected = load_model("acme/base"), load_model(str(tmp_path / "later"))
    assert torch.equal(logits(model), logits(expected))
    assert base_hash("acme/base") == before
    assert load_tokenizer("acme/base").get_vocab() == load_tokenizer("acme/base@v1").get_vocab()
    assert [asked for asked in two.asked if "HEAD" in asked and "/main/" in asked] == [
        "HEAD /acme/base/resolve/main/config.json"
    ]


@pytest.mark.parametrize("by_commit", [False, True])
def test_a_hub_that_does_not_answer_leaves_the_cache_and_is_asked_once(
    two: Hub, by_commit: bool
) -> None:
    online = logits(load_model("acme/base"))
    name = f"acme/base@{commit_of(HubName('acme/base'))}" if by_commit else "acme/base"
    ask_again()
    two.asked.clear()
    two.is_silent = True
    with pytest.warns(UserWarning, match="hub does not answer"):
        model = load_model(name)
    assert torch.equal(logits(model), online)
    with pytest.raises(UserError, match=r"'acme/none' is no folder, and no model.*does not answer"):
        load_model("acme/none")
    assert two.asked == ["HEAD /"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("acme/data", "'acme/data' on the Hugging Face hub is no model: it has neither"),
        ("acme/none", "'acme/none' is no folder, and the Hugging Face hub has no model of that"),
        ("acme/base@v9", "'acme/base' on the Hugging Face hub has no branch, tag or commit 'v9'"),
        ("acme/secret", "'acme/secret' is gated: accept its terms on http"),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_loaded(
    two: Hub, tiny_base: Path, tiny_files: Path, name: str, said: str
) -> None:
    two.put("models/acme/secret", tiny_base)
    two.put("models/acme/data", tiny_files)
    two.gated.add("models/acme/secret")
    with pytest.raises(UserError, match=said):
        load_model(name)
    with pytest.raises(UserError, match=said):
        Trained.find(name)


def test_a_word_that_is_no_folder_is_no_question_to_the_hub(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="no folder runs"):
        Trained.find("runs")
    assert not hub.asked


def test_an_adapter_of_a_revision_says_so_as_peft_reads_it(two: Hub, tmp_path: Path) -> None:
    folder = tuned("acme/base@v1", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", "v1")
    assert '"acme/base", revision="v1")' in (folder / "README.md").read_text()
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(folder))
    again = fl.save(fl.load(load_model("acme/base@v1"), folder), tmp_path / "saved")
    assert json.loads((again / "adapter_config.json").read_text())["revision"] == "v1"
    assert torch.equal(logits(fl.load(load_model("acme/base@v1"), folder)), expected)
    assert Trained.find(folder).base == "acme/base@v1"
    with pytest.warns(UserWarning, match=r"for the base acme/base@v1, and this is acme/base@main"):
        other = fl.load(load_model("acme/base@main"), folder)
    assert other.peft_config["default"].revision == "main"
    assert source_of(other) == "acme/base@main"


def test_an_adapter_is_given_by_its_name_wherever_a_folder_is(
    two: Hub,
    forgetless: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tuned("acme/base@v1", tmp_path / "adapter")
    two.put("models/someone/adapter", folder)
    base = load_model("acme/base@v1")
    expected = logits(fl.load(base, folder))
    assert torch.equal(logits(fl.load(load_model("acme/base@v1"), "someone/adapter")), expected)
    assert len(fl.spectra("someone/adapter", load_model("acme/base@v1"))) == 14
    for verb in ("export", "merge"):
        done = forgetless(verb, "someone/adapter", "--out", tmp_path / verb)
        assert done.code == 0, done.err
    again = load_model(str(tmp_path / "merge"))
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_was_tuned_in_whole_is_given_by_its_name(two: Hub) -> None:
    assert len(fl.spectra("acme/base", load_model("acme/base@v1"))) == 15
    assert (snapshot(HubName("acme/base")) / "model.safetensors").is_file()


def test_data_are_of_the_revision_that_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    for revision in ("v1", "main"):
        (tmp_path / "facts").mkdir(exist_ok=True)
        (tmp_path / "facts/train.jsonl").write_text(json.dumps({"text": revision}) + "\n")
        hub.put("datasets/acme/facts", tmp_path / "facts", revision)
    for name, revision in (("hub:acme/facts@v1", "v1"), ("hub:acme/facts", "main")):
        assert [row["text"] for _, row in read_rows(name)] == [revision]
