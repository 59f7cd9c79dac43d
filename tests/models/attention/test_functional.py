"""Calls of torch's own attention function are seen where a module of the model makes them, and put back afterwards."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rmsnorm_deploy.models.attention.find_attention import find_attention
from rmsnorm_deploy.models.attention.functional import functional_calls
from rmsnorm_deploy.models.attention.intercept import intercepted
from rmsnorm_deploy.models.attention.spec import AttentionSpec
from tests.helpers.models.families import build

ORIGINAL = [F.scaled_dot_product_attention]  # in a list, where it is not replaced
HEAD = 8**-0.5


class Calls(nn.Module):
    """A module that calls a function with heads `[B, 4, S, 8]` of x `[B, S, 32]`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        q, k = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (x, y))
        return self.function(q, k)


def found_in(function, keys=5):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("inner", Calls(function))
    x, y = torch.randn(2, 6, 32), torch.randn(2, keys, 32)
    return find_attention(model, lambda: model.inner(x, y))


MASK = torch.tensor([True, False, True, True, False])
SPECS = {
    "plain": (lambda q, k: F.scaled_dot_product_attention(q, k, k), HEAD),
    "imported": (lambda q, k: scaled_dot_product_attention(q, k, k), HEAD),
    "scale": (lambda q, k: F.scaled_dot_product_attention(q, k, k, scale=0.25), 0.25),
    "causal": (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), HEAD),
    "bool mask": (lambda q, k: F.scaled_dot_product_attention(q, k, k, MASK[None]), HEAD),
    "float mask": (lambda q, k: F.scaled_dot_product_attention(q, k, k, torch.where(MASK, 0, -math.inf)[None]), HEAD),
    "mask of 3 dims": (lambda q, k: F.scaled_dot_product_attention(q, k, k, torch.randn(4, 6, 5)), HEAD),
    "no key": (lambda q, k: F.scaled_dot_product_attention(q, k, k, torch.zeros(1, 1, 6, 5, dtype=torch.bool)), HEAD),
    "shared keys": (lambda q, k: F.scaled_dot_product_attention(q, k[:, :2], k[:, :2], enable_gqa=True), HEAD),
    "one key": (lambda q, k: F.scaled_dot_product_attention(q, k[:, :1], k[:, :1]), HEAD),
    "two": (lambda q, k: F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, k), k, k), HEAD),
}


@pytest.mark.parametrize("name", SPECS)
def test_what_a_call_computes(name):
    function, scale = SPECS[name]
    found = found_in(function)
    assert found.refusals == []
    assert [(site.path, site.class_name, site.spec) for site in found.sites] == [
        ("inner", "Calls", AttentionSpec(scale))
    ]


def autocast(q, k):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, k)


def mapped(q, k):
    return torch.vmap(lambda q, k: F.scaled_dot_product_attention(q[None], k[None], k[None])[0])(q, k)


REFUSED = {
    "dropout": (lambda q, k: F.scaled_dot_product_attention(q, k, k, dropout_p=0.5), "with dropout_p 0.5; expected 0"),
    "3 dims": (lambda q, k: F.scaled_dot_product_attention(q[:, 0], k[:, 0], k[:, 0]), "got [3, 3, 3] dims"),
    "2 dims": (lambda q, k: F.scaled_dot_product_attention(q[0, 0], k[0, 0], k[0, 0]), "got [2, 2, 2] dims"),
    "scale": (lambda q, k: F.scaled_dot_product_attention(q, k, k, scale=-1.0), "its scale is -1.0; expected a pos"),
    "mask": (lambda q, k: F.scaled_dot_product_attention(q, k, k, MASK[None], is_causal=True), "mask and is_causal"),
    "batch": (lambda q, k: F.scaled_dot_product_attention(q, k[:1], k[:1]), "unequal batches"),
    "dtype": (autocast, "expected a result in float32, got bfloat16"),
    "vmap": (mapped, "mapped by torch.vmap"),
    "scales": (
        lambda q, k: F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, k), k, k, scale=0.5),
        "its calls differ: scale 0.353553, and scale 0.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_calls_are_refused_with_the_reason(name):
    function, reason = REFUSED[name]
    found = found_in(function)
    assert found.sites == []
    assert [refusal.path for refusal in found.refusals] == ["inner"]
    assert reason in found.refusals[0].reason


def test_results_and_errors_are_those_of_the_function():
    q = torch.randn(2, 4, 6, 8)
    seen = []

    def call(*given, **named):
        return Calls(lambda *_: F.scaled_dot_product_attention(*given, **named))

    def run(*given, **named):
        model = call(*given, **named)
        with functional_calls(model, lambda call: seen.append(call) or call.original()):
            return model(torch.zeros(1, 1, 32), torch.zeros(1, 1, 32))

    got, wanted = run(q, q, q, is_causal=True), ORIGINAL[0](q, q, q, is_causal=True)
    assert torch.equal(got, wanted)
    assert got.stride() == wanted.stride()
    assert len(seen) == 1
    with pytest.raises(TypeError, match="missing 1 required"):
        run(q, q)
    assert len(seen) == 1


def test_the_function_is_restored_after_an_error():
    here = vars(sys.modules[__name__])

    def stopped():
        with intercepted(nn.Linear(1, 1), lambda call: call.original()):
            assert F.scaled_dot_product_attention is not ORIGINAL[0]
            assert here["scaled_dot_product_attention"] is F.scaled_dot_product_attention
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert F.scaled_dot_product_attention is ORIGINAL[0]
    assert scaled_dot_product_attention is ORIGINAL[0]


def test_calls_inside_the_functions_of_the_registry_and_outside_of_modules_are_not_seen():
    model, seen = build("llama").eval(), []
    model.set_attn_implementation("sdpa")
    q = torch.randn(1, 2, 3, 8)
    with torch.no_grad(), intercepted(model, lambda call: seen.append(call.implementation) or call.original()):
        model(torch.tensor([[1, 2, 3]]))
        F.scaled_dot_product_attention(q, q, q)
    assert seen == ["sdpa", "sdpa"]


def test_multi_head_attention_computes_what_it_does():
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 5, 32)
    with torch.no_grad():
        wanted = model(x, x, x, need_weights=False)[0]
        with intercepted(model, lambda call: call.original()):
            assert torch.equal(model(x, x, x, need_weights=False)[0], wanted)
