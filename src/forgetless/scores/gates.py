"""Limits on forgetting for CI: which tasks fell further than they may, as text and as JUnit XML."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.core.errors import UserError, unknown
from forgetless.scores.comparison import Comparison, TaskChange
from forgetless.scores.showing import sentence

_SHOWN = 20

# Rounding of a difference of two scores is not forgetting.
_ROUNDING = 1e-9

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


# Metrics that are logarithms of a perplexity, per token or byte, and what one of them is in nats.
_NATS = {"loss": 1.0, "kl": 1.0, "bits_per_byte": math.log(2)}


@dataclass(frozen=True)
class Limit:
    """The most that a task may lose.

    Attributes:
        size: 0 or more, see `loss`.
        relative: written with a percent sign.
        task: the task that it is for; None for every task of forgetting.
    """

    size: float
    relative: bool = False
    task: str | None = None

    def __str__(self) -> str:
        return f"{100 * self.size:g} %" if self.relative else f"{self.size:g}"

    def loss(self, row: TaskChange, worse: float) -> tuple[float, str]:
        """What the limit's size is held against, and what that is in words.

        Args:
            row: the task's change.
            worse: by how much its score became worse, in its own unit.

        Returns:
            * Of a task's own limit (gsm8k=0.05): `worse` as it is.
            * Of a limit for all tasks, 0.02: points of a share; of the metrics in `_NATS` the
              share by which the perplexity grew, exp(worse) - 1; of every other score, such as a
              perplexity, `worse` as a share of the base's score. An unbounded score has no points.
            * Of a relative limit, 5%: `worse` as a share of the base's score; of a distance to the
              base, whose own is 0, the share by which the perplexity grew.
        """
        metric = row.metric.partition(",")[0]
        if self.task is not None and not self.relative:
            return worse, ""
        if metric == "kl" or (metric in _NATS and not self.relative):
            return math.expm1(min(worse * _NATS[metric], 700.0)), "of perplexity"
        if row.is_share and not self.relative:
            return worse, ""
        if row.base == 0:
            return (math.copysign(math.inf, worse) if worse else 0.0), "of a score of 0"
        return worse / abs(row.base), "of the base's score"


@dataclass(frozen=True)
class Judgement:
    """What a limit says of a task.

    Attributes:
        row: what changed; None for a task that only one of the two was scored on.
        failed: whether it lost more than the limit allows.
        reason: in words, whatever the outcome.
    """

    task: str
    row: TaskChange | None
    limit: Limit | None
    failed: bool
    reason: str


def parse_limits(texts: Iterable[str]) -> list[Limit]:
    """Limits of the command line: ``0.02``, ``5%``, ``gsm8k=0.05`` or ``prose=10%``.

    Raises:
        UserError: every text that is no such thing, and a task, or all tasks, limited twice.
    """
    limits: list[Limit] = []
    problems: list[str] = []
    for text in texts:
        task, equals, size = text.strip().rpartition("=")
        number = size.strip().removesuffix("%")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0) or (equals and not task):
            problems.append(f"a limit is 0.02, 5%, TASK=0.02 or TASK=5%, got {text!r}")
            continue
        relative = size.strip().endswith("%")
        limit = Limit(value / 100 if relative else value, relative, task.strip() or None)
        if any(limit.task == other.task for other in limits):
            problems.append(f"two limits for {limit.task or 'all tasks'}; give one")
        limits.append(limit)
    if problems:
        raise UserError("; ".join(problems))
    return limits


def judge(
    comparison: Comparison,
    limits: Sequence[Limit],
    *,
    learning: Collection[str] = (),
    certain: bool = False,
) -> list[Judgement]:
    """Which tasks lost more than they may.

    A limit for all tasks holds for those that are not there to be learned, each measured as
    `Limit.loss` says: under 0.02 an accuracy may fall by two points, and a perplexity grow by 2 %.
    A limit of one task holds for that task alone, in whatever unit its score has.

    Args:
        comparison: the base's scores against the others.
        limits: see `parse_limits`.
        learning: tasks that training should raise; they are judged only by a limit of their own.
        certain: fail only where the whole interval of the loss is beyond the limit, and not
            already where the measured loss is. Where no interval is known, the loss decides.

    Returns:
        One judgement a task, those compared first.

    Raises:
        UserError: a limit of a task that was not compared, or limits that hold for no task since
            all are there to be learned.
    """
    names = [row.task for row in comparison]
    for limit in limits:
        if limit.task is not None and limit.task not in names:
            if limit.task in comparison.unmatched:
                raise UserError(
                    f"task {limit.task!r} has a limit and was scored for one of the two only; "
                    "evaluate both models on it"
                )
            raise unknown("task of a limit:", limit.task, names)
    judged = [_judged(row, _limit_of(row, limits, learning), certain) for row in comparison]
    if limits and not any(judgement.limit for judgement in judged):
        raise UserError(
            f"the limit {limits[0]} holds for none of {', '.join(names)}: a limit for all tasks is "
            "not for what is to be learned; name the task, as in "
            f"--max-drop {names[0]}=0.1"
        )
    return judged + [
        Judgement(task, None, None, failed=False, reason="scored for one of the two only")
        for task in comparison.unmatched
    ]


def _limit_of(row: TaskChange, limits: Sequence[Limit], learning: Collection[str]) -> Limit | None:
    """The task's own limit, or the one for all tasks unless it is to be learned."""
    wanted = [row.task] if row.task in learning else [row.task, None]
    return next((limit for task in wanted for limit in limits if limit.task == task), None)


def _judged(row: TaskChange, limit: Limit | None, certain: bool) -> Judgement:
    if limit is None:
        return Judgement(row.task, row, None, failed=False, reason=f"no limit; {sentence(row)}")
    loss = row.forgetting
    ends = [-end if row.higher_is_better else end for end in row.interval]
    low, high = min(ends), max(ends)
    is_sure = certain and not math.isnan(low)
    held, unit = limit.loss(row, low if is_sure else loss)
    failed = held > limit.size + _ROUNDING
    what = f"lost {loss:.4g}" if loss > 0 else f"gained {-loss:.4g}" if loss < 0 else "lost nothing"
    span = "unknown" if math.isnan(low) else f"{low:+.4g} to {high:+.4g}"
    share = f", {100 * held:.4g} % {unit}," if unit and held > 0 else ","
    verb = "more than" if failed else "within"
    sure = "certainly " if failed and is_sure else ""
    return Judgement(
        row.task,
        row,
        limit,
        failed=failed,
        reason=f"{what} (interval of the loss {span}){share} {sure}{verb} the limit of {limit}",
    )


# ---------------------------------------------------------------------------- text, JSON and JUnit


def verdict(judgements: Sequence[Judgement]) -> str:
    """One line a task that has a limit, and whether all are within theirs."""
    lines = [
        f"{'FAILED' if judgement.failed else 'passed'}  {judgement.task}: {judgement.reason}"
        for judgement in judgements
        if judgement.limit is not None
    ]
    without = [judgement.task for judgement in judgements if judgement.limit is None]
    return "\n".join([*lines, *([f"no limit  {', '.join(without)}"] if without else [])])


def to_json(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Plain JSON values: whether all passed, and each task's limit and reason."""
    return {
        "passed": not any(judgement.failed for judgement in judgements),
        "tasks": [
            {
                "task": judgement.task,
                "limit": None if judgement.limit is None else str(judgement.limit),
                "failed": judgement.failed,
                "reason": judgement.reason,
            }
            for judgement in judgements
        ],
    }


def junit(judgements: Sequence[Judgement]) -> str:
    """The judgements as JUnit XML: one test case a task, skipped where it has no limit.

    A failure's message is the reason; its text lists the first items that were lost.
    """
    counts = {
        "name": "forgetless compare",
        "tests": str(len(judgements)),
        "failures": str(sum(judgement.failed for judgement in judgements)),
        "errors": "0",
    }
    skipped = str(sum(judgement.limit is None for judgement in judgements))
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", counts | {"skipped": skipped, "time": "0"})
    for judgement in judgements:
        of_case = {"classname": "forgetting", "name": _xml(judgement.task), "time": "0"}
        case, reason = ET.SubElement(suite, "testcase", of_case), _xml(judgement.reason)
        if judgement.failed:
            failure = ET.SubElement(case, "failure", {"type": "forgetting", "message": reason})
            failure.text = _xml(_details(judgement))
        elif judgement.limit is None:
            ET.SubElement(case, "skipped", {"message": reason})
        else:
            ET.SubElement(case, "system-out").text = reason
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _details(judgement: Judgement) -> str:
    """Both scores, and the first of the items that were lost."""
    row = judgement.row
    if row is None:
        return judgement.reason
    lost = row.flips("lost")
    lines = [f"{row.metric} {row.base:.4g} before, {row.score:.4g} after; {sentence(row)}"]
    lines += [f"lost {c.id}: {c.prompt!r}: {c.before!r} -> {c.after!r}" for c in lost[:_SHOWN]]
    return "\n".join([*lines, *([f"and {len(lost) - _SHOWN} more"] if len(lost) > _SHOWN else [])])


def _xml(text: str) -> str:
    """Without the characters that XML cannot hold, even escaped."""
    return _NOT_XML.sub("\ufffd", text)
