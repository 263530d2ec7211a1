"""A plan: advice with reasons, costs that are right, and a recipe that runs as written."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
)

from forgetless.cli import main
from forgetless.core.errors import UserError
from forgetless.core.files import read_json, write_json
from forgetless.models.load import meta_model
from forgetless.models.quantised import bytes_as_loaded
from forgetless.recipes.checking import check as check_recipe
from forgetless.recipes.plan.advice import (
    RATE,
    Advice,
    Base,
    Rows,
    Wishes,
    advise,
    batch_advice,
    rounded,
)
from forgetless.recipes.plan.plan import HELD_OUT, Plan, plan
from forgetless.recipes.plan.showing import recipe_text, render
from forgetless.recipes.plan.speed import matmul_speed
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run
from tests.project.test_recipes import RECIPES
from tests.tiny import tokenizer

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.fixture(autouse=True, scope="module")
def _speed_is_measured_once() -> Iterator[None]:
    """A plan measures that of the processor, for a quarter of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forgetless.recipes.plan.plan.matmul_speed", cache(matmul_speed))
        yield


@pytest.fixture(scope="module")
def made(tiny_base: Path, tiny_files: Path) -> Any:
    """Plan for the tiny base and a file of its folder, each once."""
    plans: dict[Any, Plan] = {}

    def make(data: str = "train.jsonl", **wishes: Any) -> Plan:
        key = data, tuple(wishes.items())
        if key not in plans:
            plans[key] = plan(str(tiny_base), str(tiny_files / data), Wishes(**wishes))
        return plans[key]

    return make


def advised(made: Plan, key: str) -> Any:
    return next(each.value for each in made.advice if each.key == key)


def test_the_recipe_runs_as_written(tiny_base: Path, tiny_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    arguments = ["plan", str(tiny_base), "--data", str(tiny_files / "train.jsonl")]
    arguments += ["--keep", str(tiny_files / "old.txt"), "--test", str(tiny_files / "test.jsonl")]
    arguments += ["--goal", "keep"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(out), "--json"])
    assert ended.value.code == 0
    recipe = Recipe.load(out)
    assert check_recipe(recipe) == []
    done = run(recipe, tmp_path / "runs", threads=1)
    told = plan(
        str(tiny_base),
        str(tiny_files / "train.jsonl"),
        Wishes("keep", keep=str(tiny_files / "old.txt"), test=str(tiny_files / "test.jsonl")),
    )
    assert done.record["training"]["steps"] == told.steps
    assert {row["task"] for row in done.scores} == {"new_task", "to_keep", "drift"}
    assert recipe.adapter.method == "lora_null_v2"
    statistics = next((done.folder.parent / "shared" / "statistics").glob("*/*.safetensors"))
    assert statistics.stat().st_size == pytest.approx(told.disk.statistics, rel=0.1)


def test_what_is_trained_and_written_is_counted(made: Any, tmp_path: Path) -> None:
    told = made(rank=4)
    recipe = told.recipe.override({"training.checkpoint_every": 1, "training.log_every": 1})
    done = run(recipe, tmp_path, evaluate=False, threads=1)
    written = sum(
        tensor.nbytes
        for name in ("native", "adapter")
        for file in (done.folder / name).glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert written == told.disk.result
    trained = json.loads((done.folder / "log.jsonl").read_text().splitlines()[-1])
    assert trained["step"] == told.steps
    assert trained["tokens"] == told.tokens


@pytest.mark.parametrize(
    ("wishes", "data", "expected"),
    [
        ({}, "train.jsonl", ("lora", 4.0, 0.3, "cosine")),
        ({"goal": "learn"}, "train.jsonl", ("lora", 4.0, 0.0, "cosine")),
        ({"goal": "keep"}, "train.jsonl", ("lora", 2.0, 0.3, "cosine")),
        ({"goal": "keep", "keep": "old.txt"}, "train.jsonl", ("lora_null_v2", 2.0, 0.3, "cosine")),
        ({}, "old.txt", ("lora", 1.0, 0.3, "inverse_sqrt")),
        ({"goal": "learn"}, "old.txt", ("full", 1.0, 0.0, "inverse_sqrt")),
    ],
)
def test_data_and_goal_decide(
    tiny_base: Path,
    tiny_files: Path,
    wishes: dict[str, Any],
    data: str,
    expected: tuple[Any, ...],
) -> None:
    base = Base.find(str(tiny_base))
    found = advise(base, Rows.of(str(tiny_files / data), base), Wishes(**wishes))
    values = {each.key: each.value for each in found}
    keys = ("adapter.method", "training.epochs", "training.weight_decay", "training.schedule")
    assert tuple(values[key] for key in keys) == expected
    assert values["data.pack"] is (data == "old.txt")
    assert all(each.reason and each.source for each in found)


def test_a_wish_is_followed_and_said(made: Any) -> None:
    found = made(method="pissa", rank=4)
    assert (found.recipe.adapter.method, found.recipe.adapter.rank) == ("pissa", 4)
    assert found.recipe.adapter.alpha == 4
    reason = next(each.reason for each in found.advice if each.key == "adapter.method")
    assert reason == "as asked; advised is lora"


def test_the_rates_are_those_that_the_rule_was_fitted_to(tiny_files: Path) -> None:
    pocket = Base.find("pocket")
    rows = Rows.of(str(tiny_files / "train.jsonl"), pocket)
    rates = {
        method: value
        for method in ("lora", "full", "lora_null_v2")
        for value in [rate(advise(pocket, rows, Wishes(method=method)))]
    }
    assert rates == {"lora": 3e-3, "full": 3e-4, "lora_null_v2": 1e-2}  # the pilot's
    assert RATE == 2e-4  # the paper's for Llama-2-7B


def rate(advice: list[Advice]) -> Any:
    return next(each.value for each in advice if each.key == "training.learning_rate")


@pytest.mark.parametrize(
    ("stored", "method", "expected"),
    [
        ("float32", "lora", ("float32", None)),
        ("bfloat16", "lora", ("bf16", None)),
        ("float16", "lora", ("bf16", "bfloat16")),  # else every step casts all weights
        ("bfloat16", "full", ("bf16", "float32")),  # 16 bits lose small updates
    ],
)
def test_the_stored_weights_decide_the_number_formats(
    tiny_base: Path,
    tiny_files: Path,
    stored: str,
    method: str,
    expected: tuple[str, str | None],
) -> None:
    tiny = Base.find(str(tiny_base))
    base = Base(tiny.name, tiny.model.to(getattr(torch, stored)))
    rows = Rows.of(str(tiny_files / "train.jsonl"), base)
    values = {each.key: each.value for each in advise(base, rows, Wishes(method=method))}
    assert (values["training.precision"], values.get("dtype")) == expected


def test_a_rate_is_rounded_to_one_digit() -> None:
    assert [rounded(rate) for rate in (2.7e-3, 9e-4, 1.9e-5, 1e-4)] == [3e-3, 1e-3, 2e-5, 1e-4]


@pytest.mark.parametrize(
    "wishes", [{}, {"method": "full"}, {"goal": "keep", "rank": 2}], ids=lambda w: str(w)
)
def test_the_written_recipe_is_the_planned_one(made: Any, wishes: dict[str, Any]) -> None:
    found = made(**wishes)
    text = recipe_text(found, "forgetless plan")
    assert Recipe.parse(yaml.safe_load(text)) == found.recipe
    for each in found.advice:
        if each.key in ("adapter.method", "training.learning_rate"):
            assert each.reason[:40] in text


@pytest.fixture(scope="module")
def deep(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes of a base of eight layers, without weights."""
    folder = tmp_path_factory.mktemp("deep")
    for file in tiny_base.glob("*.json"):
        shutil.copy(file, folder / file.name)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "num_hidden_layers": 8})
    return folder


@pytest.mark.parametrize(
    ("memory", "batch", "recomputed"), [(1_700_000, 4, False), (1_200_000, 8, True)]
)
def test_less_memory_gives_smaller_batches_then_recomputed_layers(
    deep: Path, tiny_files: Path, memory: int, batch: int, recomputed: bool
) -> None:
    found = plan(str(deep), str(tiny_files / "train.jsonl"), Wishes(method="full", memory=memory))
    training = found.recipe.training
    assert found.memory.peak <= memory
    assert (training.batch_size, training.gradient_checkpointing) == (batch, recomputed)
    assert training.batch_size * training.gradient_accumulation == 8
    assert "holds no weights yet" in found.notes[0]


def test_too_little_memory_is_said(made: Any) -> None:
    with pytest.raises(
        UserError, match=r"--memory 10 kB is too little: training with method 'full'"
    ):
        made(method="full", memory=10_000)


def test_statistics_get_a_budget_where_they_do_not_fit(
    deep: Path, tiny_files: Path, tmp_path: Path
) -> None:
    for file in deep.iterdir():
        shutil.copy(file, tmp_path / file.name)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "intermediate_size": 1024})
    wishes = Wishes("keep", rank=2, keep=str(tiny_files / "old.txt"), memory=65_000_000)
    found = plan(str(tmp_path), str(tiny_files / "train.jsonl"), wishes)
    assert found.disk.statistics == 8 * (2**23 + 3 * 32 * 32 * 8)
    assert found.recipe.calibration.memory_budget is not None
    assert 2**23 < found.memory.matrices < found.disk.statistics
    assert found.memory.statistics <= found.memory.peak <= 65_000_000


def test_without_a_word_all_is_measured_and_repaired(made: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(60)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = made(data=str(data)).recipe
    assert recipe.data.validation == HELD_OUT
    assert recipe.repair is not None
    assert (recipe.repair.keep, recipe.repair.strength) == ("self", [0.3, 1.0])
    recipe = recipe.override({"training.epochs": None, "training.steps": 3})
    done = run(recipe, tmp_path / "runs", threads=1)
    assert {row["task"] for row in done.scores} == {"validation", "drift"}
    assert "aftercare" in done.record["seconds"]


CANNOT_PACK: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2),
    "bloom": BloomConfig(hidden_size=16, n_layer=1, n_head=2),
    "mamba": MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4),
}


@pytest.mark.parametrize(
    ("kind", "data"),
    [("opt", "short.jsonl"), *((kind, "texts.jsonl") for kind in CANNOT_PACK)],
)
def test_nothing_is_packed_where_the_base_would_mix_what_a_row_holds(
    kind: str, data: str, tmp_path: Path
) -> None:
    words, config = tokenizer(), CANNOT_PACK[kind]
    config.vocab_size = len(words)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    rows: dict[str, list[dict[str, str]]] = {
        "texts.jsonl": [{"text": "a text " * n} for n in range(1, 9)],
        "short.jsonl": [{"prompt": "a" * n, "completion": "b" * n} for n in 3 * [1, 2, 3, 40]],
    }
    for name, content in rows.items():
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in content))
    keep = str(tmp_path / "texts.jsonl")
    found = plan(str(tmp_path), str(tmp_path / data), Wishes(keep=keep, rank=2))
    assert advised(found, "data.pack") is False
    assert run(found.recipe, tmp_path / "runs", evaluate=False, threads=1).status == "done"


@pytest.mark.filterwarnings("ignore:source 2 of the training data has one row in an epoch")
@pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")
@pytest.mark.parametrize("examples", [1, 4, 5])
def test_a_plan_for_a_handful_of_examples_runs(made: Any, examples: int, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(examples)]
    data, keep = tmp_path / "sums.jsonl", tmp_path / "keep.txt"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep.write_text("The fox runs over the hill. " * 40)
    recipe = made(data=str(data), keep=str(keep)).recipe
    assert (recipe.repair is None) == (examples < 5)
    assert run(recipe, tmp_path / "runs", threads=1).status == "done"


def test_few_examples_are_not_shared_out(made: Any) -> None:
    told = made()
    assert told.recipe.data.validation is None
    assert any("Nothing measures what is learned" in note for note in told.notes)


@pytest.mark.parametrize("wishes", [{"goal": "learn"}, {"method": "full"}])
def test_a_plan_that_keeps_nothing_repairs_nothing(made: Any, wishes: dict[str, Any]) -> None:
    assert made(**wishes).recipe.repair is None


@pytest.mark.parametrize(("rows", "examples", "least"), [(80, 1.0, 8), (20, 4.0, 2), (20, 9.0, 1)])
def test_packed_rows_count_by_their_examples(rows: int, examples: float, least: int) -> None:
    assert batch_advice(rows, 1.0, examples).value == least


def test_it_fits_on_a_screen_and_a_half(made: Any) -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(render(made()))
    lines = out.getvalue().splitlines()
    assert len(lines) <= 65
    assert max(map(len, lines)) <= 100
    for word in ("method", "learning rate", "memory, training", "arXiv:2405.09673"):
        assert word in out.getvalue()


def test_the_json_is_for_programs(made: Any) -> None:
    found = made()
    read = json.loads(json.dumps(found.to_json()))
    assert Recipe.parse(read["recipe"]) == found.recipe
    training = read["cost"]["memory"]["training"]
    parts = ("weights", "adapter", "gradients", "optimizer", "activations")
    assert training["total"] == sum(training[part] for part in parts)
    assert {"key", "value", "reason", "source"} == set(read["advice"][0])


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"goal": "everything"}, "unknown goal 'everything'"),
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"rank": 1000}, "adapter.rank: rank must be in 1..16"),
        ({"keep": "missing.txt"}, "missing.txt"),
    ],
)
def test_mistakes_are_named(made: Any, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, FileNotFoundError), match=message):
        made(**wishes)


# ---- a recipe that is there ----------------------------------------------------------------------


def seven_billion(folder: Path, layers: int) -> Path:
    """A folder with the shapes of Llama-2-7B, or of its first layers, and not one weight."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
        dtype="float16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def qlora(base: Path, files: Path) -> dict[str, Any]:
    """What is marked in recipes/qlora-7b.yaml, filled in."""
    old, test = str(files / "old.txt"), str(files / "test.jsonl")
    return {
        "base": str(base),
        "data.train": str(files / "train.jsonl"),
        "calibration.source": old,
        "tasks.learning": [{"kind": "perplexity", "name": "new_skill", "path": test}],
        "tasks.forgetting": [{"kind": "kl", "name": "drift", "path": old}],
    }


QLORA = RECIPES / "qlora-7b.yaml"


def test_a_7b_base_in_4_bits_has_its_bytes(tmp_path: Path) -> None:
    model = meta_model(str(seven_billion(tmp_path, 32)), weights=False).to(torch.bfloat16)
    linear, embedded = 32 * (4 * 4096**2 + 3 * 4096 * 11_008), 2 * 32_000 * 4096
    norms = 65 * 4096
    # Half a byte a number, a byte for the scale of 64 and four for those of 256 scales.
    packed = linear * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    told = bytes_as_loaded(model, "nf4")
    assert told == pytest.approx(packed + 2 * (embedded + norms), rel=1e-4)
    assert 3.8e9 < told < 3.9e9
    assert bytes_as_loaded(model, "int8") == pytest.approx(
        linear + 4 * 32 * (5 * 4096 + 2 * 11_008) + 2 * (embedded + norms), rel=1e-6
    )


def test_a_qlora_recipe_is_checked_without_weights(
    tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = seven_billion(tmp_path, 32)
    recipe = Recipe.load(QLORA, qlora(base, tiny_files))
    monkeypatch.setattr("forgetless.recipes.checking.unavailable", lambda device: None)
    (missing,) = check_recipe(recipe)
    assert "has a config.json but no weights" in missing
    (base / "model.safetensors").touch()  # which nothing reads
    assert check_recipe(recipe) == []


def test_a_qlora_recipe_is_planned(
    tiny_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("forgetless.recipes.plan.plan.matmul_speed", lambda dtype: 1e12)
    changes = qlora(seven_billion(tmp_path, 2), tiny_files)
    command = ["plan", str(QLORA), "--memory", "24GB"]
    for key, value in changes.items():
        command += ["--set", f"{key}={json.dumps(value)}"]

    def told(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        written = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((written.out + written.err).split())

    code, text = told()
    assert code == 0
    assert "It fits: at most " in text
    assert "holds no weights yet" in text
    packed = told("--json")[1]
    whole = told("--json", "--set", "quantise=null", "--set", "dtype=bfloat16")[1]
    parts = [json.loads(each)["cost"]["memory"]["training"] for each in (packed, whole)]
    saved = 2 * 2 * (4 * 4096**2 + 3 * 4096 * 11_008) * (1 - 0.5159 / 2)
    assert parts[1]["weights"] - parts[0]["weights"] == pytest.approx(saved, rel=1e-3)
    # The largest layer is unpacked while it is computed with.
    assert parts[0]["activations"] - parts[1]["activations"] == 2 * 4096 * 11_008
    code, text = told("--memory", "1GB")
    assert code == 2
    assert "1 GB is too little: the run takes" in text
    assert "quantise: nf4" in text


def test_wishes_are_not_for_a_recipe_that_is_there(
    tiny_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, expected in (
        ([str(QLORA), "--quantise", "nf4"], "a recipe says its settings itself"),
        ([str(tmp_path)], "give the training data by --data FILE, or a recipe"),
        ([str(tmp_path), "--data", "x", "--set", "seed=1"], "--set changes a recipe"),
        ([str(tmp_path), "--data", "x", "--quantise", "int4"], "unknown quantise 'int4'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["plan", *more])
        assert ended.value.code == 2
        assert expected in " ".join(capsys.readouterr().err.split())


def test_a_plan_packs_the_base_where_it_is_asked(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgetless.recipes.checking.unavailable", lambda device: None)
    found, plain = made(quantise="nf4", rank=4), made(rank=4)
    assert (found.recipe.quantise, found.recipe.training.precision) == ("nf4", "bf16")
    assert found.memory.step.weights < plain.memory.step.weights / 2
    with pytest.raises(UserError, match="'full' trains the weights, and packed ones cannot be"):
        made(quantise="nf4", method="full")


def test_weights_that_are_packed_are_never_advised_to_be_trained(
    tiny_base: Path, tiny_files: Path
) -> None:
    base = Base.find(str(tiny_base))
    rows = Rows.of(str(tiny_files / "old.txt"), base)
    for quantise, method in ((None, "full"), ("int8", "lora")):
        found = advise(base, rows, Wishes("learn", quantise=quantise))  # type: ignore[arg-type]
        assert {each.key: each.value for each in found}["adapter.method"] == method
