"""Models in ONNX Runtime: what runs, and every way in which it must not."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from rmsnorm_deploy.export.onnx_io.read_model import read_model
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from rmsnorm_deploy.runtime.runners.base import Runner, TensorInfo
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner, import_onnxruntime, optimized_op_counts
from rmsnorm_deploy.runtime.runners.ort_graph import op_counts
from rmsnorm_deploy.runtime.runners.providers import chosen_providers, reduced_precision

ort = pytest.importorskip("onnxruntime", reason='needs onnxruntime: pip install "rmsnorm-deploy[cpu]"')

BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 8)).astype(np.float32)
W = RNG.standard_normal((8, 8)).astype(np.float32)


def build(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, int, Any]],
    outputs: list[tuple[str, int, Any]],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    domains = {node.domain: 1 for node in nodes if node.domain}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in domains.items())]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def linear() -> onnx.ModelProto:
    return build(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", T.FLOAT, ["n", 8])],
        [("y", T.FLOAT, ["n", 8])],
        {"w": W},
    )


def cast(source: int, target: int) -> bytes:
    node = helper.make_node("Cast", ["x"], ["y"], to=target)
    return build([node], [("x", source, ["n", 3])], [("y", target, ["n", 3])]).SerializeToString()


def decomposed_norm() -> onnx.ModelProto:
    """x / sqrt(mean(x^2) + eps) * w in the spelling that onnxruntime fuses."""
    steps = [
        ("Pow", ["x", "two"], "square"),
        ("ReduceMean", ["square", "axes"], "mean"),
        ("Add", ["mean", "eps"], "shifted"),
        ("Sqrt", ["shifted"], "root"),
        ("Div", ["x", "root"], "normed"),
        ("Mul", ["normed", "w"], "y"),
    ]
    weights = {
        "two": np.array(2, np.float32),
        "axes": np.array([-1]),
        "eps": np.array(1e-6, np.float32),
        "w": np.arange(8, dtype=np.float32),
    }
    nodes = [helper.make_node(op, inputs, [output]) for op, inputs, output in steps]
    return build(nodes, [("x", T.FLOAT, ["n", 8])], [("y", T.FLOAT, ["n", 8])], weights)


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model whose weight, 256 bytes, lies in weights.bin."""
    path = tmp_path / "model.onnx"
    onnx.save_model(linear(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def relocate(path: Path, **entries: str) -> None:
    """Rewrite the external data entries of the only initializer."""
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    kept = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def test_it_is_a_runner_and_lists_its_inputs(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path)
    with OrtRunner(path) as runner:
        assert isinstance(runner, Runner)
        assert runner.inputs() == [TensorInfo("x", "float32", ("n", 8))]
        assert runner.outputs() == [TensorInfo("y", "float32", ("n", 8))]
        np.testing.assert_allclose(runner.run({"x": X})["y"], X @ W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("io_binding", [False, True])
def test_io_binding_changes_nothing(io_binding: bool) -> None:
    model = linear().SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    for feed in (X, X[::-1], np.asfortranarray(X), X[:0]):
        with OrtRunner(model, io_binding=io_binding) as runner:
            output = runner.run({"x": feed})["y"]
        assert np.array_equal(output, session.run(None, {"x": np.ascontiguousarray(feed)})[0])


def test_results_outlive_the_runner() -> None:
    runner = OrtRunner(linear().SerializeToString())
    first = runner.run({"x": X})["y"]
    kept = first.copy()
    runner.run({"x": 2 * X})
    runner.close()
    assert first.flags.owndata
    assert np.array_equal(first, kept)
    for call in (lambda: runner.run({"x": X}), runner.provenance):
        with pytest.raises(UsageError, match="closed"):
            call()


@pytest.mark.parametrize("io_binding", [False, True])
def test_bfloat16_in_and_out_bit_for_bit(io_binding: bool) -> None:
    values = np.array([[1.0, -0.0, np.inf], [1e-40, 3.140625, np.nan]], np.float32).astype(BF16)
    with OrtRunner(cast(T.BFLOAT16, T.FLOAT), io_binding=io_binding) as runner:
        assert runner.inputs()[0].dtype == "bfloat16"
        np.testing.assert_array_equal(runner.run({"x": values})["y"], values.astype(np.float32))
        strided = runner.run({"x": np.asfortranarray(values)})["y"]
        np.testing.assert_array_equal(strided, values.astype(np.float32))
        with pytest.raises(UsageError, match="expected dtype bfloat16, got uint16"):
            runner.run({"x": values.view(np.uint16)})
    with OrtRunner(cast(T.FLOAT, T.BFLOAT16), io_binding=io_binding) as runner:
        output = runner.run({"x": values.astype(np.float32)})["y"]
        assert output.dtype == BF16
        assert np.array_equal(output.view(np.uint16)[:, :2], values.view(np.uint16)[:, :2])
        assert runner.run({"x": np.zeros((0, 3), np.float32)})["y"].shape == (0, 3)


@pytest.mark.parametrize(
    ("onnx_type", "dtype"),
    [(T.FLOAT16, np.float16), (T.DOUBLE, np.float64), (T.INT64, np.int64), (T.UINT8, np.uint8), (T.BOOL, np.bool_)],
)
def test_other_dtypes_and_scalars(onnx_type: int, dtype: Any) -> None:
    model = build([helper.make_node("Identity", ["x"], ["y"])], [("x", onnx_type, [])], [("y", onnx_type, [])])
    with OrtRunner(model.SerializeToString()) as runner:
        output = runner.run({"x": np.array(1, dtype)})["y"]
        assert (output.dtype, output.shape, output.item()) == (np.dtype(dtype), (), 1)
        with pytest.raises(UsageError, match="rank 1"):
            runner.run({"x": np.ones(1, dtype)})


def test_an_input_of_open_rank_takes_any_shape() -> None:
    model = build([helper.make_node("Neg", ["x"], ["y"])], [("x", T.FLOAT, None)], [("y", T.FLOAT, None)])
    with OrtRunner(model.SerializeToString()) as runner:
        assert runner.inputs()[0].shape is None
        assert runner.run({"x": X.reshape(2, 2, 4)})["y"].shape == (2, 2, 4)


def test_wrong_feeds_are_refused_by_name() -> None:
    with OrtRunner(linear().SerializeToString()) as runner:
        for feeds, text in (
            ({}, "missing: x"),
            ({"x": X, "w": W}, "unexpected: w"),
            ({"x": X.astype(np.float64)}, "expected dtype float32, got float64"),
            ({"x": X[:, :4]}, "dim 1 must be 8"),
        ):
            with pytest.raises(UsageError, match=text):
                runner.run(feeds)


@pytest.mark.parametrize("io_binding", [False, True])
def test_a_failing_run_names_the_shapes(io_binding: bool, capfd: pytest.CaptureFixture[str]) -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    model = build([node], [("x", T.FLOAT, ["a", "b"])], [("y", T.FLOAT, [2, 3])], {"shape": np.array([2, 3])})
    failure = pytest.raises(UsageError, match=r"failed on x float32\[2, 8\].*Reshape")
    with OrtRunner(model.SerializeToString(), io_binding=io_binding) as runner, failure as caught:
        runner.run({"x": X})
    assert "onnxruntime_src" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_files_that_are_not_models(tmp_path: Path) -> None:
    garbage, empty, short = tmp_path / "garbage.onnx", tmp_path / "empty.onnx", tmp_path / "short.onnx"
    garbage.write_bytes(b"this is not a model")
    empty.touch()
    short.write_bytes(linear().SerializeToString()[:-30])
    for path, text in (
        (tmp_path / "none.onnx", "the file does not exist"),
        (tmp_path, "expected a regular file, got a folder"),
        (garbage, "not an ONNX model"),
        (empty, "has no graph"),
        (short, "not an ONNX model"),
    ):
        with pytest.raises(UsageError, match=text) as caught:
            OrtRunner(path)
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="the model given as bytes: not an ONNX model"):
        OrtRunner(b"nor is this")


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rmsnorm_deploy.models.regular_files.os.open", refuse)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        OrtRunner(path)


def test_an_invalid_graph_is_refused() -> None:
    model = build([helper.make_node("Add", ["x", "nowhere"], ["y"])], [("x", T.FLOAT, [2])], [("y", T.FLOAT, [2])])
    with pytest.raises(UsageError, match=r"cannot load this model: .*nowhere"):
        OrtRunner(model.SerializeToString())


def test_external_data_runs_and_is_hashed(external: Path) -> None:
    with OrtRunner(external) as runner:
        np.testing.assert_allclose(runner.run({"x": X})["y"], X @ W, rtol=1e-5, atol=1e-5)
        record = runner.provenance()
    weights = external.with_name("weights.bin")
    digest = hashlib.sha256(W.tobytes()).hexdigest()
    assert record["external_data"] == [{"file": "weights.bin", "bytes": 256, "sha256": digest}]
    assert record["model"]["sha256"] == hashlib.sha256(external.read_bytes()).hexdigest()
    assert read_model(external).external_files == (weights,)


@pytest.mark.parametrize("keep", [0, 255])
def test_external_data_cut_short(external: Path, keep: int) -> None:
    os.truncate(external.with_name("weights.bin"), keep)
    with pytest.raises(
        UsageError, match=rf"weights\.bin is truncated: tensor w ends at byte 256, and the file has {keep} bytes"
    ):
        OrtRunner(external)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"location": "other.bin"}, "other.bin of tensor w is missing"),
        ({"location": "../weights.bin"}, "outside of the model's folder"),
        ({"location": "a/../../weights.bin"}, "outside of the model's folder"),
        ({"location": "..\\weights.bin"}, "outside of the model's folder"),
        ({"location": "/etc/hostname"}, "outside of the model's folder"),
        ({"location": "C:\\weights.bin"}, "outside of the model's folder"),
        ({"location": ""}, "outside of the model's folder"),
        ({"offset": "1"}, "ends at byte 257, and the file has 256 bytes"),
        ({"length": "1000"}, "ends at byte 1000"),
        ({"offset": "-8"}, "is not a valid number"),
        ({"length": "many"}, "is not a valid number"),
    ],
)
def test_external_data_that_is_not_where_it_should_be(external: Path, entries: dict[str, str], text: str) -> None:
    relocate(external, **entries)
    with pytest.raises(UsageError, match=text) as caught:
        OrtRunner(external)
    assert str(external) in str(caught.value)


def test_external_data_without_a_length_is_measured_by_its_dims(external: Path) -> None:
    model = onnx.load(external, load_external_data=False)
    del model.graph.initializer[0].external_data[:]
    model.graph.initializer[0].external_data.add(key="location", value="weights.bin")
    external.write_bytes(model.SerializeToString())
    OrtRunner(external).close()
    model.graph.initializer[0].dims[0] = 9
    external.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="ends at byte 288"):
        OrtRunner(external)


def test_external_data_in_bytes_and_of_no_dtype(external: Path) -> None:
    with pytest.raises(UsageError, match="give the path of the model"):
        OrtRunner(external.read_bytes())
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].data_type = 99
    external.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"tensor w has unknown dtype 99"):
        OrtRunner(external)


def test_bytes_find_their_external_data_in_the_folder_that_is_named(external: Path, tmp_path: Path) -> None:
    source = external.read_bytes()
    with OrtRunner(external) as whole, OrtRunner(source, weights_folder=external.parent) as runner:
        np.testing.assert_array_equal(runner.run({"x": X})["y"], whole.run({"x": X})["y"])
        record = runner.provenance()
    assert record["model"] is None
    assert [row["file"] for row in record["external_data"]] == ["weights.bin"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match=r"the model given as bytes: external data file .*weights\.bin of tensor w"):
        OrtRunner(source, weights_folder=empty)
    os.truncate(external.with_name("weights.bin"), 200)
    with pytest.raises(UsageError, match=r"is truncated: tensor w ends at byte 256, and the file has 200 bytes"):
        OrtRunner(source, weights_folder=external.parent)


def test_bytes_without_external_data_require_no_folder(tmp_path: Path) -> None:
    source = linear().SerializeToString()
    with OrtRunner(source) as plain, OrtRunner(source, weights_folder=tmp_path) as runner:
        np.testing.assert_array_equal(runner.run({"x": X})["y"], plain.run({"x": X})["y"])


@pytest.mark.parametrize("io_binding", [False, True])
def test_only_the_outputs_that_are_wanted_come_back(io_binding: bool) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    outputs = [("y", T.FLOAT, ["n", 8]), ("z", T.FLOAT, ["n", 8])]
    model = build(nodes, [("x", T.FLOAT, ["n", 8])], outputs, {"w": W})
    with OrtRunner(model.SerializeToString(), io_binding=io_binding) as runner:
        whole = runner.run({"x": X})
        assert list(whole) == ["y", "z"]
        for names in (["z"], ["z", "y"], ["y"]):
            found = runner.run({"x": X}, outputs=names)
            assert list(found) == names
            assert all(np.array_equal(found[name], whole[name]) for name in names)
        with pytest.raises(UsageError, match="nosuch"):
            runner.run({"x": X}, outputs=["nosuch"])


def test_packed_types_are_measured_in_bits(external: Path) -> None:
    model = onnx.load(external, load_external_data=False)
    tensor = model.graph.initializer[0]
    tensor.data_type = T.INT4
    tensor.dims[:] = [8, 64]
    external.write_bytes(model.SerializeToString())
    assert len(read_model(external).external_files) == 1
    tensor.dims[:] = [8, 65]
    external.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="ends at byte 260"):
        read_model(external)


def test_external_data_in_nodes_and_subgraphs_is_found(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W, "inner"))
    tensor = constant.attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = T.EXTERNAL
    tensor.external_data.add(key="location", value="gone.bin")
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("c", T.FLOAT, [8, 8])])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    model = build([node], [("flag", T.BOOL, [])], [("y", T.FLOAT, [8, 8])])
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"gone\.bin of tensor inner is missing"):
        OrtRunner(path)
    assert op_counts(model) == {"If": 1, "Constant": 2}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            build(
                [helper.make_node("Mul", ["x", "x"], ["y"], name="m")],
                [("x", T.BFLOAT16, [2])],
                [("y", T.BFLOAT16, [2])],
            ),
            r"no kernel for Mul \(node m\) on bfloat16 in CPUExecutionProvider. Export the model in float16 or float32",
        ),
        (
            build([helper.make_node("Norm", ["x"], ["y"], domain="own")], [("x", T.FLOAT, [2])], [("y", T.FLOAT, [2])]),
            "does not know the op own:Norm",
        ),
        (
            build([helper.make_node("Norm", ["x"], ["y"])], [("x", T.FLOAT, [2])], [("y", T.FLOAT, [2])]),
            "does not know the op Norm",
        ),
        (
            build([helper.make_node("Neg", ["x"], ["y"])], [("x", T.FLOAT, [2])], [("y", T.FLOAT, [2])], opset=999),
            "too new for onnxruntime",
        ),
        (
            build([helper.make_node("Identity", ["x"], ["y"])], [("x", T.STRING, [2])], [("y", T.STRING, [2])]),
            r"x: expected a tensor .*, got tensor\(string\)",
        ),
    ],
)
def test_what_onnxruntime_cannot_run_is_unsupported(model: onnx.ModelProto, text: str) -> None:
    with pytest.raises(UnsupportedError, match=text) as caught:
        OrtRunner(model.SerializeToString())
    assert caught.value.exit_code == 3


def test_sequences_are_unsupported() -> None:
    model = build([helper.make_node("SplitToSequence", ["x"], ["y"])], [("x", T.FLOAT, [2])], [])
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(T.FLOAT, None))
    model.graph.output.append(helper.make_value_info("y", sequence))
    with pytest.raises(UnsupportedError, match=r"y: expected a tensor .*, got seq\(tensor\(float\)\)"):
        OrtRunner(model.SerializeToString())


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_provider_names(name: str) -> None:
    with OrtRunner(linear().SerializeToString(), providers=[name], provider_options={name: {}}) as runner:
        assert runner.provenance()["providers_used"] == ["CPUExecutionProvider"]


def test_a_provider_is_named_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    texts = ["CUDA:use_tf32=0, device_id=1", "cpu"]
    assert chosen_providers(ort, texts, {"cuda": {"device_id": 2}}) == {
        "CUDAExecutionProvider": {"use_tf32": "0", "device_id": "2"}, "CPUExecutionProvider": {},
    }  # fmt: skip
    for text in ("cuda:use_tf32", "cuda:=1"):
        with pytest.raises(UsageError, match=r"expected NAME:OPTION=VALUE,\.\.\., such as cuda:use_tf32=0"):
            chosen_providers(ort, [text])


def test_tf32_is_named_where_it_is_on() -> None:
    cuda = "CUDAExecutionProvider"
    assert reduced_precision({"provider_options": {"CPUExecutionProvider": {}}}) is None
    assert reduced_precision({"runner": "torch"}) is None
    assert reduced_precision({"provider_options": {cuda: {"use_tf32": "0"}}}) is None
    for options in ({"use_tf32": "1"}, {}):
        assert "cuda:use_tf32=0" in str(reduced_precision({"provider_options": {cuda: options}}))


def test_an_operator_that_onnxruntime_itself_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(  # as onnxruntime 1.31.1 says it of a norm in bfloat16 on an H100
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: status.IsOK() was false. "
            "Failed to find kernel for SimplifiedLayerNormalization(1) (node:'norm/Mul/SimplifiedLayerNormFusion/' "
            "ep:'CUDAExecutionProvider'). Op with name (norm/Mul/SimplifiedLayerNormFusion/)"
        )

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    wanted = r"itself fuses .* SimplifiedLayerNormalization .*disabled_optimizers=\['SimplifiedLayerNormFusion'\]"
    with pytest.raises(UnsupportedError, match=wanted):
        OrtRunner(linear().SerializeToString())


def test_providers_that_are_not_in_this_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for name in ("cuda", "TensorRT"):
        with pytest.raises(
            EnvironmentMissingError, match=r"which has CPUExecutionProvider.*rmsnorm-deploy\[gpu\]"
        ) as caught:
            OrtRunner(linear().SerializeToString(), providers=[name])
        assert caught.value.exit_code == 4


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="needs a build without CUDA")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fallback_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # onnxruntime itself drops the provider with a warning and runs on the CPU.
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(EnvironmentMissingError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider"):
        OrtRunner(linear().SerializeToString(), providers=["cuda"])


def test_a_provider_that_cannot_be_set_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(EnvironmentMissingError, match="could not set up TensorrtExecutionProvider: libnvinfer"):
        OrtRunner(linear().SerializeToString(), providers=["tensorrt"])


def test_providers_and_options_that_do_not_exist() -> None:
    model = linear().SerializeToString()
    for arguments, text in (
        ({"providers": ["abacus"]}, "unknown execution provider 'abacus'"),
        ({"providers": []}, "a list of one or more providers"),
        ({"providers": "cpu"}, "a list of one or more providers"),
        ({"session_options": {"threads": 2}}, "unknown session_options threads"),
        (
            {"session_options": {"graph_optimization_level": "most"}},
            "graph_optimization_level: expected one of disabled, basic, extended, all, got 'most'",
        ),
        (
            {"session_options": {"intra_op_num_threads": "two"}},
            r"intra_op_num_threads: expected an integer of at least 0 \(0: one per core\), got 'two'",
        ),
        (
            {"session_options": {"inter_op_num_threads": -1}},
            r"inter_op_num_threads: expected an integer of at least 0 \(0: one per core\), got -1",
        ),
        ({"session_options": {"optimized_model_path": "no/such/folder/m.onnx"}}, "no/such/folder does not exist"),
    ):
        with pytest.raises(UsageError, match=text):
            OrtRunner(model, **arguments)


def test_options_for_a_provider_that_is_not_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(
        UsageError, match="provider_options: expected names among the providers CPUExecutionProvider, got cuda"
    ):
        OrtRunner(linear().SerializeToString(), provider_options={"cuda": {"device_id": 0}})


def test_without_onnxruntime_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentMissingError, match=r'pip install "rmsnorm-deploy\[cpu\]"') as caught:
        import_onnxruntime()
    assert caught.value.exit_code == 4


def test_provenance_is_json() -> None:
    options = {"graph_optimization_level": "basic", "intra_op_num_threads": 1}
    with OrtRunner(linear().SerializeToString(), session_options=options, io_binding=True) as runner:
        record = json.loads(json.dumps(runner.provenance()))
    assert record["onnxruntime"] == ort.__version__
    assert record["providers_asked"] == record["providers_used"] == ["CPUExecutionProvider"]
    assert record["session_options"] == options
    assert record["io_binding"] is True
    assert record["model"] is None


@pytest.mark.parametrize(("level", "fused"), [("disabled", 0), ("basic", 0), ("extended", 1), ("all", 1)])
def test_optimized_op_counts_see_the_fused_norm(tmp_path: Path, level: str, fused: int) -> None:
    path = tmp_path / "norm.onnx"
    onnx.save(decomposed_norm(), path)
    counts = optimized_op_counts(path, level=level)
    assert counts["SimplifiedLayerNormalization"] == fused
    assert counts["Div"] == 1 - fused
    assert [file.name for file in tmp_path.iterdir()] == ["norm.onnx"]


def test_optimized_op_counts_name_other_domains(tmp_path: Path) -> None:
    x = ("x", T.FLOAT, ["n", 8])
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")
    path = tmp_path / "model.onnx"
    onnx.save(build([node], [x], [("y", T.FLOAT, ["n", 8])], {"w": W}), path)
    assert optimized_op_counts(path) == {"com.microsoft::FusedMatMul": 1}


def test_optimized_op_counts_of_external_data(external: Path) -> None:
    assert optimized_op_counts(external, providers=["cpu"]) == {"MatMul": 1}
    assert sorted(file.name for file in external.parent.iterdir()) == ["model.onnx", "weights.bin"]


def test_the_optimized_model_is_written_and_never_over_the_input(tmp_path: Path) -> None:
    path, target = tmp_path / "norm.onnx", tmp_path / "fused.onnx"
    onnx.save(decomposed_norm(), path)
    OrtRunner(path, session_options={"optimized_model_path": target}).close()
    assert op_counts(onnx.load(target))["SimplifiedLayerNormalization"] == 1
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is the model itself"):
        OrtRunner(path, session_options={"optimized_model_path": path})
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fused.onnx", "norm.onnx"]


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs an NVIDIA GPU and onnxruntime-gpu"
)
@pytest.mark.parametrize("io_binding", [False, True])
def test_cuda_runs_bfloat16(io_binding: bool) -> None:
    node = helper.make_node("Mul", ["x", "x"], ["y"])
    model = build([node], [("x", T.BFLOAT16, ["n", 3])], [("y", T.BFLOAT16, ["n", 3])])
    values = np.array([[1.0, 1.5, -2.0]], BF16)
    with OrtRunner(model.SerializeToString(), providers=["cuda"], io_binding=io_binding) as runner:
        assert np.array_equal(runner.run({"x": values})["y"], values * values)
        assert runner.provenance()["providers_used"][0] == "CUDAExecutionProvider"
