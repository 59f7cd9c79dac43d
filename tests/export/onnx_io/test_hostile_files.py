"""Files that are damaged, or made to do damage: each gives a clear error in bounded time, and is never written to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper
from onnx import TensorProto as T

from benchmarks.fuzz_rewrite.run import fuzz
from rmsnorm_deploy.export.from_onnx.rewrite import rewrite
from rmsnorm_deploy.export.onnx_io.check_graph import DEEPEST_GRAPH, MOST_NODES, check_graph
from rmsnorm_deploy.export.onnx_io.read_model import read_model, to_ir
from rmsnorm_deploy.models.errors import RmsnormDeployError, UnsupportedError, UsageError
from tests.helpers.extent import EVERY

WIDTH = 8


def norm_model() -> ModelProto:
    """`y = x / sqrt(mean(x * x) + eps) * w`, the steps called after what they make."""
    steps = [
        ("Mul", ["x", "x"], "square"),
        ("ReduceMean", ["square", "axes"], "mean"),
        ("Add", ["mean", "eps"], "shifted"),
        ("Sqrt", ["shifted"], "root"),
        ("Div", ["x", "root"], "normed"),
        ("Mul", ["normed", "w"], "y"),
    ]
    constants = {"axes": np.array([-1]), "eps": np.float32(1e-6), "w": np.arange(WIDTH, dtype=np.float32)}
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], name=f"make {output}") for op, inputs, output in steps],
        "main",
        [helper.make_tensor_value_info("x", T.FLOAT, [2, WIDTH])],
        [helper.make_tensor_value_info("y", T.FLOAT, [2, WIDTH])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def outcome(path: Path) -> int:
    """Take a file all the way; returns how many norms were rewritten."""
    file = read_model(path)
    check_graph(file.model, file.where)
    return sum(site.changed for site in rewrite(to_ir(file), "primitives").sites)


@contextmanager
def untouched(path: Path) -> Iterator[None]:
    before = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino, sorted(path.parent.iterdir()))
    yield
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino, sorted(path.parent.iterdir())) == before


def refused(folder: Path, data: bytes | ModelProto, kind: type[RmsnormDeployError], text: str) -> None:
    path = folder / "model.onnx"
    path.write_bytes(data if isinstance(data, bytes) else data.SerializeToString())
    with untouched(path), pytest.raises(kind, match=text) as error:
        outcome(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 500
    assert str(error.value).isprintable()


def add(model: ModelProto, op_type: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    model.graph.node.append(helper.make_node(op_type, inputs, [output], name=f"make {output}", **attributes))
    return model.graph.node[-1]


def branch(*nodes: NodeProto, output: str) -> GraphProto:
    return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info(output, T.FLOAT, None)])


def test_the_model_itself_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(norm_model().SerializeToString())
    with untouched(path):
        assert outcome(path) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"\xff" * 100,
        b"import torch\nprint('this is not a model')\n",
        b"<html>404</html>" * 50,
        np.random.default_rng(0).bytes(4096),
        b"\x3a\xff\xff\xff\xff\x0f",  # a graph of 4 GB, it says
        b"\x0b" * 10_000,  # groups inside of groups
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=range(9),
)
def test_what_is_no_model(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path, data, UsageError, "not an ONNX model")


def test_places_that_are_no_files(tmp_path: Path) -> None:
    for place, text in (
        (tmp_path, "expected a regular file, got a folder"),
        (tmp_path / "none.onnx", "the file does not exist"),
    ):
        with pytest.raises(UsageError, match=text):
            outcome(place)


def test_every_truncation_is_refused_or_whole(tmp_path: Path) -> None:
    data = norm_model().SerializeToString()
    path = tmp_path / "model.onnx"
    kept = []
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with contextlib.suppress(UsageError, UnsupportedError):
            kept.append(outcome(path))
    assert not any(kept)


def test_subgraphs_too_deep(tmp_path: Path) -> None:
    model, graph = norm_model(), b""
    for _ in range(200):  # a graph in attribute 6 of a node's attribute 5 of a graph's node 1
        for number in (6, 5, 1):
            graph = _field(number, graph)
    refused(tmp_path, model.SerializeToString() + _field(7, graph), UsageError, "not an ONNX model, or a truncated one")
    inner = model.graph
    for _ in range(DEEPEST_GRAPH + 1):
        inner.node.add(op_type="If", domain="own").attribute.add(name="body", type=onnx.AttributeProto.GRAPH)
        inner = inner.node[-1].attribute[0].g
        inner.name = "branch"
    with pytest.raises(UnsupportedError, match=f"subgraphs are nested more than {DEEPEST_GRAPH} deep"):
        check_graph(model, "the model")


def _field(number: int, data: bytes) -> bytes:
    """A field of bytes as protobuf writes it."""
    size, length = b"", len(data)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def _dangling(model: ModelProto) -> None:
    model.graph.node[2].input[1] = "nowhere"


def _no_initializer(model: ModelProto) -> None:
    del model.graph.initializer[2]


def _dangling_in_branch(model: ModelProto) -> None:
    inner = branch(helper.make_node("Neg", ["nowhere"], ["i"], name="inner"), output="i")
    add(model, "If", ["flag"], "z", then_branch=inner, else_branch=inner)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))


def _out_of_a_branch(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    inner = branch(helper.make_node("Neg", ["x"], ["inside"]), output="inside")
    add(model, "If", ["flag"], "z", then_branch=inner, else_branch=inner)
    add(model, "Neg", ["inside"], "v")


def _function(name: str, *calls: str) -> onnx.FunctionProto:
    nodes = [helper.make_node(call, ["a"], [f"b{k}"], domain="own") for k, call in enumerate(calls)]
    nodes.append(helper.make_node("Neg", ["a"], ["b"]))
    return helper.make_function("own", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 18)])


def _dangling_in_function(model: ModelProto) -> None:
    model.functions.append(_function("F"))
    model.functions[0].node[0].input[0] = "x"  # of the graph, which a function does not see


def _output(model: ModelProto) -> None:
    model.graph.output[0].name = "nothing"


def _branch_output(model: ModelProto) -> None:
    inner = branch(helper.make_node("Neg", ["x"], ["i"]), output="x")
    add(model, "If", ["flag"], "z", then_branch=inner, else_branch=inner)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))


def _made_twice(model: ModelProto) -> None:
    add(model, "Neg", ["x"], "root")


def _made_from_an_input(model: ModelProto) -> None:
    add(model, "Neg", ["root"], "x")


def _given_twice(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[1])


def _input_twice(model: ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


def _itself(model: ModelProto) -> None:
    model.graph.node[3].input[0] = "root"


def _circle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "normed"


def _circle_through_branch(model: ModelProto) -> None:
    inner = branch(helper.make_node("Neg", ["y"], ["i"]), output="i")
    add(model, "If", ["flag"], "z", then_branch=inner, else_branch=inner)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    model.graph.node[0].input[0] = "z"


def _no_op(model: ModelProto) -> None:
    model.graph.node[1].op_type = ""


def _attribute_twice(model: ModelProto) -> None:
    model.graph.node[1].attribute.extend([helper.make_attribute("keepdims", k) for k in (0, 1)])


def _other_count(model: ModelProto) -> None:
    model.graph.node[3].input.append("x")


def _other_count_of_a_function(model: ModelProto) -> None:
    model.functions.append(_function("F"))
    model.graph.node.append(helper.make_node("F", ["x", "x"], ["z"], domain="own"))


def _other_type(model: ModelProto) -> None:
    model.graph.node[1].attribute.add(name="keepdims", type=onnx.AttributeProto.FLOATS)


def _other_type_of_a_norm(model: ModelProto) -> None:
    add(model, "SimplifiedLayerNormalization", ["x", "w"], "z", epsilon=1)


def _other_dtype(model: ModelProto) -> None:
    add(model, "Cast", ["x"], "z", to=-4)


def _no_opset(model: ModelProto) -> None:
    del model.opset_import[:]


def _opset_zero(model: ModelProto) -> None:
    model.opset_import[0].version = 0


def _two_opsets(model: ModelProto) -> None:
    model.opset_import.add(domain="ai.onnx", version=13)


def _recursion(model: ModelProto) -> None:
    model.functions.append(_function("F", "F"))


def _mutual_recursion(model: ModelProto) -> None:
    model.functions.extend([_function("F", "G"), _function("G", "H"), _function("H", "F", "Neg")])


def _recursion_in_a_branch(model: ModelProto) -> None:
    inner = branch(helper.make_node("F", ["a"], ["i"], domain="own"), output="i")
    model.functions.append(_function("F"))
    model.functions[0].node.append(helper.make_node("If", ["a"], ["z"], then_branch=inner, else_branch=inner))


def _same_functions(model: ModelProto) -> None:
    model.functions.extend([_function("F"), _function("F")])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_dangling, "Add 'make shifted' reads 'nowhere', which the graph does not define"),
        (_no_initializer, "Mul 'make y' reads 'w', which the graph does not define.*an initializer is missing"),
        (_dangling_in_branch, "If 'make z' reads 'nowhere', which the graph does not define"),
        (_out_of_a_branch, "Neg 'make v' reads 'inside', which the graph does not define"),
        (_dangling_in_function, "reads 'x', which function F does not define"),
        (_output, "'nothing' is an output of the graph, which does not define it"),
        (_branch_output, "'x' is an output of a subgraph of If 'make z', which does not define it"),
        (_made_twice, "'root' is made twice in the graph, again by Neg 'make root'"),
        (_made_from_an_input, "'x' is made twice in the graph, again by Neg 'make x'"),
        (_given_twice, "'eps' is defined twice as an input or initializer of the graph"),
        (_input_twice, "'x' is defined twice as an input or initializer of the graph"),
        (_itself, "Sqrt 'make root' depends on its own result"),
        (_circle, "depends on its own result, directly or through other nodes"),
        (_circle_through_branch, "depends on its own result, directly or through other nodes"),
        (_no_op, "'make mean' has no operator"),
        (_attribute_twice, "ReduceMean 'make mean' has attribute keepdims twice"),
        (_other_count, "Sqrt 'make root' has 2 inputs and 1 outputs, which does not match its definition in opset 18"),
        (
            _other_count_of_a_function,
            "F without a name.* has 2 inputs .* does not match its definition in function F",
        ),
        (_other_type, "attribute keepdims of ReduceMean 'make mean' has the wrong type"),
        (_other_type_of_a_norm, "attribute epsilon of SimplifiedLayerNormalization 'make z' has the wrong type"),
        (_other_dtype, "attribute to of Cast 'make z' has the wrong type"),
        (_no_opset, "the model does not import an opset of ONNX's default domain"),
        (_opset_zero, "the model does not import an opset of ONNX's default domain"),
        (_two_opsets, "the model imports domain '' at opsets 13, 18; expected one opset for each domain"),
        (_recursion, "function own::F calls itself"),
        (_mutual_recursion, "function own::[FGH] calls itself, directly or through others"),
        (_recursion_in_a_branch, "function own::F calls itself"),
        (_same_functions, "two functions have the same domain and name"),
    ],
)
def test_graphs_that_are_none(tmp_path: Path, damage: Callable[[ModelProto], None], text: str) -> None:
    model = norm_model()
    damage(model)
    refused(tmp_path, model, UsageError, text)


@pytest.mark.parametrize(
    "name", ["a\nb", "🙂", "n" * 10_000, "a/b\\c", "'\"`", "\x00", "\x1b[31m", "..", "%s{}", "\u202e", " "]
)
def test_names_of_any_kind_are_fine_and_never_spoil_a_message(tmp_path: Path, name: str) -> None:
    model = norm_model()
    for node in model.graph.node:
        node.name = name
        node.input[:] = [name if value == "root" else value for value in node.input]
        node.output[:] = [name if value == "root" else value for value in node.output]
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert outcome(path) == 1
    model.graph.node[3].input[0] = name
    refused(tmp_path, model, UsageError, "Sqrt .* depends on its own result")


@pytest.mark.parametrize(
    ("place", "text"),
    [(b"root", "NodeProto is not UTF-8"), (b"Sqrt", "op_type .* is not UTF-8"), (b"main", "name .* of a GraphProto")],
)
def test_names_that_are_not_utf8_are_refused(tmp_path: Path, place: bytes, text: str) -> None:
    refused(tmp_path, norm_model().SerializeToString().replace(place, b"\xff" * len(place)), UsageError, text)


def test_nodes_without_names_are_named_by_what_they_make(tmp_path: Path) -> None:
    model = norm_model()
    _dangling(model)
    model.graph.node[2].name = ""
    refused(tmp_path, model, UsageError, "Add without a name, which computes 'shifted' reads 'nowhere'")


def test_nodes_in_any_order_are_rewritten(tmp_path: Path) -> None:
    model = norm_model()
    add(model, "If", ["flag"], "z", then_branch=branch(helper.make_node("Neg", ["root"], ["i"]), output="i"),
        else_branch=branch(helper.make_node("Abs", ["root"], ["j"]), output="j"))  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert outcome(path) == 1


def chain(length: int) -> ModelProto:
    model = ModelProto(ir_version=10)
    model.opset_import.add(domain="", version=18)
    model.graph.name = "chain"
    model.graph.input.add(name="v0")
    for number in range(length):
        node = model.graph.node.add(op_type="Relu")
        node.input.append(f"v{number}")
        node.output.append(f"v{number + 1}")
    model.graph.output.add(name=f"v{length}")
    return model


def test_a_million_nodes_are_refused_at_once() -> None:
    model = chain(1_000_000)
    start = time.perf_counter()
    with pytest.raises(UnsupportedError, match=f"more than {MOST_NODES} nodes"):
        check_graph(model, "the model")
    assert time.perf_counter() - start < 1


def test_a_long_chain_is_checked_in_either_order_without_recursion() -> None:
    model = chain(20_000)
    check_graph(model, "the model")
    backwards = chain(0)
    backwards.graph.node.extend(reversed(model.graph.node))
    backwards.graph.output[0].name = "v20000"
    check_graph(backwards, "the model")


def test_functions_that_grow_without_end_when_inlined_are_refused(tmp_path: Path) -> None:
    model = norm_model()
    model.functions.extend(_function(f"F{k}", *[f"F{k + 1}"] * 10) for k in range(12))
    model.functions.append(_function("F12"))
    model.opset_import.add(domain="own", version=1)
    model.graph.node.append(helper.make_node("F0", ["x"], ["z"], domain="own"))
    refused(tmp_path, model, UnsupportedError, f"more than {MOST_NODES} nodes")


def test_damaged_files_are_rewritten_or_refused(tmp_path: Path) -> None:
    """A thousand of them with `RMSNORM_TESTS=all`."""
    count = 1000 if EVERY else 400
    outcomes = fuzz(0, tmp_path / "crashes", lambda number: number < count)
    assert outcomes.crashes == {}, str(outcomes)
    assert sum(outcomes.counts.values()) == count
    assert outcomes.counts["written, same numbers"] > count / 20
    assert outcomes.counts["refused (UsageError)"] > 0.3 * count
