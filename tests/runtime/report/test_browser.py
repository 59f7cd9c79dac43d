"""The HTML report in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.interface.browser import BROWSER, Browser
from tests.helpers.interface.report_sample import sample_report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from rmsnorm_deploy.runtime.report import html

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")

_LONG = "model." + "decoder_block_with_a_very_long_name." * 8 + "norm"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = sample_report(passed=False)
    report["norms"][0]["path"] = report["culprits"][0]["name"] = report["depth"][0]["path"] = _LONG
    report["summary"] = f"<script>console.error('ran')</script><img src='https://example.org/x.png'> {_LONG}"
    report["provenance"]["candidate"]["files"][0]["name"] = _LONG
    path = tmp_path_factory.mktemp("report") / "report.html"
    html.write(report, path)
    return path


def _column(table: str, column: int) -> str:
    return f"[...document.querySelector('{table}').tBodies].map(b => b.rows[0].cells[{column}].textContent)"


_NORMS = "section:has(> #norms) table.sortable"


def _click(browser: Browser, title: str) -> None:
    found = f"[...document.querySelectorAll('{_NORMS} th button')].find(b => b.textContent === '{title}')"
    browser.value(f"{found}.click()")


@pytest.mark.parametrize("dark", [False, True])
def test_opens_from_disk_without_a_request_or_a_complaint(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.value("document.querySelector('h1').innerText").split() == ["✗", "Fail"]
    assert browser.value("document.querySelectorAll('.verdict img, .verdict script').length") == 0


def test_the_security_policy_stops_what_comes_from_elsewhere(browser: Browser, page: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    text = page.read_text(encoding="utf-8")
    changed.write_text(text.replace("</main>", "<img src='https://example.org/x.png'></main>"), encoding="utf-8")
    browser.open(changed)
    assert any("Content Security Policy" in json.dumps(event) for event in browser.complaints())


def test_a_heading_sorts_by_number_and_back(browser: Browser, page: Path) -> None:
    browser.open(page)
    before = browser.value(_column(_NORMS, 0))
    assert before == [str(n) for n in range(1, 10)]
    _click(browser, "max ULP")
    ulps = [float("inf") if text == "–" else float(text) for text in browser.value(_column(_NORMS, 5))]
    assert ulps == sorted(ulps, reverse=True)
    assert browser.value(_column(_NORMS, 0)) != before
    sorts = f"[...document.querySelectorAll('{_NORMS} > thead th')].map(h => h.getAttribute('aria-sort'))"
    assert browser.value(sorts) == [None, None, None, None, None, "descending", None]
    _click(browser, "max ULP")
    ulps_back = browser.value(_column(_NORMS, 5))
    assert ulps_back != [str(ulp) for ulp in ulps]
    _click(browser, "#")
    assert browser.value(_column(_NORMS, 0)) == before
    _click(browser, "norm")
    paths = browser.value(_column(_NORMS, 1))
    assert paths[0] == _LONG
    assert paths[-1] == "model.norm"
    assert browser.complaints() == []


def test_rows_keep_their_details_when_sorted(browser: Browser, page: Path) -> None:
    browser.open(page)
    pairs = f"""[...document.querySelectorAll('{_NORMS} > tbody')].map(b => [b.id, b.rows[0].cells[1].textContent,
        b.querySelector('details tbody td.reason').textContent].join('|')).sort()"""
    before = browser.value(pairs)
    _click(browser, "max ULP")
    assert browser.value(pairs) == before


def test_the_keyboard_reaches_the_skip_link_and_sorts(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab")
    assert browser.value("document.activeElement.className") == "skip"
    assert browser.value("document.activeElement.getBoundingClientRect().left") >= 0
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.value(f"document.querySelector('{_NORMS} th:nth-child(5) button').focus()")
    browser.press("Tab")
    assert browser.value("document.activeElement.textContent") == "max ULP"
    browser.press("Enter", text="\r")
    assert browser.value("document.activeElement.parentElement.getAttribute('aria-sort')") == "descending"


@pytest.mark.parametrize("width", [360, 1280])
def test_only_the_tables_scroll_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    if width == 360:
        assert browser.value(wide) > 0


def test_the_plots_follow_the_color_scheme(browser: Browser, page: Path) -> None:
    colors = []
    line = "document.querySelector('.wide svg path[style*=\"--candidate\"]')"
    for dark in (False, True):
        browser.open(page, dark=dark)
        colors.append(browser.value(f"getComputedStyle({line}).stroke"))
        assert browser.value("getComputedStyle(document.querySelector('.wide svg text')).fill") not in (
            "rgb(0, 0, 0)",
            browser.value("getComputedStyle(document.body).backgroundColor"),
        )
    assert colors[0] != colors[1]


def test_a_place_in_the_depth_plot_shows_its_norm(browser: Browser, page: Path) -> None:
    browser.open(page)
    found = browser.value("""(() => {
        const svg = document.querySelector('.wide svg');
        svg.scrollIntoView({ block: 'center' });
        const box = svg.querySelectorAll('.tip')[1].getBoundingClientRect();
        const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
        return hit.closest('.tip').querySelector('title').textContent;
    })()""")
    assert found.startswith("model.layers.0.input_layernorm, output: error ")
