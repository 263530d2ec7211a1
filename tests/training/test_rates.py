"""The search for a learning rate: verdicts, trials that leave nothing behind, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forgetless.core.errors import UserError
from forgetless.core.files import read_json, read_jsonl
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies import rate_search
from forgetless.studies.folder import RunFolder
from forgetless.studies.rate_search import find_rate
from forgetless.studies.run import run
from forgetless.training.loop import train
from forgetless.training.rates import Trial, find_learning_rate, grid, judge, shortened, some_steps
from tests.training.test_interruption import ROWS, TOKENIZER, model, settings

pytest_plugins = ["tests.tiny_fixtures"]


# ---- verdicts, on made-up losses -----------------------------------------------------------------


def falling(to: float, bump: float = 0.0, steps: int = 20) -> list[float]:
    """Losses in a straight line from 4 to a value; with a bump over four steps in the middle."""
    line = [4 + (to - 4) * step / (steps - 1) for step in range(steps)]
    return [loss + bump * (8 <= step < 12) for step, loss in enumerate(line)]


def verdicts_of(**losses: list[float]) -> tuple[dict[str, str], float]:
    trials = [Trial(10.0 ** -(9 - i), losses[name]) for i, name in enumerate(losses)]
    verdicts, picked = judge(trials, steps=20)
    return dict(zip(losses, (verdict.why for verdict in verdicts), strict=True)), picked


def test_the_highest_stable_rate_is_taken() -> None:
    found, picked = verdicts_of(
        low=falling(3.8),
        slow=falling(3),
        good=falling(2.1),
        best=falling(2),
        higher=falling(2.15),
        plateau=falling(2.4),
        spiking=falling(2, bump=1.5),
        worse=falling(4.2),
        broken=falling(2)[:7],
    )
    assert found == {
        "low": "10 % of the best rate's fall",
        "slow": "50 % of the best rate's fall",
        "good": "stable",
        "best": "stable",
        "higher": "stable",
        "plateau": "80 % of the best rate's fall",
        "spiking": "spikes by 1.29",
        "worse": "learns nothing",
        "broken": "no number after step 7",
    }
    assert picked == pytest.approx(1e-5)


def test_what_the_batches_do_alone_is_no_spike() -> None:
    hard = [1.5 * (8 <= step < 12) for step in range(20)]
    found, _ = verdicts_of(
        low=[a + b for a, b in zip(falling(3.9), hard, strict=True)],
        good=[a + b for a, b in zip(falling(2), hard, strict=True)],
    )
    assert found["good"] == "stable"


def test_the_order_of_the_trials_does_not_matter() -> None:
    trials = [Trial(0.1, falling(2)), Trial(0.3, falling(2, bump=9)), Trial(0.01, falling(3))]
    assert judge(trials, 20) == judge(trials[::-1], 20)
    assert judge(trials, 20)[1] == 0.1


@pytest.mark.parametrize("losses", [falling(4.1), falling(2)[:3], []])
def test_no_stable_rate_is_an_error_that_says_what_was_seen(losses: list[float]) -> None:
    with pytest.raises(UserError, match=r"no learning rate is stable \(0.1: .*, 0.2: .*\); give"):
        judge([Trial(0.1, losses), Trial(0.2, losses)], steps=20)


def test_the_grid_covers_two_decades_around_the_centre() -> None:
    assert grid(1e-3) == [1e-4, 2.5e-4, 6.3e-4, 1.6e-3, 4e-3, 1e-2]
    assert [some_steps(whole) for whole in (5, 100, 1000, 10**6)] == [5, 20, 50, 100]


def test_a_trial_is_the_training_drawn_together() -> None:
    whole = settings(steps=None, tokens=5000, measure_at=[0.5], weight_decay=0.1)
    brief = shortened(whole, 0.3, 20)
    changed: dict[str, Any] = {
        "learning_rate": 0.3,
        "steps": 20,
        "tokens": None,
        "measure_at": [],
        "log_every": 1,
    }
    assert brief.model_dump() == whole.model_dump() | changed


# ---- trials --------------------------------------------------------------------------------------

RATES = [1e-3, 1e-1, 1e30]


def test_every_trial_begins_at_the_same_weights_and_leaves_them(tmp_path: Path) -> None:
    given = settings(max_grad_norm=1e38)
    tried = model()
    before = {name: weight.detach().clone() for name, weight in tried.named_parameters()}

    def sweep(folder: str, rates: list[float]) -> list[Trial]:
        places = tmp_path / folder
        return list(find_learning_rate(tried, TOKENIZER, ROWS, given, places, rates=rates, steps=8))

    upwards, downwards = sweep("up", RATES), sweep("down", RATES[::-1])
    assert upwards == downwards[::-1]
    assert [len(trial.losses) for trial in upwards][:2] == [8, 8]
    assert len(upwards[2].losses) < 8
    assert upwards[0].losses[0] == upwards[1].losses[0]
    assert upwards[0].losses[1:] != upwards[1].losses[1:]
    for name, weight in tried.named_parameters():
        assert torch.equal(weight, before[name]), name
        assert weight.grad is None
    assert {path.suffix for path in (tmp_path / "up").iterdir()} == {".json"}


# ---- a recipe ------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any]) -> Recipe:
    changes = {"name": "found", "adapter.method": "lora_null_v1", "tasks": {}}
    return Recipe.parse(tiny_recipe, changes)


def test_a_search_is_done_once_and_goes_on_where_it_was_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[float] = []
    really = train

    def train_twice(*given: Any, **options: Any) -> Any:
        trained.append(given[3].learning_rate)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return really(*given, **options)

    monkeypatch.setattr("forgetless.training.rates.train", train_twice)

    def search() -> Any:
        return find_rate(recipe, tmp_path, rates=[1e-3, 1e-2, 1e10], steps=8)

    with pytest.raises(KeyboardInterrupt):
        search()
    found = search()
    assert trained == [1e-3, 1e-2, 1e-2, 1e10]
    assert search() == found
    assert len(trained) == 4

    assert found.rate == 1e-2
    assert found.recipe == recipe.override({"training.learning_rate": 1e-2})
    assert 0 < found.trials[0].forgetting["kl"] < found.trials[1].forgetting["kl"]
    content = read_json(found.file)
    assert [trial["learning_rate"] for trial in content["trials"]] == [1e-3, 1e-2, 1e10]
    assert found.file.parent == tmp_path / "found" / "shared" / "rates"
    assert not list((tmp_path / "found").glob("rates-*"))


def test_the_run_that_follows_is_that_of_the_found_rate(recipe: Recipe, tmp_path: Path) -> None:
    found = find_rate(recipe, tmp_path / "searched", rates=[1e-3, 1e-2], steps=8)
    folder = tmp_path / "searched" / "found" / run_id(found.recipe)
    assert (folder / "start").is_dir()  # that of the trials
    searched, plain = run(found.recipe, tmp_path / "searched"), run(found.recipe, tmp_path / "no")
    assert searched.run_id == plain.run_id
    for name in ("start", "statistics"):
        assert searched.record[name] == plain.record[name]
    losses = [
        [line["loss"] for line in read_jsonl(RunFolder(done.folder).log)]
        for done in (searched, plain)
    ]
    assert losses[0] == losses[1]


def test_full_fine_tuning_has_a_rate_too(recipe: Recipe, tmp_path: Path) -> None:
    full = recipe.override({"adapter.method": "full"})
    found = find_rate(full, tmp_path, rates=[1e-4, 1e-2], steps=6)
    assert found.rate == 1e-2
    assert found.trials[0].forgetting == {}


def test_where_no_rate_is_stable_the_trials_stay_to_be_looked_at(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rate_search,
        "find_learning_rate",
        lambda *given, **options: iter([Trial(1e-3, falling(5)), Trial(1e-2, falling(6))]),
    )
    for _ in range(2):
        with pytest.raises(UserError, match="no learning rate is stable"):
            find_rate(recipe, tmp_path, rates=[1e-3, 1e-2], steps=20)
    (file,) = (tmp_path / "found" / "shared" / "rates").glob("*.json")
    assert len(read_json(file)["trials"]) == 2
    assert not list((tmp_path / "found").glob("rates-*"))


def test_rates_that_cannot_be_compared(recipe: Recipe, tmp_path: Path) -> None:
    for rates in ([1e-3], [1e-3, 1e-3], [-1.0, 1e-3]):
        with pytest.raises(UserError, match="at least two rates, all above 0"):
            find_rate(recipe, tmp_path, rates=rates)
    assert not list(tmp_path.iterdir())


def test_the_command_shows_the_table_and_goes_on(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from forgetless.cli import main

    done: list[Recipe] = []
    trials = [Trial(1e-3, falling(3), {"kl": 0.01}), Trial(1e-2, falling(2), {"kl": 0.2})]
    verdicts, rate = judge(trials, 20)
    chosen = recipe.override({"training.learning_rate": rate})
    found = rate_search.RateSearch(chosen, 20, trials, verdicts, tmp_path / "x.json")

    def find(*given: Any, rates: list[float], steps: int, **options: Any) -> Any:
        assert (rates, steps) == ([1e-3, 1e-2], 20)
        return found

    def go_on(recipe: Recipe, *given: Any, **options: Any) -> Any:
        done.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(rate_search, "find_rate", find)
    monkeypatch.setattr("forgetless.studies.run.run", go_on)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump()))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--find-lr", "--rates", "1e-3,1e-2", "--find-steps", "20"])
    assert ended.value.code == 130
    assert done == [chosen]
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.strip().startswith("0.0")]
    assert [row[0] for row in rows] == ["0.001", "0.01"]
    assert rows[0][3:] == ["0.01", "49", "%", "of", "the", "best", "rate's", "fall"]
    assert rows[1][3:] == ["0.2", "stable", "<-", "taken"]
    assert "The highest rate that was tried is stable" in said
    assert "forgets more" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rates", "1e-3"], "are for --find-lr"),
        (["--find-lr", "--rates", "fast"], "got 'fast'"),
    ],
)
def test_mistakes_of_the_command(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from forgetless.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["run", "recipe.yaml", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
