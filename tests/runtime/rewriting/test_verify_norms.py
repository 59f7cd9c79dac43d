"""The proof: faults that it must find, honest rewritings that it must pass, and what it says where it cannot tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.from_onnx.rewrite import Rewritten, RewrittenSite, rewrite
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.errors import EnvironmentMissingError, MismatchError
from rmsnorm_deploy.runtime.rewriting import verify_model as model_proof
from rmsnorm_deploy.runtime.rewriting import verify_norms as rewrite_proof
from rmsnorm_deploy.runtime.rewriting.verify_model import prove_model
from rmsnorm_deploy.runtime.rewriting.verify_norms import Proof, prove_norms
from rmsnorm_deploy.runtime.runners import onnxruntime as ort_runner
from tests.helpers.graphs.graph_text import Graph, weight
from tests.helpers.spellings.norm_places import PLACES
from tests.helpers.spellings.norm_spellings import SPELLINGS, WIDTH, Way, norm

HALF = Way(dtype="float16", casts="cast_then_scale", eps=1e-5)


def rewritten(proto: onnx.ModelProto, target: str = "ort") -> Rewritten:
    return rewrite(ir.from_proto(proto), target)


def proven(result: Rewritten, seed: int = 0) -> Proof:
    return prove_norms(result, Path(), seed=seed, progress=lambda text: None)


def one_norm(way: Way, width: int = WIDTH, dims: tuple[Any, ...] = ("batch", "length")) -> onnx.ModelProto:
    """x, its norm in torch's spelling, and the result."""
    g = Graph(18)
    x = g.input("x", [*dims, width], way.dtype)
    h = g.cast(x, "float32") if way.casts != "none" else x
    stat = g.reduce("ReduceMean", g.op("Pow", h, g.constant(2.0, "float32")), [-1])
    stat = g.op("Add", stat, g.constant(way.eps, "float32"))
    y, scale = g.op("Mul", h, g.op("Reciprocal", g.op("Sqrt", stat))), weight(width, way.dtype)
    if way.casts == "scale_then_cast":
        y = g.cast(g.op("Mul", g.constant(scale.astype(np.float32)), y), way.dtype)
    else:
        y = g.op("Mul", g.constant(scale), g.cast(y, way.dtype) if way.casts != "none" else y)
    g.output(y, way.dtype)
    return g.model()


# Faults in a norm -------------------------------------------------------------------------------------------------

Damage = Callable[[Rewritten], None]
OTHER_OPERATOR = {"Mul": "Div", "Add": "Sub", "Div": "Mul", "Sub": "Add", "Sqrt": "Abs", "Sigmoid": "Tanh"}
# What ONNX Runtime on a CPU does not look at, and what is below one rounding.
UNSEEN = ("stash_type", "scale_type", "scale_offset")
DAMAGED = ("dynamo", "half, square mul", "wide, axes positive", "double", "groups and bias dynamo",
           "gate after half, silu left", "in a Loop, dynamo")  # fmt: skip
NO_PLUGIN = ("double", "in a Loop, dynamo")


def nodes_of(site: RewrittenSite) -> list[ir.Node]:
    """The nodes that compute y, in the new model."""
    ends = {site.x, site.gate, *(site.sum_of or ())}
    found: dict[ir.Node, None] = {}
    pending: list[ir.Value | None] = [site.y]
    while pending:
        value = pending.pop()
        node = None if value is None or value in ends else value.producer()
        if node is not None and node not in found:
            found[node] = None
            pending.extend(node.inputs)
    return list(found)


def damages(result: Rewritten) -> Iterator[tuple[str, Damage]]:
    """Ways to damage the first norm: each number by 2% in one place or 50%, each operator for its opposite."""
    for index, node in enumerate(nodes_of(result.sites[0])):
        if node.op_type in OTHER_OPERATOR and not multiplies_by_ones(node):
            yield f"{node.op_type} becomes another", damage_operator(index)
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.FLOAT and name not in UNSEEN:
                yield f"{node.op_type}'s {name}", damage_attribute(index, name)
        for position, value in enumerate(node.inputs):
            if value is not None and value.const_value is not None and value.const_value.dtype.is_floating_point():
                yield f"{node.op_type}'s input {position}", damage_constant(index, position)


def multiplies_by_ones(node: ir.Node) -> bool:
    return any(v is not None and v.const_value is not None and bool(np.all(v.const_value.numpy() == 1))
               for v in node.inputs)  # fmt: skip


def damage_operator(index: int) -> Damage:
    def apply(result: Rewritten) -> None:
        node = nodes_of(result.sites[0])[index]
        node.op_type = OTHER_OPERATOR[node.op_type]

    return apply


def damage_attribute(index: int, name: str) -> Damage:
    def apply(result: Rewritten) -> None:
        node = nodes_of(result.sites[0])[index]
        node.attributes[name] = ir.AttrFloat32(name, node.attributes[name].as_float() * 1.5)

    return apply


def damage_constant(index: int, position: int) -> Damage:
    def apply(result: Rewritten) -> None:
        node = nodes_of(result.sites[0])[index]
        tensor = node.inputs[position].const_value  # type: ignore[union-attr]
        assert tensor is not None
        array = np.array(tensor.numpy())
        array.reshape(-1)[array.size // 2] *= array.dtype.type(1.02 if array.size > 1 else 1.5)
        bad = ir.Value(name="bad", const_value=ir.Tensor(array, dtype=tensor.dtype, name="bad"),
                       type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))  # fmt: skip
        result.model.graph.register_initializer(bad)
        node.replace_input_with(position, bad)

    return apply


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name in DAMAGED for target in TARGETS if target != "plugin" or name not in NO_PLUGIN],
)
def test_every_damage_is_found(name: str, target: str) -> None:
    build = (SPELLINGS.get(name) or PLACES[name]).build
    found = list(damages(rewritten(build(), target)))
    assert len(found) >= 2
    for text, damage in found:
        result = rewritten(build(), target)
        damage(result)
        assert proven(result).sites[0].verdict == "mismatch", text


@pytest.mark.parametrize("target", ["primitives", "plugin"])
def test_a_sum_that_is_wrong_is_found(target: str) -> None:
    """Where the norm itself hands the sum on, and where a node before it does."""
    g = Graph()
    a, b = g.input("a", ["n", WIDTH]), g.input("b", ["n", WIDTH])
    x = g.op("Add", a, b)
    y, _ = norm(g, Way(), x)
    g.output(x)
    g.output(y)
    result = rewritten(g.model(), target)
    assert proven(result).verdict == "pass"
    site = result.sites[0]
    assert site.x is not None
    node = site.x.producer()
    assert node is not None
    node.replace_input_with(1, site.sum_of[0])  # type: ignore[index]
    (proof,) = proven(result).sites
    assert proof.verdict == "mismatch"
    kinds = "sum, normal, outlier channels, large, tiny, constant, subnormal, largest, NaN and Inf"
    assert proof.reason == f"wrong on: {kinds}; sum: its second output is not the sum of its inputs"


# What is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 4096, 16384])
@pytest.mark.parametrize("way", [HALF, replace(HALF, casts="scale_then_cast"), Way()], ids=["half", "wide", "float32"])
def test_wide_rows_pass(way: Way, width: int) -> None:
    """An outlier of a wide row is many times the row's RMS, and so is the rounding that it suffers."""
    for target in ("standard", "ort"):
        (proof,) = proven(rewritten(one_norm(way, width), target)).sites
        assert (proof.verdict, len(proof.kinds)) == ("pass", 10), proof.reason


def gated(by: str, after: bool) -> onnx.ModelProto:
    """A norm of a + b, or of x, and a gate that is one of these values."""
    g = Graph()
    a = g.input("a", ["n", WIDTH])
    b = g.input("b", ["n", WIDTH]) if by != "x" else a
    x = g.op("Add", a, b) if by != "x" else a
    gate = {"x": a, "a": a, "b": b, "sum": x}[by]
    factor = g.op("Mul", gate, g.op("Sigmoid", gate))
    y, _ = norm(g, Way(), x if after else g.op("Mul", x, factor))
    g.output(g.op("Mul", y, factor) if after else y)
    g.output(g.op("Neg", x))
    return g.model()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("by", ["x", "a", "b", "sum"])
def test_a_gate_that_is_what_is_normalized_or_a_part_of_it(by: str, after: bool, target: str) -> None:
    result = rewritten(gated(by, after), target)
    assert [site.before.spec.gate for site in result.sites] == ["after" if after else "before"]
    assert proven(result).verdict == "pass"


@pytest.mark.parametrize("target", TARGETS)
def test_a_value_added_to_itself(target: str) -> None:
    g = Graph()
    a = g.input("a", ["n", WIDTH])
    x = g.op("Add", a, a)
    y, _ = norm(g, Way(), x)
    g.output(y)
    g.output(g.op("Neg", x))
    result = rewritten(g.model(), target)
    assert result.sites[0].before.form == "residual_add"
    assert proven(result).verdict == "pass"


# Unproven models ---------------------------------------------------------------------------------------------------


def test_the_weight_of_another_norm_is_found_where_weights_are_inputs() -> None:
    g = Graph()
    x = g.input("x", ["n", WIDTH])
    for number in range(2):
        stat = g.op("Add", g.reduce("ReduceMean", g.op("Mul", x, x), [-1]), g.constant(np.float32(1e-6)))
        x = g.op("Tanh", g.op("Mul", g.op("Div", x, g.op("Sqrt", stat)), g.input(f"w{number}", [WIDTH])))
    g.output(x)
    result = rewritten(g.model())
    assert [site.verdict for site in proven(result).sites] == ["pass", "pass"]
    first, second = (nodes_of(site)[0] for site in result.sites)
    first.replace_input_with(1, second.inputs[1])
    assert [site.verdict for site in proven(result).sites] == ["mismatch", "pass"]


def test_without_onnxruntime_nothing_is_called_unproven(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> None:
        raise EnvironmentMissingError("onnxruntime cannot be imported.")

    result = rewritten(one_norm(Way()))
    onnx.save(one_norm(Way()), tmp_path / "m.onnx")
    monkeypatch.setattr(ort_runner, "import_onnxruntime", missing)
    with pytest.raises(EnvironmentMissingError):
        proven(result)
    with pytest.raises(EnvironmentMissingError):
        whole(result, tmp_path / "m.onnx", tmp_path / "m.onnx")


def test_large_norms_of_fixed_shape_run_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Graph()
    x = g.input("x", [4, 2 * WIDTH])
    for number in range(5):
        h = g.reshape(x, [4, 2, WIDTH])
        stat = g.op("Add", g.reduce("ReduceMean", g.op("Mul", h, h), [-1]), g.constant(np.float32(1e-6)))
        h = g.reshape(g.op("Div", h, g.op("Sqrt", stat)), [4, 2 * WIDTH])
        x = g.op("Tanh", g.op("Mul", h, g.constant(weight(2 * WIDTH, seed=number))))
    g.output(x)
    monkeypatch.setattr(rewrite_proof, "_WINDOW_ELEMENTS", 2 * 4 * 2 * WIDTH)
    said: list[str] = []
    proof = prove_norms(rewritten(g.model()), Path(), seed=0, progress=said.append)
    assert said == [f"running norms alone: {part} of 5" for part in ("1 to 2", "3 to 4", "5 to 5")]
    assert [(site.number, site.verdict) for site in proof.sites] == [(number, "pass") for number in range(5)]


# The whole model --------------------------------------------------------------------------------------------------


def whole(result: Rewritten, before: Path, after: Path, said: list[str] | None = None) -> Proof:
    progress = [].append if said is None else said.append
    return prove_model(result, before, after, Proof(), feeds=None, seed=0, progress=progress)


def files(folder: Path, proto: onnx.ModelProto, after: onnx.ModelProto | None = None) -> tuple[Rewritten, Path, Path]:
    """A model, its rewriting, and both as files; the new one may be another model."""
    result = rewritten(proto)
    onnx.save(proto, folder / "before.onnx")
    onnx.save(ir.to_proto(result.model) if after is None else after, folder / "after.onnx")
    return result, folder / "before.onnx", folder / "after.onnx"


def chooser(dtype: str, seed: int, scale: float = 1.0) -> onnx.ModelProto:
    """A norm, scores of 500 classes, and the better half of them in order."""
    g = Graph()
    way = HALF if dtype == "float16" else Way()
    y, _ = norm(g, way, g.input("x", ["batch", "length", WIDTH], dtype))
    head = np.random.default_rng(seed).standard_normal((WIDTH, 500))
    head[:, 7] *= scale
    scores = g.cast(g.op("MatMul", y, g.constant(head, dtype)), "float32")
    best = g.op("TopK", scores, g.constant(np.array([250])), outputs=2)
    g.outputs.append(onnx.helper.make_tensor_value_info(f"{best}.1", onnx.TensorProto.INT64, None))
    return g.model()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_choices_near_a_tie_may_fall_otherwise(dtype: str, seed: int, tmp_path: Path) -> None:
    proof = whole(*files(tmp_path, chooser(dtype, seed)))
    assert proof.verdict == "pass", proof.reason
    if dtype == "float16":
        assert any("a rounding at each norm changes" in verdict.reason for verdict in proof.model or ())


def test_choices_that_no_rounding_explains_are_a_mismatch(tmp_path: Path) -> None:
    proof = whole(*files(tmp_path, chooser("float32", 0), chooser("float32", 0, scale=1.5)))
    assert proof.verdict == "mismatch"
    assert "elements differ" in proof.reason


def test_roundings_come_only_where_something_differs(tmp_path: Path) -> None:
    said: list[str] = []
    result, before, after = files(tmp_path, one_norm(Way()))
    assert whole(result, before, after, said).verdict == "pass"
    assert said == ["running the whole model"]
    said.clear()
    onnx.save(one_norm(replace(Way(), eps=0.1)), after)
    assert whole(result, before, after, said).verdict == "mismatch"
    assert len(said) == 7


def branches() -> onnx.ModelProto:
    """Norms in both branches of an If, under the same names, whose results are the branches' own."""
    bodies = []
    for number in range(2):
        inner = Graph()
        y, _ = norm(inner, Way(), "x")
        inner.output(y)
        bodies.append(inner.graph(f"body{number}"))
    g = Graph()
    g.input("x", ["batch", "length", WIDTH])
    g.inputs.append(onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    g._count = 100
    g.output(g.op("If", "flag", then_branch=bodies[0], else_branch=bodies[1]))
    return g.model()


def names_taken() -> onnx.ModelProto:
    """A norm whose result is an output, beside a value that is called as a rounding would be."""
    g = Graph()
    y, _ = norm(g, Way(), g.input("x", ["batch", "length", WIDTH]))
    g.output(y)
    g.output(g.op("Mul", y, g.constant(np.full(WIDTH, 2, np.float32), name="rounding.0")))
    return g.model()


@pytest.mark.parametrize("build", [branches, names_taken])
def test_the_rounded_model_differs_by_one_rounding(build: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    proto = build()
    result, before, after = files(tmp_path, proto)
    assert whole(result, before, after).verdict == "pass"
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)}
    if build is branches:
        feeds["flag"] = np.array(True)
    with ort_runner.OrtRunner(model_proof._rounded(result, 0)) as runner, ort_runner.OrtRunner(before) as plain:
        rounded, exact = runner.run(feeds), plain.run(feeds)
    assert list(rounded) == list(exact)
    for name, array in exact.items():
        off = np.abs(rounded[name] / array - 1) / np.finfo(np.float32).eps
        assert off.min() >= 0.5
        assert off.max() <= 2


def test_a_model_without_finite_outputs_is_not_proven(tmp_path: Path) -> None:
    g = Graph()
    y, _ = norm(g, Way(), g.input("x", ["batch", "length", WIDTH]))
    bad = g.op("Log", g.op("Sub", g.op("Mul", y, g.constant(np.float32(0))), g.constant(np.float32(1))))
    g.output(bad)
    proof = whole(*files(tmp_path, g.model()))
    assert proof.verdict == "unproven"
    assert "returns no finite values on these inputs; give --inputs" in proof.reason
    g.output(y)
    proof = whole(*files(tmp_path, g.model()))
    assert proof.verdict == "pass"
    assert proof.notes == [f"{bad} not compared: the original file returns no finite values on these inputs"]


def test_a_new_file_that_does_not_run_is_a_mismatch(tmp_path: Path) -> None:
    g = Graph()
    x = g.input("x", ["batch", "length", WIDTH])
    g.output(g.reshape(x, [7, -1]))
    with pytest.raises(MismatchError, match="the original file runs in ONNX Runtime, but the rewritten file does not"):
        whole(*files(tmp_path, one_norm(Way()), g.model()))


@pytest.mark.parametrize("one", [False, True])
def test_a_cache_under_the_names_of_other_exporters(one: bool, tmp_path: Path) -> None:
    """A decoder as optimum writes it: one token at a time, or several."""
    g = Graph()
    ids = g.input("input_ids", ["batch_size", 1 if one else "sequence_length"], "int64")
    mask = g.input("attention_mask", ["batch_size", "past_sequence_length + " + ("1" if one else "sequence_length")],
                   "int64")  # fmt: skip
    past = g.input("past_key_values.0.key", ["batch_size", 1, "past_sequence_length", WIDTH])
    table = np.random.default_rng(0).standard_normal((50, WIDTH)).astype(np.float32)
    x = g.op("Gather", g.constant(table), ids)
    y, _ = norm(g, Way(), x)
    key = g.op("Concat", past, g.op("Unsqueeze", y, g.constant(np.array([1]))), axis=2)
    scores = g.op("MatMul", g.op("Unsqueeze", y, g.constant(np.array([1]))), g.op("Transpose", key, perm=[0, 1, 3, 2]))
    g.output(g.op("Mul", scores, g.op("Unsqueeze", g.cast(mask, "float32"), g.constant(np.array([1, 2])))))
    g.output(key)
    proof = whole(*files(tmp_path, g.model()))
    assert proof.verdict == "pass", proof.reason
    assert len(proof.model or ()) == 4
    assert math.isfinite((proof.model or [])[0].figures.max_rel_row)  # type: ignore[union-attr]


def test_a_baseline_that_does_not_run_leaves_the_whole_unproven(tmp_path: Path) -> None:
    """ONNX Runtime multiplies no bfloat16 on a CPU, and the norm itself runs."""
    proto = PLACES["SimplifiedLayerNormalization bfloat16"].build()
    result, before, after = files(tmp_path, proto)
    assert whole(result, before, after).verdict == "pass"  # the same bits: nothing needs a baseline
    model = onnx.load(after)
    next(attribute for attribute in model.graph.node[-1].attribute if attribute.name == "epsilon").f = 0.5
    onnx.save(model, after)
    proof = whole(result, before, after)
    assert proof.verdict == "unproven"
    assert "with a rounding at each norm does not run" in proof.reason
