"""Learning rates with a cool-down, budgets of tokens, and attention dropout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from forgetless.core.errors import RecipeError, UserError
from forgetless.data.batches import TokenRows
from forgetless.data.mixture import Mixture
from forgetless.recipes.recipe import Recipe
from forgetless.training.loop import train
from forgetless.training.model import attention_dropout
from forgetless.training.schedules import measured_steps, rate_factor, total_steps
from forgetless.training.settings import TrainingSettings
from tests.families import FAMILIES
from tests.training.test_loop import DATA, TOKENIZER, lora, token_data


def rates(schedule: Any, steps: int, warmup: float, cooldown: float) -> list[float]:
    settings = TrainingSettings(
        steps=steps, schedule=schedule, warmup_ratio=warmup, cooldown_ratio=cooldown
    )
    factor = rate_factor(settings, steps)
    return [round(factor(step), 6) for step in range(steps + 1)]


def test_a_constant_rate_with_warmup_and_cooldown() -> None:
    expected = [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates("constant", 10, warmup=0.2, cooldown=0.4) == expected


def test_the_inverse_square_root_falls_from_the_warmups_end() -> None:
    found = rates("inverse_sqrt", 100, warmup=0.04, cooldown=0.0)
    assert found[4] == 1
    assert found[16] == 0.5
    assert found[64] == 0.25


def test_the_cooldown_multiplies_the_inverse_square_root() -> None:
    flat = rates("inverse_sqrt", 100, warmup=0.04, cooldown=0.0)
    cooled = rates("inverse_sqrt", 100, warmup=0.04, cooldown=0.2)
    assert cooled[:81] == flat[:81]
    assert cooled[90] == pytest.approx(flat[90] / 2, abs=1e-5)
    assert cooled[100] == 0


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert rates("inverse_sqrt", 4, warmup=0, cooldown=0) == [
        1,
        1,
        round(0.5**0.5, 6),
        round(3**-0.5, 6),
        0.5,
    ]


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ],
)
@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.0), (37, 0.03), (7, 1.0), (200, 0.1)])
def test_common_schedules_are_those_of_transformers_bit_for_bit(
    schedule: Any, theirs: Any, steps: int, warmup: float
) -> None:
    settings = TrainingSettings(steps=steps, schedule=schedule, warmup_ratio=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    given = theirs(optimizer, math.ceil(warmup * steps), steps).lr_lambdas[0]
    ours = rate_factor(settings, steps)
    assert [ours(step) for step in range(steps + 1)] == [given(step) for step in range(steps + 1)]


def test_training_follows_the_schedule(tmp_path: Path) -> None:
    settings = TrainingSettings(
        learning_rate=1e-2,
        steps=10,
        batch_size=4,
        schedule="constant",
        warmup_ratio=0.2,
        cooldown_ratio=0.4,
        log_every=1,
        checkpoint_every=10,
    )
    train(lora(), TOKENIZER, DATA, settings, tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    used = [float(line.split('"learning_rate": ')[1].split(",")[0]) for line in lines]
    # A line has the rate that its step was made with.
    assert used == pytest.approx([1e-2 * f for f in rates("constant", 10, 0.2, 0.4)[:10]])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"training.cooldown_ratio": 0.2}, "cosine"),
        (
            {
                "training.schedule": "constant",
                "training.cooldown_ratio": 0.9,
                "training.warmup_ratio": 0.2,
            },
            "together must be at most 1",
        ),
        ({"training.tokens": 100, "training.steps": 1}, "steps=1 and tokens=100"),
        ({"training.measure_at": [0.5, 1.0]}, "measure_at"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], problem: str) -> None:
    content = {"base": "pocket", "data": {"train": "pocket:problems"}, "training": {"steps": 2}}
    with pytest.raises(RecipeError, match=problem):
        Recipe.parse(content, changes)


def test_a_budget_of_tokens_clears_the_steps_of_a_recipe() -> None:
    content = {"base": "pocket", "data": {"train": "pocket:problems"}, "training": {"steps": 2}}
    recipe = Recipe.parse(content, {"training.tokens": 5000})
    assert (recipe.training.steps, recipe.training.tokens) == (None, 5000)


# ---- budgets of tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "steps"), [(8, 8), (24, 4)], ids=["whole", "short at end"])
def test_a_budget_of_tokens_is_met_to_within_a_step(
    batch_size: int, steps: int, tmp_path: Path
) -> None:
    """Also where the last step of an epoch is a short one: 64 rows are 48 and 16."""
    rows = TokenRows(token_data(64))
    settings = TrainingSettings(
        tokens=2 * rows.tokens, batch_size=batch_size, gradient_accumulation=2
    )
    assert total_steps(rows, settings) == steps
    result = train(lora(), TOKENIZER, token_data(64), settings, tmp_path)
    assert result.tokens == 2 * rows.tokens


def test_a_mixture_counts_the_tokens_of_all_its_sources() -> None:
    new, old = TokenRows(token_data(40)), TokenRows(token_data(7, seed=1))
    mixture = Mixture([new, old], [2, 1], seed=0)
    assert mixture.tokens == round(new.tokens + 20 * old.tokens / 7)


def test_shares_of_a_training_are_steps() -> None:
    settings = TrainingSettings(steps=8, measure_at=[0.5, 0.01, 0.25, 0.99])
    assert measured_steps(8, settings) == [1, 2, 4]


# ---- attention dropout ---------------------------------------------------------------------------

WITH_A_RATE = [name for name in FAMILIES if name not in ("t5",)]


@pytest.mark.parametrize("family", WITH_A_RATE)
def test_attention_dropout_acts_in_training_only_and_ends_with_the_block(family: str) -> None:
    model = FAMILIES[family].model()
    for module in model.modules():  # what else the family drops
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = FAMILIES[family].batch()

    def output() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**batch).logits
        return found

    model.train()
    before = output()
    with attention_dropout(model, 0.5):
        torch.manual_seed(0)
        assert not torch.equal(output(), before)
        model.eval()
        assert torch.equal(output(), before)
    assert torch.equal(output(), before)
    model.train()
    assert torch.equal(output(), before)


def test_a_model_without_attention_refuses_it() -> None:
    with (
        pytest.raises(UserError, match="no attention module of Linear"),
        attention_dropout(torch.nn.Linear(2, 2), 0.1),
    ):
        pass


def test_attention_dropout_changes_a_training_and_not_the_model(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model()
    settings = TrainingSettings(learning_rate=1e-3, steps=2, batch_size=4, log_every=1)
    dropping = settings.model_copy(update={"attention_dropout": 0.4})
    plain = train(model, TOKENIZER, DATA, settings, tmp_path / "plain")
    dropped = train(model, TOKENIZER, DATA, dropping, tmp_path / "dropped")
    assert plain.final_loss != dropped.final_loss
    assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)
