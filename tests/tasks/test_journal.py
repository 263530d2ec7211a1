"""Measuring that several processes share: what one alone would find, and each batch once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Barrier, Lock
from typing import Any, TypeVar

import pytest

from forgetless.core.errors import UserError
from forgetless.core.files import read_jsonl
from forgetless.core.processes import Processes
from forgetless.tasks.journal import in_batches, resuming, sharing

T = TypeVar("T")

TEXTS = list("abcdefghijk")
BATCHES = [[9, 10], [0, 4, 8], [1, 5], [2, 3, 6, 7]]


@dataclass(frozen=True)
class Threads(Processes):
    """Threads that exchange what processes would send each other."""

    barrier: Barrier = field(default_factory=lambda: Barrier(1))
    said: dict[int, Any] = field(default_factory=dict)

    def gather(self, value: T) -> list[T]:
        self.said[self.index] = value
        self.barrier.wait(60)
        found = [self.said[index] for index in range(self.count)]
        self.barrier.wait(60)
        return found

    def first(self, work: Callable[[], T]) -> T:
        found: Any = self.gather(work() if self.is_first else None)[0]
        return found  # type: ignore[no-any-return]


def together(count: int, work: Callable[[Processes], T]) -> list[T]:
    """What each of so many threads gets by the same work."""
    barrier, said = Barrier(count), dict[int, Any]()
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [Threads(i, count, barrier, said) for i in range(count)]))


@dataclass
class Model:
    """Gives the place in the alphabet of each text, and knows which batches it was asked."""

    asked: list[list[int]] = field(default_factory=list)
    lock: Any = field(default_factory=Lock)
    fails_at: int | None = None

    def places(self, batch: Sequence[int]) -> list[int]:
        if self.fails_at in batch:
            raise UserError("it diverged")
        with self.lock:
            self.asked.append(list(batch))
        return [ord(TEXTS[place]) - ord("a") for place in batch]


def measure(model: Model, processes: Processes, *, divisible: bool = False) -> list[int]:
    with sharing(processes):
        return in_batches("places", TEXTS, BATCHES, model.places, divisible=divisible)


@pytest.mark.parametrize("divisible", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_process_learns_what_one_alone_finds(count: int, divisible: bool) -> None:
    model = Model()
    found = together(count, partial(measure, model, divisible=divisible))
    assert found == [list(range(len(TEXTS)))] * count
    assert sorted(place for batch in model.asked for place in batch) == list(range(len(TEXTS)))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_batches_are_whole_unless_they_may_be_divided(count: int) -> None:
    model = Model()
    together(count, partial(measure, model))
    assert sorted(model.asked) == sorted(BATCHES)


def test_the_last_batches_are_divided_where_they_do_not_go_round() -> None:
    model = Model()
    together(3, partial(measure, model, divisible=True))
    assert sorted(model.asked) == [[0, 4, 8], [1, 5], [2, 3], [6, 7], [9, 10]]


def test_outside_of_the_block_each_process_is_alone() -> None:
    model = Model()

    def work(processes: Processes) -> list[int]:
        measure(model, processes)
        return in_batches("places", TEXTS, BATCHES, model.places)

    together(2, work)
    assert len(model.asked) == 3 * len(BATCHES)


def test_where_one_fails_all_fail() -> None:
    def work(processes: Processes) -> str:
        with pytest.raises(UserError) as problem:
            measure(Model(fails_at=4), processes)  # in the batch of the second process
        return str(problem.value)

    assert together(2, work) == ["another process failed; its message says why", "it diverged"]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_what_was_interrupted_is_resumed_by_any_number_of_processes(
    tmp_path: Path, before: int, after: int
) -> None:
    path = tmp_path / "partial.jsonl"

    def work(model: Model, processes: Processes) -> list[int]:
        with sharing(processes), resuming(path, "key"):
            return in_batches("places", TEXTS, BATCHES, model.places)

    def until_it_fails(processes: Processes) -> None:
        with pytest.raises(UserError):
            work(Model(fails_at=1), processes)

    together(before, until_it_fails)
    assert len(read_jsonl(path)) == 1 + 2  # the key, and the batches before that which fails
    model = Model()
    assert together(after, partial(work, model)) == [list(range(len(TEXTS)))] * after
    assert sorted(model.asked) == [[1, 5], [2, 3, 6, 7]]
    assert len(read_jsonl(path)) == 1 + len(BATCHES)
