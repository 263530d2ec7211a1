"""Settings of a trained adapter: each measured as what it is, and the choice among them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from forgetless.adapters.attachment import attach
from forgetless.adapters.dial import dial
from forgetless.adapters.folders import export, save
from forgetless.adapters.repair import repair
from forgetless.core.errors import UserError
from forgetless.data.settings import CalibrationSettings, DataSettings
from forgetless.models.load import load_model, load_tokenizer
from forgetless.models.targets import target_layers
from forgetless.models.weights import linear_weight
from forgetless.scores.gates import parse_limits
from forgetless.statistics.collection import collect
from forgetless.statistics.moments import Statistics, is_statistics
from forgetless.studies.aftercare import (
    BASE,
    TRAINED,
    Adjustable,
    Bench,
    Point,
    Read,
    Reading,
    Setting,
    choose,
)
from forgetless.tasks import Task, make_task
from forgetless.tasks.evaluation import evaluate

pytest_plugins = ["tests.tiny_fixtures"]

IDS = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def statistics(base: Path, seed: int) -> Any:
    ids = torch.randint(4, 100, (4, 40), generator=torch.Generator().manual_seed(seed))
    return collect(load_model(str(base), dtype="float32"), [{"input_ids": ids}])


def adapted(base: Path, method: str = "lora") -> Any:
    model = attach(load_model(str(base), dtype="float32"), method, rank=4, alpha=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
    return model


# --- settings -----------------------------------------------------------------------------------


def test_labels() -> None:
    assert TRAINED.label == "trained"
    assert BASE.label == "dial-0"
    assert Setting(0.1).label == "repair-0.1"
    assert Setting(0.1, 0.5).label == "repair-0.1-dial-0.5"
    assert Setting(scale=-1).label == "dial--1"


@pytest.mark.parametrize("method", ["lora", "pissa"])
@pytest.mark.parametrize("given", ["model", "native folder", "exported folder"])
def test_an_adapter_is_set_to_what_repair_and_dial_give(
    method: str, given: str, tiny_base: Path, tmp_path: Path
) -> None:
    model, base = adapted(tiny_base, method), load_model(str(tiny_base), dtype="float32")
    adapter: Any = model
    if given == "native folder":
        adapter = save(model, tmp_path / "native")
    elif given == "exported folder":
        adapter = export(model, tmp_path / "plain").folder
    keep, task = statistics(tiny_base, 1), statistics(tiny_base, 2)
    found = Adjustable(adapter, base, keep, task, [0.1, 1.0])
    before = logits(found.model)
    fresh = load_model(str(tiny_base), dtype="float32")
    with found.at(BASE) as turned:
        assert torch.equal(logits(turned), logits(fresh))
    with found.at(TRAINED) as turned:
        assert torch.equal(logits(turned), before)
    with found.at(Setting(scale=0.5)) as turned, dial(adapted(tiny_base, method), 0.5) as other:
        torch.testing.assert_close(logits(turned), logits(other), atol=1e-5, rtol=1e-5)
    for strength in (1.0, 0.1):
        healed = repair(adapted(tiny_base, method), fresh, keep, task, strength)
        for scale in (1, 0.5):
            with found.at(Setting(strength, scale)) as turned, dial(healed, scale):
                torch.testing.assert_close(logits(turned), logits(healed), atol=1e-5, rtol=1e-5)
        healed.unload()
        assert torch.equal(logits(found.model), before)


def test_a_tuned_model_is_set_likewise(tiny_base: Path, tmp_path: Path) -> None:
    model: Any = tuned(tiny_base)
    base: Any = load_model(str(tiny_base), dtype="float32")
    model.save_pretrained(tmp_path / "tuned")
    keep = statistics(tiny_base, 1)
    for given in (model, tmp_path / "tuned"):
        found = Adjustable(given, base, keep, None, [0.5])
        reference: Any = found.reference
        assert reference is base
        with found.at(BASE) as turned:
            assert torch.equal(logits(turned), logits(base))
        healed: Any = repair(tuned(tiny_base), base, keep, strength=0.5)
        with found.at(Setting(0.5, 0.5)) as turned, dial(healed, 0.5, base=base):
            assert torch.equal(logits(turned), logits(healed))
        with found.at(TRAINED) as turned:
            assert torch.equal(logits(turned), logits(model))


@torch.no_grad()
def tuned(base: Path) -> Any:
    torch.manual_seed(1)
    model: nn.Module = load_model(str(base), dtype="float32")
    for layer in target_layers(model).values():
        linear_weight(layer).add_(0.1 * torch.randn(linear_weight(layer).shape))
    return model


def loss_on(path: Path, name: str) -> Task:
    return make_task({"kind": "perplexity", "name": name, "path": str(path), "limit": 64})


# --- measuring ----------------------------------------------------------------------------------


def test_a_point_is_what_the_tasks_say(tiny_base: Path, tiny_files: Path) -> None:
    model, tokenizer = adapted(tiny_base), load_tokenizer(str(tiny_base))
    old, new = tiny_files / "old.txt", tiny_files / "test.jsonl"
    keep, task = statistics(tiny_base, 1), statistics(tiny_base, 2)
    found = Adjustable(model, model.get_base_model(), keep, task, [0.3])
    bench = Bench(found, tokenizer, old, new)
    point = bench.measure(Setting(0.3), [loss_on(old, "prose")])
    healed = repair(
        adapted(tiny_base), load_model(str(tiny_base), dtype="float32"), keep, task, 0.3
    )
    tasks: list[Any] = [
        make_task({"kind": "kl", "path": str(old), "limit": 64}),
        loss_on(new, "loss"),
        loss_on(old, "prose"),
    ]
    alone = evaluate(healed, tasks, tokenizer)
    assert point.kl is not None
    assert point.kl == pytest.approx(alone["kl"].value, rel=1e-4)
    assert point.loss == pytest.approx(alone["loss"].value, rel=1e-5)
    assert point.scores["prose"].value == pytest.approx(alone["prose"].value, rel=1e-5)
    trained, base = bench.measure(TRAINED), bench.measure(BASE)
    assert (base.kl, base.drift, trained.drift, trained.given_up) == (0, 0, 1, 0)
    assert trained.kl is not None
    assert point.drift == pytest.approx(point.kl / trained.kl)
    assert point.to_json()["strength"] == 0.3


@pytest.mark.parametrize("more", [{"bias": "lora_only"}, {"trainable_token_indices": [1, 2]}])
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
def test_what_cannot_be_turned_off_is_refused_at_once(more: dict[str, Any]) -> None:
    base = load_model("pocket")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **more))
    with pytest.raises(UserError, match="to repair it without measuring, give"):
        Adjustable(model, base)


def test_without_texts_the_moments_tell(tiny_base: Path) -> None:
    model, tokenizer = adapted(tiny_base), load_tokenizer(str(tiny_base))
    keep, task = statistics(tiny_base, 1), statistics(tiny_base, 2)
    bench = Bench(Adjustable(model, model.get_base_model(), keep, task, [0.1, 1]), tokenizer)
    weak, strong, half, none = bench.curve([Setting(0.1), Setting(1), Setting(scale=0.5), BASE])
    assert (weak.kl, weak.loss) == (None, None)
    assert 0 < strong.drift < weak.drift < 1
    assert 0 < weak.given_up < strong.given_up < 1
    assert (half.drift, half.given_up) == (0.25, 0.25)
    assert (none.drift, none.given_up) == (0, 1)


def test_each_setting_is_measured_once(
    tiny_base: Path, tiny_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def counting(*arguments: Any, **named: Any) -> Any:
        asked.append(arguments)
        return evaluate(*arguments, **named)

    monkeypatch.setattr("forgetless.studies.aftercare.evaluate", counting)
    model = adapted(tiny_base)
    trained = Adjustable(model, model.get_base_model())
    bench = Bench(trained, load_tokenizer(str(tiny_base)), tiny_files / "old.txt")
    bench.curve([BASE, TRAINED, Setting(scale=0.5), Setting(scale=0.5), TRAINED])
    bench.measure(Setting(scale=0.5))
    assert len(asked) == 3


# --- choosing -----------------------------------------------------------------------------------


def points(*values: tuple[float, float, float]) -> list[Point]:
    """Of (strength, KL, share given up); the first is as trained."""
    return [
        Point(Setting(strength), kl, 1.0, drift=kl / values[0][1], given_up=given_up)
        for strength, kl, given_up in values
    ]


CURVE = points((0, 1, 0), (0.01, 0.5, 0.001), (0.1, 0.2, 0.01), (1, 0.1, 0.1), (10, 0.08, 0.5))


@pytest.mark.parametrize(
    ("budget", "strength"),
    [
        ({"max_kl": 0.3}, 0.1),
        ({"max_kl": 0.1}, 1),
        ({"max_kl": 2}, 0),
        ({"max_drop": 0.02}, 0.1),
        ({"max_drop": 0.0}, 0),
        ({"max_drop": 1.0}, 10),
        ({"max_kl": 0.3, "max_drop": 0.2}, 0.1),
        ({}, 0.1),
    ],
)
def test_the_cheapest_point_within_the_budget_or_the_knee(
    budget: dict[str, float], strength: float
) -> None:
    assert choose(CURVE, **budget).setting.strength == strength  # type: ignore[arg-type]
    assert choose(CURVE[::-1], **budget).setting.strength == strength  # type: ignore[arg-type]


def test_a_budget_that_nothing_meets_says_what_is_to_be_had() -> None:
    with pytest.raises(
        UserError, match=r"a KL of at most 0\.01 \(the least is 0\.08, at repair-10"
    ):
        choose(CURVE, max_kl=0.01)
    with pytest.raises(UserError, match=r"given up .* \(the least is 0 %, at trained\)"):
        choose(CURVE, max_drop=-0.5)
    unmeasured = [Point(TRAINED, None, None, 1, 0)]
    with pytest.raises(UserError, match="needs held-out text to keep"):
        choose(unmeasured, max_kl=1)


def test_a_limit_of_a_task_is_against_the_adapter_as_trained(
    tiny_base: Path, tiny_files: Path
) -> None:
    model = adapted(tiny_base)
    bench = Bench(Adjustable(model, model.get_base_model()), load_tokenizer(str(tiny_base)))
    task = loss_on(tiny_files / "old.txt", "prose")
    measured = bench.curve([TRAINED, *(Setting(scale=s) for s in (0.9, 0.5, 0, 2))], [task])
    before = measured[0].scores["prose"].value
    for size in (0.001, 0.05):
        chosen = choose(measured, limits=parse_limits([f"prose={size}"]))
        allowed = [p for p in measured if p.scores["prose"].value - before <= size + 1e-9]
        assert chosen.drift == min(point.drift for point in allowed)


# --- texts --------------------------------------------------------------------------------------


def reading(base: Path, **settings: Any) -> Reading:
    return Reading(
        load_model(str(base), dtype="float32"),
        load_tokenizer(str(base)),
        "all-linear",
        CalibrationSettings(samples=16, max_length=32, **settings),
        DataSettings(train="-", max_length=32),
    )


def test_texts_are_read_in_two_parts(tiny_base: Path, tiny_files: Path, tmp_path: Path) -> None:
    read = reading(tiny_base)
    keep = read.keep(str(tiny_files / "old.txt"), tmp_path / "keep")
    task = read.task(str(tiny_files / "train.jsonl"), tmp_path / "task")
    said = read.keep("self", tmp_path / "self")
    for part in (keep, task, said):
        assert part.statistics is not None
        assert len(part.statistics) == 14
        assert part.held is not None
        assert part.held.stat().st_size > 0
    keep.statistics.save(tmp_path / "stats")  # type: ignore[union-attr]
    again = read.keep(str(tmp_path / "stats"), tmp_path / "again")
    assert again.held is None
    assert is_statistics(str(tmp_path / "stats"))
    with pytest.raises(UserError, match="give the text itself"):
        read.measured(str(tmp_path / "stats"), tmp_path)
    assert read.measured(str(tiny_files / "old.txt"), tmp_path).held == tiny_files / "old.txt"


@pytest.mark.parametrize("method", ["lora", "pissa", "full"])
def test_a_repair_takes_the_trained_model_s_activations_on_the_task(
    method: str, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    if method == "full":
        trained: Any = load_model(str(tiny_base), dtype="float32")
        with torch.no_grad():
            for layer in target_layers(trained).values():
                linear_weight(layer).mul_(1.1)
        merged = trained
    else:
        trained = adapted(tiny_base, method)
        merged = copy.deepcopy(trained).merge_and_unload()
    base, as_trained = reading(tiny_base), replace(reading(tiny_base), trained=trained)

    def of(read: Callable[[str, Path], Read], file: str) -> Statistics:
        found = read(str(tiny_files / file), tmp_path / str(len(list(tmp_path.iterdir()))))
        assert found.statistics is not None
        return found.statistics

    found, of_base = of(as_trained.task, "train.jsonl"), of(base.task, "train.jsonl")
    by_hand = of(replace(base, base=merged).task, "train.jsonl")
    keep, same = of(as_trained.keep, "old.txt"), of(base.keep, "old.txt")
    for name in found:
        moments = found[name].second_moment, by_hand[name].second_moment
        torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-6)
        assert torch.equal(keep[name].second_moment, same[name].second_moment)
    assert not torch.allclose(found[name].second_moment, of_base[name].second_moment, rtol=1e-2)
