"""The kernel against the float64 reference: its own source on the host, thread by thread, and on a GPU."""

from __future__ import annotations

import itertools
import os
from typing import Any, get_args

import numpy as np
import pytest

from rmsnorm_deploy.models.spec import Activation, Gate, Scale
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, choose
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from tests.helpers.plugins.gpu_memory import needs_gpu
from tests.helpers.plugins.kernel_cases import (
    EPSILON,
    LIMITS,
    OPTIONS,
    SPECIAL,
    Case,
    check_against_reference,
    check_quantized,
    check_quantized_nan_and_infinity,
    kernels,
    named_kernels,
    quantized_kernels,
    with_unquantized,
)
from tests.helpers.plugins.kernels import NUMPY, DeviceKernels, HostKernels, Kernels, compiler

PLACES = [
    pytest.param(
        HostKernels, id="host", marks=pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++)")
    ),
    pytest.param(DeviceKernels, id="gpu", marks=[pytest.mark.gpu, needs_gpu]),
]

EVERY = os.environ.get("RMSNORM_EVERY_KERNEL") == "1"
WIDTHS = (1, 7, 64, 80, 128, 1000, 3072, 4096, 5120, 7168, 16384, 50000)


def test_every_member_has_a_kernel_here() -> None:
    tried = [NormKernel(64, EPSILON, **changes) for changes in OPTIONS.values()]
    assert {kernel.scale for kernel in tried} == set(get_args(Scale))
    gated = {(kernel.gate, kernel.activation) for kernel in tried if kernel.gate != "none"}
    assert gated == set(itertools.product(set(get_args(Gate)) - {"none"}, set(get_args(Activation)) - {"none"}))


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> Any:
    return request.param


def compiled(place: type[Kernels], folder: Any, named: list[tuple[str, NormKernel, LaunchConfig]]) -> Kernels:
    return place(folder, [(kernel, config) for _, kernel, config in named])


def forms(place: type[Kernels], width: int) -> list[tuple[str, NormKernel, LaunchConfig]]:
    """All forms of a width on a GPU; on the host a sample, which `make test-kernel` makes all of them.

    The interpreter of PTX has the arithmetic (`test_ptx.py`); the host's threads have the barriers.
    """
    every = named_kernels(width)
    # A prime step, and another start for each width.
    return every if place is DeviceKernels or EVERY else every[WIDTHS.index(width) % 7 :: 7]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_form_is_the_reference_rounded_once(width: int, place: type[Kernels], tmp_path: Any) -> None:
    named = forms(place, width)
    library = compiled(place, tmp_path, named)
    check_against_reference(named, library)
    # The order in which threads run changes nothing.
    for number, (name, kernel, _) in enumerate(named):
        case = Case(kernel, seed=1)
        first, second = (library.run(number, **case.given, seed=seed) for seed in (1, 2))
        for role, values in first.items():
            np.testing.assert_array_equal(values, second[role], err_msg=f"{name}, {role}")


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++)")
def test_gates_hold_where_a_gpu_approximates(tmp_path: Any) -> None:
    named = [
        (name, kernel, choose(kernel, None, 90))
        for width in (128, 4096)
        for name, kernel in kernels(width)
        if kernel.gate != "none"
    ]
    library = HostKernels(tmp_path, [(kernel, config) for _, kernel, config in named])
    for ulps in (-2, 2):
        library.approximate(ulps)
        check_against_reference(named, library)


# ---------------------------------------------------------------------------------------------------- quantized


@pytest.mark.parametrize("width", [1, 7, 128, 1000, 4096, 50000])
def test_quantized_output_is_that_of_the_norm_quantized(width: int, place: type[Kernels], tmp_path: Any) -> None:
    cases = with_unquantized([(kernel, choose(kernel, None, 90)) for kernel in quantized_kernels(width)])
    check_quantized(cases, place(tmp_path, cases))


def test_quantized_nan_and_infinity(place: type[Kernels], tmp_path: Any) -> None:
    library = place(tmp_path, [(kernel, choose(kernel, None, 90)) for kernel in SPECIAL])
    check_quantized_nan_and_infinity(SPECIAL, library)


# ------------------------------------------------------------------------------------------------------- others

TILED = [
    LaunchConfig(64, 1, 8), LaunchConfig(32, 2, 4, rows=2), LaunchConfig(64, 1, 8, cluster=2),
    LaunchConfig(32, 1, 8, rows=4), LaunchConfig(96, 3, 2, prefetch=True), LaunchConfig(64, 1, 1, cluster=4),
    LaunchConfig(32, 4, 16, rows=1, cluster=8),
]  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"op": "add_rms_norm"}, {
    "quantized": "int8", "quantization": "per_row"}, {"gate": "before", "activation": "silu"},
    {"gate": "after", "activation": "silu"}])  # fmt: skip
def test_rows_that_are_read_in_tiles_or_by_clusters(
    changes: dict[str, Any], place: type[Kernels], tmp_path: Any
) -> None:
    kernel = NormKernel(2000, EPSILON, dtype="bfloat16", **changes)
    whole = LaunchConfig(256, 1, 8)
    library = place(tmp_path, [(kernel, config) for config in (whole, *TILED)])
    case = Case(kernel)
    expected = library.run(0, **case.given)
    for number, config in enumerate(TILED, 1):
        got = library.run(number, **case.given, seed=number)
        for role, values in got.items():
            close = np.isclose(values.astype(np.float32), expected[role].astype(np.float32), rtol=2**-7, atol=1)
            assert close.all(), f"{config}, {role}"
            assert np.mean(values != expected[role]) < 0.01, f"{config}, {role}"


def test_results_may_be_written_over_the_inputs(place: type[Kernels], tmp_path: Any) -> None:
    kernel = NormKernel(5120, EPSILON, "add_rms_norm", "bfloat16")
    configs = [choose(kernel, None, 90), LaunchConfig(64, 2, 8)]
    library = place(tmp_path, [(kernel, config) for config in configs])
    for number in range(len(configs)):
        case = Case(kernel)
        expected = library.run(number, **case.given)
        got = library.run(number, **case.given, in_place=True)
        for role in ("y", "sum"):
            np.testing.assert_array_equal(got[role], expected[role])


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_nan_and_infinity_go_through_as_in_pytorch(dtype: str, place: type[Kernels], tmp_path: Any) -> None:
    import torch

    kernel = NormKernel(256, EPSILON, dtype=dtype, scale="none")  # type: ignore[arg-type]
    library = place(tmp_path, [(kernel, choose(kernel, None, 90))])
    x = np.random.default_rng(0).standard_normal((5, 256)).astype(NUMPY[dtype])
    x[0, 3], x[1, 4], x[2, 5], x[3] = np.nan, np.inf, -np.inf, 0
    y = library.run(0, x)["y"].astype(np.float32)
    h = torch.from_numpy(x.astype(np.float32))
    wanted = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPSILON)).numpy()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(wanted))
    np.testing.assert_allclose(y[3:], wanted[3:], rtol=2**-7)
    assert (y[3] == 0).all()


def test_no_rows_are_no_work(place: type[Kernels], tmp_path: Any) -> None:
    kernel = NormKernel(64, EPSILON)
    config = choose(kernel, 0, 90)
    assert config.grid(0) == 0
    library = place(tmp_path, [(kernel, config)])
    assert library.run(0, np.zeros((0, 64), np.float16), weight=np.ones(64, np.float16))["y"].shape == (0, 64)
