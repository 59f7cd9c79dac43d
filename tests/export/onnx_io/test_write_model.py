"""Writing rewritten graphs: weights stay where they are, and nothing is lost that the graph does not show."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from rmsnorm_deploy.export.onnx_io import write_model as model_writer
from rmsnorm_deploy.export.onnx_io.read_model import ModelFile, read_model, to_ir
from rmsnorm_deploy.export.onnx_io.write_model import graft, write_model
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError

W = np.arange(16, dtype=np.float32)
# Fields of a version of ONNX that is still to come: number 1000, some bytes.
UNKNOWN = b"\xc2\x3e\x03new"


def external(name: str, location: str, offset: int = 0, length: int = 64, **entries: str) -> onnx.TensorProto:
    tensor = T(name=name, data_type=T.FLOAT, dims=[length // 4], data_location=T.EXTERNAL)
    for key, value in {"location": location, "offset": str(offset), "length": str(length), **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(*initializers: onnx.TensorProto) -> onnx.ModelProto:
    """`y = relu(x + first) + ... + last`."""
    nodes, last = [], "x"
    for number, tensor in enumerate(initializers):
        nodes.append(helper.make_node("Add", [last, tensor.name], [f"s{number}"], name=f"add{number}"))
        nodes.append(helper.make_node("Relu", [f"s{number}"], [f"r{number}"], name=f"relu{number}"))
        last = f"r{number}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    info = [helper.make_tensor_value_info(name, T.FLOAT, ["n", 16]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "main", info[:1], info[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=11)


def saved(folder: Path, model: onnx.ModelProto) -> ModelFile:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return read_model(path)


@pytest.fixture
def with_weights(tmp_path: Path) -> ModelFile:
    folder = tmp_path / "in"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "w.bin").write_bytes(W.tobytes() * 2)
    (folder / "deep" / "er" / "v.bin").write_bytes(W.tobytes())
    inline = numpy_helper.from_array(W, "inline")
    a, b = external("a", "w.bin", 64, checksum="abc"), external("b", "deep/er/v.bin")
    return saved(folder, model_of(a, b, inline))


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_weights_are_placed_beside_the_model_as_they_were(
    with_weights: ModelFile, tmp_path: Path, weights: Any
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    before = [(stamp.path.read_bytes(), stamp) for stamp in with_weights.stamps]
    assert write_model(to_ir(with_weights).clone(), with_weights, out, "new.onnx", weights) == []
    assert sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()) == [
        "deep/er/v.bin",
        "new.onnx",
        "w.bin",
    ]
    for name in ("w.bin", "deep/er/v.bin"):
        old, new = tmp_path / "in" / name, out / name
        assert new.read_bytes() == old.read_bytes()
        assert os.path.samefile(old, new) == (weights == "link")
    written = read_model(out / "new.onnx").model.graph
    for old, new in zip(with_weights.model.graph.initializer, written.initializer, strict=True):
        assert new.SerializeToString() == old.SerializeToString()  # inline values, and references with every entry
    assert [(stamp.path.read_bytes(), stamp) for stamp in with_weights.stamps] == before


def test_the_same_model_gives_the_same_bytes(with_weights: ModelFile, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_model(to_ir(read_model(str(with_weights.path))), with_weights, tmp_path / name, "m.onnx", "link")
        files.append((tmp_path / name / "m.onnx").read_bytes())
    assert files[0] == files[1]


def test_a_link_to_weights_becomes_the_weights(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "real.bin").write_bytes(W.tobytes())
    (folder / "w.bin").symlink_to("real.bin")
    file = saved(folder, model_of(external("a", "w.bin")))
    write_model(to_ir(file), file, out, "m.onnx", "link")
    assert not (out / "w.bin").is_symlink()
    assert os.path.samefile(out / "w.bin", folder / "real.bin")


def test_weights_are_copied_where_links_are_refused(
    with_weights: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out"
    out.mkdir()
    notes = write_model(to_ir(with_weights), with_weights, out, "m.onnx", "link")
    assert notes == ["w.bin, v.bin: copied, because the file system cannot link to the original."]
    assert (out / "w.bin").read_bytes() == W.tobytes() * 2


def test_weights_never_go_through_memory(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "w.bin").touch()
    os.truncate(folder / "w.bin", 4 << 30)
    file = saved(folder, model_of(*(external(f"w{k}", "w.bin", k << 31, 1 << 31) for k in range(2))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_model(to_ir(file).clone(), file, out, "m.onnx", "link")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert (out / "w.bin").stat().st_size == 4 << 30
    assert grown * 1024 < 20e6
    assert (out / "m.onnx").stat().st_size < 1000


def test_a_model_cannot_take_the_name_of_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(W.tobytes())
    file = saved(folder, model_of(external("a", "./m.onnx")))
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match=r"its external data file has the name of the new model, m\.onnx"):
        write_model(to_ir(file), file, tmp_path / "out", "m.onnx", "link")


def test_bytes_have_no_folder_to_take_weights_from(with_weights: ModelFile, tmp_path: Path) -> None:
    data = with_weights.model.SerializeToString()
    file = read_model(data, weights_folder=tmp_path / "in")
    with pytest.raises(UsageError, match="has no folder"):
        write_model(to_ir(file), file, tmp_path, "m.onnx", "link")


def test_a_file_that_changed_meanwhile_is_an_error(with_weights: ModelFile, tmp_path: Path) -> None:
    model = to_ir(with_weights)
    os.truncate(tmp_path / "in" / "w.bin", 200)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match=r"w\.bin changed while it was in use"):
        write_model(model, with_weights, tmp_path / "out", "m.onnx", "copy")


def test_a_graph_too_large_for_protobuf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path, model_of(numpy_helper.from_array(W, "inline")))
    monkeypatch.setattr(model_writer, "LARGEST_MODEL", 100)
    with pytest.raises(UnsupportedError, match="exceeds 100 bytes, the limit of an ONNX file"):
        write_model(to_ir(file), file, tmp_path, "new.onnx", "link")
    assert not (tmp_path / "new.onnx").exists()


def rich_model() -> onnx.ModelProto:
    """Everything that a model can say beside what it computes."""
    model = model_of(numpy_helper.from_array(W, "a"), numpy_helper.from_array(W, "b"))
    graph = model.graph
    model.producer_name, model.producer_version, model.domain, model.model_version = "p", "1", "d", 7
    model.doc_string, graph.doc_string = "model", "graph"
    things = (model, graph, graph.node[0], graph.initializer[0], graph.input[0], graph.output[0])
    for number, thing in enumerate(things):
        thing.metadata_props.add(key="key", value=str(number))
        thing.doc_string = str(number)
    graph.node.append(helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W, "held")))
    graph.node[-1].attribute[0].t.metadata_props.add(key="key", value="held")
    graph.node.append(helper.make_node("Opaque", ["c"], ["o"], domain="own"))
    opaque = graph.value_info.add(name="o").type.opaque_type
    opaque.domain, opaque.name = "own", "thing"
    graph.value_info.append(helper.make_tensor_sequence_value_info("q", T.FLOAT, ["n"]))
    graph.node.append(helper.make_node("SequenceConstruct", ["c"], ["q"]))
    optional = graph.value_info.add(name="p").type.optional_type.elem_type.tensor_type
    optional.elem_type = T.FLOAT
    graph.node.append(helper.make_node("Optional", ["c"], ["p"]))
    for name in ("x", "s0", "a"):
        annotation = graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    model.training_info.add().algorithm.name = "step"
    model.configuration.add(name="pair", num_devices=2, device=["0", "1"])
    graph.node[0].device_configurations.add(configuration_id="pair").sharding_spec.add(tensor_name="s0", device=[0, 1])
    graph.input[0].type.denotation = "TENSOR"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    body = [helper.make_node("Selu", ["u"], ["v"], alpha=2.0), helper.make_node("Relu", ["v"], ["w"])]
    body[0].attribute.add(name="gamma", type=onnx.AttributeProto.FLOAT, ref_attr_name="gamma")
    function = helper.make_function(
        "own", "F", ["u"], ["w"], body, [helper.make_opsetid("", 20)], ["given"], [helper.make_attribute("gamma", 1.5)]
    )
    function.overload, function.doc_string = "second", "function"
    function.metadata_props.add(key="key", value="function")
    function.value_info.append(helper.make_tensor_value_info("v", T.FLOAT, ["n"]))
    model.functions.append(function)
    graph.node.append(helper.make_node("F", ["c"], ["f"], domain="own", overload="second"))
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["i"], value=numpy_helper.from_array(W, "inner"))],
        "branch",
        [],
        [helper.make_tensor_value_info("i", T.FLOAT, [16])],
    )
    branch.node[0].attribute[0].t.metadata_props.add(key="key", value="inner")
    branch.doc_string = "branch"
    graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    graph.node.append(helper.make_node("If", ["flag"], ["j"], then_branch=branch, else_branch=branch))
    model.opset_import.add(domain="own", version=1)
    return model


def everything(model: onnx.ModelProto) -> dict[str, Any]:
    """A model's parts by name: of no importance are the order of maps, and types that the values show anyway."""
    parts: dict[str, Any] = {"model": onnx.ModelProto()}
    parts["model"].CopyFrom(model)
    shell = parts["model"]
    graph = shell.graph
    held = {tensor.name for tensor in graph.initializer}
    for field in ("node", "initializer", "quantization_annotation", "value_info", "input", "output"):
        for part in getattr(graph, field):
            name = getattr(part, "name", "") or getattr(part, "tensor_name", "") or str(getattr(part, "output", ""))
            if field != "value_info" or name not in held:
                parts[f"{field} {name}"] = part.SerializeToString(deterministic=True)
        graph.ClearField(field)
    parts["model"] = shell.SerializeToString(deterministic=True)
    return parts


def test_nothing_is_lost_on_the_way() -> None:
    original = rich_model()
    rewritten = ir.to_proto(ir.from_proto(original).clone())
    assert everything(rewritten) != everything(original)  # or else there would be nothing to graft
    graft(original, rewritten)
    assert everything(rewritten) == everything(original)


def test_fields_that_are_not_known_stay() -> None:
    plain = rich_model()
    graph, node, function = plain.graph, plain.graph.node[0], plain.functions[0]
    for part in (node, function, graph):
        part.MergeFromString(UNKNOWN)
    original = onnx.ModelProto.FromString(plain.SerializeToString() + UNKNOWN)
    rewritten = ir.to_proto(ir.from_proto(original))
    assert UNKNOWN not in rewritten.SerializeToString()
    graft(original, rewritten)
    for part in (rewritten.graph.node[0], rewritten.graph, rewritten.functions[0], rewritten):
        assert UNKNOWN in part.SerializeToString()
        size = len(part.SerializeToString())
        part.DiscardUnknownFields()
        assert len(part.SerializeToString()) < size
    assert everything(rewritten).keys() == everything(original).keys()


def test_what_was_rewritten_stays_rewritten() -> None:
    original = rich_model()
    model = ir.from_proto(original)
    values = np.zeros(16, np.float32)
    model.graph.initializers["a"].const_value = ir.Tensor(values, name="a")
    relu = model.graph.node("relu0")
    relu.op_type = "Elu"
    relu.attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)
    model.graph.node("add1").replace_input_with(0, model.graph.inputs[0])
    rewritten = ir.to_proto(model)
    graft(original, rewritten)
    tensor = next(t for t in rewritten.graph.initializer if t.name == "a")
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), values)
    nodes = {node.name: node for node in rewritten.graph.node}
    assert (nodes["relu0"].op_type, len(nodes["relu0"].attribute)) == ("Elu", 1)
    assert list(nodes["add1"].input) == ["x", "b"]


def test_inputs_that_are_outputs_keep_their_type() -> None:
    original = model_of(numpy_helper.from_array(W, "a"))
    original.graph.output.add(name="x")
    rewritten = ir.to_proto(ir.from_proto(original))
    assert not rewritten.graph.input[0].type.HasField("tensor_type")
    graft(original, rewritten)
    assert list(rewritten.graph.input) == list(original.graph.input)


def test_a_written_model_runs(with_weights: ModelFile, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    out.mkdir()
    write_model(to_ir(with_weights).clone(), with_weights, out, "new.onnx", "link")
    shutil.rmtree(tmp_path / "in")  # a link is the file itself
    (y,) = ort.InferenceSession(str(out / "new.onnx")).run(None, {"x": np.ones((1, 16), np.float32)})
    np.testing.assert_array_equal(y, [1 + 3 * W])
