"""The JUnit report: the structure that CI systems ask for, and never a pass where the verdict is fail.

The checks of order and attributes are those of Ant's JUnitReport schema, the stricter of the two in use.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.report import junit
from tests.helpers.interface.report_sample import sample_report

_SUITE = {"name", "package", "id", "hostname", "timestamp", "tests", "failures", "errors", "skipped", "time"}


def _root(report: dict[str, Any]) -> ET.Element:
    return ET.fromstring(junit.render(report).encode())


def _reports() -> list[dict[str, Any]]:
    small = {"schema": "rmsnorm_deploy.bisect/6", "verdict": "fail", "outputs": []}
    return [sample_report(), sample_report(passed=False), sample_report(norms=1), small]


@pytest.mark.parametrize("report", _reports(), ids=["pass", "fail", "one norm", "small"])
def test_the_structure_is_that_of_the_schema(report: dict[str, Any]) -> None:
    root = _root(report)
    assert root.tag == "testsuites"
    assert root.attrib == {}
    assert len(root) >= 1
    for place, suite in enumerate(root):
        assert suite.tag == "testsuite"
        assert set(suite.attrib) == _SUITE
        assert suite.get("id") == str(place)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
        tags = [child.tag for child in suite]
        cases = suite.findall("testcase")
        assert tags == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
        assert suite.get("tests") == str(len(cases))
        assert suite.get("failures") == str(len(suite.findall("testcase/failure")))
        assert (suite.get("errors"), suite.get("skipped"), suite.get("time")) == ("0", "0", "0")
        for case in cases:
            assert set(case.attrib) == {"classname", "name", "time"}
            assert [child.tag for child in case] in ([], ["failure"])
        for failure in suite.findall("testcase/failure"):
            assert set(failure.attrib) == {"message", "type"}
            assert failure.get("type") == "mismatch"
        for entry in suite.findall("properties/property"):
            assert set(entry.attrib) == {"name", "value"}


def test_one_suite_each_and_one_case_for_every_part() -> None:
    root = _root(sample_report(passed=False))
    assert [suite.get("name") for suite in root] == [
        "rmsnorm validate outputs", "rmsnorm validate norms", "rmsnorm validate segments",
    ]  # fmt: skip
    assert [(suite.get("tests"), suite.get("failures")) for suite in root] == [("3", "3"), ("9", "1"), ("2", "1")]
    names = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(names)) == len(names) == 14
    assert names[1] == ("rmsnorm validate.outputs", "1x7: logits")
    assert names[7] == ("rmsnorm validate.norms", "model.layers.2.input_layernorm")
    assert names[13][1] == "1: model.layers.0.post_attention_layernorm ... model.layers.1.input_layernorm"


def test_other_cases_have_times_and_may_be_skipped() -> None:
    cases = [
        junit.Case("a", None, seconds=1.25),
        junit.Case("b", None, skipped="a <failed>"),
        junit.Case("c", ("no", "no"), judged=False, seconds=2),
    ]
    report = {"schema": "rmsnorm_deploy.ship/1", "verdict": "fail"}
    (suite,) = ET.fromstring(junit.document({"export": cases, "validate": []}, report).encode())
    assert set(suite.attrib) == _SUITE
    counts = [suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped", "time")]
    assert counts == ["rmsnorm ship export", "3", "0", "1", "1", "3.25"]
    found = [(case.get("name"), case.get("time"), [child.tag for child in case]) for case in suite.iter("testcase")]
    assert found == [("a", "1.25", []), ("b", "0", ["skipped"]), ("c", "2", ["error"])]
    assert [skipped.get("message") for skipped in suite.iter("skipped")] == ["a <failed>"]


def test_a_pass_has_no_failure() -> None:
    assert list(_root(sample_report()).iter("failure")) == []


def test_a_failure_says_why_and_by_how_much() -> None:
    report = sample_report(passed=False)
    failures = list(_root(report).iter("failure"))
    row = report["outputs"][0]
    assert failures[0].get("message") == row["reason"]
    lines = (failures[0].text or "").splitlines()
    assert lines[0] == row["reason"]
    assert lines[1].startswith("candidate: max_ulp 1,020, mean_ulp 93.1, ")
    assert f"cosine {row['figures']['cosine']}, differing 3984, count 4096" in lines[1]
    assert lines[2].startswith("PyTorch: max_ulp 3.09, ")
    norm = failures[3].text or ""
    assert "outlier channels: error max" in norm
    assert "tiny: shape mismatch: (2, 8) and (2, 9)" in norm
    assert "normal: " not in norm
    assert "max_ulp inf" in norm


def test_calls_of_one_norm_have_names_of_their_own() -> None:
    report = sample_report(norms=2)
    report["norms"][1].update(path=report["norms"][0]["path"], call=1)
    path = report["norms"][0]["path"]
    assert [case.get("name") for case in _root(report)[1].iter("testcase")] == [path, f"{path} (call 2)"]


def test_what_cannot_be_judged_is_an_error_and_not_a_failure() -> None:
    report = sample_report()
    report["verdict"] = "cannot be judged"
    report["outputs"][1].update(passed=None, reason="there is no baseline")
    root = _root(report)
    assert [(suite.get("failures"), suite.get("errors")) for suite in root] == [("0", "1"), ("0", "0"), ("0", "0")]
    (error,) = root.iter("error")
    assert (error.get("message"), error.get("type")) == ("there is no baseline", "not judged")


def test_a_failing_verdict_is_never_a_green_file() -> None:
    report = sample_report()
    report.update(verdict="fail", summary="no output could be compared")
    (failure,) = _root(report).iter("failure")
    assert failure.get("message") == "no output could be compared"
    small = _root({"schema": "rmsnorm_deploy.validate/7", "verdict": "fail", "outputs": []})
    assert [case.get("name") for case in small.iter("testcase")] == ["verdict"]
    assert [failure.get("message") for failure in small.iter("failure")] == ["the verdict is: fail"]


def test_the_properties_are_the_verdict_and_the_plain_settings() -> None:
    suite = _root(sample_report())[2]
    assert {entry.get("name"): entry.get("value") for entry in suite.iter("property")} == {
        "schema": "rmsnorm_deploy.validate/7",
        "verdict": "pass",
        "settings.model": "out/model.onnx",
        "settings.against": "Qwen/Qwen3-0.6B",
        "settings.provider": "cpu",
        "settings.seed": "0",
    }


@pytest.mark.parametrize(
    ("created", "timestamp"),
    [
        ("2026-11-23T04:00:00+00:00", "2026-11-23T04:00:00"),
        ("2026-11-23T04:00:00.123456+02:00", "2026-11-23T02:00:00"),
        ("2026-11-23T04:00:00", "2026-11-23T04:00:00"),
        (None, "1970-01-01T00:00:00"),
    ],
)
def test_the_time_is_utc_without_a_zone(created: str | None, timestamp: str) -> None:
    report = {**sample_report(), "created": created}
    assert {suite.get("timestamp") for suite in _root(report)} == {timestamp}


def test_no_character_that_xml_forbids() -> None:
    hostile = "a<b>&\"']]>\x00\x0b\x1b\ud800\ufffe\nc"
    report = sample_report(passed=False)
    report["outputs"][0].update(name=hostile, case=hostile, reason=hostile)
    report["norms"][0]["path"] = hostile
    report["settings"][hostile] = hostile
    text = junit.render(report)
    assert re.search("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text) is None
    root = ET.fromstring(text.encode())
    cleaned = "a<b>&\"']]>" + "\ufffd" * 5 + "\nc"
    failure = next(root.iter("failure"))
    assert failure.get("message") == cleaned
    assert (failure.text or "").startswith(cleaned)
    assert root[1].findall("testcase")[0].get("name") == cleaned


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.xml", "b.xml"):
        junit.write(sample_report(passed=False), tmp_path / name)
    content = (tmp_path / "a.xml").read_bytes()
    assert content == (tmp_path / "b.xml").read_bytes()
    assert content.startswith(b'<?xml version="1.0" encoding="UTF-8"?>\n<!-- rmsnorm-deploy -->\n<testsuites>')


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.xml: the folder .*missing does not exist"):
        junit.write(sample_report(), tmp_path / "missing" / "report.xml")
    assert list(tmp_path.iterdir()) == []
