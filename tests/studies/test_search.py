"""Searches: a front that no lucky seed is on, runs that trials share, and kill -9 in the middle."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import read_json, write_json
from forgetless.recipes.recipe import Recipe
from forgetless.reports import report
from forgetless.studies import search as searches
from forgetless.studies.folder import RunFolder
from forgetless.studies.search import Search, search
from forgetless.studies.trials import Beat
from tests.killing import FORKSERVER

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]

RATE, DECAY = "training.learning_rate", "training.weight_decay"


def score(run: RunFolder, task: str, value: float, base: float, *, higher: bool) -> None:
    for phase, measured in (("base", base), ("final", value)):
        content = {"value": measured, "metric": "share", "higher_is_better": higher, "n": 10}
        write_json(run.scores(phase, task), content)  # type: ignore[arg-type]


class Bench:
    """Takes the place of training: scores are a function of the settings and the seed."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.lucky: dict[float, float] = {}

    def execute(self, run: RunFolder, **_: Any) -> None:
        recipe = Recipe.load(run.recipe)
        rate, luck = recipe.training.learning_rate, 0.0
        if rate > 1:
            raise RuntimeError("the loss is nan")
        if recipe.seed == 0:
            luck = self.lucky.get(rate, 0.0)
        score(run, "sums", rate + luck, 0.0, higher=True)
        score(run, "prose", 2.0 + rate**2 + recipe.training.weight_decay, 2.0, higher=False)
        run.update(status="done", tasks={"sums": "learning", "prose": "forgetting"})
        self.done.append(run.path.name)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench in the place of training."""
    found = Bench()
    monkeypatch.setattr(searches, "execute_run", found.execute)
    monkeypatch.setattr(searches, "Beat", lambda: Beat(poll=0.01))
    return found


@pytest.fixture
def definition(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """Four rates, with and without decay, all of them asked for."""
    rates = [0.1, 0.2, 0.3, 0.4]
    first = [{RATE: rate, DECAY: decay} for rate in rates for decay in (0.0, 0.5)]
    space = {RATE: rates, DECAY: [0.0, 0.5]}
    return {"name": "s", "recipe": tiny_recipe, "space": space, "first": first, "trials": 8}


def test_the_front_is_what_nothing_else_beats(
    definition: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    done = search(definition, tmp_path)
    assert [point["settings"] for point in done.front] == [
        {RATE: rate, DECAY: 0.0} for rate in (0.1, 0.2, 0.3, 0.4)
    ]
    first = done.front[0]
    assert first["learning"] == {"value": 0.1, "low": None, "high": None, "n": 1}
    assert first["learned"] == pytest.approx(0.1)
    assert first["forgotten"] == pytest.approx(0.01)
    outcome = done.outcome
    assert outcome["objectives"]["learning"]["task"] == "sums"
    assert outcome["objectives"]["forgetting"]["base"] == 2.0
    assert outcome["finished"] == 8
    volume = outcome["hypervolume"]
    assert volume == sorted(volume)
    assert 0 <= volume[0] < volume[-1] < 1
    with (done.folder / "report" / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row[RATE]) for row in rows] == [0.1, 0.2, 0.3, 0.4]
    assert len(done.runs) == 8
    assert done.failed == []


def test_the_same_call_does_nothing_twice_and_further_trials_are_done(
    definition: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    search(definition, tmp_path)
    front = search(definition, tmp_path).front
    assert len(bench.done) == 8
    done = search(definition, tmp_path, trials=10)
    assert done.outcome["finished"] == 10
    assert len(bench.done) == 8  # there are no other settings, and equal ones share a run
    assert done.front == front


def test_a_lucky_seed_is_not_on_the_front(
    definition: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    """With its own seed 0.1 beats all; then 0.2 to 0.4, which that hid, must be done again too."""
    bench.lucky = {0.1: 5.0}
    done = search({**definition, "replicate": [1, 2, 3]}, tmp_path)
    assert [point["settings"][RATE] for point in done.front] == [0.1]
    bench.lucky = {0.1: 0.7}
    done = search({**definition, "name": "less", "replicate": [1, 2, 3]}, tmp_path)
    assert [point["settings"][RATE] for point in done.front] == [0.1, 0.3, 0.4]
    for point in done.front:
        assert point["learning"]["n"] == 4
        assert point["learning"]["low"] <= point["learning"]["value"] <= point["learning"]["high"]
        assert len(set(point["runs"])) == 4


def test_a_run_that_fails_is_told_and_the_others_are_done(
    definition: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    definition["space"][RATE] = [0.1, 3.0]
    definition["first"] = [{RATE: 3.0, DECAY: 0.0}, {RATE: 0.1, DECAY: 0.0}]
    done = search({**definition, "trials": 2}, tmp_path)
    assert done.outcome["failed"] == ["RuntimeError: the loss is nan"]
    assert [point["trial"] for point in done.front] == [1]
    definition |= {"name": "none", "first": [{RATE: 3.0, DECAY: 0.0}], "trials": 1}
    none = search(definition, tmp_path)
    assert none.front == []
    with pytest.raises(FileNotFoundError, match="the loss is nan"):
        report(none.folder)


def test_importance_names_the_setting_that_decides(
    definition: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    space = {RATE: {"low": 0.01, "high": 0.99}, DECAY: {"low": 0.0, "high": 1e-6}}
    done = search({**definition, "space": space, "first": [], "trials": 24}, tmp_path)
    for shares in done.outcome["importance"].values():
        assert next(iter(shares)) == RATE
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_each_sampler_meets_the_budget_with_arms_of_their_own(
    definition: dict[str, Any], bench: Bench, tmp_path: Path, sampler: str
) -> None:
    arms = [
        {"adapter.method": "lora", "space": {RATE: {"low": 0.01, "high": 0.9, "log": True}}},
        {"adapter.method": "pissa", "space": {RATE: {"low": 0.001, "high": 0.1, "log": True}}},
    ]
    changes = {"arms": arms, "space": {DECAY: [0.0, 0.5]}, "first": [], "sampler": sampler}
    done = search({**definition, **changes, "trials": 26}, tmp_path)
    assert done.outcome["finished"] == 26
    assert {point["arm"] for point in done.outcome["trials"]} == {"lora", "pissa"}


def test_hours_end_a_search_too(definition: dict[str, Any], bench: Bench, tmp_path: Path) -> None:
    content = {**definition, "trials": None, "hours": 2 / 3600}
    began = time.time()
    done = search(content, tmp_path)
    assert done.front
    assert time.time() - began >= 2


def test_the_space_of_a_name_does_not_change(
    definition: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    search(definition, tmp_path)
    before = (tmp_path / "s" / "search.yaml").read_text()
    definition["space"][DECAY] = [0.0, 0.5, 1.0]
    with pytest.raises(UserError, match="s was begun with another space"):
        search(definition, tmp_path)
    assert (tmp_path / "s" / "search.yaml").read_text() == before


def test_mistakes_are_told_before_anything_is_run(
    definition: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    definition["space"]["adapter.rank"] = [1, 99]
    with pytest.raises(RecipeError, match="rank must be in"):
        search(definition, tmp_path)
    definition["space"]["adapter.rank"] = [1, 2]
    definition["recipe"]["training"]["batch_size"] = 3
    with pytest.raises(RecipeError, match="cannot be shared equally by 2"):
        search(definition, tmp_path, processes=2)
    assert list(tmp_path.iterdir()) == []


def test_the_page_has_the_front_and_can_be_written_again(
    definition: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    arms = [{"name": "<b>", "adapter.method": "lora"}, {"adapter.method": "pissa"}]
    done = search({**definition, "arms": arms, "first": [], "trials": 22}, tmp_path)
    text = report(done.folder).read_text()
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert {p["trial"] for p in data["points"] if p["front"]} == {p["trial"] for p in done.front}
    assert len(data["volume"]) == len(data["points"])
    assert [part["title"] for part in data["slices"]] == ["learning_rate", "weight_decay"]
    assert "Which settings matter" in text


def test_a_search_that_never_ended_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text("name: s")
    with pytest.raises(FileNotFoundError, match="run it to its end"):
        report(tmp_path)


# ---- real runs -----------------------------------------------------------------------------------


@pytest.fixture
def real(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """Two arms, one of them repaired, whose trainings share their weights."""
    arms = [
        {"name": "lora", "adapter.method": "lora", RATE: 0.01},
        {"name": "repaired", "adapter.method": "lora", RATE: 0.01, "repair.strength": 0.5},
    ]
    space = {DECAY: [0.0, 0.1]}
    first = [{"arm": arm, DECAY: 0.0} for arm in ("lora", "repaired")]
    definition = {"name": "real", "recipe": tiny_recipe, "arms": arms, "space": space}
    return {**definition, "first": first, "trials": 2, "replicate": [1]}


def test_two_calls_at_once_one_of_them_killed_share_a_search(
    real: dict[str, Any], tmp_path: Path
) -> None:
    one, other = (
        FORKSERVER.Process(target=search, args=(real, tmp_path), kwargs={"threads": 1})
        for _ in range(2)
    )
    one.start()
    other.start()
    while not list(tmp_path.glob("real/*/log.jsonl")):  # it trains
        assert one.is_alive() or other.is_alive()
        time.sleep(0.02)
    one.kill()
    one.join()
    other.join()
    assert other.exitcode == 0
    found = Search(tmp_path / "real")
    assert found.outcome["finished"] == 2
    assert found.outcome["failed"] == []
    lora, repaired = sorted(found.outcome["trials"], key=lambda point: str(point["arm"]))
    assert lora["runs"][0] == repaired["runs"][0]  # the same weights
    assert lora["forgotten"] != repaired["forgotten"]
    scored = [
        read_json(next((found.folder / run).glob("points/*/scores/final/prose.json")))["value"]
        for run in repaired["runs"]
    ]
    assert sum(scored) / len(scored) == pytest.approx(repaired["forgetting"]["value"])
    assert all(point["learning"]["n"] == 2 for point in found.front)


def test_workers_on_the_command_line(real: dict[str, Any], tmp_path: Path, python: str) -> None:
    (tmp_path / "real.yaml").write_text(json.dumps({**real, "replicate": []}))
    command = [python, "-m", "forgetless", "search", "real.yaml", "--workers", "2"]
    done = subprocess.run(
        [*command, "--storage", "sqlite:///trials.db"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "The front of 2 trials" in done.stdout
    assert (tmp_path / "runs/real/report/index.html").is_file()
    assert not list((tmp_path / "runs/real").glob("*.journal"))
