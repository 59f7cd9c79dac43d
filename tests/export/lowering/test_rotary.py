"""Rotary embeddings become one operator where the graph proves it, and compute what the primitive operators do."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.lower import lower_graph
from rmsnorm_deploy.export.from_torch.save import save
from rmsnorm_deploy.export.graph.captured_nodes import ATTENTION_OP, CAPTURE_DOMAIN
from rmsnorm_deploy.export.lowering.norm_writer import NormWriter
from rmsnorm_deploy.export.lowering.rotary import decompose_rotary, find_rotary, has_rotary, write_rotary
from rmsnorm_deploy.export.onnx_io.manifest import read_manifest
from rmsnorm_deploy.models.attention.spec import AttentionSpec
from rmsnorm_deploy.runtime.tensorrt.worker import _for_tensorrt
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.graphs.capture_graph import DATA_TYPES, GraphMaker, run
from tests.helpers.models.families import build

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
HEADS = {"q": 4, "k": 2}


@dataclass
class Case:
    """A graph that rotates q and k by positions; fields that differ from the defaults make it another graph."""

    dtype: torch.dtype = torch.float32
    width: int = 8
    rotated: int = 8
    batch: int | str | None = "b"
    position_batch: int | str = "b"
    split: bool = False
    swapped: bool = False
    scaled: bool = False
    attention: bool = False
    wrong: str = ""

    def model(self, opset: int = 23) -> ir.Model:
        self.maker = maker = GraphMaker(DATA_TYPES[self.dtype])
        positions = maker.input("positions", [self.position_batch, "s"], INT64)
        half, wrong = self.rotated // 2, self.wrong
        wide = [self.position_batch, "s", half]
        column = maker.node("Unsqueeze", [positions, self.ints("axis", 2)], "column", [*wide[:2], 1], dtype=INT64)
        column = maker.node("Cast", [column], "floats", [*wide[:2], 1], {"to": FLOAT}, dtype=FLOAT)
        angle = maker.initializer("angle", 1e4 ** (-torch.arange(half) / half))
        f = maker.node("Mul", [column, angle], "f", wide, dtype=FLOAT)
        other = maker.node("Neg", [f], "other", wide, dtype=FLOAT) if wrong == "other" else f
        both = maker.node("Concat", [f, other], "both", [*wide[:2], self.rotated], {"axis": -1}, dtype=FLOAT)
        cos, sin = self.factor("Cos", both), self.factor("Sin", both)
        if wrong == "input":
            cos = maker.input("given", cos.shape.dims)
        results = [self.rotation(name, cos, sin) for name in HEADS]
        if self.attention:
            v = maker.input("v", [self.batch, HEADS["k"], "s", self.width])
            attributes = {"spec": AttentionSpec(0.3).to_json(), "path": "attention", "heads": 4, "groups": 2}
            results.append(
                maker.node(
                    ATTENTION_OP, [*results, v], "out", [self.batch, "s", 4, self.width], attributes,
                    domain=CAPTURE_DOMAIN,
                )
            )  # fmt: skip
        return maker.model(results, opset)

    def ints(self, name: str, *numbers: int) -> ir.Value:
        return _ints(self.maker, name, numbers)

    def factor(self, op: str, both: ir.Value) -> ir.Value:
        maker, dims = self.maker, [self.position_batch, "s", self.rotated]
        value = maker.node(op, [both], op, dims, dtype=FLOAT)
        if self.scaled or self.wrong == "vector":
            count = (self.rotated,) if self.wrong == "vector" else ()
            scale = maker.initializer(
                f"{op}.scale", torch.linspace(1.25, 2, 1 if not count else count[0]).reshape(count)
            )
            value = maker.node("Mul", [scale, value], f"{op}.scaled", dims, dtype=FLOAT)
        if self.dtype != torch.float32:
            value = maker.node("Cast", [value], f"{op}.narrow", dims, {"to": maker.dtype})
        if self.wrong == "mixed":  # the elements of one row are not computed each alone
            value = maker.node("Softmax", [value], f"{op}.soft", dims, {"axis": -1})
        return maker.node("Unsqueeze", [value, self.ints("heads", 1)], f"{op}.wide", [dims[0], 1, *dims[1:]])

    def part(self, value: ir.Value, name: str, start: int, end: int, step: int = 1) -> ir.Value:
        dims = [*value.shape.dims[:3], (end - start + step - 1) // step]
        rows = [self.ints(f"{row}", row) for row in (start, end, -1, step)]
        return self.maker.node("Slice", [value, *rows], name, dims)

    def halves(self, x: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        half = self.rotated // 2
        if self.wrong == "interleaved":
            return self.part(x, f"{name}.even", 0, self.rotated, 2), self.part(x, f"{name}.odd", 1, self.rotated, 2)
        if self.split:
            first, second = (self.maker.value(f"{name}.{index}", [*x.shape.dims[:3], half]) for index in range(2))
            self.maker.nodes.append(ir.node("Split", [x], {"axis": 3, "num_outputs": 2}, outputs=[first, second]))
            return first, second
        past = 1 if self.wrong == "uneven" else 0
        return self.part(x, f"{name}.0", past, half + past), self.part(x, f"{name}.1", half, 1 << 40)

    def rotation(self, name: str, cos: ir.Value, sin: ir.Value) -> ir.Value:
        maker, dims = self.maker, [self.batch, HEADS[name], "s", self.rotated]
        whole = maker.input(name, [*dims[:3], self.width])
        partial = self.rotated != self.width
        x = self.part(whole, f"{name}.rotated", 0, self.rotated) if partial else whole
        first, second = self.halves(x, name)
        if self.wrong == "sign":
            first, second = maker.node("Neg", [first], f"{name}.neg", first.shape.dims), second
            turned = maker.node("Concat", [second, first], f"{name}.turned", dims, {"axis": -1})
        else:
            second = maker.node("Neg", [second], f"{name}.neg", second.shape.dims)
            turned = maker.node("Concat", [second, first], f"{name}.turned", dims, {"axis": -1})
        order = slice(None, None, -1 if self.swapped else 1)
        a = maker.node("Mul", [x, cos][order], f"{name}.a", dims)
        b = maker.node("Mul", [turned, sin], f"{name}.b", dims)
        y = maker.node("Sub" if self.wrong == "minus" else "Add", [a, b][order], f"{name}.y", dims)
        if not partial:
            return y
        rest = self.part(whole, f"{name}.rest", self.rotated, self.width)
        return maker.node("Concat", [y, rest], f"{name}.all", [*dims[:3], self.width], {"axis": -1})

    def feeds(self, batch: int = 3, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        rows = 1 if self.position_batch == 1 else batch
        feeds = {"positions": torch.randint(0, 4000, (rows, length), generator=random)}
        for name, heads in HEADS.items():
            feeds[name] = torch.randn((batch, heads, length, self.width), generator=random).to(self.dtype)
        return feeds


def _ints(maker: GraphMaker, name: str, numbers: tuple[int, ...]) -> ir.Value:
    full = f"ints.{name}"
    for value in maker.initializers:
        if value.name == full:
            return value
    value = maker.value(full, (len(numbers),), INT64)
    value.const_value = ir.tensor(np.array(numbers, np.int64), name=full)
    maker.initializers.append(value)
    return value


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def written(case: Case) -> ir.Model:
    model = case.model()
    norms = NormWriter(model.graph, "ort", 23)
    write_rotary(model.graph, 23, norms)
    norms.finish()
    return model


def factors(model: ir.Model, feeds: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The halves of cos and sin that a graph computes, `[B or 1, 1, S, R / 2]`."""
    operator = next((node for node in model.graph if node.op_type == "RotaryEmbedding"), None)
    named = {value.name: value for node in model.graph for value in node.outputs}
    values = operator.inputs[1:] if operator else [named["Cos.wide"], named["Sin.wide"]]
    model.graph.outputs.extend(values)
    rows = run(model, feeds)[-2:]
    del model.graph.outputs[-2:]
    return [row[:, None] for row in rows] if operator else [row[..., : row.shape[-1] // 2] for row in rows]


def rotated_by(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The rotation, each operator rounded in the dtype of its operands."""
    first, second, rest = np.split(x, [cos.shape[-1], 2 * cos.shape[-1]], axis=-1)
    return np.concatenate([first * cos + -second * sin, second * cos + first * sin, rest], axis=-1)


def exact(model: ir.Model, feeds: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """The rotation in float64 by the factors that a graph computes."""
    cos, sin = (row.astype(np.float64) for row in factors(model, feeds))
    return rotated_by(feeds[name].double().numpy(), cos, sin)


GRAPHS = [
    Case(dtype, width, rotated, position_batch=positions, split=split, swapped=swapped, scaled=scaled)
    for dtype, (width, rotated), positions, (split, swapped, scaled) in itertools.product(
        (torch.float32, torch.float16),
        ((8, 8), (64, 64), (20, 6)),
        ("b", 1),
        ((False, False, False), (True, True, True)),
    )
]


@pytest.mark.parametrize(
    "case", GRAPHS, ids=lambda case: f"{case.dtype}-{case.rotated}-{case.position_batch}-{case.split}"
)
def test_the_operator_computes_the_rotation(case):
    before, after = case.model(), written(case)
    counts = ops(after)
    assert counts["RotaryEmbedding"] == 2
    assert (counts["Neg"], counts["Split"], counts["Slice"], counts["Add"], counts["Cos"]) == (0, 0, 0, 0, 1)
    assert counts["Expand"] == (2 if case.position_batch == 1 else 0)
    assert [value.name for value in after.graph.outputs] == [value.name for value in before.graph.outputs]
    for batch, length in itertools.product((1, 3), (1, 17)):
        feeds = case.feeds(batch, length)
        for name, old, new in zip(HEADS, run(before, feeds), run(after, feeds), strict=True):
            assert old.shape == new.shape
            if case.dtype == torch.float16:
                np.testing.assert_array_equal(old, new)
                continue
            off = np.abs(new - exact(after, feeds, name)).max()
            own = np.abs(old - exact(before, feeds, name)).max()
            # A product less is rounded; each is rounded at the size of its largest term.
            assert off <= own + np.finfo(np.float32).eps * np.abs(feeds[name].numpy()).max()


@pytest.mark.parametrize("case", GRAPHS[::2], ids=lambda case: f"{case.dtype}-{case.rotated}-{case.position_batch}")
def test_operators_are_decomposed_into_the_operators_of_the_formula(case):
    after, feeds = written(case), case.feeds()
    cos, sin = factors(after, feeds)
    proto = ir.to_proto(after)
    assert has_rotary(proto)
    again = ir.from_proto(proto)
    assert decompose_rotary(again) == 2
    assert ops(again)["RotaryEmbedding"] == 0
    assert not has_rotary(ir.to_proto(again))
    for name, new in zip(HEADS, run(again, feeds), strict=True):
        # ONNX Runtime computes primitive operators of float16 in float32, and rounds the result.
        wanted = rotated_by(*(row.astype(np.float32) for row in (feeds[name].numpy(), cos, sin)))
        np.testing.assert_array_equal(wanted.astype(new.dtype), new)


def test_other_operators_are_not_decomposed():
    model = written(Case())
    for node in model.graph:
        node.metadata_props.clear()
    assert decompose_rotary(model) == 0
    assert ops(model)["RotaryEmbedding"] == 2


REFUSED = {
    "other halves": Case(wrong="other"),
    "a factor that is an input": Case(wrong="input"),
    "a factor of each channel": Case(wrong="vector"),
    "rows that are mixed": Case(wrong="mixed"),
    "interleaved": Case(wrong="interleaved"),
    "uneven halves": Case(wrong="uneven"),
    "the other sign": Case(wrong="sign"),
    "a difference": Case(wrong="minus"),
    "float64": Case(torch.float64),
    "bfloat16": Case(torch.bfloat16),
    "another batch": Case(position_batch="c"),
    "a batch without a name": Case(batch=None, position_batch=1),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_other_graphs_stay_as_they_are(case):
    model = case.model()
    before = [(node.op_type, node.name) for node in model.graph]
    assert write_rotary(model.graph, 23, NormWriter(model.graph, "ort", 23)) == []
    assert [(node.op_type, node.name) for node in model.graph] == before


def test_an_older_opset_has_no_operator():
    model = Case().model(opset=22)
    assert len(find_rotary(model.graph)) == 2
    assert write_rotary(model.graph, 22, NormWriter(model.graph, "ort", 22)) == []


@pytest.mark.parametrize("target", ["primitives", "standard", "ort", "plugin"])
@pytest.mark.parametrize("attention", [True, False])
def test_target_ort_has_the_operator_beside_captured_attentions(target, attention):
    lowered = lower_graph(Case(attention=attention).model(20), target)
    wanted = 2 if target == "ort" and attention else 0
    assert len(lowered.rotaries) == ops(lowered.model)["RotaryEmbedding"] == wanted
    assert (lowered.model.graph.opset_imports[""] >= 23) >= (wanted > 0)


def test_a_given_opset_is_kept():
    lowered = lower_graph(Case(attention=True).model(20), "ort", opset=20)
    assert (lowered.rotaries, lowered.model.graph.opset_imports[""]) == ([], 20)


@pytest.mark.parametrize(("rotated", "requires"), [(8, {}), (4, {"onnxruntime": "1.24.4"})])
def test_partial_rotations_require_a_later_runtime(rotated, requires):
    lowered = lower_graph(Case(rotated=rotated, attention=True).model(20), "ort")
    lowered.attentions.clear()
    assert lowered.requires == requires


def test_an_exported_decoder(tmp_path):
    model = build("qwen3")
    result = save(prepare(model, with_past=True), tmp_path / "out", "ort")
    assert read_manifest(result.folder)["rotary"] == {"nodes": 2 * model.config.num_hidden_layers}
    assert result.manifest["requires"] == {"onnxruntime": "1.27"}
    report = validate(result.folder, model, shapes=[(3, 9), (1, 1)])
    assert (report.verdict, report.culprits) == ("pass", [])
    path = result.folder / "model.onnx"
    assert has_rotary(onnx.load(path, load_external_data=False))
    for_tensorrt = onnx.ModelProto.FromString(_for_tensorrt(path))
    assert {node.op_type for node in for_tensorrt.graph.node}.isdisjoint({"RotaryEmbedding", "Attention"})
