"""`eager` gives the module's bits: every norm of the zoo, every dtype, every kind of input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.eager import eager, result_dtype, statistics_dtype
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.recognition.candidates import GATES, ORDERS, ROOTS
from rmsnorm_deploy.models.spec import NormSpec, Root, Scale
from tests.helpers.norms.norm_zoo import DTYPES, SCALE_FIRST, ZOO, ZooNorm


def bits(tensor: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor).view(integer)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(bits(a), bits(b)), f"{int((bits(a) != bits(b)).sum())} of {a.numel()} elements differ"


def rows(norm: ZooNorm, *leading: int, seed: int = 7) -> Tensor:
    return torch.randn(*leading, *norm.tail, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(norm: ZooNorm, module: torch.nn.Module, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        wanted = module(x, gate) if norm.gated else module(x)
        return wanted, eager(norm.spec, x, *norm.tensors(module), gate if norm.gated else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_eager_is_bit_equal_to_the_module(name: str, dtype: torch.dtype) -> None:
    norm = ZOO[name]
    module = norm.build(dtype, seed=11)
    finfo = torch.finfo(dtype)
    leadings = [(37,), (3, 5), (2, 1, 9)]
    if name.startswith("falcon"):
        leadings = leadings[:2]  # it takes two dims or three
    # Plain, large (half squares overflow float16), tiny (eps decides), outliers, subnormal, near the largest.
    sizes = [1.0, 300.0, min(1e4, finfo.max / 8), 1e-3, 1e-6, finfo.tiny, finfo.tiny / 64]
    for leading in leadings:
        for index, size in enumerate(sizes):
            x = rows(norm, *leading, seed=index) * size
            x[..., 0] *= 50.0 if index % 2 else 1.0
            gate = (rows(norm, *leading, seed=99) * 3).to(dtype)
            assert_same_bits(*call(norm, module, x.clamp(-finfo.max, finfo.max).to(dtype), gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_special_values_go_through_as_in_the_module(name: str, dtype: torch.dtype) -> None:
    norm = ZOO[name]
    module = norm.build(dtype, seed=5)
    x = rows(norm, 1, 6).to(dtype)
    gate = (rows(norm, 1, 6, seed=1) * 2).to(dtype)
    flat = x.view(6, -1)
    flat[0, 0], flat[1, -1], flat[2, 0] = math.nan, math.inf, -math.inf
    flat[3] = 0.0
    flat[4] = -0.0
    wanted, got = call(norm, module, x, gate)
    assert_same_bits(wanted, got)
    got = got.view(6, -1)
    if norm.spec.group_size is None and norm.width == "tail":
        assert got[0].isnan().all()  # one NaN takes its whole row
    assert got[1, -1].isnan()  # inf / inf
    assert got[5].isfinite().all()
    if norm.spec.eps > 0 and not norm.spec.bias:
        assert (got[3:5] == 0).all()
        if norm.tensors(module)[0] is None and not norm.gated:
            assert torch.signbit(got[4]).all()
    if norm.spec.eps == 0:
        assert got[3:5].isnan().all()


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].float64 != "refused"])
def test_eager_is_bit_equal_in_float64(name: str) -> None:
    norm = ZOO[name]
    module = norm.build(torch.float64)
    spec = norm.spec.replace(eps=2.0**-52) if norm.float64 == "eps" else norm.spec
    for size in (1.0, 1e-4, 1e5):
        x, gate = rows(norm, 4, 3) * size, rows(norm, 4, 3, seed=8)
        with torch.no_grad():
            wanted = module(x, gate) if norm.gated else module(x)
            got = eager(spec, x, *norm.tensors(module), gate if norm.gated else None)
        assert_same_bits(wanted, got)


OPTIONAL_GATES = ["mamba2", "zamba2", "falcon_h1", "falcon_h1_gate_first", "silu_after_bare"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONAL_GATES)
def test_a_gated_norm_called_without_its_gate(name: str, dtype: torch.dtype) -> None:
    norm = ZOO[name]
    module = norm.build(dtype)
    x = rows(norm, 4, 5).to(dtype)
    with torch.no_grad():
        assert_same_bits(module(x), eager(norm.spec.replace(gate="none", activation="none"), x, *norm.tensors(module)))


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma2", "torch_no_affine", "no_upcast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_weight_on_half_inputs_promotes_as_in_the_module(name: str, dtype: torch.dtype) -> None:
    norm = ZOO[name]
    module = norm.build(torch.float32)
    wanted, got = call(norm, module, rows(norm, 4, 5).to(dtype), None)
    assert_same_bits(wanted, got)
    assert got.dtype == (torch.float32 if name in ("llama", "no_upcast") else dtype)


def test_an_empty_batch_stays_empty() -> None:
    for name in ("llama", "mamba2", "torch_two_dims"):
        norm = ZOO[name]
        x = torch.zeros(0, 3, *norm.tail)
        assert_same_bits(*call(norm, norm.build(), x, x))


def test_inputs_are_not_changed() -> None:
    norm = ZOO["mamba2"]
    module = norm.build()
    x, gate = rows(norm, 2, 3).float(), rows(norm, 2, 3).float()
    x_before, gate_before = x.clone(), gate.clone()
    call(norm, module, x, gate)
    assert torch.equal(x, x_before)
    assert torch.equal(gate, gate_before)


def test_gradients_flow() -> None:
    norm = ZOO["llama"]
    module = norm.build()
    x = rows(norm, 2, 3).float().requires_grad_()
    module(x).sum().backward()
    wanted, x.grad = x.grad, None
    eager(norm.spec, x, module.weight).sum().backward()
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize(
    ("statistics", "dtype", "expected"),
    [
        ("float32", torch.float16, torch.float32),
        ("float32", torch.float64, torch.float32),
        ("promoted", torch.bfloat16, torch.float32),
        ("promoted", torch.float32, torch.float32),
        ("promoted", torch.float64, torch.float64),
        ("input", torch.float16, torch.float16),
        ("input", torch.float64, torch.float64),
    ],
)
def test_statistics_dtype(statistics: str, dtype: torch.dtype, expected: torch.dtype) -> None:
    order = "no_upcast" if statistics == "input" else "scale_then_cast"
    assert statistics_dtype(NormSpec(eps=0.0, order=order, statistics=statistics), dtype) == expected


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("spec", "inputs", "message"),
    [
        (SCALE_FIRST, {}, "'weight' is missing"),
        (SCALE_FIRST.replace(scale="none"), {"weight": ONES}, "'weight' was given"),
        (SCALE_FIRST.replace(bias=True), {"weight": ONES}, "'bias' is missing"),
        (SCALE_FIRST, {"weight": ONES, "bias": ONES}, "'bias' was given"),
        (SCALE_FIRST.replace(gate="after", activation="silu"), {"weight": ONES}, "'gate' is missing"),
        (SCALE_FIRST, {"weight": ONES, "gate": ONES}, "'gate' was given"),
    ],
)
def test_inputs_that_do_not_fit_the_spec_are_errors(spec: NormSpec, inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        eager(spec, torch.ones(2, 4), **inputs)


SCALES: list[tuple[Scale, bool]] = [
    ("none", True),
    ("weight", True),
    ("one_plus_weight", True),
    ("one_plus_weight", False),
]


def mixed_specs() -> list[NormSpec]:
    """Every order with every gate and scale, with and without a bias."""
    found = []
    for order, statistics in ORDERS.items():
        for gate, (scale, offset), bias in itertools.product(GATES[True], SCALES, (False, True)):
            activation = "none" if gate == "none" else "silu"
            found.append(
                NormSpec(
                    1e-6,
                    order=order,
                    statistics=statistics,
                    gate=gate,
                    activation=activation,
                    scale=scale,
                    offset_in_float32=offset,
                    bias=bias,
                )
            )
    return found


@pytest.mark.parametrize("root", ROOTS)
def test_the_result_dtype_is_that_of_the_result_for_every_pair_of_dtypes(root: Root) -> None:
    count = 0
    for spec, x, w, b in itertools.product(mixed_specs(), DTYPES, DTYPES, DTYPES):
        if (b != w and not spec.bias) or (w != DTYPES[0] and not spec.has_weight and not spec.bias):
            continue
        for shape in ((4,), ()):
            weight = torch.ones(shape, dtype=w) if spec.has_weight else None
            bias = torch.ones(shape, dtype=b) if spec.bias else None
            given = torch.ones(3, 4, dtype=x)
            gate = torch.ones(3, 4, dtype=w) if spec.has_gate else None
            y = eager(spec.replace(root=root), given, weight, bias, gate)
            assert result_dtype(spec, x, weight, bias) == y.dtype, (spec, x, w, b, shape)
            count += 1
    assert count == 3312
