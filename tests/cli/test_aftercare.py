"""The verbs repair, dial and spectra on files, as a user has them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from forgetless.adapters.folders import load
from forgetless.adapters.repair import repair
from forgetless.data.texts import batches
from forgetless.models.load import load_model, load_tokenizer
from forgetless.statistics.collection import collect
from forgetless.statistics.moments import Statistics
from tests.cli.test_cli import forgetless  # noqa: F401 - a fixture

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A LoRA that PEFT wrote, with no word of where its base lies now."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(str(tiny_base), dtype="float32"), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
    model.save_pretrained(str(tmp_path / "theirs"))
    capsys.readouterr()  # a bar, which only the first model that a process loads has
    return tmp_path / "theirs"


@pytest.fixture
def texts(tiny_files: Path) -> list[object]:
    keep, task = tiny_files / "old.txt", tiny_files / "train.jsonl"
    return ["--keep", keep, "--task", task, "--max-length", 32, "--samples", 16]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def test_repair_measures_chooses_and_writes_a_plain_adapter(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tiny_files: Path,
    adapter: Path,
    texts: list[object],
    tmp_path: Path,
) -> None:
    out = tmp_path / "healed"
    done = forgetless(
        "repair", adapter, "--base", tiny_base, *texts, "--out", out,
        "--tasks", f"perplexity:{tiny_files / 'old.txt'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.count("<- taken") == 1
    assert "From the adapter as trained to the one that is taken" in done.out
    old, new = tensors(adapter), tensors(out)
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {key for key in old if ".lora_A." in key}
    PeftModel.from_pretrained(load_model(str(tiny_base), dtype="float32"), out)
    told = json.loads((out / "aftercare.json").read_text())
    assert len(told["points"]) == 10
    assert told["chosen"] in told["points"]
    assert len(told["layers"]) == 14


def test_a_budget_decides_the_strength(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    adapter: Path,
    texts: list[object],
    tmp_path: Path,
) -> None:
    asked = ["repair", adapter, "--base", tiny_base, *texts, "--json"]
    found = json.loads(forgetless(*asked).out)["points"]
    kls = sorted(point["kl"] for point in found if point["strength"] > 0)
    budget = kls[len(kls) // 2]
    within = forgetless(*asked, "--max-kl", budget, "--out", tmp_path / "healed")
    chosen = json.loads(within.out)["chosen"]
    assert 0 < chosen["kl"] <= budget
    cheaper = [p for p in found if p["given_up"] < chosen["given_up"] and p["scale"] == 1]
    assert all(point["kl"] > budget for point in cheaper)
    refused = forgetless(*asked, "--max-kl", 0, "--out", tmp_path / "none")
    assert (refused.code, (tmp_path / "none").exists()) == (2, False)
    assert "the least is" in refused.err


def test_one_strength_by_saved_statistics_needs_no_weights(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tiny_files: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for source, name, more in (
        ("old.txt", "stats", ()),
        ("test.jsonl", "task", ("--adapter", adapter)),
    ):
        made = forgetless(
            "stats", tiny_base, "--calibration", tiny_files / source, "--out",
            tmp_path / name, "--max-length", 32, *more,
        )  # fmt: skip
        assert made.code == 0, made.err

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the base's weights were loaded")

    monkeypatch.setattr("forgetless.cli.commands.aftercare.load_base", refuse)
    for strength, name in (("0.5", "one"), ("auto", "auto")):
        done = forgetless(
            "repair", adapter, "--base", tiny_base, "--keep", tmp_path / "stats",
            "--task", tmp_path / "task", "--strength", strength, "--out", tmp_path / name,
        )  # fmt: skip
        assert done.code == 0, done.err
    monkeypatch.undo()
    base = load_model(str(tiny_base), dtype="float32")
    keep, task = Statistics.load(tmp_path / "stats"), Statistics.load(tmp_path / "task")
    tokenizer = load_tokenizer(str(tiny_base))
    read = batches(str(tiny_files / "test.jsonl"), base, tokenizer, max_length=32)
    of_trained = collect(load(base, adapter).merge_and_unload(), read)
    for name, layer in task.items():
        expected = of_trained[name].second_moment
        torch.testing.assert_close(layer.second_moment, expected, rtol=1e-4, atol=1e-6)
    base = load_model(str(tiny_base), dtype="float32")
    healed = repair(adapter, base, keep, task, strength=0.5)
    for name, layer in healed.named_parameters():
        if "lora_A" in name:
            key = name.replace(".default", "")
            assert torch.equal(tensors(tmp_path / "one")[key], layer)


def test_dial_shows_the_curve_and_writes_the_scale_within_a_budget(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tiny_files: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    asked = [
        "dial", adapter, "--base", tiny_base, "--scales", "-1,0,0.25,0.5,1", "--json",
        "--keep", tiny_files / "old.txt", "--task", tiny_files / "test.jsonl",
    ]  # fmt: skip
    found = {p["scale"]: p for p in json.loads(forgetless(*asked).out)["points"]}
    assert found[0]["kl"] == 0
    assert list(found) == [0, 1, -1, 0.25, 0.5]
    budget = found[0.5]["kl"]
    out = tmp_path / "turned"
    done = forgetless(*asked, "--max-kl", budget, "--out", out)
    scale = json.loads(done.out)["chosen"]["scale"]
    assert found[scale]["kl"] <= budget
    old, new = tensors(adapter), tensors(out)
    factor = {"lora_A": 1.0, "lora_B": scale * 2}  # an export has the scaling in B
    for key, tensor in old.items():
        expected = tensor * factor["lora_B" if "lora_B" in key else "lora_A"]
        torch.testing.assert_close(new[key], expected)


def test_dial_by_tasks_alone_shows_and_takes_nothing(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tiny_files: Path,
    adapter: Path,
) -> None:
    task = f"perplexity:{tiny_files / 'old.txt'}"
    done = forgetless("dial", adapter, "--base", tiny_base, "--scales", "0,0.5", "--tasks", task)
    assert done.code == 0, done.err
    assert "perplexity_old" in done.out
    assert "<- taken" not in done.out


def test_a_tuned_model_is_repaired_as_a_model_or_a_lora(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    texts: list[object],
    tmp_path: Path,
) -> None:
    model = load_model(str(tiny_base), dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.add_(0.05 * torch.randn(weight.shape))
    model.save_pretrained(tmp_path / "tuned")
    asked = ["repair", tmp_path / "tuned", "--base", tiny_base, *texts, "--strength", "0.1,1"]
    whole = forgetless(*asked, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    load_model(str(tmp_path / "whole"), dtype="float32")
    lora = forgetless(*asked, "--rank", 4, "--out", tmp_path / "lora")
    assert lora.code == 0, lora.err
    PeftModel.from_pretrained(load_model(str(tiny_base), dtype="float32"), tmp_path / "lora")


def test_spectra_by_module_and_by_layer(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    tiny_files: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    asked = ["spectra", adapter, "--base", tiny_base]
    done = forgetless(*asked, "--keep", tiny_files / "old.txt", "--out", tmp_path / "s.csv")
    assert done.code == 0, done.err
    assert all(word in done.out for word in ("q_proj", "down_proj", "erank W", "erank X", "turned"))
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert float(rows[0]["output_change"]) > 0
    quick = json.loads(forgetless(*asked, "--no-weights", "--json").out)
    assert quick["layers"][0]["rotation"] is None
    assert quick["layers"][0]["update"]["at_90"] <= 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["repair", "ADAPTER", "--base", "BASE"], "a repair needs the text to keep"),
        (["repair", "ADAPTER", "--base", "BASE", "--strength", "much"], "numbers with commas"),
        (["repair", "ADAPTER", "--base", "BASE", "--strength", "-1", "--keep", "self"], "from 0"),
        (["repair", "ADAPTER", "--base", "BASE", "--keep", "self", "--max-drop", "x=1"], "none of"),
        (["dial", "ADAPTER", "--base", "BASE"], "give --keep, --task or --tasks"),
        (["dial", "ADAPTER", "--base", "BASE", "--keep", "nowhere.txt"], "nowhere.txt"),
        (["dial", "ADAPTER", "--base", "BASE", "--task", "nowhere.txt"], "nowhere.txt"),
        (["dial", "ADAPTER", "--base", "BASE", "--keep", "x.safetensors"], "holds statistics"),
        (["repair", "ADAPTER", "--base", "BASE", "--keep", "nowhere.txt"], "nowhere.txt"),
        (
            ["repair", "ADAPTER", "--base", "BASE", "--keep", "self", "--task", "FEW"],
            "few.jsonl has 1 examples, too few",
        ),
        (["repair", "ADAPTER", "--base", "BASE", "--keep", "SHORT"], "short.txt has 2 examples"),
        (
            ["repair", "ADAPTER", "--base", "BASE", "--keep", "x.safetensors", "--max-kl", "1"],
            "give the text itself as --keep",
        ),
        (
            ["dial", "ADAPTER", "--base", "BASE", "--task", "FEW", "--max-kl", "1"],
            "give the text itself as --keep",
        ),
        (["spectra", "ADAPTER", "--base", "BASE", "--keep", "nowhere.txt"], "nowhere.txt"),
        (["spectra", "ADAPTER", "--base", "BASE", "--out", "s.txt"], "a .json or .csv file"),
        (["spectra", "BASE"], "does not say which base"),
        (["spectra", "ADAPTER", "--out", "BASE/config.json/x.json"], "config.json is a file"),
        (["eval", "BASE", "--tasks", "kl:self", "--out", "BASE"], "is a folder; give a file"),
        (
            [
                "eval",
                "BASE",
                "--tasks",
                "kl:self",
                "--adapter",
                "X",
                "--report",
                "BASE/config.json/p",
            ],
            "config.json is a file",
        ),
        (
            [
                "repair",
                "ADAPTER",
                "--base",
                "BASE",
                "--keep",
                "self",
                "--out",
                "BASE/config.json/x",
            ],
            "config.json is a file",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_before_a_weight_is_loaded(
    forgetless: Any,  # noqa: F811
    arguments: list[str],
    said: str,
    tiny_base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("forgetless.cli.commands.aftercare.load_base", None)
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "completion": "b"}\n')
    short = tmp_path / "short.txt"
    short.write_text("hi there")
    real = {
        "ADAPTER": str(adapter),
        "BASE": str(tiny_base),
        "FEW": str(few),
        "SHORT": str(short),
    }
    done = forgetless(
        *(re.sub("ADAPTER|BASE|FEW|SHORT", lambda m: real[m[0]], word) for word in arguments)
    )
    assert done.code == 2
    assert said in done.err
    assert done.err.startswith("error: ")


def test_a_base_that_is_named_from_another_folder_is_asked_for(
    forgetless: Any,  # noqa: F811
    adapter: Path,
    tmp_path: Path,
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "models/my/base"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    for verb in (["dial", "--keep", "self"], ["chat", "hi"], ["export", "--out", tmp_path / "x"]):
        done = forgetless(verb[0], moved, *verb[1:])
        assert "base 'models/my/base' does not exist" in done.err
        assert f"{moved} names its base so" in done.err
        assert "give --base" in done.err


def test_a_place_that_may_not_be_written_is_told_before_the_work(
    forgetless: Any,  # noqa: F811
    tiny_base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("forgetless.cli.commands.aftercare.load_base", None)
    asked = ("--base", tiny_base, "--keep", "self", "--out", tmp_path / "new")
    done = forgetless("repair", adapter, *asked)
    assert (done.code, done.out) == (2, "")
    assert (
        done.err == f"error: {tmp_path / 'new'} cannot be written: {tmp_path} may not be "
        "written to\n"
    )
