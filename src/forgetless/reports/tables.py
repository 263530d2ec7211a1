"""The tables of the page: every arm with its errors, and every run as in results.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forgetless.reports.arms import Arm, Setting
from forgetless.reports.evidence import Evidence, Task
from forgetless.reports.flips import TaskFlips
from forgetless.reports.markup import arm_name, estimate_cell, header, plain_cell, text, value_cell
from forgetless.studies.folder import COLUMNS


def arms_table(evidence: Evidence, arms: Sequence[Arm]) -> str:
    """One row an arm and learning rate, after one row a base model."""
    tasks = list(evidence.tasks)
    bases = "".join(_base_row(name, setting, tasks) for name, setting in _bases(arms).items())
    rows = "".join(
        _setting_row(arm, i, setting, tasks)
        for i, arm in enumerate(arms)
        for setting in arm.settings
    )
    return (
        f'<table class="sortable">{_arms_head(tasks)}'
        f'<tbody class="fixed">{bases}</tbody><tbody>{rows}</tbody></table>'
    )


def _bases(arms: Sequence[Arm]) -> dict[str, Setting]:
    return {arm.best.runs[0].base: arm.best for arm in reversed(arms)}


def _columns(task: Task) -> list[tuple[str, str]]:
    """The columns of one task: (head, explanation)."""
    score = ("score", "after training, over its 95 % interval")
    kept = ("kept", "score as a share of the base's, at most 100 %")
    rest = [("step 0", "before the first step of training"), ("n", "items of the task")]
    return [score, kept, *rest] if _has_retention(task) else [score, *rest]


def _has_retention(task: Task) -> bool:
    return task.kind == "forgetting" and task.is_share


def _arms_head(tasks: Sequence[Task]) -> str:
    groups, heads, column = "", "", 2
    for task in tasks:
        columns = _columns(task)
        better = "higher is better" if task.higher_is_better else "lower is better"
        groups += (
            f'<th scope="colgroup" colspan="{len(columns)}" class="group">{text(task.name)}'
            f"<small>{text(task.kind)} · {text(task.metric)}, {better}</small></th>"
        )
        for i, (label, note) in enumerate(columns):
            heads += header(label, note=note, column=column + i)
        column += len(columns)
    fixed = header("arm", is_number=False, column=0)
    fixed += header("rate", note="learning rate", column=1)
    tail = header("seeds", note="finished runs", column=column)
    tail += header("update", note="‖ΔW‖ / ‖W‖ over the adapted layers", column=column + 1)
    tail += header("time", note="seconds of training, mean", column=column + 2)
    return (
        f'<thead><tr><td colspan="2"></td>{groups}<td colspan="3"></td></tr>'
        f"<tr>{fixed}{heads}{tail}</tr></thead>"
    )


def _base_row(name: str, setting: Setting, tasks: Sequence[Task]) -> str:
    cells = f'<th scope="row">base <small>{text(name)}</small></th>'
    cells += "<td></td>"
    for task in tasks:
        base = setting.measured[task.name].base
        cells += estimate_cell(base, task) + "<td></td>" * (len(_columns(task)) - 2)
        cells += plain_cell(base.num_items if base else None)
    return f'<tr class="base">{cells}<td></td><td></td><td></td></tr>'


def _setting_row(arm: Arm, index: int, setting: Setting, tasks: Sequence[Task]) -> str:
    is_best = setting is arm.best and len(arm.settings) > 1
    best = '<small class="best">best rate</small>' if is_best else ""
    cells = f'<th scope="row" data-v="{text(arm.label)}">{arm_name(arm.label, index)}{best}</th>'
    cells += plain_cell(setting.learning_rate)
    for task in tasks:
        measured = setting.measured[task.name]
        final = measured.final
        cells += estimate_cell(final, task)
        if _has_retention(task):
            cells += estimate_cell(measured.retention, task)
        cells += estimate_cell(measured.step0, task)
        cells += plain_cell(final.num_items if final else None)
    seconds = setting.mean_of("train_seconds")
    cells += plain_cell(len(setting.runs)) + plain_cell(setting.mean_of("relative_update"))
    cells += value_cell(seconds, f"{seconds or 0:.0f} s")
    return f"<tr>{cells}</tr>"


def runs_table(evidence: Evidence) -> str:
    """The rows of results.csv, number for number."""
    columns = [column for column in COLUMNS if column != "study"]
    numeric = {
        column
        for column in columns
        if any(isinstance(r[column], int | float) for r in evidence.rows)
    }
    heads = "".join(
        header(column.replace("_", " "), is_number=column in numeric, column=i)
        for i, column in enumerate(columns)
    )
    body = "".join(
        f"<tr>{''.join(plain_cell(row[column]) for column in columns)}</tr>"
        for row in evidence.rows
    )
    return (
        f'<table class="sortable dense"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def flips_table(flips: TaskFlips, places: Mapping[str, int]) -> str:
    """How many items each arm kept, lost and gained, with a bar."""
    rows = ""
    for arm in flips.arms:
        known = arm.kept + arm.lost
        share = 100 * arm.kept / known if known else 0.0
        bar = (
            f'<td class="bar"><svg viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
            f'aria-label="{share:.0f} % kept"><rect class="lost" width="100" height="8"/>'
            f'<rect class="kept" width="{share:.1f}" height="8"/></svg></td>'
        )
        cells = f'<th scope="row">{arm_name(arm.label, places[arm.label])}</th>'
        for count in (arm.kept, arm.lost, arm.gained, arm.never):
            cells += value_cell(
                count, f"{count:,.0f}" if count == round(count) else f"{count:,.1f}"
            )
        rows += f"<tr>{cells}{bar if flips.task.kind == 'forgetting' else ''}</tr>"
    heads = header("arm", is_number=False)
    for label, note in (
        ("kept", "right before and after"),
        ("lost", "right before, wrong after"),
        ("gained", "wrong before, right after"),
        ("never", "wrong before and after"),
    ):
        heads += header(label, note=note)
    if flips.task.kind == "forgetting":
        heads += header("of what the base knew", is_number=False)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
