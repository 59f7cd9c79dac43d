"""Attentions that a graph spells out, as text: every part can be exchanged for another spelling, or a wrong one."""

from __future__ import annotations

import onnx_ir as ir
from onnx import parser

from rmsnorm_deploy.models.attention.spec import AttentionSpec

# Two queries' heads read one head of keys and values.
HEADS, GROUPS, WIDTH = 4, 2, 8
_REPEAT = """
    {v}u = Unsqueeze ({v}, two)
    {v}e = Expand ({v}u, {v}wide)
    {v}r = Reshape ({v}e, {v}joined)
"""
PARTS: dict[str, str] = {
    "inputs": "",
    "mask_type": "float[B, 1, S, T] mask",
    "keys": "kt = Transpose <perm = [0, 1, 3, 2]> (kr)",
    "scores": "scores = MatMul (q, kt)",
    "scale": "scaled = Mul (scores, scale)",
    "mask": "masked = Add (scaled, mask)",
    "softmax": "weights = Softmax <axis = -1> (masked)",
    "behind": "used = Identity (weights)",
    "product": "y = MatMul (used, vr)",
    "end": "z = Transpose <perm = [0, 2, 1, 3]> (y)",
    "outputs": "float[B, S, 4, 8] z",
}


# Spellings of one attention, and what they are.
SPELLINGS: dict[str, tuple[dict[str, str], AttentionSpec]] = {
    "plain": ({}, AttentionSpec(0.5)),
    "scale by division": ({"scale": "scaled = Div (scores, half)"}, AttentionSpec(0.5)),
    "scale of both sides": (
        {
            "keys": "kq = Transpose <perm = [0, 1, 3, 2]> (kr)\nkt = Mul (kq, root)",
            "scores": "qs = Mul (root, q)\nscores = MatMul (qs, kt)",
            "scale": "scaled = Identity (scores)",
        },
        AttentionSpec(0.5),
    ),
    "softcap": (
        {"scale": "s = Mul (scores, scale)\nd = Div (s, cap)\nt = Tanh (d)\nscaled = Mul (t, cap)"},
        AttentionSpec(0.5, softcap=3.0),
    ),
    "two masks": ({"mask": "m = Add (scaled, mask)\nmasked = Add (mask, m)"}, AttentionSpec(0.5)),
    "casts": (
        {
            "mask": "m = Add (scaled, mask)\nmasked = Cast <to = 11> (m)",
            "behind": "used = Cast <to = 1> (weights)",
        },
        AttentionSpec(0.5),
    ),
    "kept scores": (
        {"mask_type": "bool[B, 1, S, T] mask", "mask": "masked = Where (mask, scaled, low)"},
        AttentionSpec(0.5),
    ),
    "hidden scores": (
        {"mask_type": "bool[1, 1, S, T] mask", "mask": "masked = Where (mask, low, scaled)"},
        AttentionSpec(0.5),
    ),
    "NaN to zero": ({"behind": "bad = IsNaN (weights)\nused = Where (bad, zero, weights)"}, AttentionSpec(0.5)),
    "keys by three dims": (
        {
            "keys": """s4 = Shape (kr)
            last = Slice (s4, minus, width)
            k3s = Concat <axis = 0> (minus, keys, width)
            k3 = Reshape (kr, k3s)
            t3 = Transpose <perm = [0, 2, 1]> (k3)
            t4s = Concat <axis = 0> (batch, heads, width, keys)
            kt = Reshape (t3, t4s)"""
        },
        AttentionSpec(0.5),
    ),
    "no mask": ({"mask": "masked = Identity (scaled)"}, AttentionSpec(0.5)),
}


def attention_text(opset: int = 20, **parts: str) -> str:
    """The text of a graph with one attention; `parts` replaces parts of it."""
    row = {**PARTS, **parts}
    body = "\n".join(row[name] for name in ("keys", "scores", "scale", "mask", "softmax", "behind", "product", "end"))
    return f"""<ir_version: 10, opset_import: ["" : {opset}]>
    attention (float[B, 4, S, 8] q, float[B, 2, T, 8] k, float[B, 2, T, 8] v, {row["mask_type"]}{row["inputs"]})
        => ({row["outputs"]})
        <int64[1] two = {{2}}, int64[1] minus = {{-1}}, float scale = {{0.5}}, float half = {{2.0}},
        float cap = {{3.0}}, float root = {{0.7071067811865476}}, float zero = {{0.0}}, float low = {{-3.4028234e38}},
        int64[1] one = {{1}},
        int64[1] heads = {{4}}, int64[1] groups = {{2}}, int64[1] count = {{2}}, int64[1] width = {{8}}>
    {{
        batch = Shape <start = 0, end = 1> (q)
        keys = Shape <start = 2, end = 3> (k)
        kwide = Concat <axis = 0> (batch, groups, count, keys, width)
        vwide = Identity (kwide)
        kjoined = Concat <axis = 0> (batch, heads, keys, width)
        vjoined = Identity (kjoined)
        {_REPEAT.format(v="k")}
        {_REPEAT.format(v="v")}
        {body}
    }}"""


def attention_model(opset: int = 20, **parts: str) -> ir.Model:
    """`attention_text` as a model; the shapes of the repeated keys and values are stated, as torch's exporter does."""
    model = ir.from_proto(parser.parse_model(attention_text(opset, **parts)))
    shapes = {"e": ["B", GROUPS, HEADS // GROUPS, "T", WIDTH], "r": ["B", HEADS, "T", WIDTH]}
    for node in model.graph:
        for value in node.outputs:
            name = str(value.name)
            if name[:1] in "kv" and name[1:] in shapes:
                value.shape = ir.Shape(shapes[name[1:]])
                value.dtype = ir.DataType.FLOAT
    return model
