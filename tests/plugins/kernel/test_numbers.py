"""The number formats as C++ writes them out: every half value, and float32 values of all sizes."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy.plugins.kernel.norm_kernel import SOURCE_FOLDER
from tests.helpers.plugins.kernels import NUMPY, SHIM, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++)")

QUANTIZED = ("int8", "float8_e4m3")
FORMATS = {"float16": "Float16", "bfloat16": "BFloat16", "int8": "Int8", "float8_e4m3": "Float8E4M3"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("numbers")
    lines = ['#include "gpu.h"', '#include "numbers.cuh"', "using namespace rmsnorm;"]
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
    source, built = folder / "numbers.cpp", folder / "numbers.so"
    source.write_text("\n".join(lines) + "\n")
    command = [str(compiler()), "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{SHIM.parent}", f"-I{SOURCE_FOLDER}"]
    subprocess.run([*command, str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


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
