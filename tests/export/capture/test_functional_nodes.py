"""Modules that call torch's own attention function: one node each, and PyTorch's results at other sizes."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rmsnorm_deploy import export_model
from rmsnorm_deploy.runtime.validation.api import validate

WIDTH, HEADS = 32, 4


class Layer(nn.Module):
    """Attention with a cache, whose function is called as `call(q, k, v, mask)`."""

    def __init__(self, call, groups=HEADS):
        super().__init__()
        self.call = call
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // HEADS * groups) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x, mask=None, past=None):
        q, k, v = (
            f(self.norm(x)).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = x + self.o(self.call(q, k, v, mask).transpose(1, 2).flatten(2))
        return y if past is None else (y, k, v)


class Cross(Layer):
    """Causal attention, and a second one to the tokens of another length."""

    def forward(self, x, memory, mask):
        y = super().forward(x)
        q, k = (t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for t in (y, memory))
        return F.scaled_dot_product_attention(q, k, k.tanh(), attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)


def causal(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def repeated(q, k, v, mask):
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


def grouped(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)


def added(q, k, v, mask):
    mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0)


def random(*shape):
    return torch.randn(shape)


def steps(batch, length, past):
    """The mask of a chunk behind a cache; the first query of the first row attends to nothing."""
    mask = torch.ones(batch, length, past + length, dtype=torch.bool).tril(past)
    mask[0, 0] = False
    cache = tuple(random(batch, 2, past, WIDTH // HEADS) for _ in range(2))
    return {"x": random(batch, length, WIDTH), "mask": mask, "past": cache}


def padded(batch, length, other):
    """A mask of keys, of which the last row has one."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, 1:] = False
    return {"x": random(batch, length, WIDTH), "mask": mask}


def crossed(batch, length, other):
    mask = padded(batch, other, 0)["mask"]
    return {"x": random(batch, length, WIDTH), "memory": random(batch, other, WIDTH), "mask": mask}


def tokens(batch, length, other):
    return {"x": random(batch, length, WIDTH)}


def slow_attention():
    """`nn.MultiheadAttention` where its fast path is not taken."""
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    layer = Layer(None)
    layer.attention = attention
    layer.forward = lambda x: attention(x, x, x, need_weights=False)[0]
    return layer


MODELS = {
    "causal": (lambda: Layer(causal), tokens, 1),
    "repeated keys": (lambda: Layer(repeated, 2), steps, 1),
    "grouped keys": (lambda: Layer(grouped, 2), steps, 1),
    "added mask": (lambda: Layer(added), padded, 1),
    "two calls": (lambda: Cross(causal), crossed, 2),
    "multi-head attention": (slow_attention, tokens, 1),
}


def named(feeds):
    """The tensors in the order of the inputs of a file."""
    return [t.numpy() for value in feeds.values() for t in (value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize("name", MODELS)
def test_the_file_computes_what_the_model_does(name, tmp_path):
    make, feeds, count = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    targets = ["standard", "ort", "primitives"]
    results = export_model(model, tmp_path / "out", target=targets, inputs=feeds(2, 7, 5))
    for target, result in zip(targets, results, strict=True):
        assert ["node" in row for row in result.manifest["attention"]] == [True] * count
        path = tmp_path / "out" / target / "model.onnx"
        nodes = [node.op_type for node in onnx.load(path).graph.node]
        assert nodes.count("Attention") == (count if target == "ort" else 0)
        session = onnxruntime.InferenceSession(path)
        for sizes in ((2, 7, 5), (1, 1, 4), (3, 4, 9), (2, 6, 6)):
            given = feeds(*sizes)
            with torch.no_grad():
                wanted = model(**given)
            inputs = [value.name for value in session.get_inputs()]
            got = session.run(None, dict(zip(inputs, named(given), strict=True)))
            for one, other in zip(got, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
                np.testing.assert_allclose(one, other.numpy(), atol=3e-6)


class Lengths(nn.Module):
    """A causal attention of queries and keys of unequal length, aligned at the first key."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x, y):
        q, k = (self.norm(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (x, y))
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)


def test_a_causal_attention_of_unequal_lengths_has_a_mask(tmp_path):
    inputs = {"x": random(2, 7, WIDTH), "y": random(2, 5, WIDTH)}
    result = export_model(Lengths(), tmp_path / "out", target="ort", inputs=inputs)
    assert [row["spec"] for row in result.manifest["attention"]] == [{"scale": 8**-0.5}]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for length, keys in ((1, 4), (4, 9), (6, 6), (9, 2)):
        x, y = random(2, length, WIDTH), random(2, keys, WIDTH)
        got = session.run(None, {"x": x.numpy(), "y": y.numpy()})[0]
        np.testing.assert_allclose(got, Lengths()(x, y).detach().numpy(), atol=3e-6)


@pytest.mark.parametrize("target", ["ort", "primitives"])
def test_such_attentions_are_judged_alone(target, tmp_path):
    torch.manual_seed(0)
    model = Layer(causal).eval()
    export_model(model, tmp_path / "out", target=target, inputs=tokens(2, 7, 0))
    report = validate(tmp_path / "out", model)
    assert [(one.key, one.computes, one.passed) for one in report.attentions] == [
        (("", 0), "scale 0.353553, causal", True)
    ]
    assert report.verdict == "pass"


def test_what_stays_decomposed_is_named_in_the_manifest(tmp_path):
    def dropped(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9)

    result = export_model(Layer(dropped), tmp_path / "out", target="ort", inputs=tokens(2, 7, 0))
    (row,) = result.manifest["attention"]
    assert row["class"] == "Layer"
    assert row["reason"].startswith("it calls scaled_dot_product_attention with dropout_p 1e-09; expected 0")
    whole = export_model(Layer(causal), tmp_path / "a", target="ort", inputs=tokens(2, 7, 0), attention="decomposed")
    assert whole.manifest["attention"] == []


class OverBlocks(nn.Module):
    """Each token attends to two states of its own, so that the second dim, which is that of heads, is the length."""

    def __init__(self):
        super().__init__()
        self.query, self.norm = nn.Parameter(torch.randn(WIDTH)), nn.RMSNorm(WIDTH)

    def forward(self, x):
        states = self.norm(torch.stack([x, 2 * x.roll(1, -1)], -2))
        query = self.query.view(1, 1, 1, WIDTH).expand(*states.shape[:2], 1, WIDTH)
        return F.scaled_dot_product_attention(query, states, states).squeeze(2)


def test_heads_that_vary_with_the_length_leave_the_length_dynamic(tmp_path):
    torch.manual_seed(0)
    model = OverBlocks().eval()
    export_model(model, tmp_path / "out", target="ort", inputs={"x": random(2, 5, WIDTH)})
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    x = random(3, 7, WIDTH)
    (got,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, model(x).detach().numpy(), atol=1e-5)
    (row,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["attention"]
    assert row["reason"] == "under torch.export, the number or the size of its heads varies with the inputs"
