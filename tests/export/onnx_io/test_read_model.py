"""Reading ONNX files: what is read, what is refused, and that nobody wrote to it meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from rmsnorm_deploy.export.onnx_io import read_model as model_file
from rmsnorm_deploy.export.onnx_io.read_model import read_model, to_ir
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError

W = np.arange(64, dtype=np.float32).reshape(8, 8)


def model_of(*initializers: onnx.TensorProto) -> onnx.ModelProto:
    """`y = x @ w`, and other initializers that nothing reads."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "main",
        [helper.make_tensor_value_info("x", T.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", T.FLOAT, ["n", 8])],
        initializers or [numpy_helper.from_array(W, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def external(location: str, **entries: str) -> onnx.TensorProto:
    tensor = T(name="w", data_type=T.FLOAT, dims=[8, 8], data_location=T.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def save(folder: Path, model: onnx.ModelProto) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_model_is_read_without_its_weights(tmp_path: Path) -> None:
    path = save(tmp_path, model_of(external("data/w.bin")))
    (tmp_path / "data").mkdir()
    weights = tmp_path / "data" / "w.bin"
    weights.write_bytes(W.tobytes())
    file = read_model(path)
    assert (file.path, file.external_files, file.where) == (path, (weights,), str(path))
    assert [(stamp.path, stamp.size) for stamp in file.stamps] == [(path, path.stat().st_size), (weights, 256)]
    model = to_ir(file)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), W)


def test_weights_may_lie_where_links_inside_of_the_folder_or_of_a_store_lead(tmp_path: Path) -> None:
    inside = save(tmp_path / "inside", model_of(external("w.bin")))
    (inside.parent / "real.bin").write_bytes(W.tobytes())
    (inside.parent / "w.bin").symlink_to("real.bin")
    store = tmp_path / "store"  # as the Hugging Face hub's cache keeps its files
    blobs, shown = store / "blobs", store / "snapshots" / "main"
    save(blobs, model_of(external("w.bin"))).rename(blobs / "aa")
    (blobs / "bb").write_bytes(W.tobytes())
    shown.mkdir(parents=True)
    (shown / "model.onnx").symlink_to("../../blobs/aa")
    (shown / "w.bin").symlink_to("../../blobs/bb")
    (tmp_path / "link").symlink_to(inside.parent)
    for path in (inside, shown / "model.onnx", tmp_path / "link" / "model.onnx"):
        assert read_model(path).external_files == (path.parent / "w.bin",)


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/hostname", "C:\\w.bin", "w.bin", "folder/w.bin", "loop", "a\0b"]
)
def test_weights_outside_of_the_folder_are_refused_by_name_or_through_links(tmp_path: Path, location: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (outside / "w.bin", tmp_path / "w.bin"):
        name.write_bytes(W.tobytes())
    path = save(tmp_path / "model", model_of(external(location)))
    (path.parent / "w.bin").symlink_to(outside / "w.bin")
    (path.parent / "folder").symlink_to(outside)
    (path.parent / "loop").symlink_to("loop")
    text = "loop of tensor w is missing" if location == "loop" else "is outside of the model's folder"
    with pytest.raises(UsageError, match=text) as error:
        read_model(path)
    assert str(path) in str(error.value)


def test_weights_that_are_no_file_or_have_no_possible_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").mkdir()
    with pytest.raises(UsageError, match=r"w\.bin of tensor w is missing"):
        read_model(save(tmp_path, model_of(external("w.bin"))))
    with pytest.raises(UsageError, match="of tensor w cannot be opened: File name too long"):
        read_model(save(tmp_path, model_of(external("w" * 300))))


def test_tensors_may_share_their_bytes(tmp_path: Path) -> None:
    twin = external("w.bin", offset="0", length="256")
    twin.name = "twin"
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    assert len(read_model(save(tmp_path, model_of(external("w.bin"), twin))).external_files) == 1


def test_a_file_too_large_for_protobuf_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    os.truncate(path, (1 << 31) + 10)
    with pytest.raises(UsageError, match="expected at most 2147483647 bytes, got 2147483658"):
        read_model(path)


@pytest.mark.parametrize("place", ["initializer", "attribute", "branch", "function", "sparse"])
def test_tensors_are_checked_wherever_they_stand(place: str) -> None:
    bad = numpy_helper.from_array(W, "bad")
    bad.raw_data = bad.raw_data[:-1]
    model = model_of()
    constant = helper.make_node("Constant", [], ["c"], value=bad)
    if place == "initializer":
        model.graph.initializer.append(bad)
    elif place == "attribute":
        model.graph.node.append(constant)
    elif place == "branch":
        branch = helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch))
    elif place == "function":
        branch = helper.make_graph([constant], "branch", [], [])
        body = [helper.make_node("If", ["a"], ["b"], then_branch=branch)]
        model.functions.append(helper.make_function("own", "F", ["a"], ["b"], body, []))
    else:
        indices = numpy_helper.from_array(np.array([0]), "at")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(bad, indices, [64]))
    with pytest.raises(UsageError, match=r"tensor bad has 255 bytes; its dims \[8, 8\] require 256"):
        read_model(model.SerializeToString())


@pytest.mark.parametrize(
    ("dtype", "field", "held", "dims"),
    [
        (T.FLOAT, "float_data", 6, [2, 3]),
        (T.COMPLEX64, "float_data", 12, [2, 3]),
        (T.DOUBLE, "double_data", 6, [2, 3]),
        (T.FLOAT16, "int32_data", 6, [2, 3]),
        (T.BFLOAT16, "int32_data", 6, [6]),
        (T.INT4, "int32_data", 3, [5]),
        (T.UINT2, "int32_data", 2, [5]),
        (T.UINT32, "uint64_data", 1, []),
        (T.INT64, "int64_data", 0, [4, 0]),
    ],
)
def test_values_are_counted_in_the_field_of_their_dtype(dtype: int, field: str, held: int, dims: list[int]) -> None:
    tensor = T(name="v", data_type=dtype, dims=dims)
    getattr(tensor, field).extend([0] * held)
    read_model(model_of(tensor).SerializeToString())
    getattr(tensor, field).append(0)
    with pytest.raises(UsageError, match=f"tensor v has {held + 1} values; its dims .* require {held}"):
        read_model(model_of(tensor).SerializeToString())


def test_texts_are_counted() -> None:
    tensor = helper.make_tensor("t", T.STRING, [2], [b"a", b"b"])
    read_model(model_of(tensor).SerializeToString())
    del tensor.string_data[0]
    with pytest.raises(UsageError, match="tensor t has 1 values"):
        read_model(model_of(tensor).SerializeToString())


@pytest.mark.parametrize("dims", [[-1], [1 << 40, 1 << 40], [1 << 62, 2], [0, -5], [(1 << 63) - 1, 2, 3]])
@pytest.mark.parametrize("inside", [True, False])
def test_impossible_dims_are_refused(dims: list[int], inside: bool, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    tensor = numpy_helper.from_array(W, "w") if inside else external("w.bin")
    tensor.dims[:] = dims
    with pytest.raises(UsageError, match="tensor w has impossible dims"):
        read_model(save(tmp_path, model_of(tensor)))


def test_dims_beyond_the_file_are_refused_without_any_memory(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    tensor = external("w.bin")
    tensor.dims[:] = [1 << 40]
    with pytest.raises(UsageError, match="ends at byte 4398046511104, and the file has 256 bytes"):
        read_model(save(tmp_path, model_of(tensor)))


@pytest.mark.parametrize("change", ["longer", "same length", "replaced", "removed"])
@pytest.mark.parametrize("name", ["model.onnx", "w.bin"])
def test_a_file_that_changes_is_noticed(tmp_path: Path, name: str, change: str) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    file = read_model(save(tmp_path, model_of(external("w.bin"))))
    file.check_unchanged()
    os.link(tmp_path / name, tmp_path / "second name")
    file.check_unchanged()  # a second name is not a change
    path = tmp_path / name
    status = path.stat()
    if change == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "same length":
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    elif change == "replaced":
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(path)
    else:
        path.unlink()
    with pytest.raises(UsageError, match=f"{name} changed while it was in use"):
        file.check_unchanged()


def test_what_onnx_ir_cannot_hold_is_refused() -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.array([0]), "at"), [4]
    )
    attribute, initializer, untyped, unknown, text = (model_of() for _ in range(5))
    attribute.graph.node.append(helper.make_node("Constant", [], ["c"], name="here", sparse_value=sparse))
    initializer.graph.sparse_initializer.append(sparse)
    untyped.graph.node[0].attribute.add(name="k", f=3.0)
    unknown.graph.input.add(name="m").type.map_type.key_type = T.INT64
    text.graph.node[0].attribute.add(name="k", type=onnx.AttributeProto.STRINGS, strings=[b"\xff"])
    for model, message in (
        (attribute, "attribute sparse_value of Constant 'here' is a sparse tensor"),
        (initializer, "initializer s is a sparse tensor"),
        (untyped, "attribute k of MatMul without a name, which computes 'y' has no type"),
        (unknown, "the graph cannot be read: Map types are not supported yet"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            to_ir(read_model(model.SerializeToString()))
    with pytest.raises(UsageError, match=r"the graph cannot be read: .*invalid start byte"):
        to_ir(read_model(text.SerializeToString()))


def test_names_are_made_fit_for_a_message() -> None:
    assert model_file.shorten("plain name") == "plain name"
    assert model_file.shorten("a\nb\u200b") == "a\\nb\\u200b"
    assert model_file.shorten("x" * 100) == "x" * 77 + "..."
