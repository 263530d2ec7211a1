"""The page: one HTML file that holds its style, its scripts and its data, and asks for nothing."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

import forgetless
from forgetless.reports import aftercare, provenance
from forgetless.reports.changes import find_averages, find_tries
from forgetless.reports.findings import Findings
from forgetless.reports.numbers import amount, count_words, interval_words
from forgetless.reports.standing import Standing
from forgetless.reports.words import environment
from forgetless.studies.folder import COLUMNS

SCRIPTS = ("page", "chart", "charts", "lists")


def page(
    found: Findings, content: Mapping[str, Any], figures: Mapping[str, str], notes: Sequence[str]
) -> str:
    """The whole page.

    The content is that of `payload`, the figures are SVG for browsers without scripts, and the
    notes say what could not be made or read.
    """
    evidence, arms = found.evidence, found.arms
    runs, seeds = evidence.runs, provenance.seeds_of(evidence.runs)
    rates = {setting.learning_rate for arm in arms for setting in arm.settings} - {None}
    has_rates = any(len(arm.settings) > 1 for arm in arms)
    first = evidence.first("learning"), evidence.first("forgetting")
    counts = [count_words(len(arms), "arm"), *([count_words(len(seeds), "seed")] if seeds else [])]
    return environment().get_template("page.html").render(
        found=found,
        evidence=evidence,
        arms=arms,
        places={arm.label: i for i, arm in enumerate(arms)},
        cards=_cards(found.place),
        counts=[*counts, count_words(len(runs), "run")],
        charts=content.keys(),
        course=found.course,
        matched=found.matched,
        used=aftercare.settings(arms, evidence.tasks),
        regained=aftercare.regained(arms, evidence.tasks),
        spectra=aftercare.spectra_rows(aftercare.spectra_of(arms)),
        maps=aftercare.heat_maps(content.get("layers", {"rows": ()}), [arm.label for arm in arms]),
        changes=found.changes,
        averages=find_averages(found.changes),
        tries=find_tries(evidence.tasks, arms),
        base_settings={arm.best.runs[0].base: arm.best for arm in reversed(arms)},
        rates=sorted(rates) if has_rates and all(first) else [],
        every_run=provenance.columns_and_rows(COLUMNS[1:], evidence.rows),
        figures=figures,
        commands=provenance.commands(evidence),
        definitions=provenance.definitions(evidence),
        version=provenance.version(runs) or forgetless.__version__,
        bases=sorted({run.base for run in runs}),
        seeds=seeds,
        day=provenance.day(runs),
        shared_settings=provenance.shared_settings(runs),
        differing=provenance.differing(evidence, arms),
        unfinished=provenance.unfinished(runs),
        machine=provenance.machine(runs),
        recorded=provenance.recorded(runs),
        forgetless_version=forgetless.__version__,
        notes=notes,
        **inlined(SCRIPTS, content),
    )  # fmt: skip


def inlined(scripts: Sequence[str], content: Mapping[str, Any]) -> dict[str, str]:
    """The style, the scripts and their data as parts of a page, which asks for nothing."""
    script = "\n".join(_source(f"{name}.js") for name in scripts)
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":  # no text that it holds can end its element
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return {
        "style": Markup(_source("page.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": Markup(data),
    }


def _source(name: str) -> str:
    """A style or script as it lies beside the templates."""
    loader = environment().loader
    assert loader is not None
    return loader.get_source(environment(), name)[0]


def _cards(place: Standing) -> list[dict[str, Any]]:
    """Three numbers to take away; only what was measured and compared."""
    learning, forgetting = place.learning, place.forgetting
    if len(place.placed) < 2 or learning is None or forgetting is None or place.none_learned:
        return []
    cards: list[dict[str, Any]] = []
    for title, leaders in (("Kept most", place.keepers), ("Learned most", place.learners)):
        best = leaders[0].best
        pairs = [
            ("kept", forgetting, best.kept(forgetting)),
            ("learned", learning, best.final(learning)),
        ]
        (_, task, shown), (verb, other_task, other) = pairs if title == "Kept most" else pairs[::-1]
        if shown is None or other is None:
            continue
        tied = f", {len(leaders) - 1} more not distinguishable" if len(leaders) > 1 else ""
        cards.append({
            "title": title, "shown": amount(task, shown.value),
            "interval": interval_words(shown, task), "labels": [leaders[0].label],
            "rest": f"{verb} {amount(other_task, other.value)}{tied}",
        })  # fmt: skip
    front = [arm.label for arm in place.front]
    shown_front = f"{len(front)} of {len(place.placed)}"
    return [
        *cards,
        {
            "title": "On the Pareto front",
            "shown": shown_front,
            "labels": front,
            "interval": "",
            "rest": "",
        },
    ]
