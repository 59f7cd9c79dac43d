"""--quiet, progress without a terminal, and whole numbers on narrow screens."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from rmsnorm_deploy.cli.screen import Screen
from tests.helpers.interface.command_line import CommandLine


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[Path, Path]:
    np.savez(tmp_path / "a.npz", x=np.ones(3, np.float32), y=np.ones(2))
    np.savez(tmp_path / "b.npz", x=2 * np.ones(3, np.float32), y=np.ones(2))
    return tmp_path / "a.npz", tmp_path / "b.npz"


def test_progress_needs_a_terminal_or_the_variable(
    rmsnorm: CommandLine, arrays: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RMSNORM_PROGRESS", raising=False)
    assert rmsnorm("compare", *arrays).err == ""
    monkeypatch.setenv("RMSNORM_PROGRESS", "1")
    assert rmsnorm("compare", *arrays).err == f"... comparing {arrays[0]} and {arrays[1]}\n"


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_prints_what_failed_and_the_verdict(
    rmsnorm: CommandLine, arrays: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setenv("RMSNORM_PROGRESS", "1")
    same = rmsnorm("compare", arrays[0], arrays[0], option)
    assert (same.code, same.out, same.err) == (0, "verdict: pass\n", "")
    other = rmsnorm("compare", *arrays, option)
    lines = other.out.splitlines()
    assert (other.code, other.err, len(lines)) == (1, "", 2)
    assert lines[0].startswith("x: error max 8.39e+06 of 32 allowed")
    assert lines[1] == "verdict: fail"


def test_quiet_commands_print_errors(rmsnorm: CommandLine, tmp_path: Path) -> None:
    outcome = rmsnorm("compare", tmp_path / "none.npz", tmp_path / "none.npz", "-q")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: {tmp_path / 'none.npz'}: there is no such file.\n"


def test_quiet_export_validate_and_inspect(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    export = rmsnorm("export", f"{models}:net", "-o", tmp_path / "out", "-q")
    assert (export.code, export.out, export.err) == (0, "", "")
    arguments = ("validate", tmp_path / "out", "--against", f"{models}:net", "--shape", "1x3", "-q")
    validate = rmsnorm(*arguments)
    assert (validate.code, validate.out, validate.err) == (0, "verdict: pass\n", "")
    inspect = rmsnorm("inspect", tmp_path / "out", "-q")
    assert "1 RMSNorm in" in inspect.out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [80, 60, 40, 20])
def test_numbers_are_whole_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    columns = ("case", "output", "verdict", "max error (allowed)", "rms error (allowed)", "cosine")
    Screen(False).table(
        columns, [("1x3", "a_long_name_of_an_output", "pass", "8.39e+06 (32)", "0.25 (2)", "1.000000000")]
    )
    text = sys.stdout.getvalue()  # type: ignore[attr-defined]
    for cell in ("pass", "8.39e+06 (32)", "0.25 (2)", "1.000000000"):
        assert cell in text
    assert ("cosine: 1.000000000" in text) == (width <= 60)
