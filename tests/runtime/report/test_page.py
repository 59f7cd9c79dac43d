"""Pages: aligned text, escaped HTML, and results that show themselves on either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lxml import html as parser

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.report.page import (
    HtmlPage,
    Page,
    Shown,
    TextPage,
    aligned,
    fits,
    folded,
    is_whole,
)

HOSTILE = "<script>alert('a & \"b\"')</script>"


@pytest.mark.parametrize(
    ("columns", "rows", "lines"),
    [
        (("a", "long head"), [("longer cell", 1), ("x", None)],
         ["a            long head", "longer cell  1", "x            None"]),
        (("only", "heads"), [], ["only  heads"]),
        (("a",), [("",)], ["a", ""]),
        (("a", "b"), [("x", "")], ["a  b", "x"]),
    ],
)  # fmt: skip
def test_columns_are_aligned_without_spaces_at_the_end(columns: Any, rows: Any, lines: list[str]) -> None:
    assert aligned(columns, rows) == lines


def test_every_cell_of_a_column_begins_at_the_same_place() -> None:
    rows = [("a", "bb", "ccc"), ("dddd", "e", "f"), ("g", "hhhhhh", "i")]
    lines = aligned(("one", "two", "three"), rows)
    for column in range(3):
        texts = [("one", "two", "three")[column], *(row[column] for row in rows)]
        begin = 0 if column == 0 else 6 if column == 1 else 14
        assert [line[begin : begin + len(text)] for line, text in zip(lines, texts, strict=True)] == texts


@pytest.mark.parametrize("rows", [[("a",)], [("a", "b", "c")]])
def test_a_row_of_another_length_is_an_error(rows: Any) -> None:
    with pytest.raises(ValueError, match="zip"):
        aligned(("one", "two"), rows)


def filled(page: Page) -> str:
    page.line("first")
    page.line()
    page.table(("name", HOSTILE), [(HOSTILE, 1.5), ("<b>", None)])
    page.line(HOSTILE)
    return str(page)


def test_a_text_page_is_its_lines_and_tables_as_they_are() -> None:
    lines = filled(TextPage()).split("\n")
    assert lines[:2] == ["first", ""]
    assert lines[2].split() == ["name", *HOSTILE.split()]
    assert lines[-1] == HOSTILE
    assert len(lines) == 6


def test_an_html_page_escapes_every_text() -> None:
    text = filled(HtmlPage())
    assert "<script" not in text
    page = parser.fragment_fromstring(text, create_parent=True)
    assert [element.tag for element in page] == ["div", "table", "div"]  # no empty line
    assert [cell.text_content() for cell in page.iter("th")] == ["name", HOSTILE]
    assert [[cell.text_content() for cell in row.iter("td")] for row in page.iter("tr")] == [
        [],
        [HOSTILE, "1.5"],
        ["<b>", "None"],
    ]
    assert page[2].text_content() == HOSTILE


def test_empty_pages_are_empty() -> None:
    assert (str(TextPage()), str(HtmlPage())) == ("", "")


# ----------------------------------------------------------------------------------------------------------- Shown


class Result(Shown):
    """A result with one line and one table."""

    def to_dict(self) -> dict[str, Any]:
        return {"name": "ä <b>", "values": [1, "inf"]}

    def show(self, page: Page) -> None:
        page.line("a <b> result")
        page.table(("x",), [(1,)])


def test_a_result_prints_and_shows_itself() -> None:
    assert str(Result()) == "a <b> result\nx\n1"
    shown = Result()._repr_html_()
    assert shown.startswith("<div>a &lt;b&gt; result</div>")
    assert "<td>1</td>" in shown


def test_a_result_is_saved_as_json_with_a_line_end(tmp_path: Path) -> None:
    Result().save(tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(text) == Result().to_dict()
    assert text.endswith("}\n")
    assert '  "values": [\n' in text


def test_a_result_that_cannot_be_saved_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone"):
        Result().save(tmp_path / "gone" / "result.json")
    assert list(tmp_path.iterdir()) == []


def test_a_result_without_its_own_methods_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Shown()  # type: ignore[abstract]


def test_a_narrow_table_is_a_list() -> None:
    assert folded(("name", "size"), [("a", "1"), ("b", "2")]) == ["name: a", "size: 1", "", "name: b", "size: 2"]


def test_numbers_and_words_are_whole_and_texts_are_not() -> None:
    assert is_whole(["8.39e+06 (32)", "-", "1.000000000"])
    assert is_whole(["pass", "fail"])
    assert not is_whole(["a text of words"])
    assert not is_whole(["n" * 40])


def test_what_fits() -> None:
    columns, rows = ("name", "max error (allowed)", "verdict"), [("n" * 60, "8.39e+06 (32)", "pass")]
    assert fits(columns, rows, 80)
    assert not fits(columns, rows, 40)
    assert fits(("a",), [("b",)], 41)
    assert not fits(("a",), [("b",)], 40)
    assert not fits(columns * 3, rows[:0] or [rows[0] * 3], 80)
