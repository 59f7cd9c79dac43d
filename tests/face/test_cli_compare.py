"""`rmsnorm compare`: tables for people, JSON for programs, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.interface.command_line import CommandLine

VALUES = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    np.savez(tmp_path / "a.npz", logits=VALUES, ids=np.arange(3))
    np.savez(tmp_path / "near.npz", logits=np.nextafter(VALUES, np.float32(2)), ids=np.arange(3))
    np.savez(tmp_path / "far.npz", logits=VALUES * np.float32(1.01), ids=np.arange(3))
    return tmp_path


def report(path: Path, passed: bool, ulp: float) -> Path:
    row = {"case": "1x7", "name": "logits", "passed": passed, "reason": "it is so", "figures": {"max_ulp": ulp}}
    content: dict[str, Any] = {
        "schema": "rmsnorm_deploy.validate/7", "verdict": "pass" if passed else "fail", "summary": "a summary",
        "settings": {"seed": int(ulp)}, "outputs": [row],
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_arrays_that_agree(rmsnorm: CommandLine, files: Path) -> None:
    outcome = rmsnorm("compare", files / "a.npz", files / "near.npz")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-2:] == ["arrays that agree: 2 of 2.", "verdict: pass"]
    row = outcome.out.splitlines()[1].split()
    assert (row[0], row[1], row[-3:]) == ("logits", "pass", ["64", "of", "64"])
    assert (row[3], row[5]) == ("(32)", "(2)")
    content = rmsnorm("compare", files / "a.npz", files / "near.npz", "--json").json
    assert (content["schema"], content["verdict"]) == ("rmsnorm_deploy.compare/1", "pass")
    assert content["outputs"][0]["figures"]["differing"] == 64


def test_arrays_that_differ(rmsnorm: CommandLine, files: Path) -> None:
    outcome = rmsnorm("compare", files / "a.npz", files / "far.npz")
    assert outcome.code == 1
    assert "arrays that agree: 1 of 2.\nverdict: fail" in outcome.out
    assert "logits: error max" in outcome.out
    np.savez(files / "other.npz", ids=np.arange(3))
    outcome = rmsnorm("compare", files / "a.npz", files / "other.npz", "--json")
    assert outcome.code == 1
    assert [row["passed"] for row in outcome.json["outputs"]] == [False, True]
    assert rmsnorm("compare", files / "a.npz", files / "other.npz").out.splitlines()[1].split()[1:3] == ["fail", "-"]


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (("--rtol", "0.011"), 0),
        (("--rtol", "0.009"), 1),
        (("--rtol", "logits:0.011", "--atol", "0"), 0),
        (("--atol", "0.02", "--atol", "logits:0.001"), 1),
        (("--ulp", "0.5", "--ulp", "logits:1e6"), 0),
    ],
)
def test_limits(rmsnorm: CommandLine, files: Path, limits: tuple[str, ...], code: int) -> None:
    assert rmsnorm("compare", files / "a.npz", files / "far.npz", *limits).code == code


def test_reports(rmsnorm: CommandLine, tmp_path: Path) -> None:
    good, bad = report(tmp_path / "good.json", True, 2.0), report(tmp_path / "bad.json", False, 9.0)
    outcome = rmsnorm("compare", good, bad)
    assert outcome.code == 1
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["output", "1x7,", "logits", "pass", "fail"] in lines
    assert ["1x7,", "logits:", "it", "is", "so"] in lines
    assert ["output", "1x7,", "logits", "max_ulp", "2", "9", "4.5"] in lines
    assert ["settings", "seed", "2", "9"] in lines
    assert lines[-1] == ["verdict:", "fail"]
    outcome = rmsnorm("compare", bad, good)
    assert outcome.code == 0
    assert "verdicts worse: 0, better: 2;" in outcome.out
    assert rmsnorm("compare", good, good, "--json").json["kind"] == "reports"


def test_rows_that_come_and_go(rmsnorm: CommandLine, tmp_path: Path) -> None:
    whole = report(tmp_path / "whole.json", True, 2.0)
    content = json.loads(whole.read_text())
    (tmp_path / "less.json").write_text(json.dumps({**content, "outputs": []}))
    outcome = rmsnorm("compare", whole, tmp_path / "less.json")
    assert outcome.code == 1
    assert "missing: output 1x7, logits" in outcome.out
    outcome = rmsnorm("compare", tmp_path / "less.json", whole)
    assert outcome.code == 0
    assert "new: output 1x7, logits" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.npz",), "CANDIDATE"),
        (("a.npz", "nosuch.npz"), "no such file"),
        (("a.npz", "r.json"), "not of one kind"),
        (("old.json", "r.json"), "rmsnorm_deploy.bisect/6, got 'rmsnorm_deploy.validate/1'"),
        (("r.json", "r.json", "--ulp", "1"), "limits are for arrays"),
        (("a.npz", "near.npz", "--ulp", "logits:much"), "--ulp logits:much: expected a number"),
        (("a.npz", "near.npz", "--atol", "logit:1"), "no such output. The outputs are: logits, ids"),
    ],
)
def test_what_cannot_be_compared(rmsnorm: CommandLine, files: Path, arguments: tuple[str, ...], message: str) -> None:
    content = json.loads(report(files / "r.json", True, 1.0).read_text())
    (files / "old.json").write_text(json.dumps({**content, "schema": "rmsnorm_deploy.validate/1"}))
    placed = [files / text if text.endswith((".npz", ".json")) else text for text in arguments]
    outcome = rmsnorm("compare", *placed)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert rmsnorm("compare", *placed, "--json").json["error"]["exit_code"] == 2
