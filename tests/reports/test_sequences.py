"""The page of sequences: numbers for every colour, at any width, and what was lost of what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forgetless.core.files import read_json
from forgetless.reports import report
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
    own = tables[0].find_elements("css selector", "td.own")
    assert [cell.text for cell in own] == ["0.805", "0.905", "0.955"]
    assert {cell.value_of_css_property("outline-style") for cell in own} == {"solid"}
