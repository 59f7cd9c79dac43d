"""The operators on the CPU: bits, fake tensors, compilation, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.errors import RmsnormDeployError, UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins.torch.operators import add_rms_norm, form_of, rms_norm

HALF, BRAIN = torch.float16, torch.bfloat16
FORMS: list[dict[str, Any]] = [
    {},
    {"order": "cast_then_scale"},
    {"scale_offset": 1.0},
    {"order": "cast_then_scale", "scale_offset": 1.0, "offset_in_float32": False},
    {"root": "sqrt"},
    {"root": "reciprocal", "statistics": "promoted"},
]


def tensors(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spec_of(form: dict[str, Any], eps: float = 1e-5) -> NormSpec:
    others = {name: value for name, value in form.items() if name != "scale_offset"}
    return NormSpec(eps, scale="one_plus_weight" if form.get("scale_offset") else "weight", **others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, HALF, BRAIN])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_has_the_bits_of_eager(form: dict[str, Any], dtype: torch.dtype) -> None:
    x, weight, spec = tensors(dtype, 3, 5, 40), tensors(dtype, 40, seed=1), spec_of(form)
    assert torch.equal(rms_norm(x, weight, 1e-5, **form), eager(spec, x, weight))
    assert torch.equal(rms_norm(x, weight, 1e-5, **form_of(spec)), eager(spec, x, weight))
    residual = tensors(dtype, 3, 5, 40, seed=2)
    y, total = add_rms_norm(x, residual, weight, 1e-5, **form)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, eager(spec, x + residual, weight))


GATED: list[dict[str, Any]] = [
    {"gate_place": "after", "activation": "silu", "order": "cast_then_scale"},
    {"gate_place": "before", "activation": "sigmoid", "group_size": 8},
    {"gate_place": "before", "activation": "silu", "group_size": 20, "order": "cast_then_scale", "scale_offset": 1.0},
]


@pytest.mark.parametrize("dtypes", [(torch.float64, HALF), (HALF, HALF), (BRAIN, torch.float32)], ids=str)
@pytest.mark.parametrize("form", GATED, ids=str)
def test_every_gated_form_has_the_bits_of_eager(form: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight, gate = tensors(dtypes[0], 3, 5, 40), tensors(dtypes[1], 40, seed=1), tensors(dtypes[1], 3, 5, 40, seed=2)
    named = {"gate" if name == "gate_place" else name: value for name, value in form.items()}
    spec = spec_of(named)
    wanted = eager(spec, x, weight, gate=gate)
    assert torch.equal(rms_norm(x, weight, 1e-5, gate, **form), wanted)
    assert torch.equal(rms_norm(x, weight, 1e-5, gate=gate, **form_of(spec)), wanted)
    torch.library.opcheck(torch.ops.rmsnorm_deploy.rms_norm.default, (x, weight, 1e-5, gate), form)


def test_the_sum_may_be_normalized_in_groups() -> None:
    x, residual, weight = (tensors(HALF, *shape, seed=i) for i, shape in enumerate([(5, 24), (5, 24), (24,)]))
    y, total = add_rms_norm(x, residual, weight, group_size=8)
    assert torch.equal(y, eager(NormSpec(1e-6, group_size=8), total, weight))


def test_a_norm_without_a_weight_scales_nothing() -> None:
    x = tensors(BRAIN, 4, 24)
    assert torch.equal(rms_norm(x), eager(NormSpec(1e-6, scale="none"), x))


@pytest.mark.parametrize("view", [lambda x: x.transpose(0, 1), lambda x: x[:, :, :16], lambda x: x.expand(3, 2, 5, 24)])
def test_results_are_contiguous(view: Any) -> None:
    x = view(tensors(torch.float32, 2, 5, 24))
    assert torch.equal(rms_norm(x), eager(NormSpec(1e-6, scale="none"), x))
    y, total = add_rms_norm(x, x)
    assert all(tensor.is_contiguous() for tensor in (rms_norm(x), y, total))


@pytest.mark.parametrize("dtypes", [(BRAIN, BRAIN), (BRAIN, torch.float32), (torch.float32, HALF)])
def test_dtypes_and_strides_are_those_that_the_compiler_is_told(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """`opcheck` compares schema, fake tensors and the traced graph with what the operator does."""
    x, weight = tensors(dtypes[0], 2, 6, 16).transpose(0, 1), tensors(dtypes[1], 16, seed=1)
    for form in FORMS[:2]:
        torch.library.opcheck(torch.ops.rmsnorm_deploy.rms_norm.default, (x, weight, 1e-6), form)
        residual = tensors(dtypes[1], 6, 2, 16, seed=2)
        torch.library.opcheck(torch.ops.rmsnorm_deploy.add_rms_norm.default, (x, residual, weight, 1e-6), form)


def test_a_gradient_is_refused_where_one_is_required() -> None:
    x, weight = tensors(torch.float32, 2, 8), torch.ones(8, requires_grad=True)
    for call in (lambda: rms_norm(x, weight), lambda: add_rms_norm(x, x, weight)):
        with pytest.raises(RmsnormDeployError, match=r"for inference and has no gradient.*torch\.no_grad\(\)"):
            call()
        with torch.no_grad():
            call()
        with torch.inference_mode():
            call()
    assert torch.equal(rms_norm(x, weight.detach()), eager(NormSpec(1e-6), x, weight.detach()))


def test_autocast_changes_nothing() -> None:
    x, weight = tensors(HALF, 3, 16), tensors(torch.float32, 16, seed=1)
    wanted = rms_norm(x, weight, order="cast_then_scale")
    with torch.autocast("cpu", dtype=BRAIN):
        found = rms_norm(x, weight, order="cast_then_scale")
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


X = torch.ones(2, 8)


@pytest.mark.parametrize(("arguments", "form", "message"), [
    ((torch.tensor(1.0),), {}, r"x: expected a floating tensor of at least one dim, got \[\] float32"),
    ((torch.ones(2, 8, dtype=torch.int64),), {}, r"x: expected a floating tensor .* got \[2, 8\] int64"),
    ((X, torch.ones(4)), {}, r"weight: expected a floating tensor of shape \[8\], got \[4\] float32"),
    ((X, torch.ones(1, 8)), {}, r"weight: expected .* got \[1, 8\]"),
    ((X, torch.ones(8, device="meta")), {}, "weight: expected a tensor on x's device, cpu, got one on meta"),
    ((X, None, -1.0), {}, r"eps is -1\.0"),
    ((X,), {"scale_offset": 1.0}, "scale_offset: expected 0 for a norm without a weight"),
    ((X, torch.ones(8)), {"scale_offset": 0.5}, r"scale_offset: expected 0 or 1, got 0\.5"),
    ((X,), {"order": "no_upcast", "statistics": "input"}, "order: expected scale_then_cast or cast_then_scale, got"),
    ((X,), {"order": "later"}, "later"),
    ((X,), {"group_size": 3}, "group_size: expected a divisor of x's last dim, 8, got 3"),
    ((X,), {"group_size": 0}, "group_size must be at least 1"),
    ((X, None, 1e-6, torch.ones(8)), {"gate_place": "after", "activation": "silu"}, r"gate: expected .* got \[8\]"),
    ((X, None, 1e-6, X), {}, "gate_place: expected before or after for a norm with a gate, got none"),
    ((X, None, 1e-6, X), {"gate_place": "after"}, "activation: expected silu or sigmoid for a norm with a gate, got"),
    ((X,), {"gate_place": "after"}, "gate_place: expected none for a norm without a gate, got after"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], form: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rms_norm(*arguments, **form)


def test_a_residual_has_the_shape_of_x() -> None:
    with pytest.raises(UsageError, match=r"residual: expected a floating tensor like x, \[2, 8\] float32, got \[8\]"):
        add_rms_norm(X, torch.ones(8))
