"""compare: arrays against reference arrays, and a report against an earlier one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy.tolerances import TOLERANCES, parse_limits
from rmsnorm_deploy.runtime.report.compare import ArrayComparison, ReportComparison, compare

RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((4, 64)).astype(np.float32)
IDS = np.arange(6)


def arrays(tmp_path: Path, candidate: dict[str, Any], limits: tuple[str, ...] = (), **reference: Any) -> Any:
    np.savez(tmp_path / "a.npz", **(reference or {"logits": VALUES, "ids": IDS}))
    np.savez(tmp_path / "b.npz", **candidate)
    result = compare(tmp_path / "a.npz", tmp_path / "b.npz", parse_limits([], [], limits))
    assert isinstance(result, ArrayComparison)
    return result


# ---------------------------------------------------------------------------------------------------------- arrays


def test_equal_arrays_pass(tmp_path: Path) -> None:
    result = arrays(tmp_path, {"ids": IDS, "logits": VALUES})
    content = result.to_dict()
    assert (content["schema"], content["kind"], content["verdict"]) == ("rmsnorm_deploy.compare/1", "arrays", "pass")
    assert [row["name"] for row in content["outputs"]] == ["logits", "ids"]
    figures = content["outputs"][0]["figures"]
    assert (figures["max_ulp"], figures["differing"], figures["top1_agreement"], figures["kl"]) == (0.0, 0, 1.0, 0.0)
    assert content["summary"] == "arrays that agree: 2 of 2"
    assert json.loads(json.dumps(content, allow_nan=False)) == content


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("beyond", [0.0, 1.0])
def test_the_floors_of_the_table_are_what_arrays_may_differ_by(dtype: Any, beyond: float, tmp_path: Path) -> None:
    reference = np.ones((8, 64), dtype)
    candidate = reference.copy()
    eps = float(ml_dtypes.finfo(dtype).eps)
    candidate[2, 3] = 1 + (TOLERANCES[np.dtype(dtype).name].floor_max + beyond) * eps
    (row,) = arrays(tmp_path, {"y": candidate}, y=reference).rows
    assert row.passed is (beyond == 0.0), row.reason
    assert "the rounded reference's own max 0, rms 0" in row.reason


def test_arrays_of_two_dtypes_are_compared_in_the_coarser(tmp_path: Path) -> None:
    half = VALUES.astype(np.float16)
    assert arrays(tmp_path, {"y": half}, y=VALUES).passed
    assert arrays(tmp_path, {"y": VALUES}, y=half).passed
    assert not arrays(tmp_path, {"y": (VALUES * 1.01).astype(np.float16)}, y=VALUES).passed
    assert not arrays(tmp_path, {"y": half.astype(np.float32)}, y=VALUES).passed


def test_safetensors_and_npz_are_compared(tmp_path: Path) -> None:
    save_file({"y": torch.from_numpy(VALUES)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", y=VALUES)
    assert compare(tmp_path / "a.safetensors", tmp_path / "b.npz").passed


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ({"logits": VALUES}, "b.npz, but present in"),
        ({"logits": VALUES, "ids": IDS, "more": IDS}, "a.npz, but present in"),
        ({"logits": VALUES[:, :63], "ids": IDS}, "shape mismatch: the candidate has (4, 63), the reference (4, 64)"),
        ({"logits": IDS.reshape(1, 6), "ids": IDS}, "shape mismatch"),
        ({"logits": VALUES.astype(np.int64), "ids": IDS}, "the candidate has integer elements, the reference floating"),
        ({"logits": VALUES, "ids": IDS + 1}, "6 of 6 elements differ, the first at (0,): expected 0, got 1"),
        ({"logits": np.where(VALUES > 3, np.nan, VALUES) * np.nan, "ids": IDS}, "NaN or infinity out of place"),
    ],
)
def test_arrays_that_differ(candidate: dict[str, Any], reason: str, tmp_path: Path) -> None:
    result = arrays(tmp_path, candidate)
    assert not result.passed
    (failed,) = [row for row in result.rows if not row.passed]
    assert reason in failed.reason
    assert result.to_dict()["summary"] == f"arrays that agree: {len(result.rows) - 1} of {len(result.rows)}"


def test_complex_arrays_are_not_compared(tmp_path: Path) -> None:
    (row,) = arrays(tmp_path, {"y": np.ones(2, complex)}, y=np.ones(2, complex)).rows
    assert not row.passed
    assert "complex128 cannot be compared" in row.reason


def test_limits_are_for_arrays_by_name(tmp_path: Path) -> None:
    off = np.nextafter(VALUES, np.inf)
    both = {"a": VALUES, "b": VALUES}
    assert arrays(tmp_path, {"a": off, "b": off}, ("1",), **both).passed
    result = arrays(tmp_path, {"a": off, "b": off}, ("1", "b:0.5"), **both)
    assert [row.passed for row in result.rows] == [True, False]
    with pytest.raises(UsageError, match=r"given for c, .* The outputs are: a, b"):
        arrays(tmp_path, both, ("c:1",), **both)


def test_files_without_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz")
    with pytest.raises(UsageError, match="contain no arrays"):
        compare(tmp_path / "a.npz", tmp_path / "a.npz")


# --------------------------------------------------------------------------------------------------------- reports


def figures(size: float) -> dict[str, Any]:
    return {"max_ulp": size, "mean_ulp": 0.25, "p999_ulp": 1.0, "max_abs": 1e-6, "max_rel_row": 1e-7, "kl": None}


REPORT: dict[str, Any] = {
    "schema": "rmsnorm_deploy.validate/7",
    "created": "2026-01-01T00:00:00+00:00",
    "verdict": "pass",
    "summary": "everything passed",
    "settings": {"seed": 0, "provider": "cpu"},
    "outputs": [{"case": "1x7", "name": "logits", "passed": True, "reason": "fine", "figures": figures(3.0)}],
    "norms": [
        {"path": "norm", "call": call, "passed": True, "reason": "fine", "inputs": [
            {"kind": "large", "passed": True, "reason": "fine", "figures": figures(1.0)},
        ]} for call in (0, 1)
    ],
    "segments": [{"name": "norm ... head", "index": 1, "passed": True, "reason": "fine", "figures": None}],
    "provenance": {"candidate": {"onnxruntime": "1.23", "options": {"threads": 1}}, "versions": {"torch": "2.11"}},
}  # fmt: skip

Change = Callable[[dict[str, Any]], Any]


def reports(tmp_path: Path, change: Change = lambda report: None, before: Change = lambda report: None) -> Any:
    for name, edit in (("a.json", before), ("b.json", change)):
        content = copy.deepcopy(REPORT)
        edit(content)
        (tmp_path / name).write_text(json.dumps(content))
    result = compare(tmp_path / "a.json", tmp_path / "b.json")
    assert isinstance(result, ReportComparison)
    return result


def fail_output(report: dict[str, Any]) -> None:
    report["verdict"] = "fail"
    report["outputs"][0].update(passed=False, reason="too far off")


def test_equal_reports_pass_whenever_they_were_made(tmp_path: Path) -> None:
    result = reports(tmp_path, lambda report: report.update(created="2027-01-01T00:00:00+00:00"))
    content = result.to_dict()
    assert content["verdict"] == "pass"
    assert all(content[key] == [] for key in ("verdicts", "missing", "added", "figures", "settings"))


def test_a_row_that_fails_now_fails(tmp_path: Path) -> None:
    content = reports(tmp_path, fail_output).to_dict()
    assert content["verdict"] == "fail"
    assert content["verdicts"] == [
        {"kind": "report", "name": "verdict", "before": "pass", "after": "fail", "reason": "everything passed"},
        {"kind": "output", "name": "1x7, logits", "before": "pass", "after": "fail", "reason": "too far off"},
    ]
    assert content["summary"] == ("verdicts worse: 2, better: 0; rows missing: 0; figures changed more than 2 times: 0")


def test_a_row_that_passes_now_or_fails_as_before_passes(tmp_path: Path) -> None:
    better = reports(tmp_path, before=fail_output)
    assert better.passed
    assert [(change.before, change.after) for change in better.verdicts] == [("fail", "pass")] * 2
    assert reports(tmp_path, fail_output, fail_output).passed


@pytest.mark.parametrize("fails_before", [False, True])
def test_every_kind_of_row_is_seen(fails_before: bool, tmp_path: Path) -> None:
    def fail_parts(report: dict[str, Any]) -> None:
        report["norms"][1]["passed"] = False
        report["norms"][1]["inputs"][0]["passed"] = False
        report["segments"][0]["passed"] = False

    names = ["norm (call 2)", "norm (call 2), large", "norm ... head"]
    result = reports(tmp_path, *((lambda report: None, fail_parts) if fails_before else (fail_parts,)))
    assert result.passed is fails_before
    assert [change.name for change in result.verdicts] == names
    assert [change.kind for change in result.verdicts] == ["norm", "norm input", "segment"]


def test_missing_rows_fail_and_new_ones_do_not(tmp_path: Path) -> None:
    def drop(report: dict[str, Any]) -> None:
        del report["segments"]
        report["norms"][0]["inputs"] = []

    lacking = reports(tmp_path, drop)
    assert not lacking.passed
    assert lacking.missing == [("norm input", "norm, large"), ("segment", "norm ... head")]
    more = reports(tmp_path, before=drop)
    assert more.passed
    assert more.to_dict()["added"] == [
        {"kind": "norm input", "name": "norm, large"}, {"kind": "segment", "name": "norm ... head"},
    ]  # fmt: skip


def test_rows_of_one_name_are_numbered(tmp_path: Path) -> None:
    def twice(report: dict[str, Any], passed: bool) -> None:
        report["outputs"].append({**report["outputs"][0], "passed": passed})

    result = reports(tmp_path, lambda report: twice(report, False), lambda report: twice(report, True))
    assert [change.name for change in result.verdicts] == ["1x7, logits (2)"]


@pytest.mark.parametrize(
    ("figure", "before", "after", "ratio"),
    [
        ("max_ulp", 3.0, 6.5, 6.5 / 3),
        ("max_ulp", 3.0, 1.0, 1 / 3),
        ("max_ulp", 3.0, 6.0, None),
        ("max_ulp", 3.0, 1.5, None),
        ("max_ulp", 0.0, 0.5, "inf"),
        ("max_ulp", 0.5, 0.0, 0.0),
        ("max_ulp", "inf", "inf", None),
        ("max_ulp", 3.0, "inf", "inf"),
        ("kl", 1e-17, 1e-15, None),
        ("kl", 1e-9, 1e-8, 10.0),
        ("kl", None, 1e-8, None),
        ("count", 10, 100, None),
    ],
)
def test_figures_that_changed_more_than_twofold(
    figure: str, before: Any, after: Any, ratio: Any, tmp_path: Path
) -> None:
    def edit(value: Any) -> Change:
        return lambda report: report["outputs"][0]["figures"].update({figure: value})

    result = reports(tmp_path, edit(after), edit(before))
    assert result.passed
    found = result.to_dict()["figures"]
    if ratio is None:
        assert found == []
    else:
        expected = ratio if ratio == "inf" else pytest.approx(ratio, rel=1e-12)
        assert found == [
            {"kind": "output", "name": "1x7, logits", "figure": figure, "before": before, "after": after,
             "ratio": expected},
        ]  # fmt: skip


def test_settings_and_provenance_that_differ(tmp_path: Path) -> None:
    def edit(report: dict[str, Any]) -> None:
        report["settings"]["seed"] = 1
        report["provenance"]["candidate"]["options"]["threads"] = 4
        del report["provenance"]["versions"]

    result = reports(tmp_path, edit)
    assert result.passed
    assert result.to_dict()["settings"] == [
        {"kind": "settings", "name": "seed", "before": 0, "after": 1},
        {"kind": "provenance", "name": "candidate.options.threads", "before": 1, "after": 4},
        {"kind": "provenance", "name": "versions", "before": {"torch": "2.11"}, "after": "-"},
    ]


_READS = "expected the schema rmsnorm_deploy.validate/7 or rmsnorm_deploy.bisect/6, got"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "rmsnorm_deploy.validate/1"}, f"{_READS} 'rmsnorm_deploy.validate/1'. Write the report again"),
        ({"schema": "rmsnorm_deploy.validate/8"}, f"{_READS} 'rmsnorm_deploy.validate/8'"),
        ({"schema": "rmsnorm_deploy.run/1"}, f"{_READS} 'rmsnorm_deploy.run/1'"),
        ({"schema": None}, f"{_READS} None"),
        ({"schema": "rmsnorm_deploy.bisect/6"}, "compare two reports of one schema"),
        ({"verdict": "maybe"}, "b.json: verdict: expected 'pass', 'fail' or 'cannot be judged', got 'maybe'"),
        ({"verdict": None}, "not a complete report"),
        ({"outputs": [{"name": "logits", "passed": True}]}, "outputs.0.case: missing"),
        ({"outputs": [{"case": "1x7", "name": "logits", "passed": "yes"}]}, "passed: expected a valid boolean"),
        ({"outputs": [{"case": "", "name": "", "passed": True, "figures": {"kl": "much"}}]}, "kl: expected a valid"),
        ({"outputs": 3}, "outputs: expected a valid list, got 3"),
        ({"norms": None}, "norms: expected a valid list, got None"),
        ({"segments": [5]}, "segments.0: expected a valid dictionary, got 5"),
        ({"norms": [{"path": "n", "call": "x", "passed": True}]}, "norms.0.call: expected a valid integer, got 'x'"),
        ({"provenance": [1]}, "provenance: expected a valid dictionary, got [1]"),
        ({"outputs": [{"case": "", "name": "", "passed": True, "figures": {"kl": 10**400}}]}, "kl: expected a valid"),
    ],
)  # fmt: skip
def test_reports_that_cannot_be_compared(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"b\.json") as error:
        reports(tmp_path, lambda report: report.update(change))
    assert message in str(error.value)


def test_files_that_are_not_reports(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(REPORT))
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    np.savez(tmp_path / "c.npz", y=VALUES)
    with pytest.raises(UsageError, match=r"b\.json cannot be read as JSON"):
        compare(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(UsageError, match=r"list\.json: expected the schema .*, got None"):
        compare(tmp_path / "list.json", tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"nosuch\.json: cannot be read"):
        compare(tmp_path / "a.json", tmp_path / "nosuch.json")
    with pytest.raises(UsageError, match="not of one kind"):
        compare(tmp_path / "a.json", tmp_path / "c.npz")
    with pytest.raises(UsageError, match="limits are for arrays"):
        compare(tmp_path / "a.json", tmp_path / "a.json", parse_limits(["1"], [], []))
