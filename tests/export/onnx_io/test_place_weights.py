"""The weights of a model beside its file: linked, copied or packed."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor
from safetensors.torch import save_file

from rmsnorm_deploy.export.onnx_io import place_weights as placing
from rmsnorm_deploy.export.onnx_io.place_weights import HARD_LINKED, parse_weights, place_weights
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.weights.checkpoint import stored_tensors

MODES = ("link", "copy", "pack")


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_file({"odd": torch.ones(3, dtype=torch.uint8), "a": torch.randn(40, 30)}, folder / "one.safetensors")
    save_file({"b": torch.randn(30, 40)}, folder / "two.safetensors")
    return stored_tensors([folder / "one.safetensors", folder / "two.safetensors"])


def model_of(tensors: dict[str, torch.Tensor]) -> ir.Model:
    """y = x @ a @ b + c, where c is in memory."""
    names = ["a", "b", "c"]
    values = {name: ir.Value(name=name, const_value=TorchTensor(tensors[name], name=name)) for name in names}
    for name, value in values.items():
        value.shape, value.type = ir.Shape(tensors[name].shape), ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([2, 40]), type=ir.TensorType(ir.DataType.FLOAT))
    first = ir.node("MatMul", [x, values["a"]])
    second = ir.node("MatMul", [first.outputs[0], values["b"]])
    third = ir.node("Add", [second.outputs[0], values["c"]])
    y = third.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([2, 40]), ir.TensorType(ir.DataType.FLOAT)
    nodes = [first, second, third]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=list(values.values()), opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def place(folder: Path, tensors: dict[str, torch.Tensor], mode: Any, full_hash: bool = False) -> Any:
    folder.mkdir()
    model = model_of(tensors)
    result = place_weights(model, folder, "model.onnx", mode, full_hash)
    ir.save(model, folder / "model.onnx")
    return result


def locations(path: Path) -> dict[str, dict[str, str]]:
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    return {t.name: {entry.key: entry.value for entry in t.external_data} for t in initializers}


def result_of(path: Path, x: np.ndarray[Any, Any]) -> Any:
    return onnxruntime.InferenceSession(path).run(None, {"x": x})[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_model_runs_with_the_checkpoints_values(tmp_path: Path, mode: str) -> None:
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.randn(40, 1).expand(40, 40)[:1].clone()}
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    place(tmp_path / "out", tensors, mode)
    x = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    wanted = x @ tensors["a"].numpy() @ tensors["b"].numpy() + tensors["c"].numpy()
    np.testing.assert_allclose(result_of(tmp_path / "out" / "model.onnx", x), wanted, rtol=1e-4, atol=1e-4)
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_links_are_the_files_themselves(tmp_path: Path) -> None:
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(40, 40)}
    result = place(tmp_path / "out", tensors, "link")
    assert (result.mode, result.notes) == ("link", [HARD_LINKED])
    for name in ("one.safetensors", "two.safetensors"):
        assert os.path.samefile(tmp_path / "out" / name, tmp_path / "m" / name)
        assert result.linked[name]["source"] == str(tmp_path / "m" / name)
        assert result.linked[name]["sha256"] is None
    found = locations(tmp_path / "out" / "model.onnx")
    assert [found[name]["location"] for name in "abc"] == ["one.safetensors", "two.safetensors", "model.onnx.data"]
    data = (tmp_path / "out" / "model.onnx.data").read_bytes()
    assert data == tensors["c"].numpy().tobytes()
    assert result.hashes == {"model.onnx.data": hashlib.sha256(data).hexdigest()}


def test_copies_are_other_files_with_the_same_mode(tmp_path: Path) -> None:
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(1)}
    (tmp_path / "m" / "one.safetensors").chmod(0o600)
    result = place(tmp_path / "out", tensors, "copy", full_hash=True)
    copy = tmp_path / "out" / "one.safetensors"
    assert copy.stat().st_nlink == 1
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.read_bytes() == (tmp_path / "m" / "one.safetensors").read_bytes()
    assert result.linked["one.safetensors"]["sha256"] == hashlib.sha256(copy.read_bytes()).hexdigest()
    assert not (tmp_path / "out" / "model.onnx.data").exists()


def test_a_pack_has_each_weight_at_a_page(tmp_path: Path) -> None:
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(40, 40)}
    result = place(tmp_path / "out", tensors, "pack")
    found = locations(tmp_path / "out" / "model.onnx")
    assert {place["location"] for place in found.values()} == {"model.onnx.data"}
    data = (tmp_path / "out" / "model.onnx.data").read_bytes()
    for name, row in found.items():
        offset, length = int(row["offset"]), int(row["length"])
        assert offset % 4096 == 0
        assert data[offset : offset + length] == tensors[name].numpy().tobytes()
    assert result.linked == {}
    assert result.hashes == {"model.onnx.data": hashlib.sha256(data).hexdigest()}


def test_a_weight_that_was_changed_in_memory_is_written_as_it_is_now(tmp_path: Path) -> None:
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(1)}
    tensors["a"][0, 0] = 100.0
    place(tmp_path / "out", tensors, "link")
    assert locations(tmp_path / "out" / "model.onnx")["a"]["location"] == "model.onnx.data"
    x = np.zeros((2, 40), np.float32)
    x[:, 0] = 1.0
    wanted = x @ tensors["a"].numpy() @ tensors["b"].numpy() + 1.0
    np.testing.assert_allclose(result_of(tmp_path / "out" / "model.onnx", x), wanted, rtol=1e-4, atol=1e-3)


def test_a_clone_of_the_file_system_comes_before_a_hard_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clones share blocks on btrfs and XFS; here the system call is one that copies."""
    fcntl = pytest.importorskip("fcntl")
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(1)}

    def ioctl(target: int, request: int, source: int) -> None:
        assert request == 0x40049409
        os.write(target, os.pread(source, os.fstat(source).st_size, 0))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    result = place(tmp_path / "out", tensors, "link")
    assert (result.mode, result.notes) == ("link", [])
    assert (tmp_path / "out" / "one.safetensors").stat().st_nlink == 1
    result_of(tmp_path / "out" / "model.onnx", np.ones((2, 40), np.float32))


def test_a_reference_is_the_path_below_the_final_folder(tmp_path: Path) -> None:
    tensors = {**checkpoint(tmp_path / "home" / "m"), "c": torch.ones(40, 40)}
    (tmp_path / "home" / "partial").mkdir()
    model = model_of(tensors)
    result = place_weights(model, tmp_path / "home" / "partial", "model.onnx", "reference", final=tmp_path / "home")
    ir.save(model, tmp_path / "home" / "model.onnx")
    assert list((tmp_path / "home" / "partial").iterdir()) == []
    assert sorted(result.linked) == ["m/one.safetensors", "m/two.safetensors"]
    found = locations(tmp_path / "home" / "model.onnx")
    assert [found[name].get("location") for name in "abc"] == ["m/one.safetensors", "m/two.safetensors", None]
    loaded = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "home" / "model.onnx").graph.initializer
    }
    for name in "abc":
        np.testing.assert_array_equal(loaded[name], tensors[name].numpy())


@pytest.mark.parametrize("final", ["elsewhere", "m/onnx"])
def test_a_reference_that_leaves_the_folder_is_refused(tmp_path: Path, final: str) -> None:
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(1)}
    (tmp_path / final).mkdir()
    with pytest.raises(UsageError, match="must be in its folder"):
        place_weights(model_of(tensors), tmp_path, "model.onnx", "reference", final=tmp_path / final)


def test_a_reference_through_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "blobs")
    (tmp_path / "m").mkdir()
    for name in ("one", "two"):
        (tmp_path / "m" / f"{name}.safetensors").symlink_to(tmp_path / "blobs" / f"{name}.safetensors")
    tensors = stored_tensors([tmp_path / "m" / "one.safetensors", tmp_path / "m" / "two.safetensors"])
    with pytest.raises(UsageError, match="must be in its folder"):
        place_weights(
            model_of({**tensors, "c": torch.ones(1)}), tmp_path, "model.onnx", "reference", final=tmp_path / "m"
        )


def test_too_many_other_weights_for_a_reference_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "_MOST_INLINE", 5000)
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(40, 40)}
    with pytest.raises(UsageError, match="6400 bytes of weights are not in the checkpoint as the model uses them"):
        place_weights(model_of(tensors), tmp_path, "model.onnx", "reference", final=tmp_path / "m")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_not_possible_the_weights_are_packed_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(1)}
    original, calls = os.link, []

    def link(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        original(source, target)

    monkeypatch.setattr(placing.os, "link", link)
    result = place(tmp_path / "out", tensors, "link")
    assert result.mode == "pack"
    assert "cannot be linked to from here" in result.notes[0]
    assert os.strerror(number) in result.notes[0]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]


def test_symbolic_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    checkpoint(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in ("one", "two"):
        (snapshot / f"{name}.safetensors").symlink_to(f"../../blobs/{name}.safetensors")
    tensors = stored_tensors([snapshot / "one.safetensors", snapshot / "two.safetensors"])
    place(tmp_path / "out", {**tensors, "c": torch.ones(1)}, "link")
    linked = tmp_path / "out" / "one.safetensors"
    assert not linked.is_symlink()
    assert os.path.samefile(linked, tmp_path / "blobs" / "one.safetensors")
    result_of(tmp_path / "out" / "model.onnx", np.ones((2, 40), np.float32))


def test_files_of_one_name_and_a_file_named_as_the_model(tmp_path: Path) -> None:
    for folder, name in (("m", "a"), ("n", "b")):
        (tmp_path / folder).mkdir()
        shape = (40, 30) if name == "a" else (30, 40)
        save_file({name: torch.randn(shape)}, tmp_path / folder / "model.safetensors")
    tensors = {}
    for folder in ("m", "n"):
        tensors |= stored_tensors([tmp_path / folder / "model.safetensors"])
    result = place(tmp_path / "out", {**tensors, "c": torch.ones(1)}, "link")
    assert sorted(result.linked) == ["model-2.safetensors", "model.safetensors"]
    result_of(tmp_path / "out" / "model.onnx", np.ones((2, 40), np.float32))


def test_a_checkpoint_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    tensors = {**checkpoint(tmp_path / "m"), "c": torch.ones(1)}
    os.utime(tmp_path / "m" / "two.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match=r"two\.safetensors changed while it was in use"):
        place(tmp_path / "out", tensors, "link")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="weights: expected one of link, copy, pack, reference, got 'move'"):
        parse_weights("move")
