"""The report in a real browser: no error, no request, and usable by keyboard, in the dark and on paper.

Needs Chromium and its driver (Debian: chromium, chromium-driver); with B2S_REQUIRE_BROWSER=1 their absence
is a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from b2s.report.page import render
from tests.reports import synthetic

_OPTIONS: Final = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
_CONTRAST: Final = """
const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
const luminance = (color) => {
  const linear = (c) => (c / 255 <= .03928 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4);
  const [r, g, b] = channels(color).map(linear);
  return .2126 * r + .7152 * g + .0722 * b;
};
const paper = getComputedStyle(document.body).backgroundColor;
const ink = getComputedStyle(document.querySelector(arguments[0])).color;
const [a, b] = [luminance(ink), luminance(paper)];
return [paper, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];"""

Show = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        missing = "there is no Chromium with its driver (Debian: chromium, chromium-driver)"
        if os.environ.get("B2S_REQUIRE_BROWSER") == "1":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in _OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield started
    started.quit()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Show:
    """Opens a report of so many procedures."""

    def open_(count: int, *, since: str | None = None, width: int = 1400) -> Any:
        path = tmp_path / f"{count}.html"
        path.write_text(render(synthetic(count, since=since)), encoding="utf-8")
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get_log("browser")
        browser.get(path.as_uri())
        return browser

    return open_


def emulate(page: Any, media: str = "", **features: str) -> None:
    named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": named})


def texts(page: Any, selector: str) -> list[str]:
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector
    )
    return found


def focused(page: Any) -> str:
    text: str = page.execute_script("return document.activeElement.textContent.trim().slice(0, 60)")
    return text


def press(page: Any, *keys: str) -> None:
    page.switch_to.active_element.send_keys(*keys)


@pytest.mark.parametrize("count", [1, 5, 500])
@pytest.mark.parametrize("since", [None, "2026-11-28"])
def test_it_opens_without_an_error_and_asks_nobody_for_anything(
    show: Show, count: int, since: str | None
) -> None:
    page = show(count, since=since)
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)") == []
    assert page.execute_script("return [window.hacked, document.images.length, document.scripts.length]") == [
        None,
        0,
        1,
    ]
    assert len(texts(page, ".graph .node")) == count
    assert len(texts(page, "#procedures tbody tr")) == count
    assert page.title.startswith("bronze_to_silver: ")


def test_the_policy_of_the_page_stops_a_script_that_was_smuggled_in(show: Show, tmp_path: Path) -> None:
    """Escaping is the first line; this is the second."""
    page = show(1)
    smuggled = tmp_path / "smuggled.html"
    text = (tmp_path / "1.html").read_text(encoding="utf-8")
    smuggled.write_text(
        text.replace("</main>", "<script>window.hacked = 1</script></main>"), encoding="utf-8"
    )
    page.get(smuggled.as_uri())
    assert page.execute_script("return window.hacked") is None
    assert "Content Security Policy" in str(page.get_log("browser"))


@pytest.mark.parametrize("width", [600, 1000, 1400])
@pytest.mark.parametrize("count", [5, 500])
def test_only_what_is_large_scrolls_in_its_own_frame(show: Show, count: int, width: int) -> None:
    page = show(count, width=width)
    over = page.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert over <= 0
    heights = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].map((one) => one.clientHeight)"
    )
    assert max(heights) <= 700 or count < 30


def test_a_table_is_sorted_by_mouse_and_by_keyboard(show: Show) -> None:
    page = show(40)
    head = "#procedures th:nth-child(7)"
    rows = "[...document.querySelectorAll('#procedures tbody tr')]"
    value = f"return {rows}.map((row) => Number(row.cells[6].dataset.value))"
    page.find_element("css selector", f"{head} [role=button]").click()
    rising = page.execute_script(value)
    assert rising == sorted(rising)
    page.execute_script("document.querySelector(arguments[0]).focus()", f"{head} [role=button]")
    press(page, Keys.ENTER)
    assert page.execute_script(value) == rising[::-1]
    assert page.execute_script("return document.querySelector(arguments[0]).ariaSort", head) == "descending"
    press(page, Keys.SPACE)
    assert page.execute_script(value) == rising


def test_a_table_is_filtered_by_what_its_rows_contain(show: Show) -> None:
    page = show(40)
    page.find_element("css selector", "#procedures .filter input").send_keys("DIM_003")
    shown = page.execute_script(
        "return [...document.querySelectorAll('#procedures tbody tr')].filter((row) => row.checkVisibility())"
        ".map((row) => row.cells[0].textContent)"
    )
    assert shown == ["silver.dim_003"]


def test_everything_is_reached_by_keyboard(show: Show) -> None:
    page = show(5)
    press(page, Keys.TAB)
    assert focused(page) == "Skip to the content"
    place = page.execute_script("return document.activeElement.getBoundingClientRect().left")
    assert place >= 0, "it shows when it has the focus"
    reached = []
    for _ in range(60):
        press(page, Keys.TAB)
        reached.append(focused(page))
    assert "What failed" in reached
    assert [text for text in reached if text.startswith("silver.dim_000")], "a node of the graph is a link"
    page.execute_script("document.querySelector('.graph .node').focus()")
    press(page, Keys.ENTER)
    assert page.execute_script("return document.querySelector(':target').textContent") in texts(
        page, "#procedures tbody td:first-child"
    )


def test_it_is_light_or_dark_as_the_reader_likes_and_readable_in_both(show: Show) -> None:
    page = show(5)
    papers = {}
    for scheme in ("light", "dark"):
        emulate(page, prefers_color_scheme=scheme)
        for selector in ("body", "header p", ".unusual", "nav a", ".tile.bad dd", ".share"):
            papers[scheme], contrast = page.execute_script(_CONTRAST, selector)
            assert contrast >= 4.5, (scheme, selector)
    assert papers["light"] != papers["dark"]


def test_on_paper_everything_is_there_and_nothing_is_cut_off(show: Show) -> None:
    page = show(60)
    emulate(page, "print", prefers_color_scheme="dark")
    assert page.execute_script(_CONTRAST, "body")[0] == "rgb(255, 255, 255)"
    hidden = page.execute_script(
        "return [...document.querySelectorAll('nav, .filter')].every((one) => !one.checkVisibility())"
    )
    assert hidden
    cut = page.execute_script(
        "return [...document.querySelectorAll('.scroll')]"
        ".filter((one) => one.scrollHeight > one.clientHeight + 1).length"
    )
    assert cut == 0
    assert len(page.print_page()) > 10_000


def test_without_its_script_the_page_is_whole(show: Show) -> None:
    page = show(5)
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.refresh()
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    heads = page.find_elements("css selector", "#procedures th")
    assert [one.text for one in heads][:2] == ["procedure", "type"]
    assert len(page.find_elements("css selector", "#procedures tbody tr")) == 5
