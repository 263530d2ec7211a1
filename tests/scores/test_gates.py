"""Limits on forgetting, files of scores, and `forgetless compare`."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forgetless.cli import main
from forgetless.core.errors import UserError
from forgetless.core.files import write_json, write_jsonl, write_text
from forgetless.scores.comparison import Comparison, compare
from forgetless.scores.files import read_scores, write_records
from forgetless.scores.gates import Limit, judge, junit, parse_limits, to_json, verdict
from forgetless.studies.folder import RunFolder
from forgetless.tasks.evaluation import Scores
from tests.scores.test_comparison import answers, documents

Command = Callable[..., tuple[int, str, str]]


def facts(right: int, *, of: int = 100, name: str = "facts", said: str = "no") -> Any:
    return answers(*[1] * right, *[0] * (of - right), name=name, said=said)


def compared(**right: tuple[int, int]) -> Comparison:
    """Tasks of 100 items by (right before, right after)."""
    base = {name: facts(before, name=name) for name, (before, _) in right.items()}
    return compare(base, {name: facts(after, name=name) for name, (_, after) in right.items()})


# ------------------------------------------------------------------------------------- limits


def test_limits_are_points_or_percents_of_all_tasks_or_one() -> None:
    assert parse_limits(["0.02", " gsm8k = 5% ", "prose=0.1"]) == [
        Limit(0.02),
        Limit(0.05, relative=True, task="gsm8k"),
        Limit(0.1, task="prose"),
    ]
    assert str(parse_limits(["5%"])[0]) == "5 %"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["two"], r"a limit is 0\.02, 5%, TASK=0\.02 or TASK=5%, got 'two'"),
        (["-0.1"], "got '-0.1'"),
        (["nan"], "got 'nan'"),
        (["=0.1"], "got '=0.1'"),
        (["a=", "x"], "got 'a='.*got 'x'"),
        (["0.1", "0.2"], "two limits for all tasks"),
        (["a=0.1", "a=5%"], "two limits for a"),
    ],
)
def test_what_is_no_limit_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_limits(texts)


@pytest.mark.parametrize(
    ("limit", "after", "failed"),
    [
        ("0.02", 78, False),
        ("0.02", 77, True),
        ("0", 80, False),
        ("0", 79, True),
        ("0.02", 95, False),
        ("5%", 76, False),
        ("5%", 75, True),
        ("facts=0.1", 70, False),
        ("facts=0.1", 69, True),
    ],
)
def test_the_measured_loss_is_judged(limit: str, after: int, failed: bool) -> None:
    (judgement,) = judge(compared(facts=(80, after)), parse_limits([limit]))
    assert judgement.failed == failed
    assert ("more than the limit" in judgement.reason) == failed


def test_only_a_certain_loss_fails_when_asked() -> None:
    little, much = compared(facts=(80, 75)), compared(facts=(80, 50))
    limits = parse_limits(["0.02"])
    assert judge(little, limits)[0].failed
    assert not judge(little, limits, certain=True)[0].failed
    (judgement,) = judge(much, limits, certain=True)
    assert judgement.failed
    assert "certainly more than the limit of 0.02" in judgement.reason


def test_what_is_to_be_learned_is_not_judged_unless_named() -> None:
    comparison = compared(facts=(80, 80), skill=(50, 20))
    assert not any(j.failed for j in judge(comparison, parse_limits(["0.02"]), learning={"skill"}))
    assert [j.failed for j in judge(comparison, parse_limits(["0.02"]))] == [False, True]
    named = judge(comparison, parse_limits(["0.02", "skill=0.1"]), learning={"skill"})
    assert [j.failed for j in named] == [False, True]


def unbounded(metric: str, before: float, after: float, *, higher: bool = False) -> Comparison:
    """One task of six documents whose score changed."""
    both = [
        replace(documents([x + i / 1e4 for i in range(6)], [9] * 6), metric=metric, value=x)
        for x in (before, after)
    ]
    sides = [{"text": replace(result, higher_is_better=higher)} for result in both]
    return compare(sides[0], sides[1])


@pytest.mark.parametrize(
    ("metric", "before", "inside", "beyond"),
    [
        # exp(0.0198) is 1.02.
        ("loss", 2.0, 2.0195, 2.0205),
        ("kl", 0.0, 0.0195, 0.0205),
        # In bits, 2^0.0286 is 1.02.
        ("bits_per_byte", 0.9, 0.928, 0.929),
        ("bits_per_byte,none", 0.9, 0.928, 0.929),
        ("perplexity", 8.0, 8.15, 8.17),
        ("word_perplexity,none", 20.0, 20.3, 20.5),
        ("mean rank", 50.0, 50.9, 51.1),
    ],
)
def test_a_limit_for_all_tasks_holds_for_scores_without_points(
    metric: str, before: float, inside: float, beyond: float
) -> None:
    limits = parse_limits(["0.02"])
    for after, failed in ((before, False), (inside, False), (beyond, True), (1e4, True)):
        (judgement,) = judge(unbounded(metric, before, after), limits)
        assert judgement.limit == limits[0]
        assert judgement.failed == failed
    better = judge(unbounded(metric, 3.0, 1.0), limits)
    assert not better[0].failed


def test_unbounded_scores_of_which_more_is_better_are_judged_by_their_share() -> None:
    limits = parse_limits(["0.02"])
    for before, after, failed in ((40.0, 39.3, False), (40.0, 39.0, True), (-50.0, -52.0, True)):
        (judgement,) = judge(unbounded("bleu", before, after, higher=True), limits)
        assert judgement.failed == failed
        assert "of the base's score" in judgement.reason


def test_percents_are_of_the_base_s_score_and_of_a_distance_of_perplexity() -> None:
    limits = parse_limits(["5%"])
    assert not judge(unbounded("loss", 2.0, 2.09), limits)[0].failed
    assert judge(unbounded("loss", 2.0, 2.11), limits)[0].failed
    assert not judge(unbounded("kl", 0.0, 0.048), limits)[0].failed
    (judgement,) = judge(unbounded("kl", 0.0, 0.05), limits)
    assert judgement.failed
    assert "5.127 % of perplexity, more than the limit of 5 %" in judgement.reason


def test_a_task_s_own_limit_is_in_the_unit_of_its_score() -> None:
    for metric, before in (("loss", 2.0), ("kl", 0.0), ("perplexity", 8.0)):
        limits = parse_limits(["text=0.3"])
        assert not judge(unbounded(metric, before, before + 0.29), limits)[0].failed
        assert judge(unbounded(metric, before, before + 0.31), limits)[0].failed


def test_a_certain_loss_of_perplexity_is_beyond_the_limit_with_its_whole_interval() -> None:
    base = {"text": documents([2.0] * 8, [9] * 8)}
    mixed = {
        "text": documents([2.0 + x for x in (0.3, -0.2, 0.4, -0.1, 0.2, 0, 0.3, -0.3)], [9] * 8)
    }
    much = {"text": documents([2.5 + x / 100 for x in range(8)], [9] * 8)}
    limits = parse_limits(["0.02"])
    assert judge(compare(base, mixed), limits)[0].failed
    assert not judge(compare(base, mixed), limits, certain=True)[0].failed
    assert judge(compare(base, much), limits, certain=True)[0].failed


def test_a_limit_that_holds_for_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"holds for none of text.*--max-drop text=0\.1"):
        judge(unbounded("loss", 2.0, 1.0), parse_limits(["0.02"]), learning={"text"})


def test_limits_of_tasks_that_are_not_there_are_refused() -> None:
    comparison = compared(facts=(80, 80))
    with pytest.raises(UserError, match="unknown task of a limit: 'fact'; did you mean 'facts'"):
        judge(comparison, parse_limits(["fact=0.1"]))
    half = compare({"facts": facts(80), "more": facts(9, name="more")}, {"facts": facts(80)})
    with pytest.raises(UserError, match="'more' has a limit and was scored for one of the two"):
        judge(half, parse_limits(["more=0.1"]))
    assert [j.reason for j in judge(half, [])][1] == "scored for one of the two only"


# ------------------------------------------------------------------------------------- JUnit


def test_junit_has_a_case_for_every_task() -> None:
    base = {"facts": facts(80), "skill": facts(9, name="skill"), "code": facts(50, name="code")}
    tuned = {
        "facts": facts(50, said="\x00 <b> & ]]> \ud800"),
        "skill": facts(30, name="skill"),
        "code": facts(50, name="code"),
    }
    judged = judge(compare(base, tuned), parse_limits(["0.02"]), learning={"skill"})
    text = junit(judged)
    root = ET.fromstring(text.encode())
    assert root.tag == "testsuites"
    (suite,) = root
    counts = [suite.get(key) for key in ("tests", "failures", "errors", "skipped")]
    assert counts == ["3", "1", "0", "1"]
    cases = {case.get("name"): case for case in suite}
    failure = cases["facts"].find("failure")
    assert failure is not None
    assert "lost 0.3 (interval" in str(failure.get("message"))
    assert "lost q50: 'Q: Which is 50?\\nA:': 'yes' ->" in str(failure.text)
    assert "and 10 more" in str(failure.text)
    skipped = cases["skill"].find("skipped")
    assert skipped is not None
    assert str(skipped.get("message")).startswith("no limit; clearly better")
    assert cases["code"].find("failure") is cases["code"].find("skipped") is None


def test_a_verdict_is_a_line_a_task() -> None:
    judged = judge(
        compared(facts=(80, 50), code=(50, 50), skill=(1, 9)),
        parse_limits(["0.02"]),
        learning={"skill"},
    )
    lines = verdict(judged).splitlines()
    assert lines[0].startswith("FAILED  facts: lost 0.3 (interval of the loss +0.2")
    assert lines[1].startswith("passed  code: lost nothing (interval")
    assert lines[2] == "no limit  skill"
    data = json.loads(json.dumps(to_json(judged), allow_nan=False))
    assert data["passed"] is False
    assert [task["limit"] for task in data["tasks"]] == ["0.02", "0.02", None]


# ------------------------------------------------------------------------------- files of scores


def saved(path: Path, *results: Any) -> Path:
    """As `forgetless eval --out` writes them."""
    scores = Scores(results)
    write_json(path, scores.metrics)
    write_records(scores, path)
    return path


def saved_run(folder: Path) -> Path:
    """A run's folder with scores of a skill and of facts."""
    run = RunFolder(folder)
    write_text(run.recipe, "base: pocket\n")
    write_json(run.record, {"tasks": {"skill": "learning", "facts": "forgetting"}})
    for phase, skill, known in (("base", 5, 80), ("final", 60, 70)):
        for result in (facts(skill, name="skill"), facts(known)):
            write_json(run.scores(phase, result.task), result.to_json())  # type: ignore[arg-type]
            items = [item.to_json() for item in result.items]
            write_jsonl(run.items(phase, result.task), items)  # type: ignore[arg-type]
    return folder


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = saved(tmp_path / "scores.json", facts(3, of=4), documents([2.0, 3.0], [5, 6]))
    numbers = json.loads(path.read_text())
    assert numbers["facts"]["accuracy"]["value"] == 0.75
    for named in (path, tmp_path / "scores.records.json"):
        found = read_scores(named).scores
        assert found["facts"] == facts(3, of=4)
        assert found["text"] == documents([2.0, 3.0], [5, 6])
    assert read_scores(path).learning == frozenset()


def test_a_run_s_scores_know_what_was_to_be_learned(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "lora-1")
    assert read_scores(run).learning == {"skill"}
    assert read_scores(run).scores["facts"].value == 0.7
    assert read_scores(run, "base").scores["facts"].value == 0.8
    assert read_scores(run / "scores" / "base").scores["facts"] == facts(80)
    with pytest.raises(UserError, match="has no step0 scores yet"):
        read_scores(run, "step0")


def test_what_holds_no_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no scores at .*gone"):
        read_scores(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no scores: give a file of 'forgetless eval --out'"):
        read_scores(tmp_path)
    path = saved(tmp_path / "scores.json", facts(3, of=4))
    (tmp_path / "scores.records.json").unlink()
    with pytest.raises(UserError, match=r"numbers of 'facts' alone.*keep scores\.records\.json"):
        read_scores(path)


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *map(str, arguments)])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return call


def test_compare_shows_and_judges_two_files(command: Command, tmp_path: Path) -> None:
    base = saved(tmp_path / "base.json", facts(80))
    tuned = saved(tmp_path / "tuned.json", facts(70, said="Berlin"))
    code, out, _ = command(base, tuned)
    assert code == 0
    assert "facts: lost (10)" in out
    assert out.count("Berlin") == 10
    code, out, _ = command(base, tuned, "--max-drop", "0.2", "--items", 1)
    assert code == 0
    assert out.count("Berlin") == 1
    assert "passed  facts: lost 0.1" in out
    files = ["--json", tmp_path / "c.json", "--junit", tmp_path / "c.xml"]
    code, out, _ = command(base, tuned, "--max-drop", "0.02", *files)
    assert code == 1
    assert "FAILED  facts: lost 0.1" in out
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["gate"]["passed"] is False
    assert written["rows"][0]["lost"][0]["after"] == "Berlin"
    assert ET.parse(tmp_path / "c.xml").getroot().get("failures") == "1"


def test_compare_of_a_run_is_its_base_against_itself(command: Command, tmp_path: Path) -> None:
    run = saved_run(tmp_path / "lora-1")
    code, out, _ = command(run, "--max-drop", "0.05")
    assert code == 1
    assert "FAILED  facts" in out
    assert "no limit  skill" in out
    assert command(run, run / "scores" / "final")[1] == command(run)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{base}", "{tuned}", "--max-drop", "many"), "a limit is 0.02, 5%"),
        (("{base}", "{tuned}", "--max-drop", "other=0.1"), "unknown task of a limit"),
        (("{base}", "{gone}"), "no scores at"),
        (("{base}", "{longer}"), "is not the same for the two: n 100 against 120"),
        (("{base}",), "give the scores to compare with .*; only a run has both"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {
        "base": saved(tmp_path / "base.json", facts(80)),
        "tuned": saved(tmp_path / "tuned.json", facts(70)),
        "longer": saved(tmp_path / "longer.json", facts(80, of=120)),
        "gone": tmp_path / "gone.json",
    }
    code, _, said = command(*(text.format(**places) for text in arguments))
    assert re.search(message, said)
    assert code == 2
    assert said.count("\n") == 1
