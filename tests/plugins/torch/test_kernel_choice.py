"""A kernel is chosen only where its formula, rounding for rounding, is that of the spec; and where rows begin."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.spec import NormSpec, Order
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.plugins.torch.kernel_choice import CASTS_FIRST, RowStrides, alignment, kernel_for, spec_problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SCALES: list[dict[str, Any]] = [
    {"scale": "none"}, {"scale": "weight"}, {"scale": "one_plus_weight"},
    {"scale": "one_plus_weight", "offset_in_float32": False},
]  # fmt: skip
GATES: list[dict[str, Any]] = [
    {}, {"gate": "before", "activation": "silu", "group_size": 16}, {"gate": "after", "activation": "silu"},
    {"gate": "after", "activation": "sigmoid", "group_size": 64},
]  # fmt: skip
ACTIVATIONS = {"silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid}
WIDTH = 64


def formula(kernel: NormKernel, x: Tensor, weight: Tensor | None, gate: Tensor | None) -> Tensor:
    """What the kernel's own description says (`cuda/rms_norm.cuh`), with PyTorch's sum of squares."""
    activated = None if gate is None else ACTIVATIONS[kernel.activation](gate.float())

    def rounded(value: Tensor) -> Tensor:
        return value.to(getattr(torch, kernel.y_dtype)).float() if kernel.cast_first else value

    h = x.float() if activated is None or kernel.gate == "after" else x.float() * activated
    h = h.unflatten(-1, (kernel.weight_rows, kernel.width))
    n = rounded((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + kernel.epsilon)).flatten(-2))
    if weight is not None:
        n = rounded(n * rounded(weight.float() + (1.0 if kernel.scale == "one_plus_weight" else 0.0)))
    if activated is not None and kernel.gate == "after":
        n = n * activated
    return n.to(getattr(torch, kernel.y_dtype))


@pytest.mark.parametrize("order", [order for order, first in CASTS_FIRST.items() if first is not None])
def test_the_kernel_rounds_where_the_spec_does(order: Order) -> None:
    generator, lacking = torch.Generator().manual_seed(0), set()
    for form, gated, dtype, weight_dtype in itertools.product(SCALES, GATES, DTYPES, DTYPES):
        spec = NormSpec(1e-5, order=order, **form, **gated)
        x = torch.randn(200, WIDTH, generator=generator).to(dtype)
        weight = torch.randn(WIDTH, generator=generator).to(weight_dtype) if spec.has_weight else None
        gate = torch.randn(200, WIDTH, generator=generator).to(dtype) if gated else None
        kernel = kernel_for(
            spec, WIDTH, dtype, None if weight is None else weight_dtype, None, dtype if gated else None
        )
        if kernel is None:
            lacking.add((spec.scale, spec.offset_in_float32, dtype, weight_dtype))
            continue
        wanted = eager(spec, x, weight, gate=gate)
        assert torch.equal(formula(kernel, x, weight, gate), wanted), (spec, dtype, weight_dtype)
    # Refused are float64, a weight of another dtype after the cast, and 1 + weight rounded where the kernel does not.
    half = (torch.float16, torch.bfloat16)
    usual = {("weight", True, dtype, dtype) for dtype in (*half, torch.float32)}
    usual |= {("one_plus_weight", order == "scale_then_cast", dtype, dtype) for dtype in half}
    assert not usual & lacking
    assert not [row for row in lacking if row[0] == "none" and row[2] != torch.float64]


def test_every_order_is_known() -> None:
    assert set(CASTS_FIRST) == set(get_args(Order))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"order": "cast_factor"}, "order cast_factor"), ({"order": "no_upcast", "statistics": "input"}, "order no_upcast"),
    ({"trailing_dims": 2}, "last 2 dims"), ({"reduction": "sum"}, "sum of squares"), ({"bias": True}, "bias"),
])  # fmt: skip
def test_what_the_operators_lack_has_a_reason(changes: dict[str, Any], reason: str) -> None:
    spec = NormSpec(1e-5)
    assert spec_problem(spec) is None
    assert spec_problem(spec.replace(group_size=8, gate="before", activation="sigmoid")) is None
    assert reason in str(spec_problem(spec.replace(**changes)))


BASE = torch.zeros(4, 6, 10, 32)


@pytest.mark.parametrize(("view", "rows"), [
    (lambda x: x, RowStrides(1, 32, 0)), (lambda x: x[..., :16], RowStrides(1, 32, 0)),
    (lambda x: x[0, 0, 0], RowStrides(1, 32, 0)), (lambda x: x[:, :, :4], RowStrides(4, 320, 32)),
    (lambda x: x[:, :, 3:4], RowStrides(1, 320, 0)), (lambda x: x[:, 2, 3], RowStrides(1, 1920, 0)),
    (lambda x: x[0, :1].expand(5, 10, 32), None), (lambda x: x[0, 0, :1].expand(5, 32), RowStrides(1, 0, 0)),
    (lambda x: x[:, 1:], None), (lambda x: x[0, :, 1:], None), (lambda x: x.transpose(1, 2), None),
    (lambda x: x.transpose(2, 3), None), (lambda x: x[..., ::2], None),
], ids=range(13))  # fmt: skip
def test_rows_begin_where_the_strides_say(view: Any, rows: RowStrides | None) -> None:
    x = view(BASE)
    found = RowStrides.of(x)
    assert found == rows
    if rows is None or x.ndim == 1:
        return
    for strides in (rows, rows.with_heads(2)) if rows.heads == 1 else (rows,):
        for number, index in enumerate(itertools.product(*map(range, x.shape[:-1]))):
            begin = number // strides.heads * strides.outer + number % strides.heads * strides.inner
            assert begin == sum(map(int.__mul__, index, x.stride()[:-1]))


def test_the_alignment_is_that_of_the_least_aligned_row() -> None:
    x, weight = torch.zeros(4, 64, dtype=torch.float16), torch.zeros(65)
    assert x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    rows = RowStrides(1, 64, 0)
    assert alignment([(x, rows)], None) == alignment([(x, rows)], weight[:64]) == 16
    assert alignment([(x, rows)], weight[1:]) == 2  # 4 bytes of the weight are one element, as are 2 bytes of x
    assert alignment([(x[:, 2:], rows)], None) == 4
    assert alignment([(x, RowStrides(2, 36, 30))], None) == 4
