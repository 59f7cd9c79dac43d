"""Every norm in every target and dtype, written by `lower` and run in ONNX Runtime, against the module and the truth.

The graphs are made by hand, so no exporter is needed. x is always a graph input: ONNX Runtime emulates a float16 Add in
float32 on the CPU and may then cancel the casts around it, which would hide what the norm itself does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.models.reference import reference
from tests.helpers.graphs.capture_graph import DATA_TYPES, PATH, GraphMaker, errors, norm_model, run
from tests.helpers.graphs.evaluator import as_numpy, count_differing, evaluate
from tests.helpers.norms.norm_cases import (
    BFLOAT16,
    CASES,
    FLOAT16,
    FLOAT32,
    FLOAT32_ULP,
    Case,
    case,
    float32_bound,
    main_node,
)
from tests.helpers.norms.norm_zoo import ZOO


@pytest.mark.parametrize(("name", "target"), CASES)
def test_float32_is_a_few_ulp_from_the_reference_and_from_the_module(name: str, target: str) -> None:
    it = case(name, torch.float32)
    result, site = it.run(target)
    own, expected = it.own(), it.expected()
    assert (result.dtype, result.shape) == (own.dtype, own.shape)
    bound = float32_bound(it.spec)
    assert errors(result, expected, torch.float32).max() <= bound
    assert errors(result, own.astype(np.float64), torch.float32).max() <= bound + FLOAT32_ULP
    assert site.deviations == []
    assert (site.path, site.spec, site.form, site.dtype) == (PATH, it.spec, "plain", "float32")


@pytest.mark.parametrize(("name", "target"), CASES)
def test_float16_is_no_further_from_the_reference_than_the_module(name: str, target: str) -> None:
    it = case(name, torch.float16)
    result, site = it.run(target)
    own, expected = it.own(), it.expected()
    assert (result.dtype, result.shape) == (own.dtype, own.shape)
    declared = max((d.ulp or 0.0 for d in site.deviations), default=0.0)
    # A float32 step that ends on the other side of a float16 rounding moves the largest error by a hundredth.
    assert errors(result, expected, torch.float16).max() <= errors(own, expected, torch.float16).max() + declared + 0.01
    for deviation in site.deviations:
        if deviation.ulp is not None:
            assert errors(result, own.astype(np.float64), torch.float16).max() <= deviation.ulp
    if not site.deviations:  # an exact cell has the module's bits, except in sums that end on the other side
        assert np.count_nonzero(result != own) <= 0.002 * own.size


ORDERED = [
    name for name, norm in ZOO.items()
    if norm.spec.has_weight and norm.spec.order in ("scale_then_cast", "cast_then_scale") and norm.tail != (1,)
    and name != "one_plus_wide_after_cast"  # its result is float32, another order's is not
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ORDERED)
def test_float16_has_the_order_of_the_module_or_the_table_says_that_it_has_not(name: str, target: str) -> None:
    it = case(name, torch.float16)
    other = "cast_then_scale" if it.spec.order == "scale_then_cast" else "scale_then_cast"
    result, site = it.run(target)
    from_own = np.count_nonzero(result != it.of_order(it.spec.order))
    from_other = np.count_nonzero(result != it.of_order(other))
    assert np.count_nonzero(it.of_order(it.spec.order) != it.of_order(other)) > 0.1 * result.size
    if site.deviations:
        assert from_other < from_own  # were it otherwise, the table would claim too little
        assert [d.runtime for d in site.deviations] == ["onnxruntime"]
    else:
        assert from_own < 0.1 * from_other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "target"), CASES)
def test_the_file_puts_every_rounding_where_the_module_has_it(name: str, target: str, dtype: torch.dtype) -> None:
    """What the file says by ONNX's definitions, whatever a runtime makes of it; bfloat16's only test of numbers."""
    it = case(name, dtype)
    lowered, (site,) = lower(it.model, target)
    (result,) = evaluate(lowered, {key: as_numpy(value) for key, value in it.feeds.items()})
    with torch.no_grad():
        own = as_numpy(it.module(*it.feeds.values()))
    assert (result.dtype, result.shape) == (own.dtype, own.shape)
    # ONNX Runtime's own operator multiplies by its scale before it casts; elsewhere only its optimizer does that.
    in_kernel = target == "ort" and it.spec.has_weight and main_node(lowered, site).inputs[0].dtype in (
        FLOAT16, BFLOAT16,
    )  # fmt: skip
    differing = count_differing(result, own)
    if any(d.runtime == "any" or (d.runtime == "onnxruntime" and in_kernel) for d in site.deviations):
        assert differing > 0.05 * own.size  # were it otherwise, the table would claim too little
    else:  # sums of another order may end on the other side of a rounding
        assert differing <= 0.003 * own.size


DEVIATING = [
    name for name, norm in ZOO.items()
    if norm.spec.order == "cast_factor" or (norm.spec.order == "cast_then_scale" and norm.spec.has_weight)
]  # fmt: skip


@pytest.mark.parametrize("target", ["standard", "ort"])
@pytest.mark.parametrize("name", DEVIATING)
def test_the_bound_of_a_deviation_holds_for_every_element(name: str, target: str) -> None:
    it = Case(name, torch.float16, rows=3000)
    result, site = it.run(target)
    own = it.own().astype(np.float16)
    (deviation,) = site.deviations
    if deviation.ulp is None:  # a bias may cancel all but the error
        assert it.spec.bias
        return
    larger = np.maximum(np.abs(own), np.abs(result.astype(np.float16)))
    difference = np.abs(result.astype(np.float64) - it.own().astype(np.float64))
    # Below 2^-10 the factors themselves may be subnormal, and their roundings larger.
    ordinary = larger >= 2.0**-10
    assert (difference <= deviation.ulp * np.spacing(larger).astype(np.float64))[ordinary].all()


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].float64 != "refused"])
@pytest.mark.parametrize("target", ["primitives", "standard", "ort"])
def test_float64_is_as_near_the_reference_as_the_module(name: str, target: str) -> None:
    it = case(name, torch.float64)
    result, site = it.run(target)
    own, expected = it.own(), it.expected()
    assert (result.dtype, result.shape) == (own.dtype, own.shape)
    if it.spec.statistics == "float32":  # then a float64 model has float32's precision, and no more
        assert errors(result, expected, torch.float32).max() <= float32_bound(it.spec)
        assert np.count_nonzero(result != own) <= 0.75 * own.size  # in float64 throughout, every element differs
        assert site.deviations == []
        return
    # `epsilon` is a float32 attribute in these operators; the test below is about that.
    assert bool(site.deviations) is (target != "primitives" and float(np.float32(it.spec.eps)) != it.spec.eps)
    rounded = it.expected(it.spec.replace(eps=float(np.float32(it.spec.eps))))
    assert errors(result, expected, torch.float64).max() <= 8.0 + errors(rounded, expected, torch.float64).max()


@pytest.mark.parametrize("target", ["primitives", "standard", "ort"])
def test_eps_keeps_its_value_in_float64_or_the_table_says_that_it_does_not(target: str) -> None:
    it = Case("torch_no_affine", torch.float64)  # its eps of 1e-5 is not a float32
    small = it.x * 1e-2
    expected = reference(it.spec, small.numpy())
    lowered, (site,) = lower(it.model, target)
    (result,) = run(lowered, {"x": small})
    error = errors(result, expected, torch.float64).max()
    if target == "primitives":
        assert error <= 8.0
        assert site.deviations == []
    else:
        assert error > 1000.0
        assert [d.reason for d in site.deviations] == ["the operator stores epsilon as float32"]


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].float64 != "refused"])
def test_float64_is_refused_by_the_plugin_with_what_to_do(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"does not support float64.*Use --target primitives instead") as error:
        lower(case(name, torch.float64).model, "plugin")
    assert error.value.exit_code == 3


ROWS = ["300", "1e4", "1e-3", "1e-6", "tiny", "zero", "constant", "largest", "nan", "inf", "-inf", "outlier"]


def special_rows(tail: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One row of each kind in `ROWS`, `[1, 12, *tail]`."""
    finfo = torch.finfo(dtype)
    rows = torch.randn(len(ROWS), *tail, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = rows.view(len(ROWS), -1)
    scales = [300.0, min(1e4, finfo.max / 8), 1e-3, 1e-6, finfo.tiny, 0.0]
    for row, scale in enumerate(scales):
        flat[row] *= scale
    flat[6], flat[7] = 0.1, torch.sign(flat[7]) * finfo.max
    flat[11, 0] *= 1e3
    flat.clamp_(-finfo.max, finfo.max)
    flat[8, 0], flat[9, -1], flat[10, 0] = torch.nan, torch.inf, -torch.inf
    return rows.to(dtype)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "target"), CASES)
def test_extreme_rows_come_out_as_from_the_module(name: str, target: str, dtype: torch.dtype) -> None:
    it = case(name, dtype)
    x = special_rows(it.norm.tail, dtype)
    feeds = {"x": x}
    if it.norm.gated:
        feeds["gate"] = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        own = it.module(*feeds.values()).numpy()
    expected = reference(
        it.spec, x.double().numpy(), *(None if t is None else t.double().numpy() for t in (it.weight, it.bias)),
        feeds["gate"].double().numpy() if it.norm.gated else None,
    )  # fmt: skip
    lowered, (site,) = lower(it.model, target)
    (result,) = run(lowered, feeds)
    allowed = max((d.ulp or 0.0 for d in site.deviations), default=0.0) + 0.01
    if dtype == torch.float32:
        allowed = float32_bound(it.spec)
    for row, kind in enumerate(ROWS):
        a, b, t = result[0, row], own[0, row], expected[0, row]
        assert np.array_equal(np.isnan(a), np.isnan(b)), kind
        assert np.array_equal(np.isinf(a), np.isinf(b)), kind
        if np.isfinite(b).all():
            with np.errstate(under="ignore"):
                assert errors(a, t, dtype).max() <= errors(b, t, dtype).max() + allowed, kind


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["torch", "gemma2", "olmo2", "torch_three_dims", "qwen4_grouped", "mamba2", "biased"])
def test_any_rank_and_batch(name: str, leading: tuple[int, ...], target: str) -> None:
    norm = ZOO[name]
    module = norm.build()
    model = norm_model(norm, module, torch.float32, leading=tuple(f"dim{i}" for i in range(len(leading))))
    x, gate = torch.randn(2, *leading, *norm.tail, generator=torch.Generator().manual_seed(1))
    lowered, _ = lower(model, target)
    (result,) = run(lowered, {"x": x, "gate": gate} if norm.gated else {"x": x})
    wanted = eager(norm.spec, x, *norm.tensors(module), gate if norm.gated else None).detach().numpy()
    assert result.shape == wanted.shape
    assert errors(result, wanted.astype(np.float64), torch.float32).max() <= 2 * float32_bound(norm.spec)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "torch_two_dims", "grouped_bare", "mamba2"])
def test_an_empty_batch_stays_empty(name: str, target: str) -> None:
    norm = ZOO[name]
    lowered, _ = lower(norm_model(norm, norm.build(), torch.float32), target)
    x = torch.zeros(0, 3, *norm.tail)
    (result,) = run(lowered, {"x": x, "gate": x} if norm.gated else {"x": x})
    assert result.shape == (0, 3, *norm.tail)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma2", "torch", "biased_after_cast"])
def test_float32_weights_on_float16_inputs(name: str, target: str) -> None:
    norm = ZOO[name]
    module = norm.build(torch.float32)
    weight, bias = norm.tensors(module)
    x = torch.randn(3, 9, *norm.tail, generator=torch.Generator().manual_seed(2)).half()
    wanted = eager(norm.spec, x, weight, bias).detach()
    maker = GraphMaker(FLOAT16)
    dims = ("batch", "sequence", *norm.tail)
    inputs = [maker.input("x", dims), maker.initializer("weight", weight)]
    if bias is not None:
        inputs.append(maker.initializer("bias", bias))
    y = maker.norm(norm.spec, inputs, "y", dims, dtype=DATA_TYPES[wanted.dtype])
    (result,) = run(lower(maker.model([y]), target)[0], {"x": x})
    assert result.dtype == wanted.numpy().dtype
    expected = reference(norm.spec, x.double().numpy(), weight.double().numpy(), None if bias is None else bias.numpy())
    assert errors(result, expected, torch.float16).max() <= errors(wanted.numpy(), expected, torch.float16).max() + 0.01


@pytest.mark.parametrize("name", ["mamba2", "zamba2", "falcon_h1", "silu_after_bare"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_gated_norm_called_without_its_gate(name: str, target: str) -> None:
    norm = ZOO[name]
    module = norm.build()
    spec = norm.spec.replace(gate="none", activation="none")
    weight = norm.tensors(module)[0]
    maker = GraphMaker(FLOAT32)
    dims = ("batch", "sequence", 64)
    x = maker.input("x", dims)
    y = maker.norm(spec, [x, maker.initializer("weight", weight) if weight is not None else None], "y", dims)
    feed = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    lowered, (site,) = lower(maker.model([y]), target)
    (result,) = run(lowered, {"x": feed})
    with torch.no_grad():
        assert errors(result, module(feed).double().numpy(), torch.float32).max() <= 2 * FLOAT32_ULP
    assert site.spec == spec
