"""The page of sequences: numbers for every colour, at any width, and what was lost of what."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.files import read_json
from forgetless.reports import report
from forgetless.studies.sequence import COMPARED, pairs
from tests.sequences import scored

from .test_browser import browser, find, load, pytestmark  # noqa: F401 - fixtures by import

R = [
    [1.0, 0.0, 0.1, 0.0],
    [0.9, 0.8, 0.1, 0.0],
    [0.6, 0.7, 0.9, 0.2],
    [0.5, 0.4, 0.7, 0.95],
]
KEPT = [R[0], [1.0, 0.8, 0.1, 0.0], [1.0, 0.8, 0.8, 0.1], [1.0, 0.8, 0.8, 0.9]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms with two seeds each."""
    folder = tmp_path_factory.mktemp("pages") / "skills"
    return report(scored(folder, {"lora": R, "<null>": KEPT}))


def test_the_numbers_are_those_of_the_matrices(page: Path) -> None:
    found = read_json(page.parent / "sequence.json")
    first = found["sequences"][0]
    assert first["R"] == R
    assert first["metrics"]["ACC"] == pytest.approx((0.4 + 0.7 + 0.95) / 3)
    assert first["metrics"]["BWT"] == pytest.approx(((0.4 - 0.8) + (0.7 - 0.9)) / 2)
    assert first["metrics"]["FWT"] == pytest.approx(((0.1 - 0.1) + (0.2 - 0.0)) / 2)
    assert first["metrics"]["knowledge lost"] == pytest.approx(0.5)
    assert [each["most_after"] for each in first["lost"]] == ["b", "c", "c", None]
    text = page.read_text()
    assert "&lt;null&gt;" in text
    assert "<null>" not in text
    assert "b (2 of 2)" in text


def test_a_table_has_a_row_for_each_sequence(page: Path) -> None:
    with (page.parent / "sequences.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"], row["answers"]) for row in rows] == [
        (arm, seed, "of all") for arm in ("lora", "<null>") for seed in "01"
    ]
    assert float(rows[0]["ACC"]) == pytest.approx((0.4 + 0.7 + 0.95) / 3)
    assert rows[0]["bound"] == ""


def test_every_two_arms_are_compared_over_the_same_orders_and_seeds(page: Path) -> None:
    found = {pair["metric"]: pair for pair in read_json(page.parent / "sequence.json")["pairs"]}
    assert list(found) == ["ACC", "knowledge lost", "forgetting"]
    assert {(pair["arm"], pair["other"], pair["n"]) for pair in found.values()} == {
        ("lora", "<null>", 2)
    }
    differences = [pair["difference"] for pair in found.values()]
    assert differences == pytest.approx([(0.4 - 0.8 + 0.7 - 0.8 + 0.95 - 0.9) / 3, 0.5, 0.3])
    assert {pair["verdict"] for pair in found.values()} == {"worse"}
    row = '<th scope="row">&lt;null&gt;</th><td>lora</td><td>none</td><td>none</td>'
    assert row in page.read_text()


def test_arms_that_differ_by_chance_alone_are_level() -> None:
    """Of 40 studies of four arms that are all the same but for noise, in at most 5 one is ahead."""
    draw, ahead = random.Random(0), 0
    for number in range(40):
        chains: list[dict[str, Any]] = [
            {
                "arm": arm,
                "order": order,
                "seed": seed,
                "metrics": {metric: draw.gauss(0.5, 0.1) for metric in COMPARED},
            }
            for arm in "wxyz"
            for order in "ab"
            for seed in range(3)
        ]
        found = [pair for pair in pairs(chains) if pair["metric"] == COMPARED[number % 3]]
        assert len(found) == 6
        ahead += any(pair["verdict"] != "level" for pair in found)
    assert ahead <= 5
    for each in chains:  # and a true difference is seen
        each["metrics"]["ACC"] += each["arm"] == "z"
    seen = {(p["arm"], p["other"]): p["verdict"] for p in pairs(chains) if p["metric"] == "ACC"}
    assert seen["w", "z"] == seen["x", "z"] == seen["y", "z"] == "worse"
    assert seen["w", "x"] == "level"


def test_a_bound_is_compared_by_seeds_and_what_is_unknown_is_level() -> None:
    def case(arm: str, order: str, seed: int, acc: float | None, **more: Any) -> dict[str, Any]:
        metrics = {"ACC": acc, "knowledge lost": 0.1, "forgetting": None if more else 0.2}
        return {"arm": arm, "order": order, "seed": seed, "metrics": metrics, **more}

    chains = [case("lora", order, seed, 0.5 + 0.1 * seed) for order in "ab" for seed in (0, 1, 2)]
    chains += [case("joint", "a", seed, 0.9 + 0.1 * seed, bound="joint") for seed in (0, 1, 2)]
    acc, lost, forgetting = pairs(chains)
    assert (acc["n"], acc["verdict"], acc["difference"]) == (3, "worse", pytest.approx(-0.4))
    assert (lost["difference"], lost["verdict"]) == (0.0, "level")
    assert (forgetting["difference"], forgetting["p"]) == (None, 1.0)


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_and_every_cell_has_its_number(
    browser: Any,  # noqa: F811
    page: Path,
    width: int,
) -> None:
    for scheme in ("light", "dark"):
        load(browser, page, width, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    tables = find(browser, "table.matrix")
    assert len(tables) == 2
    rows = [row.text.split() for row in tables[0].find_elements("css selector", "tbody tr")]
    assert rows[0] == ["base", "1.005", "0.005", "0.105", "0.005"]
    assert rows[3] == ["after", "c", "0.505", "0.405", "0.705", "0.955"]
    # The whole table is on a narrow screen, without scrolling.
    inside = "return arguments[0].scrollWidth <= arguments[0].parentElement.clientWidth + 1"
    assert browser.execute_script(inside, tables[0])
    # A line for each task's scores, and the ends of the three; what is no share has its own view.
    chart = find(browser, "#along-chart svg")[0]
    assert len(chart.find_elements("css selector", "polyline.curve")) == 3
    assert len(chart.find_elements("css selector", "polyline.front")) == 3
    assert len(chart.find_elements("css selector", "g.point")) == 3 * 4
    own = tables[0].find_elements("css selector", "td.own")
    assert [cell.text for cell in own] == ["0.805", "0.905", "0.955"]
    assert {cell.value_of_css_property("outline-style") for cell in own} == {"solid"}
