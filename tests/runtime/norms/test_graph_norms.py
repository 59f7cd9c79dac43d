"""The norms inside a file: where they are, each alone, what lies between them, and files that do not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.save import ExportResult, save
from rmsnorm_deploy.export.graph.metadata import PATH_KEY, SPEC_KEY, VALUES_KEY
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.norms.access import CalledNorm, NormFeed
from rmsnorm_deploy.runtime.norms.activation_store import Key
from rmsnorm_deploy.runtime.norms.adversarial_rows import adversarial, turns
from rmsnorm_deploy.runtime.norms.cut import cut_out
from rmsnorm_deploy.runtime.norms.graph_norms import GraphNorms, cut_name, fed_name
from rmsnorm_deploy.runtime.norms.onnx_norms import OnnxNorms
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.norms.norm_zoo import ZOO

FIRST, GATED, SECOND = ("norm", 0), ("gated", 0), ("norm", 1)
KEYS: list[Key] = [FIRST, GATED, SECOND]


class Three(nn.Module):
    """A norm that is called twice, a gated one between its calls, a LayerNorm, and a sum that is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate, self.centered = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        self.norm, self.gated = ZOO["llama"].build(), ZOO["mamba2"].build()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for linear in (self.linear, self.gate):
                linear.weight.copy_(torch.randn(64, 64, generator=generator) / 8)
                linear.bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        h = self.gated(h + self.linear(h), self.gate(x))
        total = self.centered(h) + x
        return self.norm(total) * 2.0, total + 1.0


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportResult]:
    folder = tmp_path_factory.mktemp("three")
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))
    prepared = prepare(Three().eval(), inputs={"x": x})
    return {target: save(prepared, folder / target, target) for target in TARGETS}


@pytest.fixture(params=TARGETS)
def path(request: pytest.FixtureRequest, exports: dict[str, ExportResult]) -> Path:
    return exports[request.param].folder / "model.onnx"


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((2, 5, 64)).astype(np.float32)


def run(model: onnx.ModelProto, path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with OrtRunner(model.SerializeToString(), weights_folder=path.parent) as runner:
        return runner.run(feeds)


def inputs_of(model: onnx.ModelProto) -> set[str]:
    return {value.name for value in model.graph.input}


def outputs_of(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.output]


# ------------------------------------------------------------------------------------------------------- located


@pytest.mark.parametrize("target", TARGETS)
def test_located_norms_are_the_sites_call_by_call(exports: dict[str, ExportResult], target: str) -> None:
    result = exports[target]
    graph = GraphNorms(result.folder / "model.onnx")
    calls = {(row["path"], n): call for row in result.manifest["sites"] for n, call in enumerate(row["calls"])}
    assert set(graph.norms) == set(calls) == set(KEYS)
    assert {key: norm.form for key, norm in graph.norms.items()} == {key: row["form"] for key, row in calls.items()}
    assert graph.problems == {}
    assert all(calls[key]["node"] in norm.nodes for key, norm in graph.norms.items())
    assert [norm.gate is not None for norm in (graph.norms[key] for key in KEYS)] == [False, True, False]
    assert {graph.dtype(norm.x) for norm in graph.norms.values()} == {"float32"}
    names = {name for norm in graph.norms.values() for name in norm.nodes}
    assert len(names) == sum(len(norm.nodes) for norm in graph.norms.values()), "a node belongs to one norm"


def test_a_fused_residual_add_belongs_to_the_norm(exports: dict[str, ExportResult]) -> None:
    norms = {target: GraphNorms(result.folder / "model.onnx").norms[SECOND] for target, result in exports.items()}
    counts = {target: len(norm.operands) for target, norm in norms.items()}
    assert counts == {"primitives": 1, "standard": 1, "ort": 1, "plugin": 2}


def test_feeders_are_the_cut_values_on_the_way(path: Path) -> None:
    graph = GraphNorms(path)
    first, gated, second = (graph.norms[key] for key in KEYS)
    assert first.x == "x"
    assert gated.gate is not None
    assert graph.ancestry(KEYS, first.x).values == set()
    assert graph.ancestry(KEYS, gated.x).values == {first.y}
    assert graph.ancestry(KEYS, gated.gate).values == {"x"}
    assert graph.ancestry(KEYS, second.x).values == {gated.y, "x"}
    assert graph.ancestry([FIRST], second.x).values == {first.y, "x"}
    assert graph.ancestry([], second.x).values == set()
    assert graph.ancestry(KEYS, graph.output_names[0]).values == {second.y}


# --------------------------------------------------------------------------------------------------------- alone


def alone(graph: GraphNorms, keys: list[Key]) -> onnx.ModelProto:
    return cut_out(graph.model, [graph.place(key).cut() for key in keys]).model


def test_a_norm_alone_gives_the_bits_that_it_gives_inside_the_model(path: Path, x: np.ndarray) -> None:
    graph = GraphNorms(path)
    norms = [graph.norms[key] for key in KEYS]
    names = [name for norm in norms for name in (norm.x, norm.y, norm.gate, *norm.operands) if name not in (None, "x")]
    inside = {"x": x, **run(graph.exposed(list(dict.fromkeys(map(str, names)))), path, {"x": x})}
    for norm in norms:
        model, cut = alone(graph, [norm.key]), cut_name(norm.key)
        feeds = {f"{cut}.x{index}": inside[name] for index, name in enumerate(norm.operands)}
        if norm.gate is not None:
            feeds[f"{cut}.gate"] = inside[norm.gate]
        assert inputs_of(model) == set(feeds)
        assert outputs_of(model) == ([f"{cut}.y"] if len(norm.operands) == 1 else [f"{cut}.y", f"{cut}.sum"])
        found = run(model, path, feeds)
        np.testing.assert_array_equal(found[f"{cut}.y"], inside[norm.y])
        assert len(norm.operands) == 1 or np.array_equal(found[f"{cut}.sum"], inside[norm.x])


def test_norms_alone_do_not_feed_each_other(path: Path, x: np.ndarray) -> None:
    graph = GraphNorms(path)
    together, single = alone(graph, KEYS), alone(graph, [GATED])
    rng = np.random.default_rng(8)
    feeds = {name: rng.standard_normal(x.shape).astype(np.float32) for name in sorted(inputs_of(together))}
    own = {name: feeds[name] for name in inputs_of(single)}
    y = f"{cut_name(GATED)}.y"
    np.testing.assert_array_equal(run(together, path, feeds)[y], run(single, path, own)[y])
    assert len(inputs_of(together)) == sum(len(graph.norms[key].operands) for key in KEYS) + 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_residual_add_is_fed_two_parts_whose_sum_is_exact(dtype: str, tmp_path: Path) -> None:
    model = Three().eval().to(getattr(torch, dtype))
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2)).to(getattr(torch, dtype))
    save(prepare(model, inputs={"x": x}), tmp_path / "out", "plugin")
    norms = OnnxNorms(tmp_path / "out" / "model.onnx", "cpu")
    norm = CalledNorm(SECOND, ZOO["llama"].spec, (2, 5, 64), dtype, dtype, None, True)
    with norms.alone([SECOND]) as run_norms:
        for turn in range(turns(norm)):
            feed, _ = adversarial(norm, turn, seed=0)
            result = run_norms({SECOND: feed})[SECOND]
            assert result.total is not None
            assert (result.total.dtype.name, result.y.dtype.name) == (dtype, dtype)
            np.testing.assert_array_equal(result.total, feed.x)


def test_what_is_fed_takes_the_dtype_of_the_file(exports: dict[str, ExportResult]) -> None:
    norms = OnnxNorms(exports["ort"].folder / "model.onnx", "cpu")
    feed = NormFeed(np.ones((1, 2, 64), np.float64), np.ones((1, 2, 64), np.float16))
    with norms.alone([GATED]) as run_norms:
        assert run_norms({GATED: feed})[GATED].y.dtype == np.float32


# ------------------------------------------------------------------------------------------------------- between


def test_between_is_the_model_cut_at_its_norms(path: Path, x: np.ndarray) -> None:
    graph = GraphNorms(path)
    norms = [graph.norms[key] for key in KEYS]
    names = list(dict.fromkeys(n for norm in norms for n in (norm.x, norm.y, norm.gate) if n not in (None, "x")))
    inside = {"x": x, **run(graph.exposed(list(map(str, names))), path, {"x": x})}
    model = graph.between(KEYS, wanted=KEYS, with_outputs=True)
    # A fused add computes the sum again; no node of the others is left.
    plain = [norm for norm in norms if len(norm.operands) == 1]
    assert {node.name for node in model.graph.node}.isdisjoint(name for norm in plain for name in norm.nodes)
    feeds = {name: inside[name.removesuffix("@fed")] for name in inputs_of(model)}
    found = run(model, path, feeds)
    assert set(found) == {*graph.output_names, *(norm.x for norm in norms), norms[1].gate}
    for name, value in found.items():
        np.testing.assert_array_equal(value, inside[name], err_msg=name)


def test_a_value_fed_at_a_cut_reaches_only_the_next_cut(path: Path, x: np.ndarray) -> None:
    graph = GraphNorms(path)
    first, gated, second = (graph.norms[key] for key in KEYS)
    model = graph.between(KEYS, wanted=KEYS, with_outputs=True)
    plain = {name: x if name in ("x", "x@fed") else np.ones_like(x) for name in inputs_of(model)}
    before, after = (run(model, path, {**plain, fed_name(first.y): value}) for value in (plain["x@fed"], 2 * x))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {gated.x}
    assert second.x not in changed


def test_a_window_computes_its_norms_only(path: Path) -> None:
    graph = GraphNorms(path)
    model = graph.between(KEYS, wanted=[GATED], with_outputs=False)
    assert set(outputs_of(model)) == {graph.norms[GATED].x, graph.norms[GATED].gate}
    assert inputs_of(model) == {"x@fed", fed_name(graph.norms[FIRST].y)}
    weights = {tensor.name for tensor in model.graph.initializer}
    assert not any("centered" in name for name in weights)
    assert len(model.graph.node) < len(onnx.load(path, load_external_data=False).graph.node)


class Returned(nn.Module):
    """What goes into the last norm and what comes out of it are the model's own outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(64, 64, bias=False), ZOO["llama"].build()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.linear(x)
        return self.norm(h), h


@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_whose_values_are_outputs_of_the_model_is_cut_too(target: str, tmp_path: Path, x: np.ndarray) -> None:
    save(prepare(Returned().eval(), inputs={"x": torch.ones(2, 3, 64)}), tmp_path / "out", target)
    path = tmp_path / "out" / "model.onnx"
    graph = GraphNorms(path)
    norm = graph.norms[FIRST]
    assert set(graph.output_names) == {norm.x, norm.y}
    plain = run(graph.exposed([]), path, {"x": x})
    model = graph.between([FIRST], wanted=[FIRST], with_outputs=True)
    assert set(outputs_of(model)) == {norm.x, norm.y}
    found = run(model, path, {name: x if name == "x" else plain[norm.x] for name in inputs_of(model)})
    np.testing.assert_array_equal(found[norm.x], plain[norm.x])
    np.testing.assert_array_equal(found[norm.y], plain[norm.y])


# ------------------------------------------------------------------------------------------- files that do not say


@pytest.fixture
def damaged(exports: dict[str, ExportResult], tmp_path: Path) -> Callable[..., GraphNorms]:
    """The file of a target after `change` had its nodes, by norm path; weights stay where they are."""

    def opened(change: Callable[[onnx.GraphProto, list[onnx.NodeProto]], None], target: str = "ort") -> GraphNorms:
        model = onnx.load(exports[target].folder / "model.onnx", load_external_data=False)
        change(model.graph, [node for node in model.graph.node if metadata(node).get(PATH_KEY) == "gated"])
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        return GraphNorms(tmp_path / "model.onnx")

    return opened


def metadata(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def entry(nodes: list[onnx.NodeProto], key: str) -> Any:
    (found,) = [entry for node in nodes for entry in node.metadata_props if entry.key == key]
    return found


def forget(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    for node in graph.node:
        del node.metadata_props[:]


def test_norms_that_a_file_does_not_name_are_recognized(damaged: Callable[..., GraphNorms]) -> None:
    graph = damaged(forget)
    assert (list(graph.norms), graph.problems) == ([("norm", 0), ("norm", 1), ("gated", 0)], {})
    assert len(graph.output_names) == 2


def garble_values(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    entry(nodes, VALUES_KEY).value = "{x: y"


def drop_y(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    names = json.loads(entry(nodes, VALUES_KEY).value)
    entry(nodes, VALUES_KEY).value = json.dumps({"x": names["x"]})


def rename_x(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    names = json.loads(entry(nodes, VALUES_KEY).value)
    entry(nodes, VALUES_KEY).value = json.dumps({**names, "x": "nosuch"})


def no_core(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    entry(nodes, SPEC_KEY).key = "something.else"


def two_cores(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    spec, values = entry(nodes, SPEC_KEY).value, entry(nodes, VALUES_KEY).value
    other = next(node for node in nodes if SPEC_KEY not in metadata(node))
    for key, value in ((SPEC_KEY, spec), (VALUES_KEY, values)):
        other.metadata_props.add(key=key, value=value)


def y_of_others(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    names = json.loads(entry(nodes, VALUES_KEY).value)
    entry(nodes, VALUES_KEY).value = json.dumps({**names, "y": graph.output[0].name})


def without_its_gate(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    names = json.loads(entry(nodes, VALUES_KEY).value)
    entry(nodes, VALUES_KEY).value = json.dumps({"x": names["x"], "y": names["y"]})


@pytest.mark.parametrize("change", [rename_x, y_of_others])
@pytest.mark.parametrize("target", TARGETS)
def test_a_name_that_is_not_of_the_norm_is_replaced_by_the_only_value_that_it_can_be(
    damaged: Callable[..., GraphNorms], change: Any, target: str
) -> None:
    graph, right = damaged(change, target), damaged(lambda *_: None, target)
    assert (graph.problems, graph.norms) == ({}, right.norms)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (garble_values, "the metadata rmsnorm_deploy.values on its node cannot be read"),
        (drop_y, "the metadata rmsnorm_deploy.values on its node cannot be read"),
        (no_core, "expected one main node among its nodes in the file, got 0"),
        (two_cores, "expected one main node among its nodes in the file, got 2"),
        (without_its_gate, "computed from the model's inputs"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_that_cannot_be_cut_out_is_a_problem_and_the_others_are_found(
    damaged: Callable[..., GraphNorms], change: Any, problem: str, target: str
) -> None:
    graph = damaged(change, target)
    assert set(graph.norms) == {FIRST, SECOND}
    assert list(graph.problems) == ["gated"]
    assert problem in graph.problems["gated"]


def test_a_norm_whose_result_nothing_reads_is_unused(exports: dict[str, ExportResult], tmp_path: Path) -> None:
    source = exports["primitives"].folder / "model.onnx"
    assert OnnxNorms(source, "cpu").unused == frozenset()
    norm = GraphNorms(source).norms[GATED]
    model = onnx.load(source)
    for node in model.graph.node:
        if node.name not in norm.nodes:
            for index, name in enumerate(node.input):
                if name == norm.y:
                    node.input[index] = norm.x
    onnx.save(model, tmp_path / "model.onnx")
    assert OnnxNorms(tmp_path / "model.onnx", "cpu").unused == {GATED}


def test_specs_in_the_file_are_those_of_the_table(exports: dict[str, ExportResult]) -> None:
    model = onnx.load(exports["plugin"].folder / "model.onnx", load_external_data=False)
    specs = [NormSpec.from_json(metadata(node)[SPEC_KEY]) for node in model.graph.node if SPEC_KEY in metadata(node)]
    assert sorted(map(NormSpec.to_json, specs)) == sorted(
        spec.to_json() for spec in (ZOO["llama"].spec, ZOO["llama"].spec, ZOO["mamba2"].spec)
    )
