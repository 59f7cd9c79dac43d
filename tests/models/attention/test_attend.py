"""`attend` computes the formula of `AttentionSpec`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rmsnorm_deploy.models.attention.attend import attend
from rmsnorm_deploy.models.attention.spec import AttentionSpec

CASES = list(itertools.product((None, 2.5), (False, True), (False, True), (False, True)))


def by_hand(spec, q, k, v, bias, sink):
    """The formula, head by head and query by query, in NumPy."""
    q, k, v, bias, sink = (None if t is None else t.double().numpy() for t in (q, k, v, bias, sink))
    batch, heads, length, _ = q.shape
    y = np.zeros((batch, length, heads, v.shape[-1]))
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        own = h // (heads // k.shape[1])
        scores = np.array([spec.scale * float(q[b, h, i] @ key) for key in k[b, own]])
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        if bias is not None:
            scores = scores + np.broadcast_to(bias, (batch, heads, length, k.shape[2]))[b, h, i]
        if spec.causal:
            scores = np.where(np.arange(k.shape[2]) > i, -np.inf, scores)
        columns = scores if sink is None else np.append(scores, sink[h])
        weights = np.exp(columns - columns.max())
        y[b, i, h] = (weights / weights.sum())[: k.shape[2]] @ v[b, own]
    return y


@pytest.mark.parametrize(("softcap", "causal", "biased", "sinks"), CASES)
def test_the_formula_of_the_spec(softcap, causal, biased, sinks):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 3)
    bias = torch.randn(2, 1, 5, 7) if biased else None
    sink = torch.randn(6) if sinks else None
    spec = AttentionSpec(0.3, softcap, causal, sinks)
    got = attend(spec, q, k, v, bias, sink)
    assert got.shape == (2, 5, 6, 3)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), by_hand(spec, q, k, v, bias, sink), rtol=2e-5, atol=2e-6)
    wide = attend(spec, q, k, v, bias, sink, wide=torch.float64)
    np.testing.assert_allclose(wide.numpy(), by_hand(spec, q, k, v, bias, sink), rtol=1e-12, atol=1e-13)


def test_a_row_that_attends_to_nothing_is_finite():
    q = torch.randn(1, 1, 1, 4)
    bias = torch.full((1, 1, 1, 3), torch.finfo(torch.float32).min)
    got = attend(AttentionSpec(0.5), q, torch.randn(1, 1, 3, 4), torch.ones(1, 1, 3, 4), bias)
    assert torch.equal(got, torch.ones(1, 1, 1, 4))


def test_half_types_are_computed_in_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8).half() for _ in range(3))
    spec = AttentionSpec(0.35)
    wanted = attend(spec, q, k, v, wide=torch.float64)
    got = attend(spec, q, k, v)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spec", [AttentionSpec(0.125), AttentionSpec(1.0, 50.0, True, True)], ids=str)
def test_json_and_back(spec):
    assert AttentionSpec.from_json(spec.to_json()) == spec


def test_description():
    assert AttentionSpec(0.125).describe() == "scale 0.125"
    assert AttentionSpec(0.0625, 50.0, True, True).describe() == "scale 0.0625, softcap 50, causal, sinks"
