"""`rmsnorm verify`, and what `rmsnorm export` says of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rmsnorm_deploy.cli import app
from tests.helpers.models.families import build

runner = CliRunner()


def run(*arguments: Any) -> Any:
    return runner.invoke(app, [*map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "m")
    assert run("export", tmp_path / "m", "-o", tmp_path / "out", "--hash").exit_code == 0
    return tmp_path


def test_a_sound_folder_passes(folder: Path) -> None:
    result = run("verify", folder / "out")
    assert result.exit_code == 0
    assert "model.safetensors: as exported (all bytes compared)" in result.output
    payload = json.loads(run("verify", folder / "out", "--json").stdout)
    assert (payload["schema"], payload["verdict"]) == ("rmsnorm_deploy.verify/1", "pass")
    assert {row["problem"] for row in payload["files"]} == {None}


def test_a_checkpoint_that_was_trained_further_fails_and_does_not_run(folder: Path) -> None:
    path = folder / "m" / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    result = run("verify", folder / "out")
    assert result.exit_code == 1
    assert "model.safetensors: expected the bytes that were exported, got others" in result.output
    assert "1 of" in result.output
    assert json.loads(run("verify", folder / "out", "--json").stdout)["verdict"] == "fail"
    torch.save({}, folder / "x.pt")
    for command in (
        ("generate", folder / "out", "--prompt-ids", "3,4"),
        ("validate", folder / "out", "--against", folder / "m"),
        ("build", folder / "out", "-o", folder / "x.engine", "--runtime", "rtx"),
    ):
        result = run(*command)
        assert result.exit_code == 2, (command, result.output)
        assert "model.safetensors: expected the bytes that were exported" in " ".join(result.output.split())


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    result = run("verify", tmp_path)
    assert result.exit_code == 2
    assert "has no manifest.json" in result.output


def test_an_unknown_way_is_refused_before_slow_work(tmp_path: Path) -> None:
    result = run("export", tmp_path / "nothing", "-o", tmp_path / "out", "--weights", "move")
    assert result.exit_code == 2
    assert "weights: expected one of link, copy, pack, reference, got 'move'" in " ".join(result.output.split())


def test_pickled_weights_need_an_option(tmp_path: Path) -> None:
    model = build("llama")
    model.config.save_pretrained(tmp_path / "m")
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    refused = run("export", tmp_path / "m", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "pytorch_model.bin, a pickle" in " ".join(refused.output.split())
    assert not (tmp_path / "out").exists()
    allowed = run("export", tmp_path / "m", "-o", tmp_path / "out", "--allow-pickle")
    assert allowed.exit_code == 0, allowed.output
    assert (tmp_path / "out" / "model.onnx.data").exists()
    for command in (("inspect", tmp_path / "m"), ("validate", tmp_path / "out", "--against", tmp_path / "m")):
        assert run(*command).exit_code == 2
        assert run(*command, "--allow-pickle").exit_code == 0
