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
    source, built = folder / "numbers.cpp", folder / "numbers.so"
    source.write_text("\n".join(lines) + "\n")
    command = [str(compiler()), "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{SHIM.parent}", f"-I{SOURCE_FOLDER}"]
    subprocess.run([*command, str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def called(function: Any, values: np.ndarray, dtype: Any) -> np.ndarray:
    result = np.empty(values.shape, dtype)
    function(values.ctypes.data_as(ctypes.c_void_p), result.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(len(values)))
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
