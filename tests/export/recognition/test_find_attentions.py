"""Tests of export/recognition/find_attentions.py, attention_values.py and attention_proof.py."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.graph.infer_types import fill_types
from rmsnorm_deploy.export.recognition.attention_proof import difference
from rmsnorm_deploy.export.recognition.find_attentions import FoundAttention, FoundAttentions, find_attentions
from tests.helpers.graphs.attention_graphs import SPELLINGS, attention_model

# Graphs that are refused, and a part of the reason.
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "weights as an output": ({"outputs": "float[B, S, 4, 8] z, float[B, 4, S, T] weights"}, "are an output"),
    "weights are read": (
        {"behind": "used = Identity (weights)\nsum = ReduceSum (weights)", "outputs": "float[B,S,4,8] z, float sum"},
        "its weights weights are used elsewhere",
    ),
    "scores are read": (
        {"behind": "used = Identity (weights)\nsum = ReduceSum (scores)", "outputs": "float[B,S,4,8] z, float sum"},
        "its scores scores are used elsewhere",
    ),
    "another axis": ({"softmax": "weights = Softmax <axis = 2> (masked)"}, "over axis 2, expected the last"),
    "scale from outside": ({"inputs": ", float factor", "scale": "scaled = Mul (scores, factor)"}, "that is not one"),
    "scale for each head": (
        {"inputs": ", float[1, 4, 1, 1] factor", "scale": "scaled = Mul (scores, factor)"},
        "not one constant number",
    ),
    "scale behind the mask": (
        {"scale": "s = Identity (scores)", "mask": "m = Add (s, mask)\nmasked = Mul (m, scale)"},
        "computed by Add",
    ),
    "dropout": ({"behind": "used = Dropout (weights)"}, "read by Dropout"),
    "five dims": (
        {"mask_type": "float[B, 1, 1, S, T] mask", "end": "z = Transpose <perm = [0, 1, 3, 2, 4]> (y)",
         "outputs": "float[B, B, S, 4, 8] z"},
        "have 5 dims",
    ),
    "keys as they are": ({"keys": "kt = Identity (k3)", "inputs": ", float[B, 4, 8, T] k3"}, "not known to be"),
    "factor of the keys": (
        {"inputs": ", float factor", "keys": "k0 = Transpose <perm = [0, 1, 3, 2]> (kr)\nkt = Mul (k0, factor)"},
        "a factor of its keys is not one constant number",
    ),
    "negative scale": ({"scale": "n = Mul (scores, scale)\nscaled = Mul (n, low)"}, "expected a positive number"),
    "weak replacement": (
        {"mask_type": "bool[B, 1, S, T] mask", "mask": "masked = Where (mask, scaled, scale)"},
        "replaced by 0.5",
    ),
    "NaN to one": ({"behind": "bad = IsNaN (weights)\nused = Where (bad, scale, weights)"}, "others than zero"),
    "mask of another batch": ({"mask_type": "float[C, 1, S, T] mask"}, "have the batch of the query"),
    "mask of other queries": (
        {"inputs": ", float[B, 4, 1, 8] q1", "scores": "scores = MatMul (q1, kt)",
         "mask_type": "float[B, 1, 6, T] mask", "end": "z = Transpose <perm = [0, 2, 1, 3]> (y)",
         "outputs": "float[B, 6, 4, 8] z"},
        "its mask has 6 queries, expected 1 or 1",
    ),
    "a number of the scores": (
        {"scale": "s = Mul (scores, scale)\nt = Tanh (s)\nscaled = Mul (t, low)"},
        "its softcap is -3.40282e+38, expected a positive number",
    ),
    "another product in the mask": (
        {"inputs": ", float[B, 4, 8, T] r", "mask": "rel = MatMul (q, r)\nmasked = Add (scaled, rel)"},
        "not that of scores and a mask",
    ),
    "unknown heads": (
        {"scores": "q2 = Reshape (q, shape)\nscores = MatMul (q2, kt)", "inputs": ", int64[4] shape"},
        "the numbers of its heads are unknown",
    ),
}  # fmt: skip


def found_in(model: ir.Model) -> FoundAttentions:
    fill_types(model)
    return find_attentions(model)


def only(found: FoundAttentions) -> FoundAttention:
    assert found.refusals == []
    (site,) = found.sites
    return site


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_found_and_computes_its_spec(name: str) -> None:
    parts, spec = SPELLINGS[name]
    model = attention_model(**parts)
    site = only(found_in(model))
    assert site.spec.softcap == spec.softcap
    assert site.spec.scale == pytest.approx(spec.scale, rel=1e-6)
    assert site.heads == (4, 2)
    assert [str(value.name) for value in site.inputs[:3]] == ["q", "k", "v"]
    assert difference(site, model) is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_an_attention_is_left_alone(name: str) -> None:
    parts, reason = REFUSED[name]
    found = found_in(attention_model(**parts))
    assert found.sites == []
    (refusal,) = found.refusals
    assert reason in refusal.reason


def test_a_softmax_over_all_later_axes_is_another_one() -> None:
    model = attention_model(opset=12, softmax="weights = Softmax (masked)")
    for node in model.graph:
        if node.op_type == "Unsqueeze":  # the axes are an attribute of this opset
            node.attributes["axes"] = ir.AttrInt64s("axes", [2])
            node.resize_inputs(1)
        for value in node.outputs:
            if value.name == "masked":
                value.shape = ir.Shape(["B", 4, "S", "T"])
    (refusal,) = found_in(model).refusals
    assert "over axis 1" in refusal.reason


def test_a_softmax_without_a_product_is_not_mentioned() -> None:
    found = found_in(
        attention_model(product="y = Identity (vr)", outputs="float[B, T, 4, 8] z, float[B, 4, S, T] used")
    )
    assert (found.sites, found.refusals) == ([], [])


def test_repeated_heads_of_unknown_sizes_are_read_as_they_are() -> None:
    model = attention_model()
    for node in model.graph:
        if node.op_type == "Expand":
            node.outputs[0].shape = ir.Shape(["B", 2, None, "T", 8])
    site = only(found_in(model))
    assert (site.heads, site.repeats) == ((4, 4), ())
    assert difference(site, model) is None


# Each is of the form of an attention, and computes another one than its parts say.
DISPROVED: dict[str, dict[str, str]] = {
    "keys regrouped": {
        "keys": "k3s = Concat <axis = 0> (minus, width, keys)\nk3 = Reshape (kr, k3s)\n"
        "t3 = Transpose <perm = [0, 2, 1]> (k3)\nt4s = Concat <axis = 0> (batch, heads, width, keys)\n"
        "kt = Reshape (t3, t4s)"
    },
    "scores rounded": {
        "scale": "s = Mul (scores, scale)\ni = Cast <to = 7> (s)\nscaled = Cast <to = 1> (i)",
    },
}


@pytest.mark.parametrize("name", DISPROVED)
def test_what_computes_something_else_is_disproved(name: str) -> None:
    model = attention_model(**DISPROVED[name])
    assert "its result differs by" in (difference(only(found_in(model)), model) or "")


def test_what_cannot_be_run_is_not_proven() -> None:
    model = attention_model()
    site = only(found_in(model))
    node = site.y.producer()
    assert node is not None
    node.domain = "unknown"
    assert "it could not be computed" in (difference(site, model) or "")
