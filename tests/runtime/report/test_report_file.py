"""Reports read again from files: the versions that are read, and what is no report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.report.report_file import BISECT_SCHEMA, VALIDATE_SCHEMA, read_report
from tests.helpers.interface.report_sample import sample_report


@pytest.mark.parametrize("schema", [VALIDATE_SCHEMA, BISECT_SCHEMA])
def test_a_report_comes_back_as_it_was_written(tmp_path: Path, schema: str) -> None:
    report = {**sample_report(), "schema": schema, "model": "ä"}
    (tmp_path / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    assert read_report(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "None"),
        ("3", "None"),
        ("{}", "None"),
        ('{"schema": "rmsnorm_deploy.validate/2"}', "validate/2"),
        ('{"schema": "rmsnorm_deploy.risk/1"}', "risk/1"),
        ('{"schema": ["x"]}', "x"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=word) as error:
        read_report(path)
    assert str(path) in str(error.value)


def test_the_message_names_the_versions_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError) as error:
        read_report(tmp_path / "report.json")
    assert VALIDATE_SCHEMA in str(error.value)
    assert BISECT_SCHEMA in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize("name", ["gone.json", "folder"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=name):
        read_report(tmp_path / name)
