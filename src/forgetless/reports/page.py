"""The page: one HTML file that holds its style, its scripts and its data, and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import forgetless
from forgetless.reports.arms import Arm
from forgetless.reports.change_tables import changes_section, tries_section
from forgetless.reports.changes import find_averages, find_changes
from forgetless.reports.course_tables import course_table, matched_section, rates_section
from forgetless.reports.durations import Course, Matched
from forgetless.reports.evidence import Evidence
from forgetless.reports.flips import TaskFlips
from forgetless.reports.made import how_it_was_made, seeds_of, when
from forgetless.reports.markup import arm_name, prose, text
from forgetless.reports.payload import payload
from forgetless.reports.standing import Standing
from forgetless.reports.tables import arms_table, flips_table, runs_table
from forgetless.reports.words import Answer, amount, interval_words
from forgetless.scores.seeds import Estimate

SCRIPTS = tuple(
    f"{name}.js"
    for name in ("base", "chart", "plane", "course", "curves", "probes", "flips", "tables")
)
NUM_STATIC_CASES = 6


def page(
    evidence: Evidence,
    arms: Sequence[Arm],
    place: Standing,
    words: Answer,
    course: Course | None,
    matched: Matched | None,
    flips: Sequence[TaskFlips],
    figures: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    """The whole page.

    Args:
        evidence: what the study folder holds.
        arms: its arms.
        place: who stands where.
        words: the answer.
        course: the scores over the steps, where runs were scored on the way.
        matched: what the arms keep at equal learning, where that can be told.
        flips: what changed item by item.
        figures: drawings in SVG by name, for browsers without scripts; may be empty.
        notes: what could not be made beside the page, and why.
    """
    places = {arm.label: i for i, arm in enumerate(arms)}
    changes = find_changes(evidence, arms)
    changed = changes_section(changes, find_averages(changes), places)
    changed += tries_section(arms, evidence.tasks, places)
    equal = matched_section(matched, places) if matched else ""
    numbers = payload(evidence, arms, course, flips)
    sections = {
        "plane": _has_plane(arms, evidence),
        "course": bool(course),
        "changes": bool(changed),
        "flips": bool(flips),
        "numbers": True,
        "curves": any(curve["points"] for curve in numbers["curves"]),
        "probes": bool(numbers["probes"]),
        "made": True,
    }
    script = "\n".join(_part(name) for name in SCRIPTS)
    return _filled(
        _with_sections(_part("page.html"), sections),
        {
            "title": text(evidence.name),
            "css": _part("page.css"),
            "script_hashes": f"'sha256-{_sha256(script)}'",
            "eyebrow": text(_eyebrow(evidence, arms)),
            "headline": prose(words.title, places),
            "sentences": "".join(f"<p>{prose(s, places)}</p>" for s in words.sentences),
            "cards": _cards(place, places),
            "caveats": _caveats(words, places),
            "links": _links(sections),
            "plane": figures.get("plane", ""),
            "course": figures.get("course", ""),
            "course_tables": course_table(course, places) + equal if course else "",
            "changes": changed,
            "rates": rates_section(evidence, arms, places) + (equal if not course else ""),
            "arms_table": arms_table(evidence, arms),
            "runs_table": runs_table(evidence),
            "curves": figures.get("curves", ""),
            "probes": figures.get("probes", ""),
            "flips": _flips(flips, places),
            "made": how_it_was_made(evidence, arms),
            "footer": text(_footer(notes)),
            "data": _embedded(numbers),
            "js": script,
        },
    )


LINKS = {
    "plane": "Plane",
    "course": "Steps",
    "changes": "Changes",
    "flips": "Lost",
    "numbers": "Numbers",
    "curves": "Training",
    "made": "How",
}


def _links(sections: Mapping[str, bool]) -> str:
    """The way to each section that is there."""
    return "".join(
        f'<a href="#{name}">{word}</a>' for name, word in LINKS.items() if sections[name]
    )


def _has_plane(arms: Sequence[Arm], evidence: Evidence) -> bool:
    """Whether a learning and a forgetting task were measured on the same arm."""
    kinds = [
        {task.kind for task in evidence.tasks if setting.final(task) is not None}
        for arm in arms
        for setting in arm.settings
    ]
    return any(len(of_setting) > 1 for of_setting in kinds)


def _with_sections(template: str, sections: Mapping[str, bool]) -> str:
    """The template without the sections for which there is nothing."""

    def choose(found: re.Match[str]) -> str:
        return _with_sections(found[2], sections) if sections[found[1]] else ""

    return re.sub(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->\n", choose, template, flags=re.DOTALL)


def _part(name: str) -> str:
    return files("forgetless.reports").joinpath(name).read_text("utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """The template with its parts; parts are not searched for places again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _embedded(content: Any) -> str:
    """JSON that cannot end its script element, whatever text it holds."""
    dumped = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        dumped = dumped.replace(sign, f"\\u{ord(sign):04x}")
    return dumped


def _eyebrow(evidence: Evidence, arms: Sequence[Arm]) -> str:
    bases = sorted({run.base for run in evidence.runs})
    seeds = seeds_of(evidence.runs)
    parts = [
        evidence.name,
        f"base {', '.join(bases)}",
        f"{len(arms)} arm{'' if len(arms) == 1 else 's'}",
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}" if seeds else "",
        f"{len(evidence.runs)} run{'' if len(evidence.runs) == 1 else 's'}",
        when(evidence),
    ]
    return "  ·  ".join(part for part in parts if part)


def _cards(place: Standing, places: Mapping[str, int]) -> str:
    """Three numbers to take away; only what was measured and compared."""
    if len(place.placed) < 2 or place.learning is None or place.forgetting is None:
        return ""
    if place.none_learned:
        return ""
    learning, forgetting = place.learning, place.forgetting
    cards = []
    for label, leaders in (("Kept most", place.keepers), ("Learned most", place.learners)):
        arm = leaders[0]
        kept, learned = arm.best.kept(forgetting), arm.best.final(learning)
        if kept is None or learned is None:
            continue
        kept_first = label == "Kept most"
        shown, task = (kept, forgetting) if kept_first else (learned, learning)
        other, verb = (learned, "learned") if kept_first else (kept, "kept")
        rest = f"{verb} {amount(learning if kept_first else forgetting, other.value)}"
        tied = len(leaders) - 1
        also = f", {tied} more not distinguishable" if tied else ""
        cards.append(_card(label, _big(shown, task), arm, places, f"{rest}{also}"))
    front = "".join(arm_name(arm.label, places[arm.label]) for arm in place.front)
    big = f'<p class="big">{len(place.front)} of {len(place.placed)}</p>'
    cards.append(
        f'<div class="card"><h2>On the Pareto front</h2>{big}<p class="who many">{front}</p></div>'
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _big(estimate: Estimate, task: Any) -> str:
    interval = f'<span class="interval">{interval_words(estimate, task)}</span>'
    return f'<p class="big">{text(amount(task, estimate.value))}{interval}</p>'


def _card(label: str, big: str, arm: Arm, places: Mapping[str, int], rest: str) -> str:
    return (
        f'<div class="card"><h2>{label}</h2>{big}'
        f'<p class="who">{arm_name(arm.label, places[arm.label])}</p>'
        f'<p class="rest">{text(rest)}</p></div>'
    )


def _caveats(words: Answer, places: Mapping[str, int]) -> str:
    if not words.caveats:
        return ""
    items = "".join(f"<li>{prose(caveat, places)}</li>" for caveat in words.caveats)
    return f'<aside class="caveats"><h2>How far this carries</h2><ul>{items}</ul></aside>'


def _flips(flips: Sequence[TaskFlips], places: Mapping[str, int]) -> str:
    """One section a kind: what was lost of the old, what was learned of the new."""
    sections = ""
    for kind, title, about in (
        (
            "forgetting",
            "What was lost",
            "Questions that the base gets right, and what an arm says now.",
        ),
        ("learning", "What was learned", "Some questions that only the trained arm gets right."),
    ):
        of_kind = [of_task for of_task in flips if of_task.task.kind == kind]
        if not of_kind:
            continue
        body = "".join(_task_flips(of_task, places, len(of_kind) > 1) for of_task in of_kind)
        anchor = "" if sections else ' id="flips"'
        sections += f'<section{anchor}><h2>{title}</h2><p class="about">{about}</p>{body}</section>'
    return sections


def _task_flips(of_task: TaskFlips, places: Mapping[str, int], with_name: bool) -> str:
    name = text(of_task.task.name)
    title = f"<h3>{name}</h3>" if with_name else ""
    note = ""
    if any(arm.seeds > 1 for arm in of_task.arms):
        note = "Counts are means over the seeds; the list has what changed in any of them."
        note = f'<p class="note">{note}</p>'
    return (
        f'{title}<div class="scroll" tabindex="0" role="region" aria-label="Counts, {name}">'
        f"{flips_table(of_task, places)}</div>{note}"
        f'<div class="finder" data-task="{name}">{_static_cases(of_task, places)}</div>'
    )


def _static_cases(of_task: TaskFlips, places: Mapping[str, int]) -> str:
    """A few cases an arm, for browsers without scripts; scripts put a search in their place."""
    shown = ""
    for arm in of_task.arms:
        is_old = of_task.task.kind == "forgetting"
        flips = (arm.lost_items if is_old else arm.gained_items)[:NUM_STATIC_CASES]
        if not flips:
            continue
        kind = "wrong" if is_old else "right"
        rows = "".join(
            f"<li><span>{text(of_task.questions[flip.item][0])}</span>"
            f"<span>{text(of_task.questions[flip.item][1])}</span>"
            f'<span class="{kind}">{text(flip.answer)}</span></li>'
            for flip in flips
        )
        shown += f'<h3>{arm_name(arm.label, places[arm.label])}</h3><ul class="cases">{rows}</ul>'
    return shown


def _footer(notes: Sequence[str]) -> str:
    made = f"Made by Forgetless {forgetless.__version__} from the files of the study alone."
    return " ".join([made, "Beside this page: results.csv, results.parquet, figures.", *notes])
