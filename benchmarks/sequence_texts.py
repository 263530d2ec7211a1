"""The files of recipes/sequence-texts*.yaml: four sets of sentences, and what a base is to keep.

    python benchmarks/sequence_texts.py --data DATA --out DIR

DATA has text_classification/ with the folders agnews, amazon, dbpedia and yelp of O-LoRA's data,
JSON lists of rows with `label` and `sentence`, and wikitext2/ with valid.txt and test.txt. Of each
set 2,000 rows for training and 500 others for testing are drawn, always the same; DBpedia's from
its test rows and Yelp's from its training rows, since the other files are missing there. Texts are
cut at 240 characters. For a model that writes its answers every row is there as an instruction with
all classes to choose from, too (-asked.jsonl). What is to be kept are paragraphs of WikiText-2
(known.jsonl); what asks for it are others (held.jsonl), and pairs of two halves of these
(pairs.jsonl), each of which is to find the other.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from forgetless.core.files import write_jsonl

SETS = {
    "agnews": ("train", "test"),
    "amazon": ("train", "test"),
    "dbpedia": ("test", "test"),
    "yelp": ("train", "train"),
}
"""Name -> the files for training and for testing; the same file is divided."""

TRAIN, TEST, PAIRS, KNOWN, HELD = 2000, 500, 300, 500, 50
LENGTH = 240
"""Characters of a text."""


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, (train, test) in SETS.items():
        folder = given.data / "text_classification" / name
        rows = {part: json.loads((folder / f"{part}.json").read_text()) for part in (train, test)}
        for part in rows.values():
            random.Random(0).shuffle(part)
        asked = rows[test][TRAIN if test == train else 0 :][:TEST]
        for part, drawn in (("train", rows[train][:TRAIN]), ("test", asked)):
            short = [{**row, "sentence": row["sentence"][:LENGTH]} for row in drawn]
            write_jsonl(given.out / f"{name}-{part}.jsonl", short)
            options = ", ".join(json.loads((folder / "labels.json").read_text()))
            asked_of = f"Which of these is the text about: {options}?"
            if name in ("amazon", "yelp"):
                asked_of = f"What does the reviewer feel: {options}?"
            rows_asked = [
                {"prompt": f"{asked_of}\n\n{row['sentence']}", "completion": row["label"]}
                for row in short
            ]
            write_jsonl(given.out / f"{name}-{part}-asked.jsonl", rows_asked)
    for file, count in (("valid", KNOWN), ("test", PAIRS)):
        lines = (given.data / "wikitext2" / f"{file}.txt").read_text().splitlines()
        long = [line.strip() for line in lines if len(line) >= 2 * LENGTH]
        drawn = random.Random(0).sample(long, min(count, len(long)))
        if file == "valid":
            write_jsonl(given.out / "known.jsonl", [{"text": x[:LENGTH]} for x in drawn])
        else:
            write_jsonl(given.out / "held.jsonl", [{"text": x} for x in drawn[:HELD]])
            halves = [(x[:LENGTH], x[LENGTH : 2 * LENGTH]) for x in drawn]
            pairs = [{"sentence1": first, "sentence2": second} for first, second in halves]
            write_jsonl(given.out / "pairs.jsonl", pairs)


if __name__ == "__main__":
    main()
