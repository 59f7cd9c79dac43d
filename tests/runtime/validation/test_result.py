"""The report of a validation: its verdict, its culprits, its summary, and its JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.runtime.report.report_file import BISECT_SCHEMA, VALIDATE_SCHEMA
from rmsnorm_deploy.runtime.validation.depth import DepthPoint
from rmsnorm_deploy.runtime.validation.result import CREATED, Culprit, ValidationReport, differences
from tests.helpers.runtime.stand_ins import called, norm_check, segment, verdict

RIGHT, WRONG = verdict("logits"), verdict("logits", error=1.0)
UNJUDGED = dataclasses.replace(RIGHT, passed=None, reason="there is no baseline")
FIRST, SECOND = called("first"), called("first", 1)
REFUSAL = {"path": "p", "class": "C", "reason": "it subtracts the mean"}
DEVIATION = {"runtime": "onnxruntime", "at_most_ulp": 1.5, "reason": "one rounding less", "sites": ["first"]}


def report(**parts: Any) -> ValidationReport:
    return ValidationReport("model.onnx", **{"rows": [("1x1", RIGHT)], **parts})


# ------------------------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, "pass"),
        ({"rows": []}, "cannot be judged"),
        ({"rows": [], "norms": [norm_check(FIRST)], "segments": [segment("s")]}, "cannot be judged"),
        ({"rows": [("1x1", RIGHT), ("2x2", UNJUDGED)]}, "cannot be judged"),
        ({"rows": [("1x1", WRONG), ("2x2", UNJUDGED)]}, "fail"),
        ({"norms": [norm_check(FIRST), norm_check(SECOND, None)]}, "cannot be judged"),
        ({"segments": [segment("s"), segment("t", None)]}, "cannot be judged"),
        ({"rows": [("1x1", RIGHT), ("2x2", WRONG)]}, "fail"),
        ({"norms": [norm_check(FIRST), norm_check(SECOND)]}, "pass"),
        ({"norms": [norm_check(FIRST), norm_check(SECOND, False)]}, "fail"),
        ({"segments": [segment("s")]}, "pass"),
        ({"segments": [segment("s"), segment("t", False)]}, "fail"),
    ],
)
def test_the_verdict_needs_outputs_and_all_to_pass(parts: dict[str, Any], expected: str) -> None:
    assert report(**parts).verdict == expected


def test_what_cannot_be_judged_is_listed_by_reason_and_accuses_nobody() -> None:
    found = report(
        rows=[("1x1", UNJUDGED), ("2x2", UNJUDGED)],
        norms=[norm_check(FIRST, None), norm_check(SECOND)],
        segments=[segment("a ... b")],
    )
    assert found.culprits == []
    assert found.unjudged == [
        ("because", ["norm first"]),
        ("there is no baseline", ["output logits of 1x1", "output logits of 2x2"]),
    ]
    assert found.summary == (
        "0 of 2 outputs, 1 of 2 norms, 1 of 1 segment as accurate as PyTorch; norm first cannot be judged: because."
    )
    content = found.to_dict()
    assert content["unjudged"][0] == {"reason": "because", "parts": ["norm first"]}
    assert [row["passed"] for row in content["outputs"]] == [None, None]
    assert "cannot be judged: output logits of 1x1, output logits of 2x2: there is no baseline" in str(found)
    assert str(found).endswith("verdict: cannot be judged")


def test_warnings_stand_first() -> None:
    found = report(warnings=["output logits: PyTorch itself has lost the signal"])
    assert str(found).splitlines()[0] == "warning: output logits: PyTorch itself has lost the signal"


# ------------------------------------------------------------------------------------------------------ culprits


def test_nothing_wrong_has_no_culprits() -> None:
    assert report(norms=[norm_check(FIRST)], segments=[segment("s")]).culprits == []


def test_norms_come_first_then_segments() -> None:
    found = report(
        rows=[("1x1", WRONG)], norms=[norm_check(SECOND, False)], segments=[segment("a ... b", False)]
    ).culprits
    assert [(culprit.kind, culprit.name) for culprit in found] == [("norm", "first (call 2)"), ("segment", "a ... b")]
    assert found[0].reason == "because"
    assert found[1].reason == segment("s", False).verdict.reason


def test_outputs_are_culprits_only_where_nothing_else_explains_them() -> None:
    (culprit,) = report(rows=[("1x1", RIGHT), ("3x33", WRONG)]).culprits
    assert culprit == Culprit("output", "logits of 3x33", WRONG.reason)


def test_a_failed_segment_accuses_the_norms_inside_it() -> None:
    found = report(segments=[segment("a ... c", False, ["b", "b (call 2)"])]).culprits
    assert [(culprit.kind, culprit.name) for culprit in found] == [("norm", "b"), ("norm", "b (call 2)")]
    assert all("a ... c" in culprit.reason for culprit in found)


def test_a_norm_that_is_accused_twice_is_named_once() -> None:
    """Its own check comes first and gives the reason."""
    found = report(norms=[norm_check(FIRST, False)], segments=[segment("a ... c", False, ["first", "b"])]).culprits
    assert found[0].reason == "because"
    assert [culprit.name for culprit in found] == ["first", "b"]


# ------------------------------------------------------------------------------------------------------- summary


def test_the_summary_counts_what_passed() -> None:
    text = report(norms=[norm_check(FIRST), norm_check(SECOND)], segments=[segment("s")]).summary
    assert all(part in text for part in ("1 of 1 output,", "2 of 2 norms", "1 of 1 segment"))


def test_the_summary_leaves_out_what_was_not_checked() -> None:
    text = report().summary
    assert "1 of 1 output " in text
    assert "norm" not in text
    assert "segment" not in text


def test_the_summary_names_the_first_culprit_and_counts_the_others() -> None:
    text = report(norms=[norm_check(FIRST, False), norm_check(SECOND, False)]).summary
    assert "0 of 2 norms" in text
    assert "in first and 1 more" in text
    assert "more" not in report(norms=[norm_check(FIRST, False)]).summary


def test_the_summary_of_a_wrong_output_that_nothing_explains() -> None:
    text = report(rows=[("1x1", WRONG)], norms=[norm_check(FIRST)]).summary
    assert "logits of 1x1" in text
    assert "0 of 1 output" in text


def test_the_summary_of_nothing() -> None:
    assert "Nothing" in report(rows=[]).summary


# ---------------------------------------------------------------------------------------------------------- JSON


def full() -> ValidationReport:
    return report(
        rows=[("1x1", RIGHT), ("3x33", WRONG)],
        norms=[norm_check(FIRST, kinds=[verdict("normal"), verdict("tiny", error=1.0)])],
        segments=[segment("the inputs ... first", end=("first", 0)), segment("first ... logits", False)],
        depth=[DepthPoint(("first", 0), "input", 1e-7, float("inf"))],
        notes=["a note"],
        refusals=[REFUSAL],
        deviations=[DEVIATION],
        settings={"seed": 0},
        provenance={"versions": {}},
    )


def test_every_part_is_in_the_json() -> None:
    made = full()
    rows = made.to_dict()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert (rows["schema"], rows["model"], rows["verdict"]) == (VALIDATE_SCHEMA, "model.onnx", "fail")
    assert rows["summary"] == made.summary
    assert rows["culprits"] == [culprit.to_dict() for culprit in made.culprits]
    assert [(row["case"], row["name"], row["passed"]) for row in rows["outputs"]] == [
        ("1x1", "logits", True),
        ("3x33", "logits", False),
    ]
    assert [row["kind"] for row in rows["norms"][0]["inputs"]] == ["normal", "tiny"]
    assert [(row["index"], row["name"], row["passed"]) for row in rows["segments"]] == [
        (0, "the inputs ... first", True),
        (1, "first ... logits", False),
    ]
    assert rows["depth"][0]["baseline_error"] == "inf"
    assert (rows["notes"], rows["settings"], rows["provenance"]) == (["a note"], {"seed": 0}, {"versions": {}})
    assert (rows["refusals"], rows["deviations"]) == ([REFUSAL], [DEVIATION])


def test_histograms_are_kept_only_of_parts_that_failed() -> None:
    rows = full().to_dict()
    kept = [row["figures"]["histogram"] is not None for row in (*rows["norms"][0]["inputs"], *rows["segments"])]
    assert kept == [False, True, False, True]
    assert all(row["figures"]["histogram"] is not None for row in rows["outputs"])


def test_created_is_a_time_in_utc_without_fractions() -> None:
    created = datetime.datetime.fromisoformat(full().to_dict()[CREATED])
    assert created.utcoffset() == datetime.timedelta(0)
    assert created.microsecond == 0
    assert abs(datetime.datetime.now(datetime.UTC) - created) < datetime.timedelta(minutes=1)


def test_it_prints_its_verdict_and_saves_its_json(tmp_path: Path) -> None:
    made = full()
    text = str(made)
    assert text.splitlines()[-1].endswith("fail")
    assert made.summary in text
    made.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert differences(saved, made.to_dict()) == []


def test_junit_and_html_are_written(tmp_path: Path) -> None:
    full().to_junit(tmp_path / "report.xml")
    assert "logits" in (tmp_path / "report.xml").read_text()
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    full().to_html(tmp_path / "report.html")
    assert "logits" in (tmp_path / "report.html").read_text()


# --------------------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1, "b": 2}, {"b": 3, "a": 1}, ["b"]),
        ({"a": 1}, {"a": 1, "c": 2}, ["c"]),
        ({"a": 1, "c": 2}, {"a": 1}, ["c"]),
        ({"a": 1, "b": 1}, {"a": 2, "b": 2}, ["a", "b"]),
        ({CREATED: "then"}, {CREATED: "now"}, []),
        ({"a": {"b": [1]}}, {"a": {"b": [1]}}, []),
    ],
)
def test_differences_name_the_parts(old: dict[str, Any], new: dict[str, Any], expected: list[str]) -> None:
    assert differences(old, new) == expected


def test_the_schemas_are_two() -> None:
    assert report(schema=BISECT_SCHEMA).to_dict()["schema"] == BISECT_SCHEMA != VALIDATE_SCHEMA


def test_a_report_has_one_time_however_often_it_is_written() -> None:
    report = ValidationReport("model", created="2026-01-02T03:04:05+00:00")
    assert report.to_dict()["created"] == "2026-01-02T03:04:05+00:00"
    made = ValidationReport("model")
    assert made.to_dict()["created"] == made.created
    assert datetime.datetime.fromisoformat(made.created).tzinfo is not None


# ------------------------------------------------------------------------------------- what was not covered, and hints


def test_the_summary_says_that_no_norm_was_checked_and_that_the_model_is_another() -> None:
    why, hint = "the file has no metadata", "this export came from a, and --against names b"
    passed = report(unchecked=why, hint=hint)
    assert passed.summary == f"1 of 1 output as accurate as PyTorch; no norm was checked: {why}."
    wrong = report(rows=[("1x1", WRONG)], unchecked=why, hint=hint).summary
    place = "no norm was checked, so the place where error is introduced is not known"
    assert wrong == f"0 of 1 output as accurate as PyTorch; {place}: {why}; {hint}."
    faulty = report(norms=[norm_check(FIRST, False)], hint=hint).summary
    assert faulty.endswith(f"error is introduced in first; {hint}.")


# ---------------------------------------------------------------------------------------------------------- loss


def test_the_loss_of_a_lossy_file_is_sorted_and_the_summary_names_the_profile() -> None:
    norm = norm_check(FIRST, kinds=[verdict("as it runs", error=0.5), verdict("large", error=9.0)])
    parts: dict[str, Any] = {"norms": [norm], "segments": [segment("s", error=0.25), segment("t", error=1e-3)]}
    lossy = report(**parts, settings={"lossy": "int8"})
    assert [(part.kind, part.name) for part in lossy.loss] == [("norm", "first"), ("segment", "s"), ("segment", "t")]
    # One of 64 ones is off by a half: the RMS of the errors is 0.5 / 8.
    assert lossy.loss[0].rms_rel_row == pytest.approx(0.0625, rel=1e-6)
    assert lossy.to_dict()["loss"][1]["rms_rel_row"] == pytest.approx(0.25 / 8, rel=1e-6)
    assert "0 of 2 segments within the limits of int8; error is introduced in s" in lossy.summary
    plain = report(**parts)
    assert (plain.loss, plain.to_dict()["loss"]) == ([], [])
    assert "0 of 2 segments as accurate as PyTorch; error is" in plain.summary
