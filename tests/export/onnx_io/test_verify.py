"""The files of an exported folder against its manifest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.onnx_io.verify import check_weights, verify_folder
from rmsnorm_deploy.models.builtin.checkpoint import save_decoder
from rmsnorm_deploy.models.builtin.decoder import small_decoder
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.weights.checkpoint import load_weights
from rmsnorm_deploy.runtime.inputs.exported import open_exported

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and its exports with links without hashes (`out`), and with them (`hashed`)."""
    folder = tmp_path_factory.mktemp("original")
    save_decoder(small_decoder(), folder / "m")
    model = small_decoder().eval()
    load_weights(model, folder / "m")
    export_model(model, folder / "out")
    export_model(model, folder / "hashed", full_hash=True)
    return folder


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "copy")
    for name in ("out", "hashed"):  # copies of links are files of their own
        (tmp_path / "copy" / name / WEIGHTS).unlink()
        os.link(tmp_path / "copy" / "m" / WEIGHTS, tmp_path / "copy" / name / WEIGHTS)
    return tmp_path / "copy"


def problems(folder: Path) -> dict[str, str]:
    return {file.name: file.problem for file in verify_folder(folder) if file.problem is not None}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_a_folder_as_exported_is_sound(place: Path) -> None:
    assert problems(place / "out") == problems(place / "hashed") == {}
    compared = {file.name: file.compared for file in verify_folder(place / "out")}
    assert compared[WEIGHTS] == "a sample"
    assert set(compared.values()) == {"a sample", "all bytes"}
    assert {file.compared for file in verify_folder(place / "hashed")} == {"all bytes"}


def test_the_manifest_says_where_weights_are(place: Path) -> None:
    weights = manifest(place / "out")["weights"]
    assert weights["mode"] == "link"
    assert Path(weights["files"][WEIGHTS]["source"]).name == WEIGHTS
    assert weights["files"][WEIGHTS]["sha256"] is None
    assert len(manifest(place / "hashed")["weights"]["files"][WEIGHTS]["sha256"]) == 64


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def trained(path: Path) -> None:
    """The same keys and shapes, other values, written over the file as save_pretrained does."""
    tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(tensors, path)


def one_tensor(path: Path) -> None:
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = torch.randn_like(tensors[name])
    save_file(tensors, path)


def swapped(path: Path) -> None:
    save_file({"other": torch.ones(path.stat().st_size // 4)}, path)


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def linked_elsewhere(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


CHANGES = {
    "truncated": (truncated, "bytes, got"),
    "moved": (Path.unlink, "moved or deleted"),
    "trained further": (trained, "it was changed after the export"),
    "one tensor": (one_tensor, "it was changed after the export"),
    "swapped": (swapped, "changed after the export"),
    "a folder": (replaced_by_a_folder, "expected a regular file"),
    "a link out of the folder": (linked_elsewhere, "outside of it"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_checkpoint_is_noticed_and_named(place: Path, name: str) -> None:
    change, message = CHANGES[name]
    change(place / "out" / WEIGHTS)
    found = problems(place / "out")
    assert WEIGHTS in found
    assert message in found[WEIGHTS]
    with pytest.raises(UsageError, match=rf"{WEIGHTS}: expected"):
        open_exported(place / "out")


def test_one_byte_is_noticed_where_all_bytes_were_hashed(place: Path) -> None:
    data = bytearray((place / "m" / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (place / "m" / WEIGHTS).write_bytes(data)
    assert WEIGHTS in problems(place / "hashed")


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
def test_other_files_are_compared_too(place: Path, name: str) -> None:
    path = place / "out" / name
    if not path.exists():
        pytest.skip(f"this export has no {name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert list(problems(place / "out")) == [name]


def test_weights_that_a_model_reads_elsewhere_are_a_problem(place: Path) -> None:
    """A manifest whose hash fits a model with a location outside of the folder."""
    import hashlib

    import onnx

    model = onnx.load(place / "out" / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../m/model.safetensors"
    data = model.SerializeToString()
    (place / "out" / "model.onnx").write_bytes(data)
    content = manifest(place / "out")
    content["files"]["model.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (place / "out" / "manifest.json").write_text(json.dumps(content))
    assert "outside" in problems(place / "out")["model.onnx"]


def test_a_manifest_without_weights_is_checked_by_its_hashes(place: Path) -> None:
    content = manifest(place / "out")
    del content["weights"]
    (place / "out" / "manifest.json").write_text(json.dumps(content))
    check_weights(place / "out", content)
    assert {f.name: f.compared for f in verify_folder(place / "out")}[WEIGHTS] == "its size"


def test_a_model_in_the_checkpoints_folder(place: Path) -> None:
    folder = place / "m"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for _ in range(2):  # the second one replaces the first
        model = small_decoder().eval()
        load_weights(model, folder)
        export_model(model, folder, weights="reference")
    assert {file.name for file in folder.iterdir()} == {*before, "model.onnx", "manifest.json"}
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert problems(folder) == {}
    assert list(manifest(folder)["files"]) == ["model.onnx"]
    open_exported(folder)
    trained(folder / WEIGHTS)
    assert WEIGHTS in problems(folder)
    with pytest.raises(UsageError, match=rf"{WEIGHTS}: expected"):
        open_exported(folder)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_file_in_the_checkpoints_folder_that_no_export_wrote_is_kept(place: Path, name: str) -> None:
    (place / "m" / name).write_text("mine")
    model = small_decoder().eval()
    load_weights(model, place / "m")
    with pytest.raises(UsageError, match=f"has {name}, which no export wrote"):
        export_model(model, place / "m", weights="reference")
    assert (place / "m" / name).read_text() == "mine"
    assert not [file for file in (place / "m").iterdir() if file.name.startswith(".")]


def test_a_reference_to_a_folder_that_is_not_there(place: Path) -> None:
    model = small_decoder().eval()
    load_weights(model, place / "m")
    with pytest.raises(UsageError, match="is not a folder"):
        export_model(model, place / "new", weights="reference")


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        verify_folder(tmp_path)


def test_a_model_of_several_parts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    export_model(tmp_path / "m", tmp_path / "out", with_past=True)
    assert problems(tmp_path / "out") == {}
    names = {file.name for file in verify_folder(tmp_path / "out")}
    assert {"encoder/model.safetensors", "decoder/model.safetensors"} <= names
    assert os.path.samefile(tmp_path / "out/encoder/model.safetensors", tmp_path / "m/model.safetensors")
    (tmp_path / "out/decoder/model.safetensors").unlink()
    assert sorted(problems(tmp_path / "out")) == ["decoder/model.onnx", "decoder/model.safetensors"]
    with pytest.raises(UsageError, match=r"decoder/model\.safetensors: expected a file"):
        open_exported(tmp_path / "out" / "decoder")
