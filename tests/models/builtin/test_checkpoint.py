"""Decoders on disk: what is saved is what is loaded, and what is damaged is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rmsnorm_deploy.models.builtin.checkpoint import (
    CHECKPOINTS,
    CONFIG_NAME,
    FORMAT,
    WEIGHTS_NAME,
    addition,
    load_decoder,
    save_decoder,
)
from rmsnorm_deploy.models.builtin.decoder import Decoder
from rmsnorm_deploy.models.errors import UsageError


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return addition()


@pytest.fixture
def folder(decoder: Decoder, tmp_path: Path) -> Path:
    save_decoder(decoder, tmp_path / "a" / "decoder")
    return tmp_path / "a" / "decoder"


def test_the_shipped_checkpoint_is_float32_and_in_eval_mode(decoder: Decoder) -> None:
    assert {tensor.dtype for tensor in decoder.state_dict().values()} == {torch.float32}
    assert not decoder.training
    assert json.loads((CHECKPOINTS / "addition" / CONFIG_NAME).read_text())["format"] == FORMAT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit(decoder: Decoder, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load_decoder(CHECKPOINTS / "addition").to(dtype)
    save_decoder(model, str(tmp_path))
    found = load_decoder(tmp_path)
    assert found.config == model.config
    assert not found.training
    wanted = model.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    assert {tensor.dtype for tensor in found.state_dict().values()} == {dtype}


def test_only_the_two_files_are_written(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}


def test_an_earlier_save_is_still_there_after_an_error(
    decoder: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def failing(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UsageError, match="No space left"):
        save_decoder(decoder, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_place_that_is_a_file_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="file"):
        save_decoder(decoder, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name):
        load_decoder(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone"):
        load_decoder(tmp_path / "gone")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "another"}', f'{{"format": "{FORMAT}"}}'])
def test_a_config_that_is_no_decoders(folder: Path, text: str) -> None:
    (folder / CONFIG_NAME).write_text(text)
    with pytest.raises(UsageError, match=CONFIG_NAME):
        load_decoder(folder)


def test_a_config_with_an_unknown_field(folder: Path) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "no_such_field": 1}))
    with pytest.raises(UsageError, match="no_such_field"):
        load_decoder(folder)


def test_weights_that_are_cut_short(folder: Path) -> None:
    content = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=WEIGHTS_NAME):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t, name: t.pop(name), "missing"),
        (lambda t, name: t.update(another=t[name].clone()), "another"),
        (lambda t, name: t.update({name: torch.zeros(3)}), r"\[3\]"),
        (lambda t, name: t.update({name: t[name].half()}), "float16"),
        (lambda t, name: t.update({n: v.long() for n, v in t.items()}), "int64"),
        (lambda t, name: t.clear(), "more"),
    ],
)
def test_weights_that_do_not_fit_the_config(folder: Path, change: Any, word: str) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    change(tensors, sorted(tensors)[0])
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME)
    with pytest.raises(UsageError, match=word):
        load_decoder(folder)
