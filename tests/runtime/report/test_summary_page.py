"""The page of a recipe's results: what is on it, escaped, with the reports of its rows, over several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lxml import html as parser

from tests.helpers.interface.shipped_sample import failed_step, sample_row, ship_sample, write_report

pytest.importorskip("jinja2")

_TIMES = [f"2026-11-2{day}T08:15:00+00:00" for day in range(5)]


def _page(output: Path) -> Any:
    return parser.document_fromstring((output / "summary.html").read_text(encoding="utf-8"))


def _table(page: Any, title: str) -> list[list[str]]:
    rows = page.xpath(f"//section[h2[@id='{title}']]//table/tbody/tr")
    return [[" ".join(cell.text_content().split()) for cell in row] for row in rows]


def _two_runs(output: Path) -> Path:
    write_report(output, "first", limit=4.0)
    rows = [sample_row(output, "first"), sample_row(output, "second")]
    rows[1]["steps"] = rows[1]["steps"][:1]
    ship_sample(output, rows, _TIMES[0])
    write_report(output, "first", file="report.before.json")
    write_report(output, "first", passed=False)
    failed = failed_step(sample_row(output, "first"), "validate", "too far off")
    ship_sample(output, [failed, {**rows[1], "status": "unchanged", "seconds": 0.01}], _TIMES[1])
    return output


def test_rows_errors_and_links(tmp_path: Path) -> None:
    page = _page(_two_runs(tmp_path / "dist"))
    head = " ".join(page.xpath("//header")[0].text_content().split())
    assert head == f"rmsnorm ship {tmp_path}/rmsnorm.toml ✗ Fail 2 rows: 1 unchanged, 1 failed"
    first, second = _table(page, "rows")
    assert first == ["1", "first", "✗ mismatch", "first", "ort", "float16", "done", "failed", "triton: not run", "inf",
                     "12.2", "5.0 MB", "report of first, JSON of first"]  # fmt: skip
    assert second[2:9] == ["– not validated", "second", "ort", "float16", "done", "–", "–"]
    assert second[-1] == "–"
    assert page.xpath("//table//a/@href") == ["first/report.html", "first/report.json"]
    assert page.xpath("//ul[@class='links']//a/@href") == ["summary.json", "junit.xml", "history.jsonl"]
    (error,) = page.xpath("//section[h2[@id='errors']]//li")
    assert " ".join(error.text_content().split()) == "validate first MismatchError, exit code 1too far off"


def test_norms_at_risk_and_drift(tmp_path: Path) -> None:
    page = _page(_two_runs(tmp_path / "dist"))
    norms = _table(page, "norms")
    assert norms[0][:6] == ["1", "first", "model.layers.2.input_layernorm", "✗ fail", "large", "max"]
    assert [row[1] for row in norms] == ["first"] * 3
    first, second = _table(page, "drift")
    # The largest of the made-up errors of the first report is 3.6 of 4.
    assert first[:7] == ["first", "1", "failed", "89.9 %", "inf", "–", "✗ beyond the limit"]
    assert second == ["second", "1", "unchanged", "–", "–", "–", "–", "3.5 s", "3.5 s", "5.0 MB", "5.0 MB"]
    (details,) = page.xpath("//details[@class='drifts']")
    assert details.get("open") is not None
    text = " ".join(details.text_content().split())
    assert "first, beside its validation before: verdicts worse: 9, better: 0" in text
    assert "norm model.layers.2.input_layernorm: pass → fail; outlier channels: error max 913 of 4.1 allowed" in text


def test_the_trend_draws_every_run(tmp_path: Path) -> None:
    page = _page(_two_runs(tmp_path / "dist"))
    first, second = page.xpath("//table[@class='trend']/tbody/tr")
    shares, seconds = first.xpath(".//svg")
    assert [title.text for title in shares.xpath(".//title")] == [f"{_TIMES[0]}: 89.9 %", f"{_TIMES[1]}: inf"]
    assert [circle.get("class") for circle in shares.xpath(".//circle")] == [None, "beyond"]
    assert seconds.get("aria-label") == f"seconds of first: {_TIMES[0]}: 12.2 s; {_TIMES[1]}: 4.5 s"
    assert len(second.xpath(".//svg")) == 1


def test_a_first_run_has_neither_drift_nor_trend(tmp_path: Path) -> None:
    output = tmp_path / "dist"
    write_report(output, "first")
    ship_sample(output, [sample_row(output, "first")], _TIMES[0])
    page = _page(output)
    assert page.xpath("//h2/@id") == ["rows", "norms"]
    assert "✓ Pass" in " ".join(page.xpath("//header")[0].text_content().split())


def test_a_run_that_was_ended_is_not_complete(tmp_path: Path) -> None:
    output = tmp_path / "dist"
    row = sample_row(output, "first", status="not run")
    row["steps"][1].update(status="not run", seconds=0.0, result=None)
    ship_sample(output, [row], _TIMES[0], verdict="fail")
    page = _page(output)
    assert page.xpath("//header/@class") == ["verdict unjudged"]
    assert _table(page, "rows")[0][2] == "? not complete"


def test_hostile_names_and_messages_are_text(tmp_path: Path) -> None:
    output = tmp_path / "dist"
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b\ud800"
    row = failed_step(sample_row(output, "first", model=bad, target=bad, dtype=bad, notes=[bad]), "export", bad)
    hostile = sample_row(output, "../outside", model='"><b>')
    write_report(output, "../outside")
    try:
        ship_sample(output, [row, hostile], _TIMES[0])
    except UnicodeEncodeError:
        pytest.fail("a character that UTF-8 does not have reached a file")
    page = _page(output)
    assert page.xpath("//img | //b | //*[@onerror]") == []
    assert len(page.xpath("//script")) == 1
    rows = _table(page, "rows")
    assert rows[0][3] == "<script>alert(1)</script><img src=x onerror=alert(1)>\ufffd\ufffd"
    # A report outside of the folder is neither read nor linked to.
    assert (rows[1][1], rows[1][9], rows[1][-1]) == ("../outside", "–", "–")
