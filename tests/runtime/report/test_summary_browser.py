"""The page of a recipe's results in a real browser, from a file and from its server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmsnorm_deploy.runtime.shipping.report_server import ReportServer
from tests.helpers.interface.browser import BROWSER, Browser
from tests.helpers.interface.shipped_sample import failed_step, sample_row, ship_sample, write_report

pytest.importorskip("jinja2")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")

_LONG = "model-" + "with-a-very-long-name-" * 6 + "end"
_BAD = "<script>console.error('ran')</script><img src='https://example.org/x.png'>" + "no_break" * 40


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of three rows, of which one fails in the last."""
    output = tmp_path_factory.mktemp("shipped") / "dist"
    for day in (1, 2, 3):
        rows = [sample_row(output, name, notes=[_BAD]) for name in ("first", _LONG, "third")]
        rows[0]["bytes"] = 10**day
        write_report(output, "first", limit=4.0 + day)
        write_report(output, _LONG, passed=day < 3)
        write_report(output, _LONG, file="report.before.json")
        if day == 3:
            rows[2] = failed_step(rows[2], "export", _BAD, "UsageError", 2)
        ship_sample(output, rows, f"2026-11-2{day}T08:15:00+00:00")
    return output


@pytest.fixture(scope="module")
def url(output: Path) -> Iterator[str]:
    server = ReportServer(output, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield f"http://{server.address}/"
    server.stop()
    thread.join(10)


@pytest.mark.parametrize("dark", [False, True])
def test_opens_from_disk_without_a_request_or_a_complaint(browser: Browser, output: Path, dark: bool) -> None:
    page = output / "summary.html"
    browser.open(page, dark=dark)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.value("document.querySelector('h1').innerText").split() == ["✗", "Fail"]
    assert browser.value("document.querySelectorAll('main img, main script').length") == 0


def test_the_served_pages_ask_no_one_else(browser: Browser, url: str) -> None:
    for page in (url, f"{url}drift?from=1&to=3", f"{url}first/report.html"):
        browser.open(page)
        assert browser.requests() == [page]
        assert browser.complaints() == []


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("path", ["", "drift?from=1&to=3"])
def test_only_the_tables_scroll_sideways(browser: Browser, url: str, path: str, width: int) -> None:
    browser.open(url + path, width=width)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert width == 1280 or browser.value(wide) > 0


def test_two_runs_are_chosen_and_compared(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.events.clear()
    browser.value("document.querySelector('#from').value = '1'; document.querySelector('form button').click()")
    browser.wait_for("Page.loadEventFired")
    assert browser.value("location.href") == f"{url}drift?from=1&to=3"
    assert browser.value("document.querySelector('h1').textContent") == "Run 1 and run 3"
    assert browser.value("document.querySelector('#from').value") == "1"


def test_a_heading_sorts_by_number(browser: Browser, output: Path) -> None:
    browser.open(output / "summary.html")
    table = "document.querySelector('section:has(> #rows) table')"
    browser.value(f"[...{table}.querySelectorAll('button')].find(b => b.textContent === 'error / limit').click()")
    cells = browser.value(f"[...{table}.tBodies].map(b => b.rows[0].cells[9].textContent)")
    assert cells[0] == "inf"
    assert cells[1].endswith(" %")
    assert cells[2] == "–"
    assert browser.complaints() == []


def test_colors_have_contrast_in_both_schemes(browser: Browser, output: Path) -> None:
    """WCAG 2.1, 1.4.3: at least 4.5 to 1 for text; the formula is that of its definition of contrast ratio."""
    contrast = """(() => {
        const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const light = text => { const [r, g, b] = channels(text); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = e => { for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(color)) return color;
        } };
        const found = [...document.querySelectorAll('.mark, .note, .aside, h1, th, td, a, button, .kind')].map(e => {
            const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        });
        return Math.min(...found);
    })()"""
    for dark in (False, True):
        browser.open(output / "summary.html", dark=dark)
        assert browser.value(contrast) >= 4.5
