"""What methods need of the text to keep and of the new task, collected by runs and commands."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from forgetless.adapters.settings import AdapterSettings
from forgetless.cli.commands.starts import collect_statistics, init
from forgetless.core.errors import UserError
from forgetless.data.language import MODALITY
from forgetless.data.modality import training_batches
from forgetless.data.settings import SAMPLES, CalibrationSettings, DataSettings
from forgetless.data.texts import batches
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.checking import check
from forgetless.recipes.identity import input_keys
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.collection import collect
from forgetless.statistics.gradients import Gradients, collect_gradients
from forgetless.statistics.moments import Statistics
from forgetless.statistics.own_text import settled_text
from forgetless.studies import stages
from forgetless.studies.inputs import Collecting
from forgetless.studies.run import run
from tests import images, sentences
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")

NO_TASKS = {"tasks": {"learning": [], "forgetting": []}, "training.steps": 1}


def tiny(base: Path, files: Path, method: str, **changes: Any) -> Recipe:
    return Recipe.parse(recipe_of(base, files, **NO_TASKS, **{"adapter.method": method}, **changes))


def same(a: Statistics, b: Statistics) -> bool:
    return list(a) == list(b) and all(
        torch.allclose(a[n].second_moment, b[n].second_moment, rtol=1e-10) for n in a
    )


# ---- which text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", ["auto", 8])
@pytest.mark.parametrize("save", [images.save_classifier, sentences.save_classifier])
def test_a_base_that_says_nothing_is_asked_for_no_text(
    save: Callable[[Path], Path], samples: str | int, tmp_path: Path
) -> None:
    base, settings = save(tmp_path / "base"), CalibrationSettings(samples=samples)
    with pytest.raises(UserError, match="says nothing by itself; give a"):
        collect_statistics(str(base), settings)


def test_the_text_to_keep_is_the_bases_own_unless_it_is_named() -> None:
    assert CalibrationSettings().sources == [("self", 1.0)]
    assert CalibrationSettings(source="a.txt").sources == [("a.txt", 1.0)]


@pytest.mark.parametrize(
    "source",
    ["", 3, [], ["a.txt"], [{"source": "a.txt"}], [{"source": "a.txt", "weight": 0}]],
)
def test_sources_that_cannot_be(source: Any) -> None:
    with pytest.raises(ValueError, match="must be a file, 'self', 'data', 'auto', or a list"):
        CalibrationSettings(source=source)


def test_training_batches_are_what_training_sees(tiny_base: Path, tiny_files: Path) -> None:
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    source = str(tiny_files / "train.jsonl")
    made = training_batches(source, model, tokenizer, samples=5, batch_size=2)
    assert [len(batch["input_ids"]) for batch in made] == [2, 2, 1]
    for batch in made:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(value.shape == batch["input_ids"].shape for value in batch.values())
    labels = made[0]["labels"][0]
    learned = tokenizer.decode(labels[labels != -100])
    prompt, _, answer = tokenizer.decode(made[0]["input_ids"][0]).partition("=")
    assert "+" in prompt
    assert learned == answer


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ("sc_lora", {"second_moment", "task_moment"}),
        ("lora_ga", {"gradient"}),
        ("eva", {"task_moment"}),
        ("corda_ipm", {"task_moment"}),
    ],
)
def test_methods_of_the_task_run_from_a_recipe(
    method: str, needs: set[str], tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    recipe = tiny(tiny_base, tiny_files, method)
    assert check(recipe) == []
    assert set(input_keys(recipe)) == needs
    done = run(recipe, tmp_path)
    assert (done.folder / "adapter" / "adapter_model.safetensors").is_file()
    kept = tmp_path / done.folder.parent / "shared" / "statistics"
    folders = [path for path in kept.iterdir() if path.is_dir()]
    assert len(folders) == len(needs)  # and nothing unfinished is left
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    source = str(tiny_files / "train.jsonl")
    task = training_batches(source, model, tokenizer, samples=8, max_length=32)
    if method == "lora_ga":
        found, expected = Gradients.load(folders[0]), collect_gradients(model, task)
        assert all(torch.allclose(found[name], expected[name]) for name in expected)
    else:
        moments = [Statistics.load(folder) for folder in folders]
        assert any(same(found, collect(model, task)) for found in moments)


def test_several_texts_count_by_their_weights(tiny_base: Path, tiny_files: Path) -> None:
    old, new = str(tiny_files / "old.txt"), str(tiny_files / "test.jsonl")
    source = [{"source": old, "weight": 3}, {"source": new, "weight": 1}]
    recipe = tiny(tiny_base, tiny_files, "lora_null_v1", **{"calibration.source": source})
    assert check(recipe) == []
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    found = Collecting.of(recipe).collect("second_moment", model, tokenizer)
    parts = [
        collect(model, batches(text, model, tokenizer, samples=8, max_length=32))
        for text in (old, new)
    ]
    assert isinstance(found, Statistics)
    assert same(found, Statistics.mixture(list(zip(parts, (3, 1), strict=True))))


def test_every_text_is_looked_for(tiny_base: Path, tiny_files: Path) -> None:
    source = [{"source": "self", "weight": 1}, {"source": "absent.txt", "weight": 1}]
    recipe = tiny(tiny_base, tiny_files, "lora_null_v1", **{"calibration.source": source})
    assert any("calibration.source: no such file: absent.txt" in line for line in check(recipe))


def test_an_interrupted_stage_goes_on_with_the_same_text(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(tiny_base, tiny_files, "lora_null_v1", **{"calibration.source": "self"})
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    collecting = Collecting.of(recipe)
    whole = collecting.collect("second_moment", model, tokenizer)

    def stop(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("forgetless.studies.inputs.collect", stop)
        with pytest.raises(KeyboardInterrupt):
            collecting.collect("second_moment", model, tokenizer, tmp_path / "kept")
    deaf = replace(MODALITY, batches=stop)
    monkeypatch.setattr("forgetless.data.language.MODALITY", deaf)
    found = collecting.collect("second_moment", model, tokenizer, tmp_path / "kept")
    assert isinstance(found, Statistics)
    assert isinstance(whole, Statistics)
    assert same(found, whole)


def test_of_its_own_text_a_base_writes_as_much_as_it_takes(
    tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"calibration.source": "self", "calibration.max_length": 16}
    recipe = tiny(tiny_base, tiny_files, "lora_null_v1", **how, **{"calibration.samples": "auto"})
    assert check(recipe) == []
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    found = Collecting.of(recipe).collect("second_moment", model, tokenizer, tmp_path / "kept")
    assert isinstance(found, Statistics)
    count = len(settled_text(model, tokenizer, "all-linear", recipe.calibration, recipe.seed))
    stated = Collecting.of(recipe.override({"calibration.samples": count}))
    expected = stated.collect("second_moment", model, tokenizer)
    assert isinstance(expected, Statistics)
    assert found.metadata["tokens"] == expected.metadata["tokens"]


def test_where_the_count_is_automatic_only_text_of_the_base_has_another_key(
    tiny_base: Path, tiny_files: Path
) -> None:
    def key(source: str, samples: object) -> Any:
        changes = {"calibration.source": source, "calibration.samples": samples}
        return input_keys(tiny(tiny_base, tiny_files, "sc_lora", **changes))

    text = str(tiny_files / "old.txt")
    assert key(text, "auto") == key(text, SAMPLES)
    auto, stated = key("self", "auto"), key("self", SAMPLES)
    assert auto["task_moment"] == stated["task_moment"]
    assert auto["second_moment"] != stated["second_moment"]


def test_after_a_failure_fewer_texts_at_a_time_may_be_tried(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of an interrupted collection are of its own batches."""
    monkeypatch.setattr("forgetless.statistics.checkpoint.SECONDS", 0.0)
    monkeypatch.setattr("forgetless.statistics.checkpoint._SHARE", 0)
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))

    def collected(batch_size: int, kept: Path | None = None) -> Statistics:
        changes = {"calibration.batch_size": batch_size, "calibration.samples": 8}
        recipe = tiny(tiny_base, tiny_files, "lora_null_v1", **changes)
        found = Collecting.of(recipe).collect("second_moment", model, tokenizer, kept)
        assert isinstance(found, Statistics)
        return found

    forward = type(model).forward
    calls = itertools.count()

    def run_out(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError
        return forward(*args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(type(model), "forward", run_out)
        with pytest.raises(MemoryError):
            collected(2, tmp_path / "kept")
    assert list(tmp_path.rglob("progress.json"))
    assert same(collected(1, tmp_path / "kept"), collected(2))


def test_no_matrix_is_read_to_learn_its_size() -> None:
    class Untouchable(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise AssertionError(name)

    large = Statistics.of(Untouchable(a=None), {"a": "a", "b": "a"}, {"a": 1, "b": 1}, {"x": 1})
    assert stages._summary(large, 4, {"a": 5000, "b": 5000}) == {"x": 1, "tail_energy": None}


# ---- what decides --------------------------------------------------------------------------------


def digest(recipe: Recipe) -> str:
    return json.dumps(input_keys(recipe), sort_keys=True)


def test_settings_without_effect_do_not_change_the_key(tiny_base: Path, tiny_files: Path) -> None:
    def key(changes: dict[str, Any] | None = None, method: str = "lora_null_v1") -> str:
        return digest(tiny(tiny_base, tiny_files, method, **(changes or {})))

    assert key() == key({"calibration.memory_budget": "1GiB"})
    assert key() == key({"calibration.skip_first": 0})
    assert key() != key({"calibration.skip_first": 1})
    assert key() == key({"data.max_length": 16})
    assert key(method="sc_lora") != key()
    assert key(method="sc_lora") != key({"data.max_length": 16}, "sc_lora")
    auto, data = ({"calibration.source": source} for source in ("auto", "data"))
    assert key(method="eva") == key(auto, "eva") == key(data, "eva") != key(auto)


def test_the_key_of_one_text_is_that_of_earlier_versions(tiny_base: Path, tiny_files: Path) -> None:
    (key,) = input_keys(tiny(tiny_base, tiny_files, "lora_null_v1")).values()
    assert set(key) == {
        *("base", "dtype", "target_modules", "seed", "source"),
        *("samples", "max_length", "batch_size"),
    }
    assert isinstance(key["source"], str)


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora_ga", "eva", "sc_lora"])
def test_init_takes_the_training_data(
    method: str, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    settings = AdapterSettings(method=method, rank=2)
    keep = CalibrationSettings(source=str(tiny_files / "old.txt"), samples=4, max_length=32)
    source = keep if method == "sc_lora" else None
    with pytest.raises(UserError, match="give its training data by --data FILE"):
        init(str(tiny_base), settings, tmp_path / "new", source=source)
    data = DataSettings(train=str(tiny_files / "train.jsonl"))
    start = init(str(tiny_base), settings, tmp_path / "new", source=source, data=data)
    config: Mapping[str, Any] = json.loads((start.folder / "adapter_config.json").read_text())
    assert config["r"] == 2


def test_data_needs_a_recipe(tiny_base: Path) -> None:
    settings = CalibrationSettings(source="data")
    with pytest.raises(UserError, match="stands for the training data of a recipe"):
        collect_statistics(str(tiny_base), settings)
