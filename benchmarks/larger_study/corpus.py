"""Plain text and facts of a data folder, as the tokens of a pre-training and the files of a study.

A text file (.txt or .txt.xz) holds documents with `<|doc|>` between them, or one long document. Of
each, every fiftieth piece is held out of the pre-training and used to measure. A file of facts
(.jsonl or .jsonl.xz) has rows with a `prompt` and its `answer`; all of them are trained.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from forgetless.core.errors import UserError
from forgetless.core.files import write_jsonl
from forgetless.data.texts import spread

SEPARATOR = "<|doc|>"
PIECE = 16_000
"""Characters of a piece into which a longer document is cut."""
PASSAGE = 1_600
"""Characters of a passage that is measured or calibrated on."""
FACT = 50
"""Characters of a fact, about."""
HELD_EVERY = 50
_TOKENIZED_TOGETHER = 1_000

Fact = tuple[str, str]
"""A prompt and its answer."""


@dataclass(frozen=True)
class Corpus:
    """What the base is made of, and what it is measured on.

    Attributes:
        trained: source -> pieces of the pre-training.
        held: source -> pieces that it never sees.
        facts: all are trained.
    """

    trained: Mapping[str, Sequence[str]]
    held: Mapping[str, Sequence[str]]
    facts: Sequence[Fact]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is trained."""
        digest = hashlib.sha256()
        for text in chain(*self.trained.values(), *self.facts):
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()


def read_corpus(
    texts: Sequence[Path], facts: Path, *, characters: int | None = None, fact_limit: int
) -> Corpus:
    """Read the files.

    Args:
        texts: text files; the name up to its first dot is the source's.
        facts: the file of facts.
        characters: of each text, from its beginning; None for all.
        fact_limit: the first so many facts. A prompt that has two answers is left out.

    Raises:
        UserError: a file is missing, too short to hold anything out, or holds no fact.
    """
    pieces = {_name(path): _pieces(_read(path, characters)) for path in texts}
    for path, found in zip(texts, pieces.values(), strict=True):
        if len(found) <= HELD_EVERY:
            raise UserError(
                f"{path} makes {len(found)} pieces of text, and every {HELD_EVERY}th is held out: "
                "give a longer text"
            )
    held = {name: found[HELD_EVERY - 1 :: HELD_EVERY] for name, found in pieces.items()}
    trained = {
        name: [piece for i, piece in enumerate(found) if (i + 1) % HELD_EVERY]
        for name, found in pieces.items()
    }
    return Corpus(trained, held, _read_facts(facts, fact_limit))


def _name(path: Path) -> str:
    return path.name.partition(".")[0]


def _open(path: Path) -> IO[str]:
    if not path.is_file():
        raise UserError(f"no such file: {path}; the larger study needs texts and facts, see --help")
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open("r")


def _read(path: Path, characters: int | None) -> str:
    with _open(path) as file:
        return file.read(-1 if characters is None else characters)


def _pieces(text: str) -> list[str]:
    documents = (document.strip() for document in text.split(SEPARATOR))
    return [piece for document in documents for piece in _cut(document, PIECE)]


def _cut(text: str, length: int) -> Iterator[str]:
    """The text in parts of about `length` characters that end where a line or a word does."""
    start = 0
    while start < len(text):
        stop = min(start + length, len(text))
        if stop < len(text):
            ends = (text.rfind(mark, start + length // 2, stop) for mark in ("\n", " "))
            stop = next((end for end in ends if end > 0), stop)
        if part := text[start:stop].strip():
            yield part
        start = stop


def _read_facts(path: Path, limit: int) -> list[Fact]:
    answers: dict[str, set[str]] = {}
    with _open(path) as file:
        for line in file:
            row = json.loads(line)
            if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
                answers.setdefault(row["prompt"], set()).add(row["answer"])
                if len(answers) > limit:
                    break
    found = [(prompt, min(known)) for prompt, known in answers.items() if len(known) == 1]
    if not found:
        raise UserError(f"{path} holds no row with a 'prompt' and an 'answer'")
    return found[:limit]


# ---------------------------------------------------------------------------------- tokens


def sample(corpus: Corpus, characters: int) -> Iterator[str]:
    """About so many characters of the trained text, evenly spread, and all facts."""
    every = [piece for pieces in corpus.trained.values() for piece in pieces]
    yield from spread(every, max(1, characters // PIECE))
    yield from (f"{prompt} {answer}" for prompt, answer in corpus.facts)


class Tokens:
    """The tokens of the pre-training, and its batches, each a function of the seed and the step.

    Attributes:
        text: all documents end to end, each `<bos> text <eos>`.
        facts: likewise, one fact after the other.
        starts: where each fact begins, and where the last one ends.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.text, self.facts, self.starts = arrays["text"], arrays["facts"], arrays["starts"]

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Tokens:
        """Tokenise a corpus."""
        texts = _encoded(chain.from_iterable(corpus.trained.values()), tokenizer)
        facts = list(_encoded((f"{prompt} {answer}" for prompt, answer in corpus.facts), tokenizer))
        starts = np.cumsum([0, *map(len, facts)])
        arrays = {"text": np.concatenate(list(texts)), "facts": np.concatenate(facts)}
        return cls({**arrays, "starts": starts.astype(np.int64)})

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        unfinished = path.with_name(f".{path.name}")
        arrays = {"text": self.text, "facts": self.facts, "starts": self.starts}
        save_file(arrays, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """What `save` wrote."""
        return cls(load_file(path))

    def batch(self, rows: int, length: int, fact_share: float, seed: int, step: int) -> Any:
        """Token ids (rows, length), int64: windows of text, and rows of facts in random order."""
        draw = np.random.default_rng((seed, step))
        of_facts = round(rows * fact_share)
        starts = draw.integers(0, len(self.text) - length, rows - of_facts)
        windows = [self.text[start : start + length] for start in starts]
        facts = self._drawn_facts(of_facts * length, draw).reshape(of_facts, length)
        return np.concatenate([np.stack(windows), facts]).astype(np.int64)

    def _drawn_facts(self, tokens: int, draw: np.random.Generator) -> Any:
        """So many tokens of facts, which are drawn anew each time."""
        parts: list[Any] = [np.empty(0, self.facts.dtype)]
        left = tokens
        while left > 0:
            fact = int(draw.integers(len(self.starts) - 1))
            parts.append(self.facts[self.starts[fact] : self.starts[fact + 1]][:left])
            left -= len(parts[-1])
        return np.concatenate(parts)


def _encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[Any]:
    """`<bos> text <eos>` of each text, int32."""
    waiting: list[str] = []
    for text in chain(texts, [None]):
        if text is not None:
            waiting.append(text)
        if waiting and (text is None or len(waiting) == _TOKENIZED_TOGETHER):
            for ids in tokenizer(waiting, verbose=False)["input_ids"]:
                yield np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)
            waiting = []


# ---------------------------------------------------------------------------------- files


def write_files(corpus: Corpus, folder: Path, *, passages: int, questions: int) -> None:
    """Write what the study reads.

    held_<source>.jsonl   passages of the text that was held out
    held.jsonl            the same of all sources, mixed
    calibration.jsonl     as many passages that were trained, and about as much text of facts
    facts.jsonl           facts as questions

    Args:
        corpus: where they are from.
        folder: where to.
        passages: of each source.
        questions: how many facts are asked.
    """
    held = {name: _passages(pieces, passages) for name, pieces in corpus.held.items()}
    for name, found in held.items():
        write_jsonl(folder / f"held_{name}.jsonl", [{"text": text} for text in found])
    mixed = [text for group in zip(*held.values(), strict=False) for text in group]
    write_jsonl(folder / "held.jsonl", [{"text": text} for text in mixed])
    trained = [text for pieces in corpus.trained.values() for text in _passages(pieces, passages)]
    facts = spread(corpus.facts, len(trained) * PASSAGE // FACT)
    kept = [*trained, *(f"{prompt} {answer}" for prompt, answer in facts)]
    write_jsonl(folder / "calibration.jsonl", [{"text": text} for text in kept])
    asked = [{"prompt": p, "answer": a} for p, a in spread(corpus.facts, questions)]
    write_jsonl(folder / "facts.jsonl", asked)


def _passages(pieces: Sequence[str], count: int) -> list[str]:
    """So many passages, evenly spread over the pieces."""
    return spread([part for piece in pieces for part in _cut(piece, PASSAGE)], count)
