"""Probes while training: the right numbers, no trace in the training, budgets that hold."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import forgetless as fl
from forgetless.adapters.attachment import attach
from forgetless.core.errors import UserError
from forgetless.data.batches import Padding, TokenRows
from forgetless.data.examples import load_examples
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.tasks import Task, TaskResult
from forgetless.training import forgetting as module
from forgetless.training.forgetting import ForgettingCallback
from forgetless.training.loop import train
from forgetless.training.settings import TrainingSettings
from tests.tiny import tokenizer

pytest_plugins = ["tests.tiny_fixtures"]

STEPS = 8


@pytest.fixture
def base(tiny_base: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def old(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every line of the prose as a text of its own."""
    path = tmp_path_factory.mktemp("old") / "old.jsonl"
    prose = (tiny_files / "old.txt").read_text().splitlines()
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in prose))
    return path


@pytest.fixture
def held(tiny_files: Path) -> Path:
    return tiny_files / "test.jsonl"


def lora(base: Any, dropout: float = 0.1) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))


def rows(files: Path) -> TokenRows:
    return TokenRows(tokenize(load_examples(str(files / "train.jsonl")), tokenizer()))


def plain_trainer(
    model: Any, files: Path, folder: Path, *callbacks: Any, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=rows(files),
        data_collator=Padding(),
        callbacks=list(callbacks),
    )


def kl_of(model: Any, base: Any, texts: list[str], max_length: int = 256) -> float:
    """KL(base || model) per token in float64, one text at a time, without a line of the package."""
    words, total, count = tokenizer(), 0.0, 0
    for text in texts:
        ids = words(text)["input_ids"]
        for start in range(0, len(ids), max_length):
            batch = torch.tensor([ids[start : start + max_length]])
            with torch.no_grad():
                p = base(batch).logits[0].double().log_softmax(-1)
                q = model(batch).logits[0].double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            count += batch.shape[1]
    return total / count


def lines(old: Path) -> list[str]:
    return [json.loads(line)["text"] for line in old.read_text().splitlines()]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


class Snapshots(TrainerCallback):
    """The weights before the first and after every step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = weights(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = weights(kwargs["model"])


class Dice(Task):
    """A task that draws from every generator."""

    kind = name = "dice"

    def content(self) -> list[object]:
        return []

    def measure(self, *_: Any) -> TaskResult:
        value = float(torch.rand(())) + np.random.rand()
        return TaskResult("dice", "accuracy", value, 0.1, 1, True, "0")


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the A and B of an anchored adapter are loaded without")
@pytest.mark.parametrize("kind", ["lora", "anchored", "full"])
def test_the_kl_is_that_of_an_independent_computation(
    kind: str, base: Any, tiny_base: Path, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    untouched = LlamaForCausalLM.from_pretrained(tiny_base).eval()
    tuned: Any = base
    if kind != "full":
        tuned = lora(base) if kind == "lora" else attach(base, "pissa", rank=4)
    probes, taken = ForgettingCallback(old, every=3, tokenizer=tokenizer()), Snapshots()
    plain_trainer(tuned, tiny_files, tmp_path, probes, taken).train()

    assert [probe.step for probe in probes.history] == [0, 3, 6, 8]
    for probe in probes.history:
        tuned.load_state_dict(taken.at[probe.step], strict=False)
        expected = kl_of(tuned.eval(), untouched, lines(old))
        assert probe.values["forgetting/kl"] == pytest.approx(expected, abs=1e-5)
    assert probes.history[0].values["forgetting/kl"] == 0.0
    assert probes.history[-1].values["forgetting/kl"] > 0.001


def test_learning_is_the_mean_loss_of_the_held_answers(
    base: Any, tiny_files: Path, held: Path, old: Path, tmp_path: Path
) -> None:
    probes = ForgettingCallback(old, held, every=4, tokenizer=tokenizer())
    model = lora(base)
    plain_trainer(model, tiny_files, tmp_path, probes).train()
    first, *_, last = [probe.values["learning/loss"] for probe in probes.history]
    found = fl.evaluate(model, {"kind": "perplexity", "path": str(held), "limit": 32}, tokenizer())
    assert last == pytest.approx(found["perplexity"].value, abs=1e-6)
    assert last < first


# ---- no trace in the training --------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_with_probes_is_that_without_bit_for_bit(
    checkpointing: bool, tiny_base: Path, tiny_files: Path, old: Path, held: Path, tmp_path: Path
) -> None:
    done, logs = [], []
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    for probes in (None, ForgettingCallback([old, Dice()], held, every=1, tokenizer=tokenizer())):
        model = lora(LlamaForCausalLM.from_pretrained(tiny_base))
        trainer = plain_trainer(
            model, tiny_files, tmp_path, *([probes] if probes else []),
            logging_steps=3, gradient_checkpointing=checkpointing, **options,
        )  # fmt: skip
        trainer.train()
        done.append(weights(model))
        logs.append([e for e in trainer.state.log_history if "loss" in e])
        assert model.training
        assert all(w.grad is None for w in model.parameters())
    assert same(*done)
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[1]] == [3, 6]


def test_our_own_training_keeps_its_losses_and_logs_the_probes(
    tiny_base: Path, tiny_files: Path, old: Path, held: Path, tmp_path: Path
) -> None:
    settings = TrainingSettings(steps=6, batch_size=4, log_every=2)
    found = {}
    for name in ("without", "with"):
        probes = ForgettingCallback(old, held, every=2) if name == "with" else None
        model = lora(LlamaForCausalLM.from_pretrained(tiny_base))
        data = load_examples(str(tiny_files / "train.jsonl"))
        result = train(model, tokenizer(), data, settings, tmp_path / name, probes=probes)
        found[name] = (
            weights(model),
            [
                {key: value for key, value in line.items() if key != "seconds"}
                for line in log(tmp_path / name)
            ],
        )
    assert same(found["with"][0], found["without"][0])
    assert [line for line in found["with"][1] if "loss" in line] == found["without"][1]
    probed = [line for line in found["with"][1] if "probe" in line]
    assert [line["step"] for line in probed] == [0, 2, 4, 6]
    assert set(probed[0]["probe"]) == {"learning/loss", "forgetting/kl"}
    assert 0 < result.probe_seconds <= result.train_seconds


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- any trainer, any place to report to ---------------------------------------------------------


class Board(TrainerCallback):
    """Stands for TensorBoard and the like, which are called before the user's own callbacks."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(kwargs["logs"])))


def test_values_reach_what_the_trainer_reports_to(
    base: Any, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    board = Board()
    probes = ForgettingCallback(old, every=4, tokenizer=tokenizer())
    trainer = plain_trainer(lora(base), tiny_files, tmp_path, board, probes, logging_steps=2)
    trainer.train()
    probed = {step: logs["forgetting/kl"] for step, logs in board.seen if "forgetting/kl" in logs}
    assert probed == {p.step: p.values["forgetting/kl"] for p in probes.history}
    assert [step for step, logs in board.seen if "loss" in logs] == [2, 4, 6, 8]
    assert [e["step"] for e in trainer.state.log_history if "forgetting/kl" in e] == [0, 4, 8]


def test_trl_sft_and_dpo_trainers_take_it(tiny_base: Path, old: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    common: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "bf16": False, "max_length": 64,
    }  # fmt: skip
    pairs = Dataset.from_list([{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(6)])
    choices = Dataset.from_list(
        [{"prompt": f"{i}? ", "chosen": "Yes.", "rejected": "No!"} for i in range(6)]
    )
    for kind, config, data in ((SFTTrainer, SFTConfig, pairs), (DPOTrainer, DPOConfig, choices)):
        base = LlamaForCausalLM.from_pretrained(tiny_base)
        untouched = LlamaForCausalLM.from_pretrained(tiny_base).eval()
        probes = ForgettingCallback(old, every=1)
        trainer = kind(
            model=attach(base, "pissa", rank=4),
            args=config(**common),
            train_dataset=data,
            processing_class=tokenizer(),
            callbacks=[probes],
        )
        trainer.train()
        expected = kl_of(trainer.model.eval(), untouched, lines(old))
        assert [probe.step for probe in probes.history] == [0, 1, 2]
        assert probes.history[-1].values["forgetting/kl"] == pytest.approx(expected, abs=1e-5)
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        # What the trainer gathers between its logs is in its own lines, at every step.
        assert [set(entry) for entry in losses[1:]] == [set(losses[0])]
        assert "mean_token_accuracy" in losses[0] or "rewards/margins" in losses[0]


# ---- budgets -------------------------------------------------------------------------------------


def limits_of(old: Path, base: Any, files: Path, folder: Path) -> tuple[list[Any], Snapshots]:
    """Probes of an unlimited training, and its weights after every step."""
    probes, taken = ForgettingCallback(old, every=2, tokenizer=tokenizer()), Snapshots()
    plain_trainer(lora(base), files, folder, probes, taken).train()
    return probes.history, taken


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_budget_stops_or_rolls_back(
    action: Any, tiny_base: Path, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    history, taken = limits_of(
        old, LlamaForCausalLM.from_pretrained(tiny_base), tiny_files, tmp_path / "free"
    )
    kl = [probe.values["forgetting/kl"] for probe in history]
    assert kl[1] < kl[2]
    limit = (kl[1] + kl[2]) / 2  # inside after 2 steps, over after 4

    probes = ForgettingCallback(old, every=2, max_kl=limit, on_exceed=action, tokenizer=tokenizer())
    model = lora(LlamaForCausalLM.from_pretrained(tiny_base))
    trainer = plain_trainer(model, tiny_files, tmp_path / "held", probes)
    trainer.train()

    assert trainer.state.global_step == 4
    kept = 4 if action == "stop" else 2
    assert same(weights(model), taken.at[kept])
    event = probes.exceeded
    assert event is not None
    assert (event.limit, event.probe, event.step, event.kept_step) == ("max_kl", "kl", 4, kept)
    assert event.value == pytest.approx(kl[2])
    assert event.value > event.allowed == limit


def test_a_drop_is_measured_from_the_base_and_not_from_a_tuned_start(
    tiny_base: Path, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    model = lora(LlamaForCausalLM.from_pretrained(tiny_base))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    task = {"kind": "perplexity", "path": str(old), "limit": 8}
    with model.disable_adapter():
        base = fl.evaluate(model, task, tokenizer())["perplexity"].value
    start = fl.evaluate(model, task, tokenizer())["perplexity"].value
    assert abs(start - base) > 1e-3
    probes = ForgettingCallback(task, max_drop=5.0, tokenizer=tokenizer())
    plain_trainer(model, tiny_files, tmp_path, probes).train()
    assert probes._base == {"perplexity": pytest.approx(base)}
    strict = ForgettingCallback(task, max_drop=1e-9, tokenizer=tokenizer())
    if start > base:
        with pytest.raises(UserError, match="exceeded before the first step"):
            plain_trainer(model, tiny_files, tmp_path, strict).train()


@pytest.mark.parametrize(("action", "killed_at"), [("stop", 3), ("rollback", 5)])
def test_a_budget_survives_an_interruption(
    action: Any, killed_at: int, tiny_base: Path, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    settings = TrainingSettings(
        steps=STEPS, batch_size=4, learning_rate=1e-2, checkpoint_every=1, log_every=1
    )
    data = load_examples(str(tiny_files / "train.jsonl"))

    def attempt(folder: str, limit: float | None, stop: int | None = None) -> Any:
        def kill(step: int, steps: int) -> None:
            if step == stop:
                raise KeyboardInterrupt

        probes = ForgettingCallback(old, every=2, max_kl=limit, on_exceed=action)
        model = lora(LlamaForCausalLM.from_pretrained(tiny_base))
        result = train(
            model, tokenizer(), data, settings, tmp_path / folder, probes=probes, on_step=kill
        )
        return model, result, probes

    kl = [p.values["forgetting/kl"] for p in attempt("free", None)[2].history]
    assert kl[1] < kl[2] < kl[3]
    limit = (kl[2] + kl[3]) / 2
    expected, through, _ = attempt("through", limit)
    with pytest.raises(KeyboardInterrupt):
        attempt("killed", limit, killed_at)
    model, result, probes = attempt("killed", limit)
    assert result.resumed_from == killed_at - 1
    assert result.exceeded == through.exceeded
    assert result.exceeded.kept_step == (6 if action == "stop" else 4)
    assert same(weights(model), weights(expected))
    again, finished, _ = attempt("killed", limit)  # loads the end, and trains no further
    for one in (result, finished):
        assert (one.steps, one.tokens) == (one.exceeded.kept_step, one.exceeded.kept_tokens)
        assert (one.final_loss, one.exceeded) == (through.final_loss, through.exceeded)
    assert same(weights(again), weights(expected))
    steps = [line["step"] for line in log(tmp_path / "killed") if "probe" in line]
    assert steps == [0, 2, 4, 6] == [probe.step for probe in probes.history]
    with pytest.raises(UserError, match="belongs to another training, with budget"):
        attempt("killed", 2 * limit)


def test_a_plain_trainer_resumes_a_finished_budget_at_its_end(
    tiny_base: Path, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    def attempt(checkpoint: str | None) -> tuple[Any, ForgettingCallback]:
        probes = ForgettingCallback(
            old, every=2, max_kl=1e-4, on_exceed="rollback", tokenizer=tokenizer()
        )
        model = lora(LlamaForCausalLM.from_pretrained(tiny_base))
        options = {"save_strategy": "steps", "save_steps": 100}
        plain_trainer(model, tiny_files, tmp_path, probes, **options).train(
            resume_from_checkpoint=checkpoint
        )
        return model, probes

    first, probes = attempt(None)
    assert probes.exceeded is not None
    step = probes.exceeded.step
    second, resumed = attempt(str(tmp_path / f"checkpoint-{step}"))
    assert resumed.exceeded == probes.exceeded
    assert same(weights(first), weights(second))


def test_a_full_fine_tuning_still_knows_its_base_after_an_interruption(
    tiny_base: Path, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    untouched = LlamaForCausalLM.from_pretrained(tiny_base).eval()
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        model = LlamaForCausalLM.from_pretrained(tiny_base)
        probes = ForgettingCallback(old, every=4, tokenizer=tokenizer())
        options = {"save_strategy": "steps", "save_steps": 4}
        plain_trainer(model, tiny_files, tmp_path, probes, **options).train(
            resume_from_checkpoint=checkpoint
        )
        expected = kl_of(model.eval(), untouched, lines(old))
        assert probes.history[-1].values["forgetting/kl"] == pytest.approx(expected, abs=1e-5)
    assert [probe.step for probe in probes.history] == [0, 4, 8]
    (tmp_path / module.BASE_FILE).unlink()
    with pytest.raises(UserError, match="pass reference="):
        plain_trainer(model, tiny_files, tmp_path, probes).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


def test_a_drop_from_a_base_that_nobody_knows_any_more_is_refused(
    tiny_base: Path, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    """Of a training without probes that goes on with them, the weights are no longer the base's."""
    saving = {"save_strategy": "steps", "save_steps": 4}
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    plain_trainer(model, tiny_files, tmp_path, max_steps=4, **saving).train()
    prose = {"kind": "perplexity", "path": str(old), "limit": 4}
    probes = ForgettingCallback(prose, max_drop=0.5, tokenizer=tokenizer())
    with pytest.raises(UserError, match="pass reference="):
        plain_trainer(model, tiny_files, tmp_path, probes).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


def test_a_model_is_freed_with_its_training(
    tiny_base: Path, tiny_files: Path, old: Path, tmp_path: Path
) -> None:
    probes = ForgettingCallback(old, every=2)
    model = lora(LlamaForCausalLM.from_pretrained(tiny_base))
    data = load_examples(str(tiny_files / "train.jsonl"))
    gc.collect()
    gc.disable()
    try:
        train(model, tokenizer(), data, TrainingSettings(steps=2), tmp_path, probes=probes)
        weight = weakref.ref(next(model.parameters()))
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:task .* were cut off")
@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_on_the_pocket_world_a_budget_keeps_what_was_known(action: Any, tmp_path: Path) -> None:
    base, words = load_model("pocket"), load_tokenizer("pocket")
    model = attach(base, "lora", rank=16, alpha=16)
    settings = TrainingSettings(steps=30, batch_size=8, learning_rate=3e-2, warmup_ratio=0.0)
    probes = ForgettingCallback(
        ["pocket:held", {"kind": "pocket_recall", "limit": 8}],
        "pocket:problems:test", every=2, max_kl=0.3, on_exceed=action,
    )  # fmt: skip
    problems = load_examples("pocket:problems", limit=200)
    result = train(model, words, problems, settings, tmp_path, probes=probes)
    event = result.exceeded
    assert event is not None
    assert result.steps == event.kept_step <= event.step < 30
    kl = {probe.step: probe.values["forgetting/kl"] for probe in probes.history}
    assert kl[event.kept_step] <= 0.3 or action == "stop"
    assert kl[event.step] > 0.3
    lines = [line for line in log(tmp_path) if "loss" in line]
    losses = [line["loss"] for line in lines if line["step"] <= event.kept_step]
    assert result.final_loss == losses[-1] if losses else np.isnan(result.final_loss)
    found = probes.probes.measure(model, words, None)[1]["kl"].value
    assert found == pytest.approx(kl[event.kept_step], abs=1e-6)
    assert probes.history[0].values["forgetting/pocket_recall"] == 1.0


# ---- recipes -------------------------------------------------------------------------------------


def test_a_run_writes_down_its_probes_and_its_budget(
    tiny_recipe: dict[str, Any], tiny_files: Path, tmp_path: Path
) -> None:
    plain = fl.Recipe.parse(tiny_recipe)
    probes = {
        "learning": [str(tiny_files / "test.jsonl")],
        "forgetting": [str(tiny_files / "old.txt")],
    }
    watched = fl.Recipe.parse({**tiny_recipe, "probes": {**probes, "every": 1}})
    limited = fl.Recipe.parse(
        {**tiny_recipe, "probes": {**probes, "every": 1, "max_kl": 1e-6, "on_exceed": "rollback"}}
    )
    assert run_id(watched) == run_id(plain) != run_id(limited)
    run = fl.run(limited, tmp_path)
    event = run.record["training"]["exceeded"]
    assert (event["limit"], event["action"], event["kept_step"]) == (
        "max_kl",
        "rollback",
        event["step"] - 1,
    )
    # What is said of the training is said of the weights that it went back to.
    trained, kept = run.record["training"], event["kept_step"]
    before = [line for line in log(run.folder) if "loss" in line and line["step"] == kept]
    assert trained["steps"] == kept == event["step"] - 1
    assert trained["tokens"] == event["kept_tokens"] == sum(line["tokens"] for line in before)
    assert trained["final_loss"] == (before[0]["loss"] if before else None)
    assert [line["step"] for line in log(run.folder) if "probe" in line] == [
        *range(event["step"] + 1)
    ]


def test_what_is_wrong_with_probes_is_among_the_problems_of_a_recipe(
    tiny_recipe: dict[str, Any],
) -> None:
    recipe = fl.Recipe.parse({**tiny_recipe, "probes": {"forgetting": ["gone.txt"]}})
    assert check(recipe) == [f"probes: task 'kl': no such file: gone.txt (looked in {Path.cwd()})"]
    recipe = fl.Recipe.parse({**tiny_recipe, "probes": {"max_kl": 0.1}})
    assert [problem[:24] for problem in check(recipe)] == ["probes: no probe given; "]


# ---- cost ----------------------------------------------------------------------------------------


def test_probes_are_spread_so_that_they_take_their_share_and_no_more(old: Path) -> None:
    """A made-up clock: steps of 10 ms, probes of 100 ms, so 4 % of 4 000 steps are 16 probes."""
    callback = ForgettingCallback(old)
    clock, seconds = callback._clock, 0.0
    callback.history = [module.Probe(0, {}, 0.1)]
    for step in range(1, 4001):
        seconds += 0.01
        clock.seconds = seconds
        clock.warm = clock.warm or (step, seconds)
        if callback._is_due(step, 4000):
            callback.history.append(module.Probe(step, {}, 0.1))
    steps = [probe.step for probe in callback.history]
    assert 14 <= len(steps) <= 16
    assert steps[-1] == 4000
    assert max(np.diff(steps)) < 1.3 * min(np.diff(steps)[:-1])  # evenly spread
    assert callback.probe_seconds <= 0.04 * seconds + 1e-9


def test_with_a_budget_the_steps_of_the_probes_do_not_follow_the_clock(old: Path) -> None:
    callback = ForgettingCallback(old, max_kl=0.5)
    due = [step for step in range(1, 51) if callback._is_due(step, 50)]
    assert due == [*range(3, 49, 3), 50]


# ---- mistakes ------------------------------------------------------------------------------------


def test_mistakes_show_before_any_training(old: Path) -> None:
    for options, words in (
        ({}, "no probe given"),
        ({"forgetting": "nowhere.txt"}, "no such file: nowhere.txt"),
        ({"forgetting": old, "every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"forgetting": old, "max_kl": -1.0}, "max_kl must be a number above 0 or None, got -1"),
        ({"forgetting": old, "max_drop": 0.1}, "max_drop needs a forgetting probe with a score"),
        ({"learning": old, "max_kl": 0.1}, "max_kl needs a forgetting probe that measures KL"),
        ({"forgetting": old, "on_exceed": "undo"}, "must be 'stop' or 'rollback', got 'undo'"),
    ):
        with pytest.raises(UserError, match=words):
            ForgettingCallback(**options)


def test_a_model_without_a_tokenizer_is_named(base: Any, tiny_files: Path, old: Path) -> None:
    base.name_or_path = ""
    with pytest.raises(UserError, match=r"by which tokenizer; pass processor= \(the tokenizer\)"):
        plain_trainer(lora(base), tiny_files, tiny_files, ForgettingCallback(old)).train()


def test_a_base_too_large_to_keep_is_refused(
    base: Any, tiny_files: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgetless.training.probes.RECORDED_BYTES", 1000)
    probes = ForgettingCallback(old, tokenizer=tokenizer())
    with pytest.raises(UserError, match="pass reference="):
        plain_trainer(base, tiny_files, tmp_path, probes).train()
