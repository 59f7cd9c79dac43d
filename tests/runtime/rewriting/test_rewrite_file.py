"""Rewriting files: what is written where, what is proven, and what a fault in between does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.from_onnx import rewrite as export_rewrite
from rmsnorm_deploy.export.from_onnx.rewrite import rewrite
from rmsnorm_deploy.export.graph.site import GraphRecognition
from rmsnorm_deploy.models.errors import MismatchError, RmsnormDeployError, UnsupportedError, UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.rewriting import rewrite_file as rewriting
from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model
from rmsnorm_deploy.runtime.rewriting.verify_model import prove_model
from rmsnorm_deploy.runtime.rewriting.verify_norms import Proof, prove_norms
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.graphs.graph_text import Graph, weight
from tests.helpers.spellings.norm_places import PLACES
from tests.helpers.spellings.norm_spellings import WIDTH, Way, build, norm


def block(dtype: str = "float32", layers: int = 2) -> onnx.ModelProto:
    """A residual stream with norms and linear layers."""
    way = Way(dtype=dtype, casts="cast_then_scale" if dtype == "float16" else "none", eps=1e-5)
    g = Graph(20)
    x = g.input("x", ["batch", "length", WIDTH], dtype)
    for number in range(layers):
        y, _ = norm(g, way, x, f"layers.{number}.")
        linear = np.random.default_rng(number).standard_normal((WIDTH, WIDTH)) * 0.2
        x = g.op("Add", x, g.op("MatMul", y, g.constant(linear, dtype, f"layers.{number}.linear")))
    y, _ = norm(g, way, x, "last.")
    g.output(y, dtype)
    return g.model()


def saved(path: Path, model: onnx.ModelProto, external: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 64} if external else {}
    onnx.save(model, path, **options)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# What is written where --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["primitives", "standard", "ort", "plugin"])
def test_a_folder_with_the_model_its_weights_and_what_was_done(target: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "in" / "decoder.onnx", block(), external=True)
    (path.parent / "config.json").write_text("{}")
    before = {file.name: (digest(file), file.stat().st_mtime_ns) for file in path.parent.iterdir()}
    result = rewrite_model(path, tmp_path / "out", target=target)
    assert {file.name: (digest(file), file.stat().st_mtime_ns) for file in path.parent.iterdir()} == before
    assert listing(tmp_path / "out") == {"decoder.onnx", "weights.bin", "config.json", "manifest.json"}
    assert (tmp_path / "out" / "weights.bin").read_bytes() == (path.parent / "weights.bin").read_bytes()
    assert (tmp_path / "out" / "weights.bin").stat().st_nlink == 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == result.manifest
    assert [site["path"] for site in manifest["sites"]] == ["layers.0.norm", "layers.1.norm", "last.norm"]
    assert all(call["changed"] for site in manifest["sites"] for call in site["calls"])
    assert manifest["proof"]["verdict"] == "pass"
    assert manifest["files"]["weights.bin"]["sha256"] is None
    assert manifest["files"]["decoder.onnx"]["sha256"] == digest(result.model)
    once = digest(result.model)
    again = rewrite_model(result.model, tmp_path / "again", target=target)
    assert digest(again.model) == once
    assert not again.rewritten.changed
    assert digest(rewrite_model(path, tmp_path / "out", target=target).model) == once  # an earlier result is replaced


def test_links_are_the_same_file_and_can_be_read_again(tmp_path: Path) -> None:
    path = saved(tmp_path / "in" / "model.onnx", block(), external=True)
    result = rewrite_model(path, tmp_path / "out", weights="link")
    assert os.path.samefile(tmp_path / "out" / "weights.bin", path.parent / "weights.bin")
    assert any("hard links" in note for note in result.manifest["notes"])
    assert rewrite_model(result.model, tmp_path / "next", target="plugin").proof is not None
    with OrtRunner(result.model) as runner:
        runner.run({"x": np.ones((1, 2, WIDTH), np.float32)})


def test_a_file_beside_the_original_refers_to_the_same_weights(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.onnx", block(), external=True)
    result = rewrite_model(path, tmp_path / "fast.onnx")
    assert listing(tmp_path) == {"model.onnx", "weights.bin", "fast.onnx"}
    assert result.files == [tmp_path / "fast.onnx"]
    assert result.proof is not None
    assert result.proof.verdict == "pass"
    with pytest.raises(UsageError, match=r"fast.onnx exists; give a new file name"):
        rewrite_model(path, tmp_path / "fast.onnx")
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"must be in the folder of .* refers to its external data"):
        rewrite_model(path, tmp_path / "other" / "fast.onnx")
    assert listing(tmp_path / "other") == set()


def test_nothing_of_the_rest_changes(tmp_path: Path) -> None:
    """Names, notes and operators that are none of a norm's, a quantized neighbor among them."""
    g = Graph(17)
    x = g.input("x", ["batch", "length", WIDTH])
    scale, zero = g.constant(np.float32(0.05)), g.constant(np.int8(0))
    quantized = g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)
    y, _ = norm(g, Way(opset=17), quantized)
    g.output(g.op("DequantizeLinear", g.op("QuantizeLinear", y, scale, zero), scale, zero))
    model = g.model()
    model.doc_string, model.producer_name = "a note", "somebody"
    model.metadata_props.add(key="author", value="somebody")
    model.graph.node[0].doc_string = "a quantized input"
    result = rewrite_model(saved(tmp_path / "model.onnx", model), tmp_path / "out", target="ort")
    written = onnx.load(result.model)
    assert (written.doc_string, written.producer_name, written.metadata_props[0].value) == (
        "a note",
        "somebody",
        "somebody",
    )
    assert list(written.graph.input) == list(model.graph.input)
    assert list(written.graph.output) == list(model.graph.output)
    assert written.opset_import == model.opset_import
    for node in (*written.graph.node, *model.graph.node):
        node.ClearField("domain")  # "" is the same as none
    kept = [node for node in model.graph.node if node.op_type.endswith("Linear")]
    assert [node for node in written.graph.node if node.op_type.endswith("Linear")] == kept
    assert [node.op_type for node in written.graph.node if node not in kept] == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize("opset", [7, 9, 11])
@pytest.mark.parametrize("target", ["primitives", "ort"])
def test_an_old_opset_stays_where_the_target_can_use_it(opset: int, target: str, tmp_path: Path) -> None:
    model = build(Way(opset=opset, root="one_over"))
    result = rewrite_model(saved(tmp_path / "model.onnx", model), tmp_path / "out", target=target)
    assert result.manifest["opset"] == opset
    assert result.proof is not None
    assert result.proof.verdict == "pass"


# What is refused --------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "in" / "model.onnx", block())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    cases: list[tuple[type[RmsnormDeployError], str, Callable[[], object]]] = [
        (UsageError, "got 'fast'", lambda: rewrite_model(path, tmp_path / "o", target="fast")),
        (
            UsageError,
            "weights: expected one of copy, link, got 'move'",
            lambda: rewrite_model(path, tmp_path / "o", weights="move"),
        ),  # type: ignore[arg-type]
        (UsageError, "is the folder of the model itself", lambda: rewrite_model(path, path.parent)),
        (UsageError, "holds files that no export wrote", lambda: rewrite_model(path, foreign)),
        (UsageError, "the file does not exist", lambda: rewrite_model(tmp_path / "none.onnx", tmp_path / "o")),
        (UsageError, "expected at least 20, the opset", lambda: rewrite_model(path, tmp_path / "o", opset=13)),
        (
            UnsupportedError,
            "requires opset 23",
            lambda: rewrite_model(path, tmp_path / "o", target="standard", opset=21),
        ),
        (UnsupportedError, "expected at most 23, got 99", lambda: rewrite_model(path, tmp_path / "o", opset=99)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert listing(tmp_path) == {"in", "in/model.onnx", "foreign", "foreign/notes.txt"}


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "in" / "model.onnx", block())

    def rewrite_and_touch(*arguments: object, **options: object) -> object:
        result = rewrite(*arguments, **options)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes() + b"\0")
        return result

    monkeypatch.setattr(rewriting, "rewrite", rewrite_and_touch)
    with pytest.raises(UsageError, match=r"changed while it was in use"):
        rewrite_model(path, tmp_path / "out", verify=False)
    assert listing(tmp_path) == {"in", "in/model.onnx"}


# The proof --------------------------------------------------------------------------------------------------------


def damaged(fault: str, dtype: str, target: str) -> Proof:
    """The proof of a rewriting that something was done to."""
    result = rewrite(block_graph(dtype), target)
    site = result.sites[1]
    node = next(n for n in result.model.graph if site.lowered is not None and n.name == site.lowered.node)
    if fault == "epsilon":
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    elif fault == "weight":
        value = node.inputs[-1]
        assert value is not None
        array = value.const_value.numpy().copy()  # type: ignore[union-attr]
        array[3] *= 1.02
        result.model.graph.initializers["bad"] = ir.Value(name="bad", const_value=ir.Tensor(array, name="bad"))
        node.replace_input_with(len(node.inputs) - 1, result.model.graph.initializers["bad"])
    elif fault == "offset":
        node.attributes["scale_offset"] = ir.AttrFloat32("scale_offset", 1.0)
    elif fault == "axis":
        node.attributes["axis"] = ir.AttrInt64("axis", -2)
    elif fault == "operand":
        node.replace_input_with(1, node.inputs[0])
    return prove_norms(result, Path(), seed=0, progress=lambda text: None)


def block_graph(dtype: str) -> ir.Model:
    return ir.from_proto(block(dtype))


@pytest.mark.parametrize(
    ("fault", "dtype", "target"),
    [
        ("epsilon", "float32", "ort"), ("epsilon", "float16", "standard"), ("epsilon", "float32", "plugin"),
        ("weight", "float32", "ort"), ("weight", "float16", "plugin"), ("weight", "float32", "standard"),
        ("offset", "float32", "plugin"), ("axis", "float32", "standard"), ("operand", "float32", "plugin"),
        ("operand", "float16", "plugin"),
    ],
)  # fmt: skip
def test_a_fault_in_a_norm_is_found_and_named(fault: str, dtype: str, target: str) -> None:
    proof = damaged(fault, dtype, target)
    verdicts = [row.verdict for row in proof.sites]
    assert verdicts == ["pass", "mismatch", "pass"]
    assert proof.verdict == "mismatch"
    assert "layers.1.norm" in proof.reason


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("target", ["primitives", "standard", "ort", "plugin"])
def test_honest_rewritings_pass(dtype: str, target: str) -> None:
    proof = damaged("none", dtype, target)
    assert [(row.verdict, len(row.kinds)) for row in proof.sites] == [("pass", 10)] * 3
    assert proof.verdict == "pass"


@pytest.mark.parametrize("wrong", [{"eps": 1e-3}, {"scale": "one_plus_weight"}])
def test_a_norm_that_was_recognized_wrongly_is_left_unchanged(
    wrong: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "model.onnx", block())
    find = export_rewrite.find_norms

    def misread(model: ir.Model) -> GraphRecognition:
        found = find(model)
        bad: NormSpec = found.sites[1].spec.replace(**wrong)
        found.sites[1] = replace(found.sites[1], spec=bad)
        return found

    monkeypatch.setattr(export_rewrite, "find_norms", misread)
    result = rewrite_model(path, tmp_path / "out", target="ort")
    assert [site.changed for site in result.rewritten.sites] == [True, False, True]
    (refusal,) = result.rewritten.refusals
    assert refusal.path == "layers.1.norm"
    assert "its proof fails" in refusal.reason
    assert "the formula that it was recognized as" in refusal.reason
    assert result.proof is not None
    assert result.proof.verdict == "pass"
    written = onnx.load(result.model)
    assert sum(node.op_type == "SimplifiedLayerNormalization" for node in written.graph.node) == 2
    assert sum(node.op_type == "ReduceMean" for node in written.graph.node) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_fault_elsewhere_is_found_in_the_whole_model(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "in" / "model.onnx", block(dtype))
    write = rewriting.write_model

    def write_damaged(model: ir.Model, original: object, folder: Path, name: str, weights: object) -> list[str]:
        notes = write(model, original, folder, name, weights)  # type: ignore[arg-type]
        proto = onnx.load(folder / name)
        linear = next(tensor for tensor in proto.graph.initializer if tensor.name == "layers.0.linear")
        array = onnx.numpy_helper.to_array(linear).copy()
        array[:, 5] *= 1.05
        linear.CopyFrom(onnx.numpy_helper.from_array(array, linear.name))
        onnx.save(proto, folder / name)
        return notes

    monkeypatch.setattr(rewriting, "write_model", write_damaged)
    with pytest.raises(MismatchError, match=r"for target \w+ differs: output v\d+: error max"):
        rewrite_model(path, tmp_path / "out")
    assert listing(tmp_path) == {"in", "in/model.onnx"}
    assert rewrite_model(path, tmp_path / "out", verify=False).proof is None  # nobody looked


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("seed", range(5))
def test_the_whole_model_raises_no_false_alarm(dtype: str, seed: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "model.onnx", block(dtype, layers=2 + seed))
    for target in ("standard", "plugin"):
        result = rewrite_model(path, tmp_path / target, target=target, seed=seed)
        assert result.proof is not None
        assert result.proof.verdict == "pass"
        assert len(result.proof.model or ()) == 2


def test_a_file_that_did_not_run_must_run_now(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.onnx", PLACES["RMSNormalization of mixed dtypes"].build())
    result = rewrite_model(path, tmp_path / "out", target="standard")
    proof = result.proof
    assert proof is not None
    assert proof.verdict == "pass"
    assert [(row.name, row.reason) for row in proof.model or ()] == [
        (proof.model[0].name, "finite; the original file cannot be loaded")  # type: ignore[index]
    ] * 2
    assert len(proof.notes) == 2
    assert "PyTorch was the baseline" in proof.notes[0]


def test_what_cannot_be_run_is_written_and_called_unproven(tmp_path: Path) -> None:
    way = Way(dtype="bfloat16", casts="cast_then_scale", eps=1e-5, opset=20)
    result = rewrite_model(saved(tmp_path / "model.onnx", build(way)), tmp_path / "out", target="primitives")
    assert result.proof is not None
    assert result.proof.verdict == "unproven"
    assert "could not be run" in result.proof.reason
    assert result.model.is_file()


def test_inputs_that_cannot_be_guessed_leave_the_whole_model_unproven(tmp_path: Path) -> None:
    g = Graph()
    x = g.input("x", ["batch", "length", WIDTH])
    g.inputs.append(onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.INT64, ["n"]))
    y, _ = norm(g, Way(), x)
    g.output(g.op("Gather", y, "rows", axis=1))
    path = saved(tmp_path / "model.onnx", g.model())
    result = rewrite_model(path, tmp_path / "out")
    assert result.proof is not None
    assert result.proof.verdict == "unproven"
    assert "give --inputs" in result.proof.reason
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32), "rows": np.array([2, 0])}
    with pytest.raises(UsageError, match="missing: rows"):
        rewrite_model(path, tmp_path / "given", inputs={"x": feeds["x"]})
    given = rewrite_model(path, tmp_path / "given", inputs=feeds).proof
    assert given is not None
    assert given.verdict == "pass"


def test_weights_that_are_inputs_are_fed_to_both_sides(tmp_path: Path) -> None:
    g = Graph()
    x = g.input("x", ["batch", "length", WIDTH])
    y, _ = norm(g, Way(weight="input"), x)
    g.output(y)
    path = saved(tmp_path / "model.onnx", g.model())
    feeds = {"x": np.ones((2, 3, WIDTH), np.float32), "norm.weight": weight(WIDTH)}
    proof = rewrite_model(path, tmp_path / "out", inputs=feeds).proof
    assert proof is not None
    assert (proof.verdict, len(proof.sites)) == ("pass", 1)


def test_a_large_static_input_is_proven_on_a_small_one(tmp_path: Path) -> None:
    g = Graph()
    x = g.input("x", [64, 4096, 512])
    h = g.op("Pow", x, g.constant(np.float32(2)))
    stat = g.op("Add", g.reduce("ReduceMean", h, [-1]), g.constant(np.float32(1e-5)))
    y = g.op("Div", x, g.op("Sqrt", stat))
    g.output(g.op("Mul", y, g.constant(weight(512))))
    result = rewrite(ir.from_proto(g.model()), "ort")
    proof = prove_norms(result, tmp_path, seed=0, progress=lambda text: None)
    assert [row.verdict for row in proof.sites] == ["pass"]


def test_the_proof_of_the_whole_compares_with_the_file_before(tmp_path: Path) -> None:
    """By itself: two files that differ by 1% in one norm's weight."""
    model = block()
    path = saved(tmp_path / "model.onnx", model)
    result = rewrite(ir.from_proto(onnx.load(path)), "ort")
    tensor = next(t for t in model.graph.initializer if t.name == "layers.1.norm.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    other = saved(tmp_path / "other" / "model.onnx", model)
    for after, verdict in ((other, "mismatch"), (Path(shutil.copy(path, tmp_path / "same.onnx")), "pass")):
        proof = prove_model(result, path, after, Proof(), feeds=None, seed=0, progress=lambda text: None)
        assert proof.verdict == verdict
