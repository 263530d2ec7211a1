"""Text that a base writes for its statistics: how long it takes, and what more of it would change.

    python benchmarks/own_text.py [--base SMOLLM2] [--ranks 16,32,64] [--blocks 8] [--times 4]
        [--threads 2] [--json]

`write` is the text with the default number of sequences, `collect` the statistics of all linear
layers on it. Then `--times` as much text, of which it is the beginning, and `--fresh` sequences of
another seed: `leak` is the mean over the inputs of some blocks, and at worst, of ‖X N‖ on the fresh
text, where N are the weakest directions of the default text, over the same of the longer one.
Prints a table and writes benchmarks/results/own_text.json; with --json prints the row alone.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from forgetless.core.linalg import eigen_tail
from forgetless.data.settings import CalibrationSettings
from forgetless.data.texts import padded, self_text
from forgetless.models.load import load_model, load_tokenizer
from forgetless.models.targets import target_layers
from forgetless.statistics.collection import collect
from forgetless.statistics.moments import Statistics
from forgetless.statistics.own_text import settled_text, spread
from timing import report

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """What came of it, and seconds of the processor and of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    found = work()
    return found, time.process_time() - processor, time.perf_counter() - clock


def leaks(chosen: Statistics, fresh: Statistics, rank: int) -> list[float]:
    """‖X N‖ on the fresh text of every input, N chosen on the other."""
    found = []
    for name in (group[0] for group in chosen.shared_inputs):
        N = eigen_tail(chosen[name].second_moment, rank).vectors
        found.append(float((N * (fresh[name].second_moment @ N)).sum()) ** 0.5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--ranks", default="16,32,64")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--fresh", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the row as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of few tokens
    model, tokenizer = load_model(options.base), load_tokenizer(options.base)
    settings = CalibrationSettings()
    length, targets = settings.max_length, "all-linear"
    said, *writing = timed(lambda: settled_text(model, tokenizer, targets, settings))
    _, *collecting = timed(lambda: collect(model, padded(said, settings.batch_size)))
    row: dict[str, Any] = {"sequences": len(said), "tokens": sum(map(len, said))}
    row |= {"write s": writing[1], "collect s": collecting[1], "both s": writing[1] + collecting[1]}
    row |= {"write, processor s": writing[0], "collect, processor s": collecting[0]}

    layers = list(spread(target_layers(model, targets), options.blocks))

    def moments(sequences: Sequence[Sequence[int]]) -> Statistics:
        return collect(model, padded(sequences, settings.batch_size), layers)

    more = self_text(model, tokenizer, (options.times - 1) * len(said), length, 0, len(said))
    fresh = moments(self_text(model, tokenizer, options.fresh, length, 1))
    few = moments(said)
    whole = few + moments(more)
    for rank in map(int, options.ranks.split(",")):
        pairs = zip(leaks(few, fresh, rank), leaks(whole, fresh, rank), strict=True)
        ratios = [one / other for one, other in pairs]
        row |= {f"leak, rank {rank}": sum(ratios) / len(ratios), f"worst {rank}": max(ratios)}
    if options.json:
        print(json.dumps(row))
    else:
        asked = {"base": options.base, "times": options.times, "blocks": options.blocks}
        report("own_text", "Text of the base for its statistics", asked, [row])


if __name__ == "__main__":
    main()
