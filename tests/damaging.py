"""Every kind of file that a command keeps is damaged, and the command given again.

    python -m tests.damaging --cases 300

What was damaged is then as it was, or the command names the file; no other run is touched.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.killing import VERBS, Verb, differences, do, left, prepare, said, write_inputs


def flipped(draw: random.Random, content: bytes) -> bytes:
    """One bit is another."""
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def miscounted(draw: random.Random, content: bytes) -> bytes:
    """One digit is another, so that what is read is a number still."""
    places = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    if not places:
        return flipped(draw, content)
    place = draw.choice(places)
    digit = draw.choice([d for d in b"123456789" if d != content[place]])
    return content[:place] + bytes([digit]) + content[place + 1 :]


def cut(draw: random.Random, content: bytes) -> bytes:
    """The end is missing."""
    return content[: draw.randrange(len(content))]


def shortened(draw: random.Random, content: bytes) -> bytes:
    """A line is missing, or some bytes where there are no lines."""
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    return b"".join(lines[:place] + lines[place + 1 :])


def blank(draw: random.Random, content: bytes) -> bytes:
    """A block is zeros, as a disk gives where it lost one."""
    place = draw.randrange(len(content))
    return content[:place] + bytes(len(content[place : place + 512])) + content[place + 512 :]


DAMAGES: list[Callable[[random.Random, bytes], bytes] | None] = [
    *(flipped, flipped, miscounted, miscounted, cut, shortened, blank),
    None,
]
"""None for a file that is gone."""


@dataclass(frozen=True)
class Kept:
    """A folder that a command reads what it kept in.

    Attributes:
        made: the command that makes it.
        again: the command that reads it; the same one if left out.
        share: of the time that the first takes until it is killed; None for not at all.
        shared: whether of a study only what its runs share is left, so that all of that is read;
            otherwise none of it is damaged, since a run that is done reads none.
    """

    made: Verb
    again: Verb | None = None
    share: float | None = None
    shared: bool = False


KEPT = {
    "study": Kept(VERBS["study"]),
    "study, half done": Kept(VERBS["study"], share=0.6),
    "run with aftercare": Kept(VERBS["aftercare"]),
    "training, half done": Kept(VERBS["train"], share=0.8),
    "what a study shares": Kept(VERBS["study"], shared=True),
    "what aftercare shares": Kept(VERBS["aftercare"], shared=True),
    "sequence": Kept(VERBS["sequence"]),
    "what a sequence shares": Kept(VERBS["sequence"], shared=True),
    "scores": Kept(
        Verb(
            "eval IN/base --tasks perplexity:IN/files/test.jsonl,kl:IN/files/old.txt "
            "--cache OUT/cache --out OUT/scores.json"
        )
    ),
    "adapter": Kept(
        Verb("init IN/base --method lora --rank 2 --alpha 2 --out OUT/start"),
        Verb("export OUT/start --out OUT/plain"),
    ),
    "statistics": Kept(
        VERBS["stats"],
        Verb("init IN/base --method lora_null_v1 --rank 2 --stats OUT/stats --out OUT/start"),
    ),
}


def damageable(kept: Kept, out: Path) -> list[Path]:
    """The files that have content and are read: no locks, and of a trained run no start."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size)
    return [
        path
        for path in files
        if not path.name.endswith((".lock", ".holder", ".journal"))
        and ("shared" in path.relative_to(out).parts) == kept.shared
        and not (path.parent.name == "start" and (path.parents[1] / "native").exists())
    ]


def remove_all_but(out: Path, name: str) -> None:
    """Leave one folder of a study alone."""
    for entry in [entry for study in out.iterdir() for entry in study.iterdir()]:
        if entry.name != name:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def kind_of(file: Path, out: Path) -> str:
    """What files of all runs have in common."""
    parts = file.relative_to(out).parts
    return "/".join([*parts[-3:-1], file.suffix if "scores" in parts[:-1] else file.name])


def meaning(file: Path, content: bytes | None) -> object:
    """What a file says: the last of 17 digits may be another one of the same number.

    Of an adapter's config without the name of its base, which people may change.
    """
    if file.suffix != ".json" or content is None:
        return content
    try:
        values = json.loads(content)
        is_config = file.name == "adapter_config.json"
        return {**values, "base_model_name_or_path": None} if is_config else values
    except (ValueError, TypeError):
        return content


def fault(
    kept: Kept, inputs: Path, out: Path, whole: dict[str, object], draw: random.Random, file: Path
) -> str | None:
    """What is wrong after one file was damaged and the command given again, if anything is."""
    damage, content = draw.choice(DAMAGES), file.read_bytes()
    damaged = None if damage is None else damage(draw, content)
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)
    code = do(kept.again or kept.made, inputs, out, None)
    name = "gone" if damage is None else damage.__name__
    if meaning(file, damaged) == meaning(file, content):
        return None
    text = (inputs / "said0.txt").read_text()
    is_named = file.name in "".join(text.split())
    if "Traceback" in text or code not in (0, 1, 2):
        return f"{name}: ended with {code}: {text[-300:]}"
    if not is_named and damaged is not None and file.exists() and file.read_bytes() == damaged:
        return f"{name}: is trusted silently"
    own = file.relative_to(out).parts[:2]
    other = [
        line
        for line in differences(whole, left(out))
        if not (is_named and Path(line.split(" ")[0]).parts[:2] == own) and "/report/" not in line
    ]
    if other and not (is_named and (code or kept.again)):
        return f"{name}: ended with {code}, and differs in {', '.join(other[:5])}: {text[-200:]}"
    return None


def main() -> None:
    """Damage a file of every kind in turn until there were cases enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", nargs="*", default=list(KEPT), choices=KEPT)
    options = parser.parse_args()
    draw, done, wrong = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="forgetless-damaging-") as name:
        inputs, out = Path(name) / "in", Path(name) / "out"
        write_inputs(inputs)
        states = {}
        for what in options.kept:
            kept, place = KEPT[what], Path(name) / "states" / what
            prepare(kept.made, inputs, out)
            assert do(kept.made, inputs, out, None) == 0, said(inputs)
            if kept.share is None:
                shutil.copytree(out, place)
            if kept.shared:
                remove_all_but(place, "shared")
            assert do(kept.again or kept.made, inputs, out, None) == 0, said(inputs)
            states[what] = place, left(out)
            if kept.share is not None:
                prepare(kept.made, inputs, out)
                began = time.perf_counter()
                do(kept.made, inputs, out, None)
                seconds = kept.share * (time.perf_counter() - began)
                code: int | None = 0
                while code is not None:  # it was faster this time
                    prepare(kept.made, inputs, out)
                    code, seconds = do(kept.made, inputs, out, seconds), 0.8 * seconds
                shutil.copytree(out, place)
            print(f"{what}: {len(damageable(kept, place))} files", flush=True)
        while done.total() < options.cases:
            for what, (place, whole) in states.items():
                shutil.rmtree(out)
                shutil.copytree(place, out)
                kinds: dict[str, list[Path]] = {}
                for file in damageable(KEPT[what], out):
                    kinds.setdefault(kind_of(file, out), []).append(file)
                fewest = min(done[f"{what}: {kind}"] for kind in kinds)
                kind = draw.choice([k for k in kinds if done[f"{what}: {k}"] == fewest])
                done[f"{what}: {kind}"] += 1
                file = draw.choice(kinds[kind])
                if found := fault(KEPT[what], inputs, out, whole, draw, file):
                    wrong += 1
                    print(f"{what}: {file.relative_to(out)}: {found}", flush=True)
    print(json.dumps({"cases": done.total(), "kinds of file": len(done), "wrong": wrong}))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
