"""Replay: the shares of several sources are exact in every epoch, and a resumed training keeps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from forgetless.core.errors import UserError
from forgetless.data.batches import TokenRows
from forgetless.data.mixture import Mixture
from forgetless.training.loop import train
from tests.training.test_loop import TOKENIZER, fit, lora, same, settings


def source(token: int, rows: int) -> TokenRows:
    """Rows that begin with the token of the source and then tell their own number."""
    ids = [[token, 10 + row % 80, 3 + row // 80] for row in range(rows)]
    return TokenRows(Dataset.from_dict({"input_ids": ids, "labels": ids}))


def mixture(seed: int = 0) -> Mixture:
    return Mixture([source(1, 90), source(2, 7), source(3, 50)], [0.9, 0.09, 0.01], seed)


def epoch(rows: Mixture, number: int) -> list[tuple[int, ...]]:
    rows.set_epoch(number)
    return [tuple(rows[index]["input_ids"].tolist()) for index in range(len(rows))]


def test_shares_are_exact_in_every_epoch() -> None:
    rows = mixture()
    for number in range(3):
        counts = Counter(row[0] for row in epoch(rows, number))
        assert counts == {1: 90, 2: 9, 3: 1}


def test_every_row_of_the_first_source_is_in_every_epoch_once() -> None:
    rows = mixture()
    for number in range(3):
        assert len({row for row in epoch(rows, number) if row[0] == 1}) == 90


def test_no_row_comes_again_before_all_others_have_come() -> None:
    rows = mixture()
    walk = [row for number in range(7) for row in epoch(rows, number) if row[0] == 2]
    assert Counter(walk) == dict.fromkeys(set(walk), 9)
    assert len(set(walk[:7])) == 7
    assert walk[:7] != walk[7:14]


def test_the_seed_decides_the_walk() -> None:
    first, again, other = (epoch(mixture(seed), 2) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert mixture(0).fingerprint == mixture(0).fingerprint != mixture(1).fingerprint


def test_of_a_buffer_the_same_rows_come_every_time() -> None:
    def buffered(seed: int, buffer: int | None) -> Mixture:
        return Mixture([source(1, 60), source(3, 50)], [60, 6], seed, [None, buffer])

    seen = [row for number in range(5) for row in epoch(buffered(0, 6), number) if row[0] == 3]
    assert Counter(seen) == dict.fromkeys(set(seen), 5)
    assert len(set(seen)) == 6
    others = {row for row in epoch(buffered(1, 6), 0) if row[0] == 3}
    assert others != set(seen)
    assert buffered(0, 6).fingerprint != buffered(0, None).fingerprint
    plain = Mixture([source(1, 60), source(3, 50)], [60, 6], 0)
    assert buffered(0, None).fingerprint == plain.fingerprint == buffered(0, 90).fingerprint
    assert epoch(buffered(0, 90), 3) == epoch(plain, 3)


def test_shares_are_positive() -> None:
    with pytest.raises(UserError, match="must be positive"):
        Mixture([source(1, 90), source(2, 7), source(3, 50)], [1.0, 0.0, 1.0], 0)


@pytest.mark.parametrize(("rows", "share"), [(2, 1 / 9), (90, 0.001)])
def test_a_source_has_a_row_in_every_epoch_however_few_there_are(rows: int, share: float) -> None:
    with pytest.warns(UserWarning, match=f"source 3 .* has one row in an epoch of {rows}, which"):
        mixture = Mixture([source(1, rows), source(2, 7), source(3, 4)], [1.0, 1.0, share], 0)
    drawn = [row for number in range(4) for row in epoch(mixture, number) if row[0] == 3]
    assert len(set(drawn)) == len(drawn) == 4


class Seen(Mixture):
    """A mixture that remembers which rows were asked for."""

    def __init__(self, *args: Any) -> None:
        self.seen: list[tuple[int, ...]] = []
        super().__init__(*args)

    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        self.seen.append(tuple(row["input_ids"].tolist()))
        return row


def small() -> Seen:
    return Seen([source(1, 8), source(2, 30)], [0.5, 0.5], 0)


def test_training_reads_a_new_part_of_the_replay_in_every_epoch(tmp_path: Path) -> None:
    rows = small()
    fit(lora(), tmp_path, data=rows, steps=12)
    for start in range(0, 48, 16):
        assert Counter(row[0] for row in rows.seen[start : start + 16]) == {1: 8, 2: 8}
    assert len({row for row in rows.seen if row[0] == 2}) == 24


def test_padding_beside_packed_rows_is_not_counted(tmp_path: Path) -> None:
    ids = [[1] * 12, [2] * 9]
    packed = {"input_ids": ids, "labels": ids, "lengths": [[7, 5], [4, 5]]}
    plain = [[3] * length for length in (3, 10, 4, 6)]
    parts = [packed, {"input_ids": plain, "labels": plain}]
    rows = Mixture([TokenRows(Dataset.from_dict(part)) for part in parts], [1.0, 2.0], seed=0)
    result = fit(lora(), tmp_path, data=rows, steps=None, epochs=2, batch_size=3)
    assert result.tokens == 2 * (12 + 9 + 3 + 10 + 4 + 6)


def test_a_stopped_training_continues_with_the_same_rows(tmp_path: Path) -> None:
    undisturbed, stopped = lora(), lora()
    whole, first, rest = small(), small(), small()
    fit(undisturbed, tmp_path / "a", data=whole, steps=12)
    with pytest.raises(KeyboardInterrupt):
        fit_until(7, stopped, tmp_path / "b", first)
    resumed = lora()
    torch.manual_seed(99)
    assert fit(resumed, tmp_path / "b", data=rest, steps=12, checkpoint_every=3).resumed_from == 6
    assert rest.seen[-24:] == whole.seen[-24:]
    assert same(resumed, undisturbed)


def fit_until(step: int, model: Any, folder: Path, rows: Mixture) -> None:
    def stop(done: int, _: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    plan = settings(steps=12, checkpoint_every=3)
    train(model, TOKENIZER, rows, plan, folder, on_step=stop)
