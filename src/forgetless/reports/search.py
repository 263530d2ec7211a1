"""The page of a search: its front, how that grew, what decides it, and a slice a setting."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import forgetless
from forgetless.core.files import read_json, write_text
from forgetless.recipes.study import labels
from forgetless.reports.numbers import three_decimals
from forgetless.reports.page import inlined
from forgetless.reports.words import environment
from forgetless.studies.folder import results, write_tables


def write_search(folder: str | Path) -> Path:
    """Write the page of a search and its tables, from search.json; the path of index.html.

    Raises:
        FileNotFoundError: the search in the folder has not come to an end, or none of its trials.
    """
    folder = Path(folder)
    found = read_json(folder / "report" / "search.json")
    if not found:
        raise FileNotFoundError(f"{folder}: the search has no result yet; run it to its end")
    if not found["trials"]:
        reasons = "; ".join(found["failed"]) or "none was begun"
        raise FileNotFoundError(f"{folder}: none of its trials came to an end: {reasons}")
    write_tables(folder, results(folder), [])
    arms = list(dict.fromkeys(point["arm"] for point in found["trials"]))
    names = dict.fromkeys(name for of in found["importance"].values() for name in of)
    text = (
        environment()
        .get_template("search.html")
        .render(
            found=found,
            places={arm: place for place, arm in enumerate(arms)},
            decides={n: [of.get(n, 0) for of in found["importance"].values()] for n in names},
            settings_of=lambda point: " ".join(labels(point["chosen"])),
            score=_score,
            figures={},
            version=forgetless.__version__,
            **inlined(("page", "chart", "charts", "search"), _content(found, arms)),
        )
    )
    write_text(folder / "report" / "index.html", text)
    return folder / "report" / "index.html"


def _score(found: Mapping[str, Any]) -> tuple[str, str]:
    """A mean and the ends of its interval, in words."""
    ends = "" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
    return three_decimals(found["value"]), ends


def _content(found: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """What the scripts draw."""
    front = {point["trial"] for point in found["front"]}
    axes = [
        {"kind": kind, "title": f"{of['task']} ({of['metric']})", "higher": of["higher_is_better"]}
        for kind, of in found["objectives"].items()
    ]
    points = [
        {
            "trial": point["trial"],
            "arm": arms.index(point["arm"]),
            "front": point["trial"] in front,
            "settings": list(labels(point["chosen"])),
            **{axis["kind"]: point[axis["kind"]] for axis in axes},
        }
        for point in found["trials"]
    ]
    bases = {kind: of["base"] for kind, of in found["objectives"].items()}
    return {
        "arms": list(arms),
        "axes": axes,
        "points": points,
        "base": bases,
        "volume": [
            [point["trial"], share]
            for point, share in zip(found["trials"], found["hypervolume"], strict=False)
        ],
        "slices": list(_slices(found["trials"])),
    }


def _slices(trials: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every setting with the place of each trial on its axis; None of a trial without it.

    Numbers of which one is ten times another lie on a logarithmic axis; choices that are no numbers
    at 0, 1 and so on, which the title says.
    """
    for key in dict.fromkeys(key for point in trials for key in point["chosen"]):
        values = [point["chosen"].get(key) for point in trials]
        title, known = key.rpartition(".")[2], [value for value in values if value is not None]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in known):
            is_log = min(known) > 0 and max(known) >= 10 * min(known)
            places = [None if v is None else math.log10(v) if is_log else v for v in values]
            title = f"log10 {title}" if is_log else title
        else:
            choices = sorted({json.dumps(value, sort_keys=True) for value in known})
            at = {choice: place for place, choice in enumerate(choices)}
            places = [
                None if value is None else at[json.dumps(value, sort_keys=True)] for value in values
            ]
            title += ": " + ", ".join(f"{place} is {choice}" for choice, place in at.items())
        yield {"title": title, "places": places}
