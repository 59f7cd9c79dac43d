"""The quantized operators on the CPU: values, fake tensors, compilation, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.errors import RmsnormDeployError, UsageError
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins.torch.operators import add_rms_norm, form_of, rms_norm
from rmsnorm_deploy.plugins.torch.quantize import quantize
from rmsnorm_deploy.plugins.torch.quantized_operators import add_rms_norm_quantized, rms_norm_quantized

HALF, BRAIN, FLOAT, E4M3 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
QUANTIZED = (torch.int8, E4M3)
SCALE = torch.tensor([0.02])
FORMS: list[dict[str, Any]] = [
    {},
    {"order": "cast_then_scale", "scale_offset": 1.0, "offset_in_float32": False},
    {"root": "sqrt"},
    {"root": "reciprocal", "statistics": "promoted"},
]


def tensors(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found.view(torch.int8), wanted.view(torch.int8))


@pytest.mark.parametrize("scale", [None, SCALE], ids=["per row", "static"])
@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, HALF, BRAIN], ids=str)
def test_results_are_those_of_the_norm_quantized(
    dtype: torch.dtype, quantized: torch.dtype, scale: Tensor | None
) -> None:
    x, weight, residual = (tensors(dtype, *shape, seed=i) for i, shape in enumerate([(3, 5, 40), (40,), (3, 5, 40)]))
    for form in FORMS:
        y, used = rms_norm_quantized(x, weight, 1e-5, scale, dtype=quantized, **form)
        wanted, expected = quantize(rms_norm(x, weight, 1e-5, **form), quantized, scale)
        assert_equal(y, wanted)
        assert used is scale or used.shape == (3, 5, 1)
        assert torch.equal(used, expected)
        y, used, total = add_rms_norm_quantized(x, residual, weight, 1e-5, scale, dtype=quantized, **form)
        z, added = add_rms_norm(x, residual, weight, 1e-5, **form)
        wanted, expected = quantize(z, quantized, scale)
        assert_equal(y, wanted)
        assert torch.equal(used, expected)
        assert torch.equal(total, added)


@pytest.mark.parametrize("scale", [None, torch.tensor(0.02)], ids=["per row", "static"])
@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BRAIN], ids=str)
def test_results_are_within_half_a_step_of_float64(
    dtype: torch.dtype, quantized: torch.dtype, scale: Tensor | None
) -> None:
    """Half a step of the quantized dtype, and the rounding of y to its own dtype before."""
    x, weight = tensors(dtype, 9, 256) * torch.logspace(-2, 2, 9)[:, None].to(dtype), tensors(dtype, 256, seed=1)
    x[3] = 0.0
    q, used = rms_norm_quantized(x, weight, 1e-5, scale, dtype=quantized)
    y = reference(NormSpec(1e-5), x.double().numpy(), weight.double().numpy())
    largest, eps = 127.0 if quantized == torch.int8 else 448.0, torch.finfo(dtype).eps
    by = used.double().numpy()
    if scale is None:
        wanted = np.abs(y).max(-1, keepdims=True) / largest
        wanted[3] = 1.0
        np.testing.assert_allclose(by, wanted, rtol=2 * eps)
    clipped = np.clip(y / by, -largest, largest)
    assert (np.abs(y / by) > largest + 1).any() == (scale is not None and quantized == torch.int8)
    with np.errstate(divide="ignore"):
        e4m3_step = np.exp2(np.maximum(np.floor(np.log2(np.abs(clipped))), -6.0) - 3)
    step = 1.0 if quantized == torch.int8 else e4m3_step
    found = np.clip(q.double().numpy(), -largest, largest)
    assert np.all(np.abs(found - clipped) <= 0.5 * step + 2 * eps * np.abs(clipped))
    assert np.abs(found - clipped).mean() > 1e-3  # the bound is that of a rounding which happened
    assert not found[3].any()


@pytest.mark.parametrize("scale", [None, SCALE], ids=["per row", "static"])
@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
def test_dtypes_and_strides_are_those_that_the_compiler_is_told(quantized: torch.dtype, scale: Tensor | None) -> None:
    """`opcheck` compares schema, fake tensors and the traced graph with what the operator does."""
    x, weight = tensors(BRAIN, 2, 6, 16).transpose(0, 1), tensors(BRAIN, 16, seed=1)
    residual, library = tensors(FLOAT, 6, 2, 16, seed=2), torch.ops.rmsnorm_deploy
    overload, form = ("default", {}) if scale is None else ("static", {"root": "sqrt"})
    rest = (weight, 1e-6) if scale is None else (weight, 1e-6, scale)
    for name, given in (("rms_norm_quantized", (x,)), ("add_rms_norm_quantized", (x, residual))):
        operator = getattr(getattr(library, name), overload)
        torch.library.opcheck(operator, (*given, *rest), {"dtype": quantized, **form})


@pytest.mark.parametrize("scale", [None, SCALE], ids=["per row", "static"])
def test_a_call_compiles_to_one_node(scale: Tensor | None) -> None:
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        nodes.extend(str(node.target) for node in graph.graph.nodes if "rmsnorm_deploy" in str(node.target))
        return graph

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, used, total = add_rms_norm_quantized(x, x, weight, 1e-5, scale, dtype=E4M3, **form_of(NormSpec(1e-5)))
        return y, used, total

    weight = tensors(HALF, 24, seed=1)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 7):
        x = tensors(HALF, rows, 24, seed=rows)
        for found, wanted in zip(compiled(x, weight), function(x, weight), strict=True):
            assert_equal(found, wanted)
    assert nodes == [f"rmsnorm_deploy.add_rms_norm_quantized.{'default' if scale is None else 'static'}"]


def test_a_gradient_is_refused_where_one_is_required() -> None:
    x, weight = tensors(FLOAT, 2, 8), torch.ones(8, requires_grad=True)
    for call in (
        lambda: rms_norm_quantized(x, weight),
        lambda: rms_norm_quantized(x, weight, scale=SCALE),
        lambda: add_rms_norm_quantized(x, x, weight),
        lambda: rms_norm_quantized(x, scale=torch.ones(1, requires_grad=True)),
    ):
        with pytest.raises(RmsnormDeployError, match=r"for inference and has no gradient.*torch\.no_grad\(\)"):
            call()
        with torch.no_grad():
            call()


def test_autocast_changes_nothing() -> None:
    x = tensors(FLOAT, 3, 16)
    wanted, expected = rms_norm_quantized(x)
    with torch.autocast("cpu", dtype=BRAIN):
        y, scale = rms_norm_quantized(x)
    assert torch.equal(y, wanted)
    assert torch.equal(scale, expected)


X = torch.ones(2, 8)


@pytest.mark.parametrize(("form", "message"), [
    ({"dtype": torch.uint8}, r"dtype: expected torch\.int8 or torch\.float8_e4m3fn, got torch\.uint8"),
    ({"dtype": "int8"}, r"dtype: expected torch\.int8 or torch\.float8_e4m3fn, got 'int8'"),
    ({"scale": torch.ones(2, 1)}, r"scale: expected one float32 element, got \[2, 1\] float32"),
    ({"scale": torch.ones(1, dtype=HALF)}, r"scale: expected one float32 element, got \[1\] float16"),
    ({"scale": torch.ones(1, device="meta")}, "scale: expected a tensor on x's device, cpu, got one on meta"),
    ({"group_size": 4}, "group_size: expected none, as quantized norms have no groups and no gate, got 4"),
    ({"gate": X}, "gate: expected none, as quantized norms have no groups and no gate, got a tensor"),
    ({"gate_place": "after"}, "gate_place: expected none, as quantized norms have no groups and no gate, got after"),
    ({"scale_offset": 1.0}, "scale_offset: expected 0 for a norm without a weight"),
    ({"order": "later"}, "later"),
    ({"weight": torch.ones(4)}, r"weight: expected a floating tensor of shape \[8\], got \[4\] float32"),
])  # fmt: skip
def test_wrong_arguments_are_refused(form: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rms_norm_quantized(X, **form)
    with pytest.raises(UsageError, match=message):
        add_rms_norm_quantized(X, X, **form)


def test_rows_without_elements_are_refused() -> None:
    with pytest.raises(UsageError, match=r"x: expected at least one element a row to quantize, got \[2, 0\] float32"):
        rms_norm_quantized(torch.ones(2, 0))


def test_no_rows_have_no_scales() -> None:
    y, scale = rms_norm_quantized(torch.ones(0, 8))
    assert (y.shape, scale.shape) == ((0, 8), (0, 1))
