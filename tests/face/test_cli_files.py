"""No command touches a file that this package did not write, and no name in a file steers the terminal."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest

from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.runtime.report.text import printable
from tests.helpers.interface.command_line import CommandLine


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def out(rmsnorm: CommandLine, place: Path) -> Path:
    assert rmsnorm("export", "builtin:small", "-o", "out").code == 0
    np.savez(place / "in.npz", input_ids=np.ones((1, 4), np.int64))
    return place / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(rmsnorm: CommandLine, place: Path, message: str, *arguments: object) -> None:
    """The command exits with 2 and this message, and every file is as it was."""
    before = content(place)
    outcome = rmsnorm(*arguments)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err
    assert content(place) == before


def test_a_folder_of_others_with_a_manifest_is_not_emptied(rmsnorm: CommandLine, place: Path) -> None:
    (place / "web").mkdir()
    (place / "web" / "manifest.json").write_text('{"name": "a web app"}')
    (place / "web" / "index.html").write_text("mine")
    refused(rmsnorm, place, "index.html, manifest.json", "export", "builtin:small", "-o", "web")


@pytest.mark.parametrize("name", ["notes.md", ".git/HEAD"])
def test_files_beside_an_export_stay(rmsnorm: CommandLine, place: Path, out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    refused(
        rmsnorm, place, f"no export wrote, or that were changed since: {name}", "export", "builtin:small", "-o", out
    )


def test_an_export_replaces_an_export_and_leaves_nothing_else(rmsnorm: CommandLine, place: Path, out: Path) -> None:
    before = content(out)
    assert rmsnorm("export", "builtin:small", "-o", out, "--target", "ort").code == 0
    assert content(out) != before
    assert sorted(os.listdir(place)) == ["in.npz", "out"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "contains"),
        (".", "contains"),
        ("out", "is the folder of the model itself"),
        ("out/../out", "is the folder of the model itself"),
        ("link", "is not a folder"),
        ("link/../out", "is the folder of the model itself"),
        ("..", "contains"),
    ],
)
def test_a_rewrite_never_touches_its_input(
    rmsnorm: CommandLine, place: Path, out: Path, output: str, message: str
) -> None:
    (place / "link").symlink_to("out")
    refused(rmsnorm, place, message, "rewrite", out / "model.onnx", "-o", output)


def test_a_run_never_writes_over_what_it_reads_or_over_files_of_others(
    rmsnorm: CommandLine, place: Path, out: Path
) -> None:
    command = ("run", out, "--inputs", place / "in.npz", "-o")
    refused(rmsnorm, place, "--inputs and -o both name", *command, place / "in.npz")
    refused(rmsnorm, place, "rmsnorm did not write it", *command, out / "model.onnx")
    refused(rmsnorm, place, "is not a regular file", *command, "/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    for _ in range(2):  # a file of an earlier run is replaced
        assert rmsnorm(*command, place / "y.npz").code == 0
    refused(rmsnorm, place, "--inputs and -o both name", "run", out, "--inputs", "y.npz", "-o", "./y.npz")


def test_reports_replace_reports_alone(rmsnorm: CommandLine, place: Path, out: Path) -> None:
    command = ("validate", out, "--against", "builtin:small", "--outputs-only", "--shape", "1x2")
    refused(rmsnorm, place, "--html and --junit both name", *command, "--html", "a", "--junit", "./a")
    (place / "page.html").write_text("<!doctype html><title>mine</title>")
    refused(rmsnorm, place, "rmsnorm did not write it", *command, "--html", "page.html")
    for _ in range(2):
        assert rmsnorm(*command, "-o", "report.json", "--junit", "report.xml", "--html", "report.html").code == 0
    refused(rmsnorm, place, "--replay and -o both name", "validate", "--replay", "report.json", "-o", "report.json")


def test_a_manifest_does_not_lead_out_of_its_folder(rmsnorm: CommandLine, place: Path, out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    (place / "secret.onnx").write_bytes((out / "model.onnx").read_bytes())
    (out / "link.onnx").symlink_to("../secret.onnx")
    for name in ("../secret.onnx", str(place / "secret.onnx"), "link.onnx"):
        (out / "manifest.json").write_text(json.dumps({**manifest, "model": name}))
        refused(rmsnorm, place, "which is outside of the folder", "run", out, "--inputs", "in.npz", "-o", "y.npz")


def test_a_private_model_stays_private(rmsnorm: CommandLine, place: Path, out: Path) -> None:
    for file in out.iterdir():
        file.chmod(0o600)
    assert rmsnorm("rewrite", out / "model.onnx", "-o", "fast").code == 0
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (place / "fast").iterdir()}
    assert {name: mode for name, mode in modes.items() if name.startswith("model.onnx")} == {
        "model.onnx": 0o600, "model.onnx.data": 0o600,
    }  # fmt: skip


@pytest.mark.parametrize("taken", ["manifest.json", "model.onnx"])
def test_external_data_with_the_name_of_another_file_is_refused(
    rmsnorm: CommandLine, place: Path, out: Path, taken: str
) -> None:
    """Not overwritten after its proof."""
    (place / "in").mkdir()
    onnx.save(
        onnx.load(out / "model.onnx"), place / "in" / "m.onnx", save_as_external_data=True, location=taken,
        size_threshold=0,
    )  # fmt: skip
    if taken == "manifest.json":
        refused(rmsnorm, place, "has the name of the manifest", "rewrite", "in/m.onnx", "-o", "fast")
    else:  # another name than the model's is free
        assert rmsnorm("rewrite", "in/m.onnx", "-o", "fast").code == 0


def test_external_data_called_like_a_companion_is_not_replaced(rmsnorm: CommandLine, place: Path, out: Path) -> None:
    (place / "in").mkdir()
    onnx.save(
        onnx.load(out / "model.onnx"), place / "in" / "m.onnx", save_as_external_data=True, location="config.json",
        size_threshold=0,
    )  # fmt: skip
    assert rmsnorm("rewrite", "in/m.onnx", "-o", "fast").code == 0
    assert (place / "fast" / "config.json").read_bytes() == (place / "in" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb\x08c\x7f", "a\\rb\\x08c\\x7f"),
        ("\x9b31m", "\\x9b31m"),
        ("nur\u202etxt", "nur\\u202etxt"),
        ("half \udcff", "half \\udcff"),
        ("soft\xadhyphen\ufeff", "soft\\xadhyphen\\ufeff"),
        ("ü – 模型\ttab\nline", "ü – 模型\ttab\nline"),
    ],
)
def test_names_cannot_steer_the_terminal(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(text) == shown
    screen = Screen(as_json=False)
    screen.line(text)
    screen.note(text)
    screen.table(["name"], [[text.replace("\n", " ")]])
    captured = capsys.readouterr()
    assert all(text not in part or text == shown for part in (captured.out, captured.err))
    assert captured.out.startswith(shown)
    assert captured.err == shown + "\n"
