"""The HTML report: what is on the page, in which order, escaped, the same every time, and readable."""

from __future__ import annotations

import builtins
import copy
import re
import time
from pathlib import Path
from typing import Any

import pytest
from lxml import etree
from lxml import html as parser

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.runtime.report.text import exact, percent, short
from tests.helpers.interface.report_sample import sample_report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from rmsnorm_deploy.runtime.report import html

_SECTIONS = ["culprits", "outputs", "depth", "norms", "segments", "histograms", "worst", "notes", "refusals",
             "deviations", "provenance", "again"]  # fmt: skip


@pytest.fixture(scope="module")
def failing() -> str:
    return html.render(sample_report(passed=False))


def _sections(page: str) -> list[str]:
    return parser.document_fromstring(page).xpath("//h2/@id")


def _text(page: str, path: str) -> str:
    return " ".join(parser.document_fromstring(page).xpath(path)[0].text_content().split())


@pytest.mark.parametrize(("passed", "word", "sign"), [(True, "Pass", "✓"), (False, "Fail", "✗")])
def test_the_verdict_comes_first(passed: bool, word: str, sign: str) -> None:
    report = {**sample_report(passed), "model": "out/model.onnx"}
    page = html.render(report)
    main = parser.document_fromstring(page).get_element_by_id("main")
    assert main[0].tag == "header"
    assert " ".join(main[0].text_content().split()) == (
        f"rmsnorm validate out/model.onnx against {report['settings']['against']} {sign} {word} {report['summary']}"
    )
    assert _text(page, "//title") == f"{word} – rmsnorm validate"


def test_the_sections_are_in_order(failing: str) -> None:
    assert _sections(failing) == _SECTIONS
    assert _sections(html.render(sample_report())) == _SECTIONS[1:]


def test_a_small_report_has_no_empty_sections() -> None:
    row = {"case": "1x1", "name": "y", "passed": False, "reason": "shape mismatch", "figures": None,
           "baseline_figures": None}  # fmt: skip
    page = html.render({"schema": "rmsnorm_deploy.bisect/6", "verdict": "fail", "outputs": [row]})
    assert _sections(page) == ["outputs", "notes", "refusals", "again"]
    assert _text(page, "//section[h2/@id='notes']") == "Notes none"
    assert _text(page, "//section[h2/@id='refusals']").endswith(" none")
    assert _text(page, "//pre") == "rmsnorm validate --replay report.json"
    assert "shape mismatch" in _text(page, "//section[h2/@id='outputs']//tbody")


def test_the_figures_are_on_the_page(failing: str) -> None:
    report = sample_report(passed=False)
    figures = report["outputs"][0]["figures"]
    document = parser.document_fromstring(failing)
    cells = document.xpath("//section[h2/@id='outputs']//tbody")[0].xpath("./tr[1]/td[contains(@class, 'n')]")
    values = [cell.get("data-value") for cell in cells]
    assert values[:2] == ["1", str(figures["max_ulp"])]
    assert cells[1].text == short(figures["max_ulp"])
    assert values[2] == str(report["outputs"][0]["baseline_figures"]["max_ulp"])
    assert cells[-2].text == "93.00 %"
    assert float(cells[9].text) == pytest.approx(1 - figures["cosine"], rel=0.01)
    row = document.get_element_by_id("norm-5")
    assert [cell.text_content().strip() for cell in row.xpath("./tr[1]/*")][:6] == [
        "5", "model.layers.2.input_layernorm", "✗ fail", "plain", "large", "inf",
    ]  # fmt: skip
    assert len(row.xpath(".//table/tbody/tr")) == 8
    assert row.xpath(".//details/@open") == [""]
    assert document.xpath("//ul[@class='culprits']//a/@href") == ["#norm-5"]
    assert "Created 2026-11-23T04:00:00+00:00" in _text(failing, "//footer")


def test_nested_provenance_and_settings_are_shown(failing: str) -> None:
    text = _text(failing, "//section[h2/@id='provenance']")
    assert "model.onnx.data" in text
    assert "09ab" * 16 in text
    assert "against Qwen/Qwen3-0.6B".replace(" ", "") in _text(failing, "//section[h2/@id='again']").replace(" ", "")


def test_a_second_call_of_a_norm_is_named() -> None:
    report = sample_report(norms=2)
    report["norms"][1].update(path=report["norms"][0]["path"], call=1)
    names = parser.document_fromstring(html.render(report)).xpath("//tbody[starts-with(@id, 'norm-')]/tr/th")
    assert [name.text_content() for name in names] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.input_layernorm (call 2)",
    ]


def _with_text_everywhere(value: Any, text: str) -> Any:
    """The report with `text` put behind every string but those that have a meaning to the page."""
    if isinstance(value, dict):
        kept = ("schema", "verdict", "created", "kind", "side", "ulp_at_most")
        return {
            key + (text if key in ("torch", "seed") else ""): part if key in kept else _with_text_everywhere(part, text)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [_with_text_everywhere(part, text) for part in value]
    return value + text if isinstance(value, str) and value != "inf" else value


def test_everything_is_escaped() -> None:
    hostile = "<script>alert(1)</script>\"'&amp;]]></style><b onclick=x>"
    page = html.render(_with_text_everywhere(sample_report(passed=False, norms=3), hostile))
    document = parser.document_fromstring(page)
    assert len(document.xpath("//script")) == 1
    assert len(document.xpath("//style")) == 1
    assert document.xpath("//b | //*[@onclick]") == []
    plain = parser.document_fromstring(html.render(sample_report(passed=False, norms=3)))
    # The text may add no element: only the breaks that paths have anyway.
    assert len(document.xpath("//*[not(self::wbr)]")) == len(plain.xpath("//*[not(self::wbr)]"))
    assert "&lt;script&gt;alert(1)" in page
    assert hostile in "".join(document.xpath("//tbody[@id='norm-1']/tr[1]/th")[0].itertext())


def test_characters_that_a_file_cannot_contain_are_replaced(tmp_path: Path) -> None:
    report = sample_report(norms=1)
    report["summary"] = "nul \x00 and half a surrogate pair \ud800"
    html.write(report, tmp_path / "r.html")
    assert "nul \ufffd and half a surrogate pair \ufffd" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_same_report_gives_the_same_bytes(failing: str) -> None:
    import matplotlib as mpl

    # A person's own settings of matplotlib may not show.
    with mpl.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.edgecolor": "red", "axes.grid": False}):
        assert html.render(copy.deepcopy(sample_report(passed=False))) == failing


def test_only_the_time_differs_between_two_runs(failing: str) -> None:
    report = sample_report(passed=False)
    report["created"] = "2027-01-01T00:00:00+00:00"
    assert html.render(report).replace(report["created"], "2026-11-23T04:00:00+00:00") == failing


def test_nothing_is_loaded_from_elsewhere(failing: str) -> None:
    document = parser.document_fromstring(failing)
    policy = document.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"]
    assert all(link.startswith(("#", "data:")) for link in document.xpath("//@href | //@src"))
    assert "http://" not in failing
    assert "https://" not in failing


def test_ids_are_unique_and_every_reference_has_one(failing: str) -> None:
    document = parser.document_fromstring(failing)
    ids = document.xpath("//@id")
    assert len(ids) == len(set(ids))
    assert len(document.xpath("//svg")) == 4
    references = {link[1:] for link in document.xpath("//@href") if link.startswith("#")}
    references |= set(re.findall(r"url\(#([^)]+)\)", failing)) | set(document.xpath("//@aria-labelledby"))
    assert references
    assert references <= set(ids)


def test_the_depth_plot_names_every_row_and_marks_the_culprit(failing: str) -> None:
    report = sample_report(passed=False)
    svg = parser.document_fromstring(failing).xpath("//section[h2/@id='depth']//svg")[0]
    titles = svg.xpath(".//title/text()")
    assert len(titles) == len(report["depth"])
    assert titles[0].startswith("model.layers.0.input_layernorm, input: error ")
    assert titles[9].startswith("model.layers.2.input_layernorm, output: error 0.003,")
    assert "introduced 0.003" in titles[9]
    assert etree.tostring(svg, encoding="unicode").count("var(--fail)") == 1
    assert not re.search(r"#0101", failing)


def test_odd_errors_can_be_drawn() -> None:
    report = sample_report(norms=3)
    for row, error in zip(report["depth"], (0.0, "inf", "nan", 1e-320, 1e308, 0.0), strict=True):
        row.update(error=error, baseline_error=None, introduced=None)
    page = html.render(report)
    titles = parser.document_fromstring(page).xpath("//section[h2/@id='depth']//svg//title/text()")
    assert [re.search(r"error (\S+),", title)[1] for title in titles] == ["0", "inf", "nan", "1e-320", "1e308", "0"]  # type: ignore[index]
    report["depth"] = [{**row, "error": 0.0} for row in report["depth"]]
    assert "<svg" in html.render(report)


def test_at_most_four_histograms_those_of_the_largest_errors() -> None:
    report = sample_report()
    rows = [copy.deepcopy(report["outputs"][0]) for _ in range(6)]
    for place, row in enumerate(rows):
        row["name"] = f"y{place}"
        row["figures"]["max_ulp"] = [1.0, 7.0, "inf", 3.0, 2.0, 9.0][place]
    rows[0]["figures"]["histogram"] = None
    report["outputs"] = rows
    names = parser.document_fromstring(html.render(report)).xpath("//figcaption[starts-with(@id, 'histogram-')]")
    assert [name.text_content().split()[-1] for name in names] == ["y2", "y5", "y1", "y3"]


def test_the_bars_give_their_counts(failing: str) -> None:
    counts = sample_report(passed=False)["outputs"][0]["figures"]["histogram"]["count"]
    titles = (
        parser.document_fromstring(failing).xpath("//section[h2/@id='histograms']//svg")[0].xpath(".//title/text()")
    )
    assert titles[0] == f"candidate: {counts[0]:,} of {sum(counts):,} elements, at most 0 ULP"
    assert titles[1] == f"candidate: {counts[1]:,} of {sum(counts):,} elements, at most 0.25 ULP and more than 0"
    assert any(title.startswith("PyTorch: ") for title in titles)


def test_the_worst_elements_start_with_what_failed() -> None:
    report = sample_report(passed=False)
    report["norms"][0]["inputs"][0]["figures"]["worst"][0]["ulp"] = 1e9
    rows = parser.document_fromstring(html.render(report)).xpath("//section[h2/@id='worst']//tbody/tr")
    assert len(rows) == 30
    ulps = [float(row[-1].get("data-value")) for row in rows]
    assert ulps == sorted(ulps, reverse=True)
    assert ulps[0] < 1e9
    report = sample_report()
    report["outputs"][0]["figures"]["worst"][0].update(value=1.00000012, reference=1.0, ulp="inf")
    first = parser.document_fromstring(html.render(report)).xpath("//section[h2/@id='worst']//tbody/tr")[0]
    assert [cell.text_content() for cell in first][1:4] == ["1x1, logits", "[0, 0, 0]", "1.00000012"]


def test_two_hundred_norms_are_quick_and_small() -> None:
    report = sample_report(passed=False, norms=200)
    start = time.process_time()
    page = html.render(report)
    assert time.process_time() - start < 5.0
    assert len(page.encode()) < 3_000_000
    assert page.count('<tbody id="norm-') == 200


def _colors(page: str) -> list[dict[str, str]]:
    """The variables of the light and of the dark theme."""
    return [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", page, re.S)
    ][:2]


def _luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_what_cannot_be_judged_is_neither_a_pass_nor_a_fail() -> None:
    report = sample_report(norms=1)
    report["verdict"] = "cannot be judged"
    report["outputs"][0].update(passed=None, reason="there is no baseline")
    report["unjudged"] = [{"reason": "there is no <baseline>", "parts": ["output logits of 1x1"]}]
    report["untried"] = ["lengths past 4096: add --thorough"]
    report["warnings"] = ["output logits: PyTorch itself in float16 is off by 30%"]
    page = html.render(report)
    assert '<header class="verdict unjudged">' in page
    assert "Cannot be judged</h1>" in page
    assert page.count(">not judged<") + page.count("</span> not judged</span>") == 1
    assert "there is no &lt;baseline&gt;" in page
    assert "<li>lengths past 4096: add --thorough</li>" in page
    warning = page.index("Warning: output logits: PyTorch itself in float16 is off by 30%")
    assert page.index("</h1>") < warning < page.index('class="summary"')


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_colors_meet_wcag_aa(failing: str, theme: int) -> None:
    colors = _colors(failing)[theme]
    assert len(colors) == 14
    for ground in ("page", "panel"):
        for ink in ("text", "muted", "link", "pass", "unjudged", "fail"):
            assert _contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
    for verdict in ("pass", "unjudged", "fail"):
        assert _contrast(colors[verdict], colors[f"{verdict}-panel"]) >= 4.5
        assert _contrast(colors["text"], colors[f"{verdict}-panel"]) >= 4.5
    for line in ("candidate", "pytorch"):
        assert _contrast(colors[line], colors["page"]) >= 3.0


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import rmsnorm_deploy.runtime.report as package

    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(name, *rest, **more)

    html.environment.cache_clear()
    monkeypatch.delitem(sys.modules, f"{package.__name__}.plots", raising=False)
    monkeypatch.delattr(package, "plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentMissingError, match=rf'requires {module}.*pip install "rmsnorm-deploy\[report\]"'):
        html.render(sample_report(norms=1))


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    html.write(sample_report(norms=1), target)
    assert target.read_text(encoding="utf-8") == html.render(sample_report(norms=1))
    before = target.read_bytes()

    def full(self: Path, text: str, **_: Any) -> int:
        self.write_bytes(text[:100].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match=r"report\.html failed: No space left on device"):
        html.write(sample_report(norms=2), target)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_bytes() == before


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.html: the folder .*missing does not exist"):
        html.write(sample_report(norms=1), tmp_path / "missing" / "report.html")
    with pytest.raises(UsageError, match="is a folder; give a file name"):
        html.write(sample_report(norms=1), tmp_path)
    assert list(tmp_path.parent.glob(f".{tmp_path.name}*")) == []


def test_numbers_have_three_significant_digits() -> None:
    values = (0, -0.0, 1, 1234.5, 0.0012345, 9.999e-4, 999_999, 1e6, "inf", "-inf", "nan", None, -2.5, 1.23456e-12)
    assert [short(value) for value in values] == [
        "0", "0", "1", "1,230", "0.00123", "1e-3", "1,000,000", "1e6", "inf", "-inf", "nan", "–", "-2.5", "1.23e-12",
    ]  # fmt: skip
    assert [exact(value) for value in (1.00000012, "inf", None)] == ["1.00000012", "inf", "–"]
    assert [percent(value) for value in (1.0, 0.999999, 0.5, 0.0, None)] == [
        "100 %", "99.99 %", "50.00 %", "0.00 %", "–",
    ]  # fmt: skip


@pytest.mark.parametrize("passed", [True, False])
def test_every_table_and_plot_scrolls_in_its_own_box(passed: bool) -> None:
    """On a phone the page itself must not scroll sideways."""
    page = html.render(sample_report(passed=passed))
    document = parser.document_fromstring(page)
    assert document.xpath("//meta[@name='viewport']/@content") == ["width=device-width, initial-scale=1"]
    wide = document.xpath("//table | //figure//svg")
    assert wide
    for element in wide:
        boxes = [set(str(box.get("class")).split()) for box in element.iterancestors()]
        assert any(box & {"scroll", "nested"} for box in boxes), etree.tostring(element)[:200]
    style = document.xpath("string(//style)")
    for box in (".scroll", ".nested"):
        assert re.search(rf"^{re.escape(box)} {{[^}}]*overflow-x: auto", style, re.M)
