"""Bad inputs by the thousand: whole files of every kind that are read, each damaged by a seed.

    python -m tests.fuzzing [--cases 1000] [--seed 0] [--kinds recipe data ...]

Every case is one command on one damaged file. A case is wrong where the command ends otherwise than
well or with a line that says what to mend: a traceback, an error of a library, more than five
seconds, more than a gigabyte.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

SECONDS, GIGABYTES = 5.0, 1.0

Damage = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        said: the end of its output.
        code: its exit code; -1 where it raised.
    """

    kind: str
    seed: int
    code: int
    said: str
    seconds: float
    gigabytes: float

    @property
    def fault(self) -> str | None:
        """What is wrong with it, if anything is."""
        if self.code == -1 or "Traceback" in self.said:
            return "traceback"
        if "--debug shows where" in self.said or self.code not in (0, 1, 2):
            return "raw error"
        if self.seconds > SECONDS:
            return "hang"
        if self.gigabytes > GIGABYTES:
            return "memory"
        return None


# ---- damage --------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, "", " ", "x", "x" * 5000, "\x00", "\ud800", "é", "../..", "/dev/null", "/dev/zero",
    "~", ".", "*" * 300, "(a+)+$", "%s{0}{{x}}", "\x1b[31m", "=cmd()",
    -1, 0, 1, 2, 1.5, -0.0, 1e308, 1e-308, 2**31, 2**63, 10**30, float("inf"), float("-inf"),
    float("nan"),
    True, False, [], {}, [None], [[]], [1, 2], {"a": 1}, {"": None}, ["x"] * 50,
    {"kind": "kl"}, {"path": "/nowhere"}, [{"kind": 3}],
]  # fmt: skip


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, cut out, doubled, or put in from elsewhere."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(found) + 1)
        length = min(draw.choice([1, 1, 2, 8, 64]), len(found) - place)
        match draw.randrange(5):
            case 0 if length:
                found[place] = draw.randrange(256)
            case 1:
                del found[place : place + length]
            case 2:
                found[place:place] = found[place : place + length] * draw.choice([1, 2, 50])
            case 3:
                found[place:place] = draw.choice(
                    [b"\x00", b"\xff\xfe", b"{", b"]", b'"', b"\n", b"&a *a", b"1e999"]
                )
            case _:
                found = found[:place] if draw.random() < 0.3 else found
    return bytes(found)


def mutated_value(draw: random.Random, value: Any) -> Any:
    """A tree of lists and mappings with one leaf, branch or key replaced by something odd."""
    paths = list(_paths(value))
    path = draw.choice(paths)
    copied = json.loads(json.dumps(value))
    if not path:
        return draw.choice(ODD)
    parent = copied
    for step in path[:-1]:
        parent = parent[step]
    match draw.randrange(6):
        case 0 if isinstance(parent, dict):
            parent[draw.choice(["", "x", 3, "training.steps", "a b"])] = parent.pop(path[-1])
        case 1:
            del parent[path[-1]]
        case 2 if len(paths) > 2:
            parent[path[-1]] = json.loads(json.dumps(_at(value, draw.choice(paths))))
        case _:
            parent[path[-1]] = draw.choice(ODD)
    return copied


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, part in pairs:
        yield from _paths(part, (*path, key))


def _at(value: Any, path: Sequence[Any]) -> Any:
    for step in path:
        value = value[step]
    return value


def mutated_yaml(draw: random.Random, content: bytes) -> bytes:
    """YAML with a value, a key or some bytes changed."""
    if draw.random() < 0.3:
        return mutated_bytes(draw, content)
    value = mutated_value(draw, yaml.safe_load(content))
    text = yaml.safe_dump(value, allow_unicode=False, sort_keys=False)
    return text.encode("utf-8", "surrogatepass")


def mutated_json(draw: random.Random, content: bytes) -> bytes:
    """JSON with a value, a key or some bytes changed."""
    if draw.random() < 0.3:
        return mutated_bytes(draw, content)
    value = mutated_value(draw, json.loads(content))
    return json.dumps(value, ensure_ascii=draw.random() < 0.7).encode("utf-8", "surrogatepass")


def mutated_jsonl(draw: random.Random, content: bytes) -> bytes:
    """Rows with one of them changed."""
    rows = content.split(b"\n")
    place = draw.randrange(max(1, len(rows) - 1))
    rows[place] = mutated_json(draw, rows[place])
    return b"\n".join(rows)


def mutated_safetensors(draw: random.Random, content: bytes) -> bytes:
    """Tensors with a damaged header, other numbers, or cut off."""
    length = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + length], content[8 + length :]
    match draw.randrange(4):
        case 0:
            header = mutated_json(draw, header)
            return len(header).to_bytes(8, "little") + header + tensors
        case 1:
            return content[: draw.randrange(len(content))]
        case 2:
            return (
                content[:8]
                + header
                + tensors[: len(tensors) // 2]
                + b"\xff" * 64
                + tensors[len(tensors) // 2 + 64 :]
            )
        case _:
            return mutated_bytes(draw, content)


# ---- commands ------------------------------------------------------------------------------------


def say(arguments: Sequence[str], kind: str, seed: int, patience: float = 30) -> Outcome:
    """Run a command in this process."""
    from forgetless.cli.process import main

    def late(*_: object) -> None:
        raise TimeoutError("the command took too long")

    output = io.StringIO()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, code = time.perf_counter(), -1
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, patience)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        output.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    took = time.perf_counter() - started
    return Outcome(kind, seed, code, output.getvalue()[-3000:], took, grown)


class Inputs:
    """Whole files of every kind, and for each kind the command that reads a damaged one."""

    def __init__(self, folder: Path) -> None:
        from tests.tiny import recipe_of, save_base, save_files

        self.folder = folder
        self.base, files = save_base(folder / "base"), save_files(folder / "files")
        self.recipe = recipe_of(self.base, files)
        self.files = files
        self._write("recipe.yaml", self.recipe)
        arms = [{"name": "a", "adapter.method": "lora"}, {"adapter.method": "pissa"}]
        study = {"name": "s", "recipe": self.recipe, "axes": {"seed": [0, 1]}, "arms": arms}
        self._write("study.yaml", study)
        shared = {**self.recipe, "tasks": {"forgetting": self.recipe["tasks"]["forgetting"][:1]}}
        shared["data"] = {"max_length": 32}
        tasks = [{"name": n, "data": str(files / "train.jsonl"),
                  "measure": {"kind": "perplexity", "name": n, "path": str(files / "test.jsonl")}}
                 for n in ("one", "two")]  # fmt: skip
        self._write("sequence.yaml", {"name": "q", "recipe": shared, "tasks": tasks, "seeds": [0]})
        chat = [{"messages": [{"role": "user", "content": "Hi"},
                              {"role": "assistant", "content": "Ho"}]}] * 3  # fmt: skip
        (files / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
        (files / "table.csv").write_text("question,answer\nWhat?,That\nWho?,Me\n")
        (files / "list.json").write_text(json.dumps([{"text": "a b c"}, {"text": "d e f"}]))
        self._ran()

    def _ran(self) -> None:
        """An adapter, statistics and scores, made once."""
        base, old = str(self.base), str(self.files / "old.txt")
        for arguments in (
            [
                "stats",
                base,
                "--calibration",
                old,
                "--samples",
                "4",
                "--out",
                f"{self.folder}/stats",
            ],
            [
                "init",
                base,
                "--method",
                "lora",
                "--rank",
                "2",
                "--alpha",
                "2",
                "--out",
                f"{self.folder}/adapter",
            ],
            ["eval", base, "--tasks", f"perplexity:{old}", "--out", f"{self.folder}/scores.json"],
        ):
            done = say(arguments, "set up", 0, patience=300)
            assert done.code == 0, done.said
        weights = self.folder / "adapter" / "adapter_model.safetensors"
        save_file({k: t + 0.1 for k, t in load_file(weights).items()}, weights, {"format": "pt"})

    def _write(self, name: str, content: Any) -> None:
        (self.folder / name).write_text(yaml.safe_dump(content, sort_keys=False))

    def case(self, kind: str, seed: int) -> Outcome:
        """One command on one file that was damaged by this seed."""
        draw = random.Random(f"{kind} {seed}")
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            return say(getattr(self, f"_{kind}")(draw, Path(name)), kind, seed)

    def _damaged(self, draw: random.Random, file: Path, damage: Damage, out: Path) -> str:
        target = out / file.name
        target.write_bytes(damage(draw, file.read_bytes()))
        return str(target)

    def _recipe(self, draw: random.Random, out: Path) -> list[str]:
        file = self._damaged(draw, self.folder / "recipe.yaml", mutated_yaml, out)
        return ["run", file, "--check"]

    def _study(self, draw: random.Random, out: Path) -> list[str]:
        file = self._damaged(draw, self.folder / "study.yaml", mutated_yaml, out)
        return ["study", file, "--check"]

    def _sequence(self, draw: random.Random, out: Path) -> list[str]:
        file = self._damaged(draw, self.folder / "sequence.yaml", mutated_yaml, out)
        return ["sequence", file, "--check"]

    def _data(self, draw: random.Random, out: Path) -> list[str]:
        kinds: list[tuple[str, Damage]] = [
            ("train.jsonl", mutated_jsonl),
            ("chat.jsonl", mutated_jsonl),
            ("list.json", mutated_json),
            ("table.csv", mutated_bytes),
            ("old.txt", mutated_bytes),
        ]
        name, damage = draw.choice(kinds)
        return ["data", str(self.base), self._damaged(draw, self.files / name, damage, out)]

    def _base(self, draw: random.Random, out: Path) -> list[str]:
        folder = out / "base"
        shutil.copytree(self.base, folder)
        file = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        damage = mutated_safetensors if file.suffix == ".safetensors" else mutated_json
        file.write_bytes(damage(draw, file.read_bytes()))
        if draw.random() < 0.5:
            return ["data", str(folder), str(self.files / "train.jsonl")]
        tasks = f"perplexity:{self.files / 'test.jsonl'}"
        return [
            "eval",
            str(folder),
            "--tasks",
            tasks,
            "--limit",
            "2",
            "--cache",
            str(out / "cache"),
        ]

    def _adapter(self, draw: random.Random, out: Path) -> list[str]:
        folder = out / "adapter"
        shutil.copytree(self.folder / "adapter", folder)
        file = draw.choice(
            sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
        )
        damage = mutated_safetensors if file.suffix == ".safetensors" else mutated_json
        file.write_bytes(damage(draw, file.read_bytes()))
        return ["spectra", str(folder), "--base", str(self.base)]

    def _stats(self, draw: random.Random, out: Path) -> list[str]:
        folder = out / "stats"
        shutil.copytree(self.folder / "stats", folder)
        file = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        damage = mutated_safetensors if file.suffix == ".safetensors" else mutated_json
        file.write_bytes(damage(draw, file.read_bytes()))
        return [
            "init",
            str(self.base),
            "--stats",
            str(folder),
            "--rank",
            "2",
            "--out",
            str(out / "new"),
        ]

    def _scores(self, draw: random.Random, out: Path) -> list[str]:
        name = draw.choice(["scores.json", "scores.records.json"])
        for other in ("scores.json", "scores.records.json"):
            shutil.copy(self.folder / other, out)
        self._damaged(draw, self.folder / name, mutated_json, out)
        return ["compare", str(self.folder / "scores.json"), str(out / "scores.json")]


KINDS = ("recipe", "study", "sequence", "data", "base", "adapter", "stats", "scores")


def main() -> None:
    """Run cases, say what is wrong, and exit with 1 if anything is."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--cases", type=int, default=1000)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    given = asked.parse_args()
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        inputs = Inputs(Path(name))
        for number in range(given.cases):
            kind = given.kinds[number % len(given.kinds)]
            outcome = inputs.case(kind, given.seed + number)
            if outcome.fault:
                faults[outcome.fault] += 1
                cost = f"{outcome.seconds:.1f} s, {outcome.gigabytes:.1f} GiB"
                print(f"{outcome.fault}: {kind} {outcome.seed} ({cost})\n{outcome.said[-600:]}\n")
    print(f"{given.cases} cases, {sum(faults.values())} wrong: {dict(faults)}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
