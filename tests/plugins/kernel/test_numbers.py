"""The kernel's arithmetic of single values on the host: number formats, quotients by a scale, and gates."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy.runtime.accuracy.float_formats import ulp_size
from tests.helpers.plugins.kernels import NUMPY, compiler, host_library

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++)")

QUANTIZED = ("int8", "float8_e4m3")
FORMATS = {"float16": "Float16", "bfloat16": "BFloat16", "int8": "Int8", "float8_e4m3": "Float8E4M3"}

ACTIVATIONS = ("silu", "sigmoid")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    lines = ['#include "rms_norm.cuh"', "using namespace rmsnorm;"]
    for name, kind in FORMATS.items():
        lines.append(
            f'extern "C" void narrow_{name}(const float* from, u32* to, long n) '
            f"{{ for (long i = 0; i < n; ++i) to[i] = {kind}::narrow(from[i]); }}"
        )
    for name in ("float16", "bfloat16"):
        lines.append(
            f'extern "C" void widen_{name}(const u32* from, float* to, long n) '
            f"{{ for (long i = 0; i < n; ++i) to[i] = {FORMATS[name]}::widen(from[i]); }}"
        )
    for name, kind in {**FORMATS, "float32": "Float32"}.items():
        if name not in QUANTIZED:
            lines.append(
                f'extern "C" void divide_{name}(const float* from, float* to, long n, float scale) '
                f"{{ const Divisor<{kind}> divisor(scale); "
                f"for (long i = 0; i < n; ++i) {{ float y[1] = {{from[i]}}; divisor.divide(y); to[i] = y[0]; }} }}"
            )
    for name in ACTIVATIONS:
        for exact in ("true", "false"):
            lines.append(
                f'extern "C" void {name}_{exact}(const float* from, float* to, long n, float value) '
                f"{{ for (long i = 0; i < n; ++i) to[i] = gated<{name}, {exact}>(value, from[i]); }}"
            )
    return host_library(tmp_path_factory.mktemp("numbers"), lines)


def called(function: Any, values: np.ndarray, dtype: Any, *more: Any) -> np.ndarray:
    result = np.empty(values.shape, dtype)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, result)]
    function(*pointers, ctypes.c_long(len(values)), *more)
    return result


def floats() -> np.ndarray:
    """Random bits, every half value, and what lies between two and next to it."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32)
    exact = np.concatenate(
        [np.arange(65536).astype(np.uint16).view(NUMPY[d]).astype(np.float32) for d in ("float16", "bfloat16")]
    )
    eights = np.arange(256, dtype=np.uint8).view(NUMPY["float8_e4m3"]).astype(np.float32)
    with np.errstate(all="ignore"):
        ordered = np.sort(exact[np.isfinite(exact)].astype(np.float64))
        few = np.sort(eights[np.isfinite(eights)].astype(np.float64))
        middles = np.concatenate([(v[1:] + v[:-1]) / 2 for v in (ordered, few)]).astype(np.float32)
        wholes = np.arange(-300, 300, 0.25, dtype=np.float32)
        values = np.concatenate([bits, exact, eights, middles, wholes])
        return np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(0))])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_value_is_read(library: ctypes.CDLL, dtype: str) -> None:
    bits = np.arange(65536, dtype=np.uint32)
    got = called(library[f"widen_{dtype}"], bits, np.float32)
    np.testing.assert_array_equal(got, bits.astype(np.uint16).view(NUMPY[dtype]).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_are_rounded_to_the_nearest_half(library: ctypes.CDLL, dtype: str) -> None:
    values = floats()
    got = called(library[f"narrow_{dtype}"], values, np.uint32).astype(np.uint16)
    with np.errstate(all="ignore"):
        wanted = values.astype(NUMPY[dtype])
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], wanted.view(np.uint16)[~nan])
    assert np.isnan(got.view(NUMPY[dtype])[nan].astype(np.float32)).all()


def test_e4m3_saturates_and_keeps_nan(library: ctypes.CDLL) -> None:
    values = floats()
    got = called(library.narrow_float8_e4m3, values, np.uint32).astype(np.uint8)
    wanted = np.clip(values, -448, 448).astype(NUMPY["float8_e4m3"])
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], wanted.view(np.uint8)[~nan])
    assert (got[nan] & 0x7F == 0x7F).all()


def test_int8_saturates_and_has_no_nan(library: ctypes.CDLL) -> None:
    values = floats()
    got = called(library.narrow_int8, values, np.uint32).astype(np.uint8).view(np.int8)
    wanted = np.where(np.isnan(values), 0, np.clip(np.rint(values), -128, 127)).astype(np.int8)
    np.testing.assert_array_equal(got, wanted)


# ---------------------------------------------------------------------------------------------------- quotients


def middles(dtype: str) -> np.ndarray:
    """What lies in the middle between two neighboring values of a quantized format, and the largest value."""
    if dtype == "int8":
        return np.append(np.arange(-127.5, 127), [-128, 127])
    eights = np.arange(256, dtype=np.uint8).view(NUMPY[dtype]).astype(np.float64)
    values = np.unique(eights[np.isfinite(eights)])
    return np.append((values[1:] + values[:-1]) / 2, [-448, 448])


def scales() -> np.ndarray:
    """Random ones; those of few bits and their neighbors, whose quotients come closest to ties; limits; no numbers."""
    rng = np.random.default_rng(0)
    random = np.exp2(rng.uniform(-20, 10, 300)).astype(np.float32)
    anywhere = rng.integers(0, 2**32, 300, dtype=np.uint32).view(np.float32)
    few = np.arange(64, 128) << 17
    near = (few[:, None] + np.arange(-3, 4)).ravel().astype(np.float32) * np.float32(2.0**-30)
    limits = np.exp2(np.array([-149, -140, -126, -64, -60, -59, 0, 60, 61, 64, 127])).astype(np.float32)
    around = np.concatenate([np.nextafter(limits, np.float32(0)), limits, np.nextafter(limits, np.float32(np.inf))])
    no_numbers = np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    return np.concatenate([random, -random[:20], anywhere, near, around, no_numbers])


def values_near_ties(dtype: str, scale: np.float32) -> np.ndarray:
    """The values of a format whose quotients are next to ties of either quantized format, and special ones."""
    ties = np.concatenate([middles(quantized) for quantized in QUANTIZED])
    with np.errstate(all="ignore"):
        y = (ties * np.float64(scale)).astype(NUMPY[dtype])
        below, above = (np.nextafter(y, np.array(end, y.dtype)) for end in (-np.inf, np.inf))
        special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 6e-8, 1, 65504, 3e38], np.float32).astype(y.dtype)
        return np.concatenate([below, y, above, special]).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_quantized_quotient_is_that_of_a_division(library: ctypes.CDLL, dtype: str) -> None:
    for scale in scales():
        values = values_near_ties(dtype, scale)
        got = called(library[f"divide_{dtype}"], values, np.float32, ctypes.c_float(scale))
        with np.errstate(all="ignore"):
            wanted = values / scale
        where = f"scale {scale!r}"
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted), err_msg=where)
        for quantized in QUANTIZED:
            narrow = library[f"narrow_{quantized}"]
            one, other = (called(narrow, quotients, np.uint32) for quotients in (got, wanted))
            off = (one != other) & ~np.isnan(wanted)
            assert not off.any(), f"{quantized}, {where}: {values[off][:3]}, {got[off][:3]}, not {wanted[off][:3]}"


def test_a_float32_quotient_in_range_is_that_of_a_division(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    for scale in scales():
        if 1e-30 < scale < 1e30:
            values = (rng.standard_normal(2000) * 100 * scale).astype(np.float32)
            got = called(library.divide_float32, values, np.float32, ctypes.c_float(scale))
            np.testing.assert_array_equal(got, values / scale, err_msg=f"scale {scale!r}")


# -------------------------------------------------------------------------------------------------------- gates


def gates() -> np.ndarray:
    """Gates of all sizes, and more of the sizes that activations bend."""
    rng = np.random.default_rng(0)
    sizes = np.exp2(rng.uniform(-100, 126, 50_000))
    near = np.concatenate([rng.standard_normal(50_000) * 3, rng.uniform(-120, 120, 50_000)])
    edges = np.array([0, 1, 0.34657, 0.34658, 87.3, 88.8, 103.9, 104, 127 * np.log(2), 169.9, 170, 171, 1e30])
    return np.concatenate([sizes, -sizes, near, edges, -edges]).astype(np.float32)


def activated(name: str, z: np.ndarray) -> np.ndarray:
    wide = z.astype(np.float64)
    e = np.exp(-np.abs(wide))
    return np.where(wide < 0, e, 1) * (wide if name == "silu" else 1) / (1 + e)


@pytest.mark.parametrize("value", [1.0, -37.7, 3e-6])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_in_float32_is_within_one_ulp_and_uses_no_approximation(
    library: ctypes.CDLL, name: str, value: float
) -> None:
    z = gates()
    library.approximate(1000)
    try:
        got = called(library[f"{name}_true"], z, np.float32, ctypes.c_float(value))
    finally:
        library.approximate(0)
    expected = activated(name, z) * np.float64(np.float32(value))
    finite = np.abs(expected) < np.finfo(np.float32).max
    off = np.abs(got.astype(np.float64) - expected)[finite] / ulp_size(expected[finite], np.dtype(np.float32))
    assert off.max() <= 1.0, f"{off.max():.2f} ULP at {z[finite][off.argmax()]!r}"


@pytest.mark.parametrize("ulps", [-2, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_in_half_is_rounded_once_whatever_a_gpu_approximates(
    library: ctypes.CDLL, name: str, dtype: str, ulps: int
) -> None:
    z = np.unique(gates().astype(NUMPY[dtype]).astype(np.float32))
    z = z[np.isfinite(z)]
    library.approximate(ulps)
    try:
        got = called(library[f"{name}_false"], z, np.float32, ctypes.c_float(1.0))
    finally:
        library.approximate(0)
    expected = activated(name, z)
    off = np.abs(got.astype(NUMPY[dtype]).astype(np.float64) - expected) / ulp_size(expected, np.dtype(NUMPY[dtype]))
    assert off.max() <= 0.51, f"{off.max():.3f} ULP at {z[off.argmax()]!r}"


@pytest.mark.parametrize("exact", ["true", "false"])
def test_a_gate_that_is_no_number_acts_as_in_pytorch(library: ctypes.CDLL, exact: str) -> None:
    import torch

    z = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32)
    for name in ACTIVATIONS:
        got = called(library[f"{name}_{exact}"], z, np.float32, ctypes.c_float(1.0))
        wide = torch.from_numpy(z)
        wanted = wide / (1 + torch.exp(-wide)) if name == "silu" else torch.sigmoid(wide)
        np.testing.assert_array_equal(got, wanted.numpy())
