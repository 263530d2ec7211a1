"""Every verb that writes is killed at random moments and given again, until it ends.

    python -m tests.killing --kills 150
    python -m tests.killing --pairs 100       # instead: each is given two times at once

What it leaves is then what an undisturbed one leaves: the same files with the same content, but for
times and for who did it. Nothing that was unfinished is left over.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tests.tiny import recipe_of, save_base, save_files

TIMES = ("train_seconds",)

# What a run imports is imported once, in the process that the others are forked from.
FORKSERVER = multiprocessing.get_context("forkserver")
PRELOAD = [
    *("forgetless.cli.app", "forgetless.studies.study", "forgetless.training.loop"),
    *("forgetless.studies.search", "forgetless.reports", "optuna.storages._rdb.storage"),
    *("optuna.storages._rdb.models", "sqlalchemy.orm", "sqlalchemy.dialects.postgresql.psycopg"),
    *("sqlalchemy.dialects.mysql", "sqlalchemy.dialects.sqlite", "alembic.command"),
    *("alembic.config", "alembic.migration", "alembic.script", "psycopg", "scipy.stats"),
]
FORKSERVER.set_forkserver_preload(PRELOAD)


def draws() -> random.Random:
    """For random moments: others each day, or those of the seed FORGETLESS_KILL_SEED."""
    seed = os.environ.get("FORGETLESS_KILL_SEED") or str(date.today().toordinal())
    print(f"again: FORGETLESS_KILL_SEED={seed}")  # pytest shows it where a test fails
    return random.Random(seed)


def killed_until_done(work: Callable[..., object], *arguments: Any, most: int = 3) -> int:
    """Do some work in a process that is killed at random moments, until it ends; how often."""
    draw = draws()
    for kills in range(most + 1):
        process = FORKSERVER.Process(target=work, args=arguments)
        process.start()
        # At first too soon to have ended, so that there is one kill at least.
        process.join(draw.uniform(0.3, 1.0 + kills) if kills < most else None)
        if not process.is_alive():
            assert process.exitcode == 0
            return kills
        process.kill()
        process.join()
    raise AssertionError("the last one is waited for")


_TOUCHES = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"})


def killed_when_touching(
    folder: Path, counts: Path, moment: int | None, work: Callable[..., object], *arguments: Any
) -> None:
    """Do some work, and be killed just before it touches a folder for the `moment`-th time.

    Args:
        folder: whose files and folders are opened, made, renamed or removed.
        counts: the file that is told how often that was, if the work comes to its end.
        moment: counted from 1; None for not at all.
        work: what is done.
        arguments: of it.
    """
    touched, place = 0, str(folder)

    def count(event: str, details: tuple[object, ...]) -> None:
        nonlocal touched
        if event in _TOUCHES and details and str(details[0]).startswith(place):
            touched += 1
            if touched == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work(*arguments)
    counts.write_text(str(touched))


def in_a_process(work: Callable[..., object], *arguments: Any) -> int | None:
    """Do some work in a process of its own; its exit code, negative for a signal."""
    process = FORKSERVER.Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def study_of(base: Path, files: Path, steps: int = 6) -> dict[str, Any]:
    """Four short runs: full fine-tuning, a plain LoRA, and two that share statistics."""
    recipe = recipe_of(base, files, **{"training.steps": steps, "adapter.dropout": 0.1})
    methods = ["full", "lora", "lora_null_v1", "lora_null_v2"]
    return {"name": "killed", "recipe": recipe, "axes": {"adapter.method": methods}}


def results(study_folder: Path) -> list[dict[str, str]]:
    """The rows of results.csv without what depends on the clock."""
    with (study_folder / "report" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


# ---- every verb ----------------------------------------------------------------------------------

CLOCK = re.compile(
    r"seconds|started|finished|since|hardware|versions|_at$|per_second|resumed_from|xxh3"
    r"|^log.jsonl$"
)
"""Keys of JSON whose values say when, how long, where, and after which interruption."""


@dataclass(frozen=True)
class Verb:
    """A command that writes.

    Attributes:
        words: what is typed; OUT stands for where it writes, IN for the inputs.
        ends: what of OUT is there when it is done; then it may refuse to do it again.
        into: a folder of IN that it adds to, in a copy that lies in OUT.
    """

    words: str
    ends: str = ""
    into: str = ""


VERBS = {
    "run": Verb("run IN/recipe.yaml --out OUT"),
    "train": Verb("train IN/recipe.yaml --out OUT"),
    "aftercare": Verb("run IN/aftercare.yaml --out OUT"),
    "study": Verb("study IN/study.yaml --out OUT"),
    "study, two workers": Verb("study IN/study.yaml --out OUT --workers 2"),
    "sequence": Verb("sequence IN/sequence.yaml --out OUT"),
    "report": Verb("report OUT/done", into="done"),
    "stats": Verb("stats IN/base --calibration IN/files/old.txt --samples 8 --out OUT/stats"),
    "init": Verb("init IN/base --method pissa --rank 2 --alpha 2 --out OUT/start", "start"),
    "eval": Verb(
        "eval IN/base --adapter IN/adapter --tasks perplexity:IN/files/test.jsonl"
        ",kl:IN/files/old.txt --cache OUT/cache --out OUT/scores.json",
    ),
    "export": Verb("export IN/adapter --out OUT/plain", "plain"),
    "merge": Verb("merge IN/adapter --out OUT/merged", "merged"),
    "repair": Verb(
        "repair IN/adapter --keep IN/files/old.txt --task IN/files/train.jsonl --out OUT/repaired",
        "repaired",
    ),
    "dial": Verb(
        "dial IN/adapter --keep IN/files/old.txt --task IN/files/train.jsonl --out OUT/dialled",
        "dialled",
    ),
    "spectra": Verb("spectra IN/adapter --out OUT/spectra.json"),
    "plan": Verb("plan IN/base --data IN/files/train.jsonl --out OUT/plan.yaml", "plan.yaml"),
}
"""Every verb that writes, and some of them with more to do."""


def say(words: Sequence[str]) -> None:
    """A command in this process, which is forked for it; what it prints is kept for a failure."""
    from forgetless.cli import main

    log = open(words[-1], "w")  # noqa: SIM115 - until the process ends
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    main(list(words[:-1]))


def write_inputs(folder: Path) -> None:
    """The files that the verbs read, an adapter and a finished study among them."""
    base, files = save_base(folder / "base"), save_files(folder / "files")
    recipe = recipe_of(base, files, **{"adapter.dropout": 0.1})
    after = recipe_of(
        base,
        files,
        **{
            "repair": {"strength": [0.1, 1.0]},
            "dial": {"scales": [0.5]},
            "spectra": True,
        },
    )
    arms = [{"adapter.method": "lora"}, {"adapter.method": "lora_null_v1"}]
    study = {"name": "arms", "recipe": recipe, "axes": {"seed": [0, 1]}, "arms": arms}
    shared = {**recipe, "tasks": {"forgetting": recipe["tasks"]["forgetting"][:1]}}
    shared["data"] = {"max_length": 32}
    measured = {"kind": "perplexity", "path": str(files / "test.jsonl")}
    tasks = [
        {"name": name, "data": str(files / "train.jsonl"), "measure": {**measured, "name": name}}
        for name in ("one", "two")
    ]
    sequence = {"name": "tasks", "recipe": shared, "tasks": tasks, "seeds": [0]}
    contents = {"recipe": recipe, "aftercare": after, "study": study, "sequence": sequence}
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(json.dumps(content))


def left(folder: Path) -> dict[str, Any]:
    """Every file below a folder with its content, but for locks, pages and what the clock says."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix not in (".lock", ".journal") and path.parent.name != "workers":
            try:
                found[str(path.relative_to(folder))] = content(path)
            except (ValueError, csv.Error):
                found[str(path.relative_to(folder))] = "damaged"
    return found


def content(path: Path) -> Any:
    """What a file holds, but for what the clock says and for checksums of that."""
    match path.suffix:
        case ".json":
            return without_clock(json.loads(path.read_text()))
        case ".jsonl":
            return [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
        case ".csv":
            with path.open(newline="") as file:
                return without_clock(list(csv.DictReader(file)))
        case ".html" | ".md" | ".png" | ".svg" | ".parquet":
            return "there"
        case _:
            return hashlib.sha256(path.read_bytes()).hexdigest()


def without_clock(value: Any) -> Any:
    """JSON without the entries that say when, how long and where."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not CLOCK.search(str(k))}
    return [without_clock(each) for each in value] if isinstance(value, list) else value


def prepare(verb: Verb, inputs: Path, out: Path) -> None:
    """An empty folder to write to, but for what is added to."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if verb.into:
        shutil.copytree(inputs / verb.into, out / verb.into)


def started(verb: Verb, inputs: Path, out: Path, number: int = 0) -> Any:
    """The process that does a command."""
    words = [w.replace("IN", str(inputs)).replace("OUT", str(out)) for w in verb.words.split()]
    process = FORKSERVER.Process(target=say, args=([*words, str(inputs / f"said{number}.txt")],))
    process.start()
    return process


def said(inputs: Path, number: int = 0) -> str:
    """The end of what a command printed."""
    return (inputs / f"said{number}.txt").read_text()[-2000:]


def do(verb: Verb, inputs: Path, out: Path, seconds: float | None) -> int | None:
    """Give a command; None where it was killed after so many seconds, else its exit code."""
    process = started(verb, inputs, out)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    code: int = process.exitcode
    return code


def killed(verb: Verb, inputs: Path, out: Path, seconds: float, draw: random.Random, n: int) -> int:
    """Kill a command up to `n` times before it ends at last; how often that was.

    Raises:
        AssertionError: it did not end well after that.
    """
    for kills in range(n + 1):
        code = do(verb, inputs, out, draw.uniform(0.05, 1.0) * seconds if kills < n else None)
        if code is None:
            continue
        is_done = bool(verb.ends) and (out / verb.ends).exists()
        assert code == 0 or (is_done and kills), said(inputs)
        return kills
    raise AssertionError("the last one is waited for")


def twice(verb: Verb, inputs: Path, out: Path) -> None:
    """Give a command two times at once.

    Raises:
        AssertionError: neither ended well, or one fails with more than a refusal of what is there.
    """
    both = [started(verb, inputs, out, number) for number in range(2)]
    for process in both:
        process.join()
    codes = [process.exitcode for process in both]
    assert 0 in codes, (codes, said(inputs, 0), said(inputs, 1))
    for number, code in enumerate(codes):
        assert code == 0 or (code == 2 and verb.ends), (code, said(inputs, number))


def differences(whole: Any, found: Any, place: str = "") -> list[str]:
    """The files that are missing, more, or of other content, and where in them."""
    if isinstance(whole, dict) and isinstance(found, dict):
        pairs = [(key, whole.get(key), found.get(key)) for key in sorted({*whole, *found})]
    elif isinstance(whole, list) and isinstance(found, list) and len(whole) == len(found):
        pairs = list(zip(map(str, range(len(whole))), whole, found, strict=True))
    else:
        return [] if whole == found else [place]
    return [line for key, a, b in pairs for line in differences(a, b, f"{place} {key}".strip())]


def main() -> None:
    """Kill all verbs in turn until there were kills enough, and count what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=0, help="instead: two at once, so many times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", nargs="*", default=list(VERBS), choices=VERBS)
    options = parser.parse_args()
    draw, counts, wrong = random.Random(options.seed), dict.fromkeys(options.verbs, 0), 0
    with tempfile.TemporaryDirectory(prefix="forgetless-killing-") as name:
        inputs, out = Path(name) / "in", Path(name) / "out"
        write_inputs(inputs)
        prepare(VERBS["study"], inputs, out)
        assert do(VERBS["study"], inputs, out, None) == 0, said(inputs)
        (out / "arms").rename(inputs / "done")
        shutil.copytree(next((inputs / "done").glob("lora-*")) / "native", inputs / "adapter")
        wholes = {}
        for verb in options.verbs:
            prepare(VERBS[verb], inputs, out)
            started = time.perf_counter()
            code = do(VERBS[verb], inputs, out, None)
            assert code == 0, (verb, code, said(inputs))
            wholes[verb] = left(out), time.perf_counter() - started
            print(f"{verb}: undisturbed in {wholes[verb][1]:.1f} s", flush=True)
        while sum(counts.values()) < (options.pairs or options.kills):
            for verb in options.verbs:
                prepare(VERBS[verb], inputs, out)
                whole, seconds = wholes[verb]
                if options.pairs:
                    twice(VERBS[verb], inputs, out)
                    n = 1
                else:
                    n = killed(VERBS[verb], inputs, out, seconds, draw, draw.randint(1, 4))
                counts[verb] += n
                if unlike := differences(whole, left(out)):
                    wrong += 1
                    print(f"{verb}, {n}: {', '.join(unlike[:8])}", flush=True)
            print(f"{sum(counts.values())} done, {wrong} with other results", flush=True)
    print(json.dumps({"pairs" if options.pairs else "kills": counts, "wrong": wrong}))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
