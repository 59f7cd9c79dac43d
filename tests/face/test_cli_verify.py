"""`rmsnorm verify`, and what `rmsnorm export` says of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.families import build


@pytest.fixture
def folder(rmsnorm: CommandLine, tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "m")
    assert rmsnorm("export", tmp_path / "m", "-o", tmp_path / "out", "--hash").code == 0
    return tmp_path


def test_a_sound_folder_passes(rmsnorm: CommandLine, folder: Path) -> None:
    result = rmsnorm("verify", folder / "out")
    assert result.code == 0
    assert "model.safetensors: as exported (all bytes compared)" in (result.out + result.err)
    payload = json.loads(rmsnorm("verify", folder / "out", "--json").out)
    assert (payload["schema"], payload["verdict"]) == ("rmsnorm_deploy.verify/1", "pass")
    assert {row["problem"] for row in payload["files"]} == {None}


def test_a_checkpoint_that_was_trained_further_fails_and_does_not_run(rmsnorm: CommandLine, folder: Path) -> None:
    path = folder / "m" / "model.safetensors"
    data = save({name: tensor * 2 for name, tensor in load_file(path).items()}, {"format": "pt"})
    path.write_bytes(data)  # in place: a new file would leave the export as it is
    result = rmsnorm("verify", folder / "out")
    assert result.code == 1
    assert "model.safetensors: expected the bytes that were exported, got others" in (result.out + result.err)
    assert "1 of" in (result.out + result.err)
    assert json.loads(rmsnorm("verify", folder / "out", "--json").out)["verdict"] == "fail"
    torch.save({}, folder / "x.pt")
    for command in (
        ("generate", folder / "out", "--prompt-ids", "3,4"),
        ("validate", folder / "out", "--against", folder / "m"),
        ("build", folder / "out", "-o", folder / "x.engine", "--runtime", "rtx"),
    ):
        result = rmsnorm(*command)
        assert result.code == 2, (command, (result.out + result.err))
        assert "model.safetensors: expected the bytes that were exported" in " ".join((result.out + result.err).split())


def test_a_folder_that_is_no_export(rmsnorm: CommandLine, tmp_path: Path) -> None:
    result = rmsnorm("verify", tmp_path)
    assert result.code == 2
    assert "has no manifest.json" in (result.out + result.err)


def test_an_unknown_way_is_refused_before_slow_work(rmsnorm: CommandLine, tmp_path: Path) -> None:
    result = rmsnorm("export", tmp_path / "nothing", "-o", tmp_path / "out", "--weights", "move")
    assert result.code == 2
    assert "weights: expected one of link, copy, pack, reference, got 'move'" in " ".join(
        (result.out + result.err).split()
    )


def test_pickled_weights_need_an_option(rmsnorm: CommandLine, tmp_path: Path) -> None:
    model = build("llama")
    model.config.save_pretrained(tmp_path / "m")
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    refused = rmsnorm("export", tmp_path / "m", "-o", tmp_path / "out")
    assert refused.code == 2
    assert "pytorch_model.bin, a pickle" in " ".join((refused.out + refused.err).split())
    assert not (tmp_path / "out").exists()
    allowed = rmsnorm("export", tmp_path / "m", "-o", tmp_path / "out", "--allow-pickle")
    assert allowed.code == 0, allowed.err
    assert (tmp_path / "out" / "model.onnx.data").exists()
    for command in (("inspect", tmp_path / "m"), ("validate", tmp_path / "out", "--against", tmp_path / "m")):
        assert rmsnorm(*command).code == 2
        assert rmsnorm(*command, "--allow-pickle").code == 0
