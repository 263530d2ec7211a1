"""Writes the pages of docs/ that follow from the code: docs/methods.md.

python docs/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

from forgetless.method_table import as_markdown

DOCS = Path(__file__).parent
TIMES = DOCS / "results" / "start.json"
"""What `benchmarks/start.py --full` writes; the column of times is empty without it."""


def seconds() -> dict[str, float]:
    """Method -> seconds of its start, where they were measured."""
    if not TIMES.is_file():
        return {}
    rows = json.loads(TIMES.read_text(encoding="utf-8"))["rows"]
    return {row["method"]: row["block s"] for row in rows if row["method"]}


def main() -> None:
    """Write the page."""
    page = DOCS / "methods.md"
    page.write_text(as_markdown(seconds()), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
