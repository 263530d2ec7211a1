"""Every kind of page in a real browser: no errors, hover, legend, dark mode, narrow and wide."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forgetless.data.pictures import thumbnail
from forgetless.reports import report, write_evaluation

from .test_aftercare import with_aftercare
from .test_course import study
from .test_page import Sheet, facts, make_study, probed, scored, two_sheets, with_pictures

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser: needs the packages chromium and chromium-driver"
)

WIDTHS = (390, 1400)
KINDS = ("durations", "rates", "evaluation", "one run", "no curves", "aftercare", "pictures")
PLANES = ("durations", "rates", "one run", "no curves", "aftercare", "pictures")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind, by its name."""
    root = tmp_path_factory.mktemp("pages")
    rates = two_sheets({"lora": 0.8, "pissa": 0.5}, {"lora": 0.5, "pissa": 0.4})
    thumbnails = [thumbnail(f"pocket:digit {i % 10}/test/{i}") for i in range(30)]
    folders = {
        "durations": study(root / "durations"),
        "rates": make_study(root / "rates", rates, ["lora", "pissa"], rates=(1e-3, 2e-3)),
        "one run": probed(root / "one"),
        "no curves": make_study(root / "bare", rates, ["lora", "pissa"]),
        "evaluation": root / "evaluation",
        "aftercare": with_aftercare(make_study(root / "after", rates, ["lora", "pissa"])),
        "pictures": with_pictures(root / "pictures", thumbnails),
    }
    for log in folders["no curves"].glob("*/log.jsonl"):
        log.unlink()
    for name, known in (("tuned", 8), ("other", 13)):
        after = scored([i >= known for i in range(20)])
        write_evaluation(folders["evaluation"], "pocket", name, scored([True] * 20), after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # figures take the longest
        return {kind: report(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, which keeps what a page writes on its console."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def load(browser: Any, page: Path, width: int = 1400, scheme: str = "light") -> None:
    """Open a page, and wait until its charts are drawn; whatever it logs is an error."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())
    browser.execute_async_script(
        "const done = arguments[0], charts = [...document.querySelectorAll('figure')];"
        "const wait = () => charts.every((c) => c.querySelector('svg')) ? done()"
        " : requestAnimationFrame(wait); wait();"
    )
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def find(browser: Any, selector: str) -> list[Any]:
    """The elements of a CSS selector."""
    return list(browser.find_elements("css selector", selector))


def hover(browser: Any, element: Any) -> None:
    """Bring the pointer over an element, wherever it lies on the page."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    webdriver.ActionChains(browser).move_to_element(element).perform()


def lightness(browser: Any) -> int:
    """Of the page's background, 0 to 255."""
    colour = "return getComputedStyle(document.body).backgroundColor"
    return int(browser.execute_script(colour).partition("(")[2].split(",")[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_load_without_an_error_and_fit_the_width(
    browser: Any, pages: dict[str, Path], kind: str, width: int
) -> None:
    for scheme in ("light", "dark"):
        load(browser, pages[kind], width, scheme)
        root = "document.documentElement"
        assert browser.execute_script(f"return {root}.scrollWidth") <= width
        assert (lightness(browser) > 200) == (scheme == "light")
    charts = {figure.get_attribute("id") for figure in find(browser, "figure.chart svg, figure")}
    assert ("plane-chart" in charts) == (kind in PLANES)
    assert ("course-chart" in charts) == (kind == "durations")
    assert ("curves-chart" in charts) == (kind not in ("evaluation", "no curves"))
    assert ("probes-chart" in charts) == (kind == "one run")
    assert ("aftercare-chart" in charts) == ("layers-chart" in charts) == (kind == "aftercare")


@pytest.mark.parametrize("kind", PLANES)
def test_a_mark_shows_its_numbers(browser: Any, pages: dict[str, Path], kind: str) -> None:
    load(browser, pages[kind])
    hover(browser, find(browser, "#plane-chart .point use:not(.minor)")[0])
    [card] = find(browser, "#plane-chart .tip")
    assert "lora" in card.text
    assert "%" in card.text
    hover(browser, find(browser, "h1")[0])
    assert not card.is_displayed()


def test_the_curves_show_the_losses_at_a_step(browser: Any, pages: dict[str, Path]) -> None:
    load(browser, pages["rates"])
    hover(browser, find(browser, "#curves-chart .area")[0])
    [card] = find(browser, "#curves-chart .tip")
    assert card.text.startswith("step ")
    assert {"lora", "pissa"} <= set(card.text.split())


def test_probes_show_what_ended_a_run(browser: Any, pages: dict[str, Path]) -> None:
    load(browser, pages["one run"])
    hover(browser, find(browser, "#probes-chart .point use")[1])
    [card] = find(browser, "#probes-chart .tip")
    assert "Forgetting: distance from the base" in card.text


@pytest.mark.parametrize("chart", ["plane", "course", "curves"])
def test_the_legend_switches_an_arm_off_in_every_chart(
    browser: Any, pages: dict[str, Path], chart: str
) -> None:
    load(browser, pages["durations"])
    drawn = "#plane-chart .point, #course-chart .point, #curves-chart .curve"
    before = len(find(browser, drawn))
    button = find(browser, f"#{chart}-legend button")[0]
    browser.execute_script("arguments[0].click()", button)
    assert button.get_attribute("aria-pressed") == "false"
    assert len(find(browser, drawn)) == before // 2
    browser.execute_script("arguments[0].click()", button)
    assert len(find(browser, drawn)) == before


def test_the_button_turns_light_into_dark_and_back(browser: Any, pages: dict[str, Path]) -> None:
    load(browser, pages["evaluation"])
    seen = []
    for _ in range(2):
        find(browser, "#theme")[0].click()
        seen.append(lightness(browser) > 200)
    assert seen == [False, True]


def test_lost_facts_are_found_by_a_search(browser: Any, pages: dict[str, Path]) -> None:
    load(browser, pages["evaluation"])
    question, _ = facts(20)[2]
    find(browser, ".finder input[type=search]")[0].send_keys(question)
    rows = [row.text for row in find(browser, ".cases li:not(.head)")]
    assert len(rows) == 1
    assert rows[0].startswith(question)
    assert "Atlantis" in rows[0]


def test_lost_pictures_are_seen_with_what_they_are_taken_for(
    browser: Any, pages: dict[str, Path]
) -> None:
    load(browser, pages["pictures"], 390)
    cards = find(browser, "#flips .gallery li:not(.head)")
    assert len(cards) == 24
    counted = find(browser, "#flips .pick + .note")[0].text
    assert re.fullmatch(r"Most often taken: (bars for dots|dots for bars) \(1\d\), .*\.", counted)
    shown = cards[0].find_element("css selector", "svg.picture")
    assert shown.get_attribute("aria-label") in ("bars", "dots")
    assert shown.size == {"width": 64, "height": 64}
    other = {"bars": "dots", "dots": "bars"}[shown.get_attribute("aria-label")]
    assert f"now taken for {other}" in cards[0].text
    colours = (
        "const done = arguments[1], picture = document.querySelector("
        "arguments[0].querySelector('use').getAttribute('href')), image = new Image();"
        "image.onload = () => done([image.naturalWidth, image.naturalHeight]);"
        "image.src = picture.getAttribute('href');"
    )
    assert browser.execute_async_script(colours, shown) == [16, 16]


def test_a_head_sorts_its_table(browser: Any, pages: dict[str, Path]) -> None:
    load(browser, pages["rates"])
    table = find(browser, "#numbers table.sortable")[0]
    heads = table.find_elements("css selector", "button.sort")
    rate = next(i for i, head in enumerate(heads) if head.text == "rate")

    def column() -> list[float]:
        rows = table.find_elements("css selector", "tbody:last-child tr")
        return [float(row.find_elements("css selector", "th, td")[rate].text) for row in rows]

    for reverse in (True, False):
        browser.execute_script("arguments[0].click()", heads[rate])
        assert column() == sorted(column(), reverse=reverse)


def test_a_plane_of_losses_runs_from_worse_to_better(browser: Any, tmp_path: Path) -> None:
    sheets = [
        Sheet("maths", "learning", 7.0, {"lora": 3.0, "pissa": 2.0}, 100, "loss", False),
        Sheet("stories", "forgetting", 1.2, {"lora": 1.5, "pissa": 2.5}, 100, "loss", False),
    ]
    load(browser, report(make_study(tmp_path / "s", sheets, ["lora", "pissa"])))
    places = {
        mark.get_attribute("aria-label").split(":")[0]: mark.rect
        for mark in find(browser, "#plane-chart .point")
    }
    assert places["lora"]["x"] > places["pissa"]["x"]  # it kept more
    assert places["lora"]["y"] > places["pissa"]["y"]  # and learned less, so it is lower
