"""The page of a search in a browser: every trial a mark, the front a line, a slice a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forgetless.core.files import write_json
from forgetless.reports import report

from .test_browser import browser, find, load, pytestmark  # noqa: F401 - fixtures by import

RATE = "training.learning_rate"


def point(trial: int, arm: str, settings: dict[str, Any], learned: float, kl: float) -> Any:
    def mean(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 3}

    return {
        "trial": trial,
        "arm": arm,
        "settings": settings,
        "chosen": settings,
        "learned": learned,
        "forgotten": kl,
        "learning": mean(learned),
        "forgetting": mean(kl),
        "runs": [f"run-{trial}"],
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials of two arms, of which two are on the front."""
    folder = tmp_path_factory.mktemp("pages") / "rates"
    trials = [
        point(0, "lora", {RATE: 0.1, "repair": None}, 0.9, 0.5),
        point(1, "lora", {RATE: 0.001, "repair": {"strength": 0.1}}, 0.5, 0.1),
        point(2, "<full>", {RATE: 0.01}, 0.4, 0.6),
        point(4, "<full>", {RATE: 0.02}, 0.3, 0.2),
    ]
    tasks = {
        "learning": {"task": "sums", "metric": "accuracy", "base": 0.1, "higher_is_better": True},
        "forgetting": {"task": "kl", "metric": "kl", "base": 0.0, "higher_is_better": False},
    }
    content = {
        "name": "rates",
        "objectives": tasks,
        "sampler": "tpe",
        "seeds": [None, 1, 2],
        "finished": 4,
        "failed": ["RuntimeError: the loss is <nan>"],
        "trials": trials,
        "front": [trials[1], trials[0]],
        "hypervolume": [0.1, 0.6, 0.6, 0.7],
        "importance": {"learning": {RATE: 0.75, "arm": 0.25}, "forgetting": {RATE: 1.0}},
    }
    write_json(folder / "report" / "search.json", content)
    (folder / "search.yaml").write_text("name: rates")
    return report(folder)


def test_every_trial_is_a_mark_and_the_front_a_line(browser: Any, page: Path) -> None:  # noqa: F811
    for width, scheme in ((390, "light"), (1400, "dark")):
        load(browser, page, width, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert len(find(browser, "#front-chart .point")) == 4
    labels = [m.get_attribute("aria-label") for m in find(browser, "#front-chart .point")]
    assert any("learning_rate 0.001" in label and "3 seeds" in label for label in labels)
    line = find(browser, "#front-chart polyline.front")[0].get_attribute("points").split()
    assert len(line) == 2
    (x1, y1), (x2, y2) = (tuple(map(float, place.split(","))) for place in line)
    # Less KL is further right; what learned less is further down.
    assert x1 > x2
    assert y1 > y2
    rows = [row.text.split() for row in find(browser, "#front tbody tr")]
    assert [row[0] for row in rows] == ["lora", "lora"]
    assert find(browser, "#decides tbody tr")[1].text.split() == ["arm", "25", "%", "0", "%"]
    assert "the loss is <nan>" in browser.find_element("css selector", ".lede").text


def test_a_slice_shows_the_trials_that_have_the_setting(browser: Any, page: Path) -> None:  # noqa: F811
    load(browser, page)
    assert len(find(browser, "#slices-chart .point")) == 4
    assert "log10 learning_rate" in browser.find_element("css selector", "#slices-chart").text
    settings = find(browser, "#slices-tools select")[0]
    settings.find_elements("css selector", "option")[1].click()
    shown = browser.find_element("css selector", "#slices-chart").text
    assert 'repair: 0 is {"strength": 0.1}' in shown
    assert len(find(browser, "#slices-chart .point")) == 1
