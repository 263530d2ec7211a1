"""How the study was made: settings, versions, machines, times, what failed, how to do it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import forgetless
from forgetless.reports.again import again, definitions
from forgetless.reports.arms import Arm
from forgetless.reports.evidence import Evidence, Run, flatten, number
from forgetless.reports.markup import arm_name, details, header, pairs, plain_cell, text
from forgetless.reports.words import NOT_MEASURED

# What a run's record holds about its stages, in the order of the table.
RECORDED = ("start", "seconds", "statistics", "training", "export")


def how_it_was_made(evidence: Evidence, arms: Sequence[Arm]) -> str:
    """The last section of the page, without its heading."""
    same, varied = _split_settings(evidence.runs)
    cite = "" if evidence.evaluations else _cite(evidence)
    parts = [
        f'<div class="again">{again(evidence)}{cite}</div>',
        "<h3>Settings that every run shares</h3>" + pairs((k, _shown(v)) for k, v in same.items()),
        _varied_table(evidence, arms, varied),
        _failed_table(evidence),
        "<h3>Versions and machine</h3>" + pairs(_machine(evidence.runs)),
        details("What every run recorded", _recorded_table(evidence.runs)),
        *(details(name, f"<pre>{text(content)}</pre>") for name, content in definitions(evidence)),
    ]
    return "".join(part for part in parts if '<dl class="pairs"></dl>' not in part)


def when(evidence: Evidence) -> str:
    """The day on which the first run was started."""
    days = sorted(
        str(run.record["started"])[:10] for run in evidence.runs if run.record.get("started")
    )
    return days[0] if days else ""


def seeds_of(runs: Iterable[Run]) -> list[str]:
    """The seeds used, in order."""
    seeds = {run.settings.get("seed") for run in runs} - {None}
    return [str(seed) for seed in sorted(seeds, key=lambda seed: (number(seed) or 0.0, str(seed)))]


def duration(seconds: float) -> str:
    """A time as people say it: 41 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cite(evidence: Evidence) -> str:
    version = _one(evidence.runs, "versions", "forgetless") or forgetless.__version__
    bases = ", ".join(sorted({run.base for run in evidence.runs}))
    seeds = seeds_of(evidence.runs)
    cite = (
        f"Forgetless {version}, study “{evidence.name}”, base {bases}, "
        f"seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)}, "
    )
    day = f'<span class="whole">{text(when(evidence))}.</span>'
    return f'<div><h3>Cite it</h3><p class="cite">{text(cite)}{day}</p></div>'


def _split_settings(runs: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    """The settings that are the same in all runs, and the keys of those that are not."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    same, varied = {}, []
    for key in keys:
        values = {_shown(run.settings.get(key)) for run in runs}
        if len(values) == 1:
            same[key] = runs[0].settings.get(key)
        elif key not in ("name", "seed"):
            varied.append(key)
    return {key: value for key, value in same.items() if value is not None}, varied


def _varied_table(evidence: Evidence, arms: Sequence[Arm], varied: Sequence[str]) -> str:
    if not set(varied) - {"adapter.method"} or not arms:
        return ""
    rows = ""
    for i, arm in enumerate(arms):
        runs = [run for setting in arm.settings for run in setting.runs]
        cells = ""
        for key in varied:
            values = dict.fromkeys(_shown(run.settings.get(key)) for run in runs)
            cells += f"<td>{text(', '.join(values))}</td>"
        cells += f"<td>{text(', '.join(seeds_of(runs)))}</td>"
        rows += f'<tr><th scope="row">{arm_name(arm.label, i)}</th>{cells}</tr>'
    heads = "".join(header(key, is_number=False) for key in ("arm", *varied, "seeds"))
    return f"<h3>Settings that differ</h3>{_scrolled(heads, rows)}"


def _failed_table(evidence: Evidence) -> str:
    lost = [run for run in evidence.runs if run.status != "done"]
    if not lost:
        return ""
    rows = ""
    for run in lost:
        reason = run.record.get("reason") or "not finished yet"
        shown = (
            run.run_id,
            run.settings.get("adapter.method"),
            _shown(run.settings.get("training.learning_rate")),
            run.settings.get("seed"),
            run.status,
            reason,
        )
        rows += f"<tr>{''.join(f'<td>{text(value)}</td>' for value in shown)}</tr>"
    labels = ("run", "method", "rate", "seed", "status", "reason")
    heads = "".join(header(label, is_number=False) for label in labels)
    return f"<h3>Runs without a result</h3>{_scrolled(heads, rows, 'reasons')}"


def _machine(runs: Sequence[Run]) -> list[tuple[str, str]]:
    found: dict[str, set[str]] = {}
    for part in ("versions", "hardware"):
        for run in runs:
            for key, value in flatten(_mapping(run.record.get(part))):
                if value is not None:
                    found.setdefault(key, set()).add(_shown(value))
    rows = [(key, ", ".join(sorted(values))) for key, values in found.items()]
    seconds = [s for run in runs if (s := _total_seconds(run)) is not None]
    if seconds:
        rows.append(("time of all runs together", duration(sum(seconds))))
    return rows


def _total_seconds(run: Run) -> float | None:
    values = [number(value) for _, value in flatten(_mapping(run.record.get("seconds")))]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _recorded_table(runs: Sequence[Run]) -> str:
    recorded = [_recorded(run) for run in runs]
    keys = list(dict.fromkeys(key for record in recorded for key in record))
    heads = header("run", is_number=False, column=0)
    heads += "".join(
        header(key.replace("_", " "), column=i, is_number=any(number(r.get(key)) is not None
                                                              for r in recorded))
        for i, key in enumerate(keys, start=1)
    )  # fmt: skip
    rows = "".join(
        f"<tr><th scope=row>{text(run.run_id)}</th>"
        f"{''.join(plain_cell(record.get(key)) for key in keys)}</tr>"
        for run, record in zip(runs, recorded, strict=True)
    )
    return _scrolled(heads, rows, "sortable dense")


def _recorded(run: Run) -> dict[str, Any]:
    """What the stages of a run wrote down, and what a task measured beside its score."""
    parts = {part: run.record.get(part) for part in RECORDED}
    parts |= {task: run.score("final", task).get("extra") for task in run.rows}
    return {
        f"{part} {key}": value
        for part, content in parts.items()
        for key, value in flatten(_mapping(content))
        if not isinstance(value, list)
    }


def _one(runs: Sequence[Run], part: str, key: str) -> Any:
    return next((v for run in runs if (v := _mapping(run.record.get(part)).get(key))), None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return NOT_MEASURED if value is None else str(value)


def _scrolled(heads: str, rows: str, kind: str = "") -> str:
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
