"""The kernel as NVRTC compiles it, run by the interpreter of `tests/helpers/plugins/ptx.py`: no GPU.

A sample by default; every form, width, layout and architecture with RMSNORM_EVERY_KERNEL=1 (`make test-kernel`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, layouts
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from tests.helpers.plugins.kernel_cases import (
    EPSILON,
    SPECIAL,
    check_against_reference,
    check_quantized,
    check_quantized_nan_and_infinity,
    kernels,
    quantized_kernels,
    with_unquantized,
)
from tests.helpers.plugins.kernels import PtxKernels

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC: pip install 'rmsnorm-deploy[kernel]'")

EVERY = os.environ.get("RMSNORM_EVERY_KERNEL") == "1"
WIDTHS = (1, 7, 64, 80, 128, 1000, 4096, 5120, 7168, 16384)
ARCHITECTURES = (75, 80, 89, 90, 100, 120)
# One in so many of all combinations; a prime, so that none of their factors stays the same.
STEP, QUANTIZED_STEP = (1, 1) if EVERY else (349, 229)
Combination = tuple[str, NormKernel, LaunchConfig, int]


def combinations(step: int, quantized: bool) -> Iterator[Combination]:
    found = (
        (f"{name} {width} sm_{architecture}", kernel, config, architecture)
        for architecture in ARCHITECTURES
        for width in WIDTHS
        for name, kernel in (
            ((f"{k.op} {k.dtype} {k.quantized} {k.quantization}", k) for k in quantized_kernels(width))
            if quantized
            else kernels(width)
        )
        for config in layouts(kernel, architecture)
    )
    return (combination for number, combination in enumerate(found) if number % step == 0)


def test_the_sample_has_every_kind() -> None:
    sample = list(combinations(STEP, False))
    assert set(WIDTHS) == {kernel.width for _, kernel, _, _ in sample}
    assert set(ARCHITECTURES) == {architecture for *_, architecture in sample}
    assert {(kernel.op, kernel.dtype) for _, kernel, _, _ in sample} == {(k.op, k.dtype) for _, k in kernels(64)}
    assert {kernel.gate for _, kernel, _, _ in sample} == {kernel.gate for _, kernel in kernels(64)}
    assert {config.cluster > 1 for _, _, config, _ in sample} == {True, False}
    assert {config.prefetch for _, _, config, _ in sample} == {True, False}
    assert {config.threads <= 32 for _, _, config, _ in sample} == {True, False}
    assert {config.elements == 1 for _, _, config, _ in sample} == {True, False}
    quantized = list(combinations(QUANTIZED_STEP, True))
    assert {(k.quantized, k.quantization) for _, k, _, _ in quantized} == {
        (k.quantized, k.quantization) for k in quantized_kernels(64)
    }
    assert {config.cluster > 1 for _, _, config, _ in quantized} == {True, False}


@pytest.mark.parametrize(
    "combination",
    [pytest.param(each, id=f"{each[0]} {number}") for number, each in enumerate(combinations(STEP, False))],
)
def test_every_form_is_the_reference_rounded_once(combination: Combination, tmp_path: Path) -> None:
    name, kernel, config, architecture = combination
    check_against_reference(
        [(name, kernel, config)], PtxKernels(tmp_path, [(kernel, config)], architecture=architecture)
    )


@pytest.mark.parametrize(
    "combination",
    [pytest.param(each, id=f"{each[0]} {number}") for number, each in enumerate(combinations(QUANTIZED_STEP, True))],
)
def test_quantized_output_is_that_of_the_norm_quantized(combination: Combination, tmp_path: Path) -> None:
    _, kernel, config, architecture = combination
    cases = with_unquantized([(kernel, config)])
    check_quantized(cases, PtxKernels(tmp_path, cases, architecture=architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES if EVERY else (75, 90))
def test_quantized_nan_and_infinity(architecture: int, tmp_path: Path) -> None:
    cases = [(kernel, layouts(kernel, architecture)[-1]) for kernel in SPECIAL]
    check_quantized_nan_and_infinity(SPECIAL, PtxKernels(tmp_path, cases, architecture=architecture))


@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize(
    "changes", [{}, {"gate": "after", "activation": "silu"}, {"gate": "before", "activation": "sigmoid"}]
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_hold_where_approximate_units_are_off(
    dtype: Any, changes: dict[str, Any], side: float, tmp_path: Path
) -> None:
    kernel = NormKernel(128, EPSILON, dtype=dtype, **changes)
    config = layouts(kernel, 90)[-1]
    check_against_reference([("", kernel, config)], PtxKernels(tmp_path, [(kernel, config)], side=side))


@pytest.mark.parametrize("alignment", [2, 4, 8])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_layouts_hold_for_the_alignment_that_they_are_for(op: Any, alignment: int, tmp_path: Path) -> None:
    kernel = NormKernel(1000, EPSILON, op, "bfloat16")
    config = layouts(kernel, 90, alignment)[0]
    check_against_reference([("", kernel, config)], PtxKernels(tmp_path, [(kernel, config)], alignment=alignment))


@pytest.mark.parametrize("config", [
    LaunchConfig(32, 2, 4, rows=2), LaunchConfig(64, 1, 8, cluster=2), LaunchConfig(64, 1, 1, cluster=4),
    LaunchConfig(96, 3, 2, prefetch=True),
])  # fmt: skip
def test_rows_that_are_read_in_tiles_or_by_clusters(config: LaunchConfig, tmp_path: Path) -> None:
    kernel = NormKernel(2000, EPSILON, "add_rms_norm", "bfloat16")
    check_against_reference([("", kernel, config)], PtxKernels(tmp_path, [(kernel, config)]))
