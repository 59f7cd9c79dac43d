"""What a run reports of an ONNX model: files, ops, and the dtypes that go into a node."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import pytest

from rmsnorm_deploy.runtime.runners.ort_graph import file_record, input_dtypes, op_counts

# A branch inside a branch, a call of a local function, and an op of another domain.
NESTED = onnx.parser.parse_model("""
<ir_version: 8, opset_import: ["" : 18, "local" : 1, "ai.onnx.ml" : 3]>
g (bool c, float[2] x, float16[2] h) => (float[2] y) <float[2] w = {1, 2}> {
    a = Add(x, w)
    r = If (c) <
        then_branch = t () => (float[2] one) {
            one = If (c) <
                then_branch = t2 () => (float[2] two) { two = Neg(x) },
                else_branch = e2 () => (float[2] three) { three = Add(x, x) }
            >
        },
        else_branch = e () => (float[2] four) { four = local.Twice(x) }
    >
    n = ai.onnx.ml.Normalizer(a)
    y = Add(r, n)
}
<domain: "local", opset_import: ["" : 18]> Twice (v) => (u) { u = Add(v, v) }
""")


@pytest.mark.parametrize("content", [b"", b"\x00\x01 bytes"])
def test_a_files_record(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    assert file_record(path) == {
        "file": "weights.bin",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_ops_are_counted_in_subgraphs_and_functions_as_themselves() -> None:
    assert op_counts(NESTED) == {"Add": 3, "If": 2, "Neg": 1, "local::Twice": 1, "ai.onnx.ml::Normalizer": 1}


def test_the_default_domain_has_two_names() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    )
    model.graph.node[0].domain = "ai.onnx"
    assert op_counts(model) == {"Neg": 1}


@pytest.fixture
def mixed() -> onnx.ModelProto:
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 18]>
    g (bool c, bfloat16[2] b, float[2] x) => (float[2] y) <float16[2] w = {1, 2}, float[2] v> {
        m = Mul(b, w)
        k = Mul(x, x)
        s = Mul(unknown, v)
        y = If (c) <
            then_branch = t () => (float[2] one) { one = Neg(x) },
            else_branch = e (double[2] d) => (double[2] two) { two = Neg(d) }
        >
    }
    """)
    for node, name in zip(model.graph.node, ("first", "second", "third"), strict=False):
        node.name = name
    model.graph.node[3].attribute[1].g.node[0].name = "inside"
    return model


@pytest.mark.parametrize(
    ("op", "node", "dtypes"),
    [
        ("Mul", "first", ["bfloat16", "float16"]),
        ("Mul", "second", ["float"]),
        ("Neg", "inside", ["double"]),
        ("Mul", "third", ["float"]),
        ("Add", "first", []),
        ("Mul", "nobody", []),
    ],
)
def test_dtypes_that_go_into_a_node(mixed: onnx.ModelProto, op: str, node: str, dtypes: list[str]) -> None:
    assert input_dtypes(mixed, op, node) == dtypes


def test_dtypes_that_the_model_states_of_values_between() -> None:
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 18]> g (float[2] x) => (float16[2] y) <float16[2] h> {
        h = Cast<to = 10>(x)
        y = Neg(h)
    }
    """)
    model.graph.node[1].name = "n"
    assert input_dtypes(model, "Neg", "n") == ["float16"]
    del model.graph.value_info[:]
    assert input_dtypes(model, "Neg", "n") == []
