"""Whatever goes wrong: a clear message, the right exit code, no traceback, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy.cli.application import run
from rmsnorm_deploy.models.errors import (
    EnvironmentMissingError,
    MismatchError,
    RmsnormDeployError,
    UnsupportedError,
    UsageError,
)
from tests.helpers.interface.command_line import CommandLine


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, which hears Ctrl-C even where these tests run in the background."""

    def hear() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "rmsnorm_deploy", *map(str, arguments)]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "preexec_fn": hear,
        "env": {**os.environ, "RMSNORM_PROGRESS": "1"},
    }
    return subprocess.Popen(command, text=True, **pipes, **options)


# -------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nosuch",), "nosuch"),
        (("exprt",), "Did you mean 'export'?"),
        (("inspect",), "MODEL"),
        (("export", "builtin:small"), "--output"),
        (("inspect", "builtin:small", "--frobnicate"), "--frobnicate"),
        (("generate", "out", "--prompt-ids", "1", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("validate", "out", "--against", "builtin:small", "--shape", "3by4"), "3x33"),
        (("validate", "out", "--against", "builtin:small", "--shape", "0x4"), "at least 1"),
        (("bisect", "out", "--against", "builtin:small", "--shape", "3by4"), "3x33"),
        (("validate", "out"), "out does not exist"),
        (("validate", "--replay", "nosuch.json"), "nosuch.json: cannot be read"),
    ],
)
def test_wrong_command_line(rmsnorm: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    outcome = rmsnorm(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    content = rmsnorm(*arguments, "--json").json
    assert content["schema"] == "rmsnorm_deploy.error/1"
    assert content["error"]["exit_code"] == 2
    assert message in content["error"]["message"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nosuch/folder/here", "neither an existing folder nor a hub name"),
        ("./nosuch", "neither an existing folder nor a hub name"),
        ("builtin:nosuch", "builtin:addition"),
        ("nosuch_module:make", "nosuch_module"),
        ("nosuch.py:make", "the file nosuch.py does not exist"),
        ("{models}:nosuch", "nosuch"),
        ("{models}:broken", "no luck"),
        ("{models}:torch", "torch"),
        ("{models}:quitting", "SystemExit: 3"),
        ("{models}", "is a file"),
        ("{folder}", "config.json"),
        ("{folder}/text.onnx", "not an ONNX model"),
    ],
)
def test_no_model(rmsnorm: CommandLine, models: Path, tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "text.onnx").write_text("this is not a model")
    outcome = rmsnorm("inspect", model.format(models=models, folder=tmp_path))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert "this is a bug" not in outcome.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--target", "nosuch"), 2, "primitives, standard, ort, plugin"),
        (("--opset", "17"), 3, "18 to 23"),
        (("--opset", "24"), 3, "18 to 23"),
        (("--opset", "20", "--target", "standard"), 3, "requires opset 23"),
        (("--dtype", "float8"), 2, "float32, float16, bfloat16, float64"),
        (("--dtype", "float64", "--target", "plugin"), 3, "--target primitives"),
        (("--with-past",), 3, "KV cache"),
        (("--inputs", "nosuch.npz"), 2, "no such file"),
    ],
)
def test_export_that_cannot_be(
    rmsnorm: CommandLine, models: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    outcome = rmsnorm("export", f"{models}:net", "-o", tmp_path / "out", *options, "--json")
    assert outcome.code == code
    assert outcome.json["error"]["exit_code"] == code
    assert message in outcome.json["error"]["message"]
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_model_without_inputs_says_how_to_give_them(
    rmsnorm: CommandLine, models: Path, tmp_path: Path
) -> None:
    source = tmp_path / "bare.py"
    source.write_text(f"import sys; sys.path.insert(0, {str(models.parent)!r})\nfrom tiny_models import Floats\n")
    outcome = rmsnorm("export", f"{source}:Floats", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "--inputs FILE.npz" in outcome.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- wrong places


@pytest.mark.parametrize("place", ["{file}/out", "/proc/nosuch/out"])
def test_export_to_where_nothing_can_be_written(rmsnorm: CommandLine, models: Path, tmp_path: Path, place: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    outcome = rmsnorm("export", f"{models}:net", "-o", place.format(file=file))
    assert outcome.code == 2
    assert "cannot write to" in outcome.err
    assert file.read_text() == "mine"


def test_export_to_a_read_only_folder(
    rmsnorm: CommandLine, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("rmsnorm_deploy.export.onnx_io.destinations.tempfile.mkdtemp", refused)
    outcome = rmsnorm("export", f"{models}:net", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "Permission denied" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_export_over_something_else(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    outcome = rmsnorm("export", f"{models}:net", "-o", tmp_path)
    assert outcome.code == 2
    assert "holds files that no export wrote" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _ctrl_c() -> None:
    raise KeyboardInterrupt


def _sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()  # the handler runs at the latest here


@pytest.mark.parametrize(
    ("happens", "code", "message"),
    [
        (_disk_full, 2, "No space left on device"),
        (_ctrl_c, 130, "interrupted"),
        (_sigterm, 143, "terminated"),
    ],
)
def test_export_that_stops_while_it_writes(
    rmsnorm: CommandLine,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[[], None],
    code: int,
    message: str,
) -> None:
    def half_written(model: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        happens()

    monkeypatch.setattr("rmsnorm_deploy.export.from_torch.save.ir.save", half_written)
    before = signal.getsignal(signal.SIGTERM)
    outcome = rmsnorm("export", f"{models}:net", "-o", tmp_path / "out")
    assert outcome.code == code
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


SLOW = """
import time, torch
class Slow(torch.nn.Linear):
    def forward(self, x):
        if torch.compiler.is_exporting():
            time.sleep(50)
        return super().forward(x)
def net():
    return Slow(4, 4), {"x": torch.ones(2, 4)}
"""


def test_export_interrupted_while_it_captures(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    model = tmp_path_factory.mktemp("slow") / "slow.py"
    model.write_text(SLOW)
    process = start("export", f"{model}:net", "-o", tmp_path / "out")
    assert process.stderr is not None
    for line in process.stderr:
        if "capturing" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.splitlines()[-1]) == ("", "error: interrupted; no incomplete files were left behind.")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ at run time


@pytest.fixture
def feeds(tmp_path: Path) -> Path:
    path = tmp_path / "x.npz"
    np.savez(path, input_ids=np.ones((1, 4), np.int64))
    return path


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported / "ort", tmp_path / "copy")


def test_truncated_external_data(rmsnorm: CommandLine, copied: Path, feeds: Path, tmp_path: Path) -> None:
    data = copied / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    outcome = rmsnorm("run", copied, "--inputs", feeds, "-o", tmp_path / "y.npz")
    assert outcome.code == 2
    assert "model.onnx.data is truncated" in outcome.err
    assert not (tmp_path / "y.npz").exists()


def test_truncated_model(rmsnorm: CommandLine, copied: Path, feeds: Path, tmp_path: Path) -> None:
    model = copied / "model.onnx"
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    outcome = rmsnorm("run", model, "--inputs", feeds, "-o", tmp_path / "y.npz")
    assert outcome.code == 2
    assert "not an ONNX model, or a truncated one" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nosuch",), "nosuch does not exist"),
        (("{folder}",), "no manifest.json"),
        (("{model}", "--provider", "nosuch"), "unknown execution provider 'nosuch'"),
    ],
)
def test_nothing_to_run(
    rmsnorm: CommandLine, copied: Path, feeds: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    named = [argument.format(folder=tmp_path, model=copied) for argument in arguments]
    outcome = rmsnorm("run", *named, "--inputs", feeds, "-o", tmp_path / "y.npz")
    assert outcome.code == 2
    assert message in outcome.err


def test_provider_that_is_not_there(rmsnorm: CommandLine, copied: Path, feeds: Path, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    outcome = rmsnorm("run", copied, "--provider", "cuda", "--inputs", feeds, "-o", tmp_path / "y.npz")
    assert outcome.code == 4
    assert "rmsnorm-deploy[gpu]" in outcome.err


def test_wrong_arrays(rmsnorm: CommandLine, copied: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "x.npz", tmp_path / "y.npz"

    def message(**arrays: Any) -> str:
        np.savez(path, **arrays)
        outcome = rmsnorm("run", copied, "--inputs", path, "-o", output)
        assert outcome.code == 2
        return outcome.err

    assert "missing: input_ids; unexpected: ids. The inputs are: input_ids." in message(ids=np.ones((1, 4), np.int64))
    assert "expected dtype int64" in message(input_ids=np.ones((1, 4), np.float32))
    assert "of rank 2, got" in message(input_ids=np.ones(4, np.int64))
    assert "expected an .npz file of plain arrays" in message(input_ids=np.array([{}]))


def test_files_that_are_not_npz(rmsnorm: CommandLine, copied: Path, tmp_path: Path) -> None:
    array, text, empty = tmp_path / "a.npy", tmp_path / "t.npz", tmp_path / "e.npz"
    np.save(array, np.ones(3))
    text.write_text("no archive")
    empty.touch()
    for path in (array, text, empty):
        outcome = rmsnorm("run", copied, "--inputs", path, "-o", tmp_path / "y.npz")
        assert outcome.code == 2
        assert "expected an .npz file of plain arrays" in outcome.err
    outcome = rmsnorm("run", copied, "--inputs", tmp_path / "nosuch.npz", "-o", tmp_path / "y.npz")
    assert "no such file" in outcome.err


def test_outputs_that_cannot_be_written(
    rmsnorm: CommandLine, copied: Path, feeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is a folder" in rmsnorm("run", copied, "--inputs", feeds, "-o", tmp_path).err
    assert "does not exist" in rmsnorm("run", copied, "--inputs", feeds, "-o", tmp_path / "no" / "y.npz").err
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("numpy.lib.format.write_array", lambda *_, **__: _disk_full())
    outcome = rmsnorm("run", copied, "--inputs", feeds, "-o", tmp_path / "y.npz")
    assert outcome.code == 2
    assert "No space left on device" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_validate_in_another_dtype(rmsnorm: CommandLine, models: Path, exported: Path) -> None:
    outcome = rmsnorm("validate", exported / "ort", "--against", f"{models}:net", "--dtype", "float16")
    assert outcome.code == 2
    assert "--dtype float32" in outcome.err


# -------------------------------------------------------------------------------------------------------- handling


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("wrong file"), 2, "wrong file"),
        (UnsupportedError("cannot"), 3, "cannot"),
        (EnvironmentMissingError("not there"), 4, "not there"),
        (MismatchError("differs"), 1, "differs"),
        (RmsnormDeployError("other"), 2, "other"),
        (SystemExit(3), 2, "exited with 3"),
        (KeyboardInterrupt(), 130, "interrupted; no incomplete files were left behind."),
        (OSError(errno.EIO, "Input/output error", "some/file"), 2, "some/file: Input/output error"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 4, "torch is not installed"),
        (ValueError("odd\nvalue"), 70, "ValueError: odd value (this is a bug; run with RMSNORM_DEBUG=1"),
        (ModuleNotFoundError("no", name="rmsnorm_deploy.nosuch"), 70, "this is a bug"),
    ],
)
def test_every_exception_becomes_a_message(
    rmsnorm: CommandLine, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("rmsnorm_deploy.runtime.generation.api.Generator", fails)
    outcome = rmsnorm("generate", "out", "--prompt-ids", "1", "--json")
    assert outcome.code == code
    assert message in outcome.json["error"]["message"]
    assert outcome.json["error"]["exit_code"] == code
    assert outcome.err.splitlines()[-1].startswith("error: ")


def test_debugging_shows_the_traceback(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RMSNORM_DEBUG", "1")
    assert run(["inspect", f"{models}:broken"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "RuntimeError: no luck" in shown


def test_a_reader_that_closes_the_pipe_is_not_an_error() -> None:
    process = start("targets", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_a_home_folder_that_is_not_known(rmsnorm: CommandLine) -> None:
    outcome = rmsnorm("export", "~no-such-user/model", "-o", "out")
    assert (outcome.code, "a bug" in outcome.err) == (2, False)
    assert "write the whole path" in outcome.err
