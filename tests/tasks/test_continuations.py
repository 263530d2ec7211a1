"""Continuations that share their beginning: the scores that each has alone, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import BloomConfig, GPTNeoConfig, MambaConfig, MistralConfig, PreTrainedModel

from forgetless.tasks import continuations
from forgetless.tasks.continuations import continuation_logps
from tests.composites import COMPOSITE, SPECIAL, TEXT, VOCAB, built
from tests.families import FAMILIES

QUESTION = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
ROWS = [
    [*QUESTION, 20, 21],
    [*QUESTION, 20, 22, 23],
    [*QUESTION, 24],
    [*QUESTION, 25],
    [5, 6, 7, 30, 31],
    [40, 41],
    [*QUESTION, 20, 21],
]
COUNTS = [2, 3, 1, 1, 2, 1, 1]

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **SPECIAL}


def _neo() -> PreTrainedModel:
    layers = [[["global", "local"], 1]]
    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
        attention_types=layers, max_position_embeddings=128, **SPECIAL
    )  # fmt: skip
    return built(config)


def _narrow() -> PreTrainedModel:
    return built(MistralConfig(**{**TEXT, "sliding_window": 6}))


SHARING: dict[str, Callable[[], nn.Module]] = {
    "llama": FAMILIES["llama"].model,
    "qwen2": FAMILIES["qwen2"].model,
    "gpt2": FAMILIES["gpt2"].model,
    "mistral": lambda: built(MistralConfig(**{**TEXT, "sliding_window": 64})),
}
READ_ROW_BY_ROW: dict[str, Callable[[], nn.Module]] = {
    "a window that is too narrow": _narrow,
    "windows of some layers": lambda: built(COMPOSITE["gemma3"]()),
    "local attention": _neo,
    "recurrent": lambda: built(MambaConfig(**SMALL, state_size=8)),
    "places from the mask": lambda: built(
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    ),
}


def alone(model: nn.Module, row: list[int], count: int) -> tuple[float, bool]:
    """By the definition, from the whole forward of one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row[:-1]])).logits[0, -(len(row) - 1) :]
    logps, said = logits.double().log_softmax(-1)[-count:], torch.tensor(row[-count:])
    each = logps.gather(1, said[:, None])
    return float(each.sum()), bool((logps.argmax(-1) == said).all())


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a beginning was read for several rows, in each pass over all of `ROWS`."""
    seen: list[bool] = []
    own = continuations._scores

    def noted(model: Any, trees: Any, *more: Any) -> Any:
        if sum(len(tree.paths) for tree in trees) == len(ROWS):
            seen.append(any(tree.forks for tree in trees))
        return own(model, trees, *more)

    monkeypatch.setattr(continuations, "_scores", noted)
    return seen


@pytest.mark.parametrize("base", [*SHARING, *READ_ROW_BY_ROW])
def test_each_has_the_score_that_it_has_alone(base: str, shared: list[bool]) -> None:
    model = (SHARING | READ_ROW_BY_ROW)[base]()
    found = continuation_logps(model, ROWS, COUNTS)
    for (value, greedy), row, count in zip(found, ROWS, COUNTS, strict=True):
        expected = alone(model, row, count)
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    assert shared[-1] == (base in SHARING)
    assert found[0][0] != pytest.approx(found[1][0], abs=1e-2)


@pytest.mark.parametrize("base", ["local attention", "a window that is too narrow"])
@pytest.mark.parametrize("tokens", [1 << 10, 64])
def test_it_is_tried_on_rows_that_share_whatever_else_is_read(
    base: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of which the config says nothing, and a row as long as no other's, in their batch
    and in one before.
    """
    monkeypatch.setattr(continuations, "_WINDOWS", ())
    monkeypatch.setattr("forgetless.tasks.logits._TOKENS", {"cpu": tokens, "gpu": tokens})
    same_as_alone(READ_ROW_BY_ROW[base](), [[*range(20, 80)], *ROWS], [3, *COUNTS])


@pytest.mark.parametrize("windows", [("sliding_window",), ()])
def test_a_row_that_shares_nothing_is_read_in_its_window_too(
    windows: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch of trees that fit into the window."""
    monkeypatch.setattr(continuations, "_WINDOWS", windows)
    model = built(MistralConfig(**{**TEXT, "sliding_window": 20}))
    same_as_alone(model, [*ROWS, [*range(20, 80)]], [*COUNTS, 3])


def same_as_alone(model: nn.Module, rows: list[list[int]], counts: list[int]) -> None:
    found = continuation_logps(model, rows, counts)
    for (value, _), row, count in zip(found, rows, counts, strict=True):
        assert value == pytest.approx(alone(model, row, count)[0], abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_and_attention_of_every_kind(
    attention: str, dtype: torch.dtype, shared: list[bool]
) -> None:
    model: Any = FAMILIES["llama"].model(dtype)
    model.set_attn_implementation(attention)
    found = continuation_logps(model, ROWS, COUNTS, dtype=torch.float32)
    near = 1e-4 if dtype == torch.float32 else 0.1
    for (value, _), row, count in zip(found, ROWS, COUNTS, strict=True):
        assert value == pytest.approx(alone(model, row, count)[0], abs=near)
    assert shared == [True]


def test_the_greedy_continuation_is_known() -> None:
    model: Any = FAMILIES["llama"].model()
    row = list(QUESTION)
    for _ in range(3):
        with torch.no_grad():
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    other = [*row[:-1], (row[-1] + 1) % VOCAB]
    found = continuation_logps(model, [row, other, [*QUESTION, *row[-3:]]], [3, 3, 1])
    assert [greedy for _, greedy in found] == [True, False, True]


def test_an_adapter_reads_as_its_model_does(shared: list[bool]) -> None:
    model = get_peft_model(FAMILIES["llama"].model(), LoraConfig(target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    model.eval()
    found = continuation_logps(model, ROWS, COUNTS)
    assert found[1][0] == pytest.approx(alone(model, ROWS[1], 3)[0], abs=1e-4)
    assert shared == [True]
    tuning = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    prompted = get_peft_model(FAMILIES["llama"].model(), tuning).eval()
    found = continuation_logps(prompted, ROWS, COUNTS)
    assert found[1][0] == pytest.approx(alone(prompted, ROWS[1], 3)[0], abs=1e-4)


def test_a_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = FAMILIES["llama"].model()
    read: list[int] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, given: read.append(given[0].shape[:2].numel())
    )
    rows = [[start, *QUESTION, end, 50] for start in range(20, 40) for end in range(60, 70)]
    monkeypatch.setattr("forgetless.tasks.logits._TOKENS", {"cpu": 120, "gpu": 120})
    one = continuation_logps(model, rows, [2] * len(rows))
    tokens = len({tuple(row[: i + 1]) for row in rows for i in range(len(row) - 1)})
    tried = len(rows[0]) - 1
    assert sum(read) == tokens + tried
    assert max(read) <= 120
    few = continuation_logps(model, rows, [2] * len(rows), batch_size=1)
    assert [value for value, _ in few] == pytest.approx([value for value, _ in one], abs=1e-4)
