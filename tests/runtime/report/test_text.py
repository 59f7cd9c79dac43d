"""Names and numbers as text, and files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.report.text import (
    ABSENT,
    clean,
    command,
    counted,
    exact,
    label,
    percent,
    plain,
    short,
    write_text,
)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ("rmsnorm_deploy.validate/7", "rmsnorm validate"),
        ("rmsnorm_deploy.bisect/6", "rmsnorm bisect"),
        ("rmsnorm_deploy.risk/1", "rmsnorm risk"),
    ],
)
def test_the_command_behind_a_schema(schema: str, expected: str) -> None:
    assert command({"schema": schema}) == expected


def test_a_label_is_the_path_and_a_later_call() -> None:
    assert label({"path": "a.b"}) == label({"path": "a.b", "call": 0}) == "a.b"
    later = label({"path": "a.b", "call": 1})
    assert later != "a.b"
    assert later.startswith("a.b (call ")


def test_a_label_counts_calls_as_names_of_norms_do() -> None:
    from rmsnorm_deploy.models.recognition.site import norm_name

    assert label({"path": "a.b", "call": 1}) == norm_name("a.b", 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tab\tline\nreturn\r", "tab\tline\nreturn\r"),
        ("é–漢😀", "é–漢😀"),
        ("\x00\x1b[31m\x7f", "\ufffd\ufffd[31m\x7f"),
        ("\ud800 alone \ufffe\uffff", "\ufffd alone \ufffd\ufffd"),
    ],
)
def test_characters_that_xml_forbids_are_replaced(text: str, expected: str) -> None:
    assert clean(text) == expected
    clean(text).encode("utf-8")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ABSENT),
        ("text", "text"),
        ("", ""),
        (True, "true"),
        (0, "0"),
        (1.5, "1.5"),
        (["é", None], '["é", null]'),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_json_values_as_text(value: Any, expected: str) -> None:
    assert plain(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (999.4, "999"),
        (999.5, "1,000"),
        (123456, "123,000"),
        (1e-3, "0.001"),
        (0.00099951, "1e-3"),
        (-1234567.0, "-1.23e6"),
        (1e-300, "1e-300"),
        (5e-324, "4.94e-324"),
        ("1e-7", "1e-7"),
        ("nan", "nan"),
    ],
)
def test_short(value: float | str, expected: str) -> None:
    assert short(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.1, "0.1"), (1 / 3, "0.333333333"), (16777217, "16777217")])
def test_exact_has_nine_digits(value: float, expected: str) -> None:
    assert exact(value) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(0.12349, "12.34 %"), (1 - 1e-12, "99.99 %"), (0.25, "25.00 %"), (None, ABSENT)]
)
def test_percent_is_rounded_down(share: float | None, expected: str) -> None:
    assert percent(share) == expected


@pytest.mark.parametrize("share", [57 / 100, 69 / 100, 43 / 125])
def test_percent_of_whole_hundredths(share: float) -> None:
    assert percent(share) == f"{100 * share:.2f} %"


def test_counted() -> None:
    assert [counted(count, "norm") for count in (0, 1, 2)] == ["0 norms", "1 norm", "2 norms"]


# ----------------------------------------------------------------------------------------------------- write_text


def test_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text("ä\nb\n", tmp_path / "report")
    assert (tmp_path / "report").read_bytes() == b"\xc3\xa4\nb\n"
    assert [file.name for file in tmp_path.iterdir()] == ["report"]


REPORT = '{\n  "schema": "rmsnorm_deploy.validate/7",\n  "note": "%s"\n}\n'


def test_an_earlier_report_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "report"
    write_text(REPORT % "longer text", str(path))
    path.chmod(0o600)
    write_text(REPORT % "short", str(path))
    assert path.read_text() == REPORT % "short"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text", ["mine", "", "{}", '{"schema": "other/1"}', '{"schema": "rmsnorm_deploy.manifest/2"}', "PK\3\4", "<html>"]
)
def test_a_file_of_others_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    (tmp_path / "report").write_text(text)
    with pytest.raises(UsageError, match="report exists and rmsnorm did not write it"):
        write_text(REPORT, tmp_path / "report")
    assert (tmp_path / "report").read_text() == text


def test_the_home_folder_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text("text", "~/report")
    assert (tmp_path / "report").read_text() == "text"


@pytest.mark.parametrize("place", ["folder", "file/report", "gone/report"])
def test_a_place_that_cannot_be_written_to(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError) as error:
        write_text("text", tmp_path / place)
    assert str(tmp_path / place) in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "file"}
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_left_behind_when_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report").write_text(REPORT)

    def failing(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UsageError, match="No space left"):
        write_text("after", tmp_path / "report")
    assert (tmp_path / "report").read_text() == REPORT
    assert len(list(tmp_path.iterdir())) == 1
