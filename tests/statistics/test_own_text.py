"""A base writes as much of its own text as its statistics need, and no more."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from forgetless.core.linalg import eigen_tail
from forgetless.data.settings import CalibrationSettings
from forgetless.data.texts import padded, self_text
from forgetless.models.load import load_model, load_tokenizer
from forgetless.models.targets import target_layers
from forgetless.statistics import own_text
from forgetless.statistics.collection import collect
from forgetless.statistics.collector import mirror_lower_triangle
from forgetless.statistics.own_text import LEAK, settled_text

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")

ASKED = CalibrationSettings(max_length=16)
LAYERS = ["down_proj", "o_proj"]
SEED = 0


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model("pocket")


@pytest.fixture(scope="module")
def texts(model: PreTrainedModel) -> list[list[int]]:
    """What the base writes until its statistics have settled."""
    return settled_text(model, load_tokenizer("pocket"), LAYERS, ASKED, SEED)


@pytest.fixture(scope="module")
def more(model: PreTrainedModel, texts: list[list[int]]) -> list[list[int]]:
    """Four times as much, written without looking at it."""
    return self_text(model, load_tokenizer("pocket"), 4 * len(texts), ASKED.max_length, SEED)


def leak(model: PreTrainedModel, texts: list[list[int]], fresh: list[list[int]]) -> float:
    """Mean over layers of ‖X N‖, of each over the root of its energy."""
    found: list[float] = []
    chosen, held = (collect(model, padded(rows, 32), LAYERS) for rows in (texts, fresh))
    for name in chosen:
        N = eigen_tail(chosen[name].second_moment, own_text.RANK).vectors
        C = held[name].second_moment
        found.append(float((N * (C @ N)).sum() / C.trace()) ** 0.5)
    return sum(found) / len(found)


def test_four_times_the_text_would_leak_hardly_less(
    model: PreTrainedModel, texts: list[list[int]], more: list[list[int]]
) -> None:
    assert own_text.FIRST < len(texts) < own_text.MOST
    fresh = self_text(model, load_tokenizer("pocket"), 512, ASKED.max_length, SEED + 10)
    few, enough, whole = (leak(model, rows, fresh) for rows in (texts[:32], texts, more))
    # It is enough on average: of four texts of the pocket base the largest was 1.005 of this.
    assert enough <= 1.03 * LEAK * whole
    assert few > 1.2 * LEAK * whole  # which one round would not have been


def test_the_text_is_the_beginning_of_what_the_base_says(
    model: PreTrainedModel,
    texts: list[list[int]],
    more: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_text, "LEAK", 1.3)  # after a round or two
    few, again = (
        settled_text(model, load_tokenizer("pocket"), LAYERS, ASKED, SEED) for _ in range(2)
    )
    assert few == again
    assert len(few) < len(texts)
    for said in (few, texts):
        same = sum(a == b for a, b in zip(said, more, strict=False))
        assert same >= 0.95 * len(said)


def test_what_is_summed_while_the_base_writes_is_what_it_reads_of_the_whole(
    model: PreTrainedModel,
) -> None:
    layers = own_text.spread(target_layers(model, "all-linear"), most=2)
    halves = own_text._Halves.of(model, layers, 1)
    said: list[list[int]] = []
    for count in (30, 7):
        with halves.listening():
            args = count, 40, 0, len(said)
            said += self_text(model, load_tokenizer("pocket"), *args, before=halves.before)
    assert len({len(row) for row in said}) > 3
    for half in (0, 1):
        found = collect(model, padded([row[:-1] for row in said[half::2]], 8), skip_first=1)
        for name in halves.layers:
            total = halves.sums[half, name] / halves.tokens[half, name]
            mirror_lower_triangle(total)
            assert halves.tokens[half, name] == found[name].tokens
            assert torch.allclose(total, found[name].second_moment, rtol=1e-3, atol=1e-5)
