"""Training: exact resume, right loss, honest log, clear errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export, load, save
from forgetless.data.batches import Padding, TokenRows
from forgetless.data.examples import load_examples
from forgetless.data.packing import IGNORED
from forgetless.data.tokens import tokenize
from forgetless.training import checkpoints as ckpt
from forgetless.training.log import TrainingLog
from forgetless.training.loop import TrainingResult, train
from forgetless.training.settings import TrainingSettings
from forgetless.training.trainer import ExactTrainer
from tests.adapters.test_attachment import REPRESENTATIVES, attached
from tests.data.test_forms import PAIRS, byte_tokenizer, examples
from tests.families import FAMILIES, VOCAB

pytest_plugins = ["tests.quick_python"]


TOKENIZER: Any = SimpleNamespace(pad_token_id=0)


def token_data(rows: int = 50, seed: int = 0) -> datasets.Dataset:
    """Rows of 5 to 19 random tokens, of which the first one to four are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row in range(rows):
        length = int(torch.randint(5, 20, (1,), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        prompt = 1 + row % 4
        columns["input_ids"].append(ids)
        columns["labels"].append([IGNORED] * prompt + ids[prompt:])
    return datasets.Dataset.from_dict(columns)


DATA = token_data()


def full() -> Any:
    """A whole model with dropout, so that the random state matters."""
    model = FAMILIES["llama"].model()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


def lora() -> Any:
    """A plain LoRA with dropout."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    return get_peft_model(FAMILIES["llama"].model(), config)


def anchored() -> Any:
    """An adapter of this package that starts away from zero."""
    return attach(FAMILIES["llama"].model(), "pissa", rank=4, alpha=4, dropout=0.1)


MODELS = {"lora": lora, "anchored": anchored, "full": full}


def settings(**changes: Any) -> TrainingSettings:
    defaults = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    return TrainingSettings(**{**defaults, **changes})


def fit(
    model: Any, folder: Path, seed: int = 0, data: Any = DATA, **changes: Any
) -> TrainingResult:
    return train(model, TOKENIZER, data, settings(**changes), folder, seed=seed)


def log(folder: Path, without: str = "seconds") -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != without} for line in lines]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(first: Any, second: Any) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---- resume --------------------------------------------------------------------------------------

RESUMED: dict[str, Any] = {
    "steps": 17,
    "gradient_accumulation": 2,
    "weight_decay": 0.1,
    "checkpoint_every": 5,
    "log_every": 3,
}


def stop_at(step: int) -> Callable[[int, int], None]:
    def stop(done: int, steps: int) -> None:
        assert steps == RESUMED["steps"]
        if done == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("kind", MODELS)
def test_a_stopped_training_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Stopped twice, once in the second and once in the third and last epoch."""
    undisturbed = MODELS[kind]()
    expected = fit(undisturbed, tmp_path / "a", seed=3, **RESUMED)
    assert expected.resumed_from is None

    for step in (12, 16):
        with pytest.raises(KeyboardInterrupt):
            train(
                MODELS[kind](),
                TOKENIZER,
                DATA,
                settings(**RESUMED),
                tmp_path / "b",
                seed=3,
                on_step=stop_at(step),
            )
    model = MODELS[kind]()
    result = fit(model, tmp_path / "b", seed=3, **RESUMED)

    assert result.resumed_from == 15
    assert log(tmp_path / "b") == log(tmp_path / "a")
    assert same(model, undisturbed)
    assert (result.steps, result.final_loss, result.tokens) == (
        expected.steps,
        expected.final_loss,
        expected.tokens,
    )
    assert sorted(os.listdir(tmp_path / "b" / "checkpoints")) == ["checkpoint-15", "checkpoint-17"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_finished_training_is_loaded_and_not_repeated(kind: str, tmp_path: Path) -> None:
    first, again = MODELS[kind](), MODELS[kind]()
    expected = fit(first, tmp_path)
    lines = log(tmp_path, without="")
    result = fit(again, tmp_path)
    assert result.resumed_from == result.steps == 6
    assert (result.train_seconds, result.final_loss) == (
        expected.train_seconds,
        expected.final_loss,
    )
    assert same(first, again)
    assert log(tmp_path, without="") == lines


KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.training.test_loop import RESUMED, fit, full

save = torch.save
def dying_save(content, path, *args, **kwargs):
    if "checkpoint-15" in str(path) and "scheduler" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, path, *args, **kwargs)
torch.save = dying_save

fit(full(), Path(sys.argv[1]), **RESUMED)
"""


def test_a_checkpoint_half_written_at_a_kill_is_not_resumed_from(
    tmp_path: Path, python: str
) -> None:
    repository = Path(__file__).parents[2]
    paths = os.pathsep.join([str(repository), str(repository / "src")])
    killed = subprocess.run(
        [python, "-c", KILLED, str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    half = tmp_path / "killed" / "checkpoints" / "checkpoint-15"
    assert (half / "model.safetensors").exists()
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')

    resumed, undisturbed = full(), full()
    result = fit(resumed, tmp_path / "killed", **RESUMED)
    fit(undisturbed, tmp_path / "undisturbed", **RESUMED)
    assert result.resumed_from == 10
    assert same(resumed, undisturbed)
    assert log(tmp_path / "killed") == log(tmp_path / "undisturbed")


def test_a_checkpoint_with_a_missing_or_shortened_file_does_not_count(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("weights")
        ckpt.seal(tmp_path / f"checkpoint-{step}", {"seed": 0})
    assert ckpt.newest(tmp_path) == tmp_path / "checkpoint-15"
    (tmp_path / "checkpoint-15" / "weights").write_text("weig")
    assert ckpt.newest(tmp_path) == tmp_path / "checkpoint-10"
    assert (tmp_path / "checkpoint-15").exists()
    (tmp_path / "checkpoint-10" / "weights").unlink()
    assert ckpt.newest(tmp_path) == tmp_path / "checkpoint-5"
    ckpt.discard_unsealed(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-5"]


def test_a_flipped_bit_in_a_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed, resumed = lora(), lora()
    fit(undisturbed, tmp_path / "undisturbed", steps=6, checkpoint_every=2)
    fit(lora(), tmp_path / "damaged", steps=6, checkpoint_every=2)
    weights = next((tmp_path / "damaged" / "checkpoints" / "checkpoint-6").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    result = fit(resumed, tmp_path / "damaged", steps=6, checkpoint_every=2)
    assert result.resumed_from == 4
    assert f"{weights} is damaged" in caplog.text
    assert same(resumed, undisturbed)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    fit(lora(), tmp_path, steps=2)
    fit(lora(), tmp_path, steps=2, log_every=7, checkpoint_every=9)  # these decide no weight
    with pytest.raises(ValueError, match=r"another training, with learning_rate 0.01 \(now 0.02\)"):
        fit(lora(), tmp_path, steps=2, learning_rate=2e-2)
    with pytest.raises(ValueError, match=r"with seed 0 \(now 1\); give another folder"):
        fit(lora(), tmp_path, steps=2, seed=1)
    with pytest.raises(ValueError, match="with data"):
        fit(lora(), tmp_path, steps=2, data=token_data(seed=1))
    with pytest.raises(ValueError, match="with trained_weights"):
        fit(full(), tmp_path, steps=2)


@pytest.mark.parametrize("damage", [None, b"", b'{"step": 1'])
def test_a_lost_log_is_that_of_the_checkpoint(damage: bytes | None, tmp_path: Path) -> None:
    fit(lora(), tmp_path, steps=2)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.unlink() if damage is None else log.write_bytes(damage)
    fit(lora(), tmp_path, steps=2)
    assert log.read_bytes() == whole


def test_where_no_checkpoint_has_it_a_lost_log_is_an_error_and_not_a_gap(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(ValueError, match=r"log\.jsonl has no line for step 2"):
        TrainingLog(log, 2, tmp_path / "checkpoints" / "checkpoint-2")


# ---- loss, optimiser, schedule -------------------------------------------------------------------


def mean_loss(model: Any, data: datasets.Dataset) -> Tensor:
    """Mean over all learned tokens, one example at a time."""
    total, count = torch.zeros(()), 0
    for row in data:
        labels = torch.tensor(row["labels"])
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != IGNORED).sum())
    return total / count


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_step_follows_the_gradient_of_the_mean_token_loss(family: str, tmp_path: Path) -> None:
    """Padding, batching and accumulation change nothing (one step of SGD shows the gradient)."""
    data = token_data(16)
    reference = FAMILIES[family].model()
    loss = mean_loss(reference, data)
    torch.autograd.backward(loss)
    for batch_size, accumulation in ((16, 1), (4, 4), (3, 6)):
        model = FAMILIES[family].model()
        model.config.attn_pdrop = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        result = fit(
            model,
            tmp_path / f"{batch_size}",
            data=data,
            steps=1,
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            optimizer="sgd",
            learning_rate=1.0,
            warmup_ratio=0,
            max_grad_norm=1e9,
            schedule="constant",
        )
        assert result.final_loss == pytest.approx(loss.item(), abs=1e-6)
        for trained, weight in zip(model.parameters(), reference.parameters(), strict=True):
            assert weight.grad is not None
            torch.testing.assert_close(weight - trained, weight.grad, atol=1e-6, rtol=1e-5)


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    big, small = (FAMILIES["llama"].model() for _ in range(2))
    fit(big, tmp_path / "big", batch_size=8, optimizer="sgd")
    fit(small, tmp_path / "small", batch_size=2, gradient_accumulation=4, optimizer="sgd")
    for one, other in zip(log(tmp_path / "big"), log(tmp_path / "small"), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    for first, second in zip(big.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_weight_decay_is_decoupled_and_spares_vectors(tmp_path: Path) -> None:
    """One step of AdamW with and without decay differs by learning rate x decay x weight."""
    start, plain, decayed = (FAMILIES["gpt2"].model() for _ in range(3))
    for model in (plain, decayed):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    same_way: dict[str, Any] = {"steps": 1, "warmup_ratio": 0, "schedule": "constant"}
    fit(plain, tmp_path / "plain", **same_way)
    fit(decayed, tmp_path / "decayed", weight_decay=0.5, **same_way)
    trained = zip(start.parameters(), plain.parameters(), decayed.parameters(), strict=True)
    for weight, without, with_decay in trained:
        expected = 1e-2 * 0.5 * weight if weight.ndim == 2 else torch.zeros_like(weight)
        torch.testing.assert_close(without - with_decay, expected, atol=1e-6, rtol=1e-4)


def test_weight_decay_reaches_every_matrix_of_an_adapter() -> None:
    model = lora()
    decayed = set(ExactTrainer.get_decay_parameter_names(cast("ExactTrainer", None), model))
    assert {n for n, w in model.named_parameters() if w.requires_grad} <= decayed


def test_gradients_are_clipped(tmp_path: Path) -> None:
    start, model = FAMILIES["llama"].model(), FAMILIES["llama"].model()
    fit(model, tmp_path, steps=1, optimizer="sgd", learning_rate=1.0, max_grad_norm=0.1,
        warmup_ratio=0)  # fmt: skip
    moved = [(a - b).norm() for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.1, rel=1e-4)
    assert log(tmp_path)[0]["grad_norm"] > 1.0  # the log shows it before clipping


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [0.0, 0.5, 1.0, 0.9330, 0.75, 0.5, 0.25, 0.0670]),
    ],
)
def test_schedules(schedule: str, expected: list[float], tmp_path: Path) -> None:
    fit(lora(), tmp_path, steps=8, schedule=schedule, learning_rate=1.0, warmup_ratio=0.25,
        max_grad_norm=1e-6)  # fmt: skip
    rates = [line["learning_rate"] for line in log(tmp_path)]
    assert rates == pytest.approx(expected, abs=1e-4)


def test_a_training_of_one_step_is_made_at_the_full_rate(tmp_path: Path) -> None:
    """Its warm-up, rounded up, would be all of it, at a rate of 0."""
    model = lora()
    fit(model, tmp_path, steps=1, warmup_ratio=0.03)
    assert log(tmp_path)[0]["learning_rate"] == 1e-2
    assert not same(model, lora())


def test_epochs_become_steps(tmp_path: Path) -> None:
    result = fit(lora(), tmp_path, steps=None, epochs=1.5, batch_size=8, gradient_accumulation=2)
    assert result.steps == 6  # 50 examples: 7 batches, 4 steps an epoch


def test_only_the_seed_decides_what_is_random(tmp_path: Path) -> None:
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        model = lora()
        torch.manual_seed(100 + number)
        fit(model, tmp_path / str(number), seed=seed)
        losses.append([line["loss"] for line in log(tmp_path / str(number))])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_the_order_changes_with_the_epoch_and_neighbouring_seeds_share_none(tmp_path: Path) -> None:
    orders = {}
    for seed in (0, 1):
        seen: list[int] = []

        class Watched(TokenRows):
            def __getitem__(self, index: int) -> dict[str, Tensor]:
                seen.append(index)  # noqa: B023
                return super().__getitem__(index)

        rows = Watched(DATA)
        fit(lora(), tmp_path / str(seed), data=rows, seed=seed, steps=4, batch_size=25)
        orders[seed] = [seen[:50], seen[50:100]]
    epochs = [*orders[0], *orders[1]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_frozen_weights_stay(tmp_path: Path) -> None:
    start, model = lora(), lora()
    fit(model, tmp_path)
    frozen = [n for n, w in model.named_parameters() if not w.requires_grad]
    before, after = weights(start), weights(model)
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)


# ---- precision, memory, state of the model -------------------------------------------------------


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    for kind, build in MODELS.items():
        plain, checkpointed = build(), build()
        fit(plain, tmp_path / kind / "plain")
        fit(checkpointed, tmp_path / kind / "checkpointed", gradient_checkpointing=True)
        assert log(tmp_path / kind / "plain") == log(tmp_path / kind / "checkpointed")
        assert same(plain, checkpointed)
        moved = [w for name, w in checkpointed.named_parameters() if "lora_B" in name]
        assert all(weight.any() for weight in moved)
        assert bool(moved) == (kind != "full")
        assert not any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_is_close_to_float32(kind: str, tmp_path: Path) -> None:
    exact, rough = MODELS[kind](), MODELS[kind]()
    fit(exact, tmp_path / "float32")
    fit(rough, tmp_path / "bf16", precision="bf16")
    first, second = (log(tmp_path / name)[0]["loss"] for name in ("float32", "bf16"))
    assert first != second
    assert first == pytest.approx(second, rel=0.02)
    assert {weight.dtype for weight in rough.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_model_is_given_back_as_it_was(precision: str, tmp_path: Path) -> None:
    model = full()
    forward, use_cache = model.forward, model.config.use_cache
    fit(model.eval(), tmp_path, steps=1, precision=precision, gradient_checkpointing=True)
    assert not model.training
    assert model.forward == forward
    assert model.config.use_cache == use_cache
    with torch.inference_mode():
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)


# ---- log and output ------------------------------------------------------------------------------


def test_log_lines(tmp_path: Path) -> None:
    result = fit(lora(), tmp_path, steps=10, log_every=4, checkpoint_every=5)
    lines = log(tmp_path, without="")
    assert [line["step"] for line in lines] == [1, 4, 5, 8, 10]  # and at every checkpoint
    assert all(
        list(line) == ["step", "loss", "learning_rate", "grad_norm", "tokens", "seconds"]
        for line in lines
    )
    last = lines[-1]
    assert result == TrainingResult(10, last["seconds"], last["loss"], int(last["tokens"]))
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_the_loss_of_a_line_is_the_mean_since_the_line_before(tmp_path: Path) -> None:
    fit(lora(), tmp_path / "each", steps=6)
    fit(lora(), tmp_path / "some", steps=6, log_every=3)
    each = [line["loss"] for line in log(tmp_path / "each")]
    some = [line["loss"] for line in log(tmp_path / "some")]
    assert some == pytest.approx([each[0], sum(each[1:3]) / 2, sum(each[3:]) / 3], abs=1e-6)


def test_tokens_leave_padding_out(tmp_path: Path) -> None:
    result = fit(lora(), tmp_path, steps=None, epochs=1)
    assert result.tokens == sum(map(len, DATA["input_ids"]))


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for kind, build in MODELS.items():
        model = build()
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fit(model, tmp_path / kind)
            fit(model, tmp_path / kind)
        printed = capfd.readouterr()
        assert printed.out + printed.err == ""


# ---- mistakes ------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    def poison(step: int, steps: int) -> None:
        if step == 3:
            torch.nn.init.constant_(model.model.norm.weight, torch.nan)

    model = full()
    with pytest.raises(ValueError, match=r"loss became nan at step 4, learning rate 0\.01; lower"):
        train(
            model,
            TOKENIZER,
            DATA,
            settings(schedule="constant", log_every=10),
            tmp_path,
            on_step=poison,
        )
    assert [line["step"] for line in log(tmp_path)] == [1]
    assert os.listdir(tmp_path / "checkpoints") == []


def test_no_checkpoint_holds_weights_that_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient became nan at step 2, learning rate 1e\+30"):
        fit(full(), tmp_path, optimizer="sgd", learning_rate=1e30, warmup_ratio=0,
            max_grad_norm=1e30, schedule="constant", log_every=10, checkpoint_every=2)  # fmt: skip
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("kind", MODELS)
def test_what_breaks_in_the_last_step_is_no_result(kind: str, value: float, tmp_path: Path) -> None:
    def poison(step: int, steps: int) -> None:
        if step == steps:
            next(w for w in model.parameters() if w.requires_grad).data[-1] = value

    model = MODELS[kind]()
    with pytest.raises(ValueError, match=rf"weights became {value} at step 6, learning rate .*low"):
        train(model, TOKENIZER, DATA, settings(checkpoint_every=4), tmp_path, on_step=poison)
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint-4"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_training_that_no_gradient_reaches_is_no_result(kind: str, tmp_path: Path) -> None:
    def cut(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden.detach() + 0 * hidden
        return output

    model = MODELS[kind]()
    model.get_decoder().register_forward_hook(cut)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    with pytest.raises(ValueError, match="no gradient reached any trained weight in 6 steps"):
        fit(model, tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("method", REPRESENTATIVES)
def test_what_is_saved_on_the_way_changes_nothing(method: str, tmp_path: Path) -> None:
    def write(step: int, steps: int) -> None:
        save(busy, tmp_path / "native")
        export(busy, tmp_path / "adapter")

    quiet, busy = attached("llama", method), attached("llama", method)
    needed = [weight.requires_grad for weight in busy.parameters()]
    fit(quiet, tmp_path / "quiet", steps=4)
    often = settings(steps=4, checkpoint_every=1)
    train(busy, TOKENIZER, DATA, often, tmp_path / "busy", on_step=write)
    assert log(tmp_path / "busy") == log(tmp_path / "quiet")
    assert same(busy, quiet)
    assert [weight.requires_grad for weight in busy.parameters()] == needed


@pytest.mark.parametrize("kind", ["lora", "anchored"])
def test_training_goes_on_from_an_exported_adapter_at_its_loss(kind: str, tmp_path: Path) -> None:
    done = MODELS[kind]()
    fit(done, tmp_path / "first", steps=12)
    exported = export(done, tmp_path / "adapter").folder
    again = load(FAMILIES["llama"].model(), exported, trainable=True)
    assert list(again.peft_config) == ["default"]
    fit(done, tmp_path / "same", steps=3)
    fit(again, tmp_path / "again", steps=3)
    before, after, went_on = (log(tmp_path / n) for n in ("first", "again", "same"))
    assert after[0]["loss"] == pytest.approx(went_on[0]["loss"], abs=1e-5)
    assert after[0]["loss"] < before[0]["loss"] - 0.1


def test_clear_errors_before_the_first_step(tmp_path: Path) -> None:
    frozen = FAMILIES["llama"].model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weight .* asks for gradients; attach an adapter"):
        fit(frozen, tmp_path)
    long = datasets.Dataset.from_dict({"input_ids": [[5] * 200], "labels": [[5] * 200]})
    with pytest.raises(
        ValueError, match=r"has 200 tokens, .* 128 positions; set max_length to 128"
    ):
        fit(lora(), tmp_path, data=long)
    foreign = datasets.Dataset.from_dict({"input_ids": [[5, VOCAB]], "labels": [[5, 5]]})
    with pytest.raises(ValueError, match=f"token {VOCAB}, but the model knows {VOCAB} tokens"):
        fit(lora(), tmp_path, data=foreign)


def test_sixteen_bit_weights_are_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="lose small updates; load the model with dtype 'float32'"):
        fit(full().bfloat16(), tmp_path, steps=1)


# ---- data in, and our data in other trainers -----------------------------------------------------


def tiny_speaker() -> LlamaForCausalLM:
    """A tiny model that has as many tokens as the byte tokenizer."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(byte_tokenizer()),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=192,
        )
    )


def test_examples_are_tokenised_on_the_way(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    losses = []
    for name, data in {
        "examples": examples(*PAIRS),
        "tokens": tokenize(examples(*PAIRS), tokenizer),
    }.items():
        result = train(
            tiny_speaker(), tokenizer, data, settings(batch_size=2, steps=3), tmp_path / name
        )
        losses.append(result.final_loss)
    assert losses[0] == losses[1]


def test_the_answers_are_learned_by_heart(tmp_path: Path) -> None:
    tokenizer, model = byte_tokenizer(), tiny_speaker()
    train(model, tokenizer, examples(*PAIRS), settings(batch_size=2, steps=60), tmp_path)
    prompt = tokenizer(PAIRS[0]["prompt"], return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(answer[0]) == PAIRS[0]["prompt"] + PAIRS[0]["completion"] + "</s>"


def test_a_model_learns_to_stop_where_padding_is_the_end_of_text(tmp_path: Path) -> None:
    tokenizer, model = byte_tokenizer(), tiny_speaker()
    tokenizer.pad_token = tokenizer.eos_token
    pairs = [{"prompt": f"{n}:", "completion": "ab"[n % 2] * (1 + n % 3)} for n in range(20)]
    rows = TokenRows(tokenize(examples(*pairs), tokenizer))
    batch = rows.join([rows[n] for n in range(20)])
    learned = [labels[labels != IGNORED] for labels in batch["labels"]]
    assert [labels[-1].item() for labels in learned] == [tokenizer.eos_token_id] * 20
    train(model, tokenizer, examples(*pairs), settings(steps=50, batch_size=20), tmp_path)
    for pair in pairs:
        prompt = tokenizer(pair["prompt"], return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        assert answer[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["pairs", "conversations"])
def test_an_example_without_a_token_to_learn_is_named_and_spoils_nothing(
    kind: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    rows: list[Any] = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(9)]
    rows.insert(4, {"prompt": "x" * 200, "completion": "y"})
    if kind == "conversations":
        roles = {"prompt": "user", "completion": "assistant"}
        rows = [
            {"messages": [{"role": roles[key], "content": text} for key, text in row.items()]}
            for row in rows
        ]
    with pytest.warns(UserWarning, match=r"1 of 10 examples .* are left out: test, row 5$"):
        ten = tokenize(examples(*rows), tokenizer, max_length=64)
    nine = tokenize(examples(*rows[:4], *rows[5:]), tokenizer, max_length=64)
    trained = {}
    for name, data in {"ten": ten, "nine": nine}.items():
        trained[name] = tiny_speaker()
        train(trained[name], tokenizer, data, settings(steps=8, batch_size=3), tmp_path / name)
    assert log(tmp_path / "ten") == log(tmp_path / "nine")
    assert same(trained["ten"], trained["nine"])
    assert all(weight.isfinite().all() for weight in trained["ten"].parameters())


def test_batches_are_padded_to_their_longest_row() -> None:
    rows = TokenRows(DATA.select([3, 0, 7]))
    batch = Padding()([rows[0], rows[1], rows[2]])
    lengths = [len(DATA[index]["input_ids"]) for index in (3, 0, 7)]
    assert batch["input_ids"].shape == (3, max(lengths)) == (3, rows.longest)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"][0, : lengths[0]].tolist() == DATA[3]["input_ids"]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_trl_takes_our_records_and_an_attached_model(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    pairs = load_examples("pocket:problems", limit=8)
    trainer = SFTTrainer(
        model=attach(tiny_speaker(), "pissa", rank=4, alpha=4),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            max_length=192,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=pairs.dataset(),
        processing_class=byte_tokenizer(),
    )
    losses = [step["loss"] for step in _train_and_log(trainer) if "loss" in step]
    assert losses[1] < losses[0]
    for ours, theirs in zip(
        tokenize(pairs, byte_tokenizer(), max_length=192), trainer.train_dataset, strict=True
    ):
        assert theirs["input_ids"] == ours["input_ids"]
        learned = theirs.get("labels") or [  # older ones make labels of a mask in their batches
            word if answers else -100
            for word, answers in zip(theirs["input_ids"], theirs["completion_mask"], strict=True)
        ]
        assert learned == ours["labels"]


def _train_and_log(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    history: list[dict[str, float]] = trainer.state.log_history
    return history
