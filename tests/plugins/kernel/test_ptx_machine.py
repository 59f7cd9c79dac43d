"""The interpreter of PTX: its arithmetic against exact numbers and torch, and what it does not let pass."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.plugins.ptx import Machine, Program
from tests.helpers.plugins.ptx_arithmetic import TYPES, Approximation, operation
from tests.helpers.plugins.ptx_memory import GlobalMemory, PtxError

HEAD = """
.version 9.0
.target sm_{architecture}
.visible .entry test(.param .u64 test_param_0) .maxntid 64, 1, 1 {{
.reg .pred %p<9>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
.shared .align 4 .b8 held[256];
"""
ADDRESSES = """
ld.param.u64 %rd1, [test_param_0];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
mov.u64 %rd4, held;
add.s64 %rd5, %rd4, %rd2;
setp.eq.u32 %p1, %r1, 0;
"""


def run(body: str, architecture: int = 80, threads: int = 64, cluster: int = 1) -> Any:
    """What 64 threads make of 0, 1, 2, ... in global memory."""
    memory, values = GlobalMemory(), np.arange(64, dtype=np.uint32)
    address = memory.put(values, writable=True)
    program = Program(HEAD.format(architecture=architecture) + ADDRESSES + body + "\nret;\n}")
    Machine(program, memory, [address], cluster, threads, cluster, Approximation()).run()
    return memory.get(address, values)


def test_threads_take_turns_through_memory() -> None:
    got = run("""
        ld.global.u32 %r2, [%rd3];
        st.shared.u32 [%rd5], %r2;
        bar.sync 0;
        sub.s64 %rd6, %rd4, %rd2;
        ld.shared.u32 %r3, [%rd6+252];
        shfl.sync.bfly.b32 %r4|%p2, %r3, 1, 31, -1;
        @%p1 bra $L1;
        add.s32 %r4, %r4, 100;
        $L1:
        st.global.u32 [%rd3], %r4;""")
    wanted = (63 - np.arange(64)) ^ 1
    wanted[1:] += 100
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r2, [%rd3+4];", "a load outside of the arrays"),
        ("ld.global.u32 %r2, [%rd3+-4];", "a load outside of the arrays"),
        ("ld.global.u32 %r2, [%rd3+2];", "not aligned"),
        ("st.global.u32 [%rd3+8192], %r1;", "outside"),
        ("ld.shared.u32 %r2, [%rd5+256];", "outside or not aligned"),
        ("ld.shared.u32 %r2, [%rd5];", "read before it is written"),
        ("add.s32 %r2, %r3, 1;", "%r3 is read before it is written"),
        ("st.shared.u32 [%rd5], %r1; ld.shared.u32 %r2, [%rd4];", "no barrier after it was written"),
        ("st.shared.u32 [%rd4], %r1;", "two threads write"),
        ("st.shared.u32 [%rd5], %r1; bar.sync 0; ld.shared.u32 %r2, [%rd4]; st.shared.u32 [%rd5], %r1;", "no barrier"),
        ("@%p1 bra $L1; bar.sync 0; $L1:", "in vain"),
        ("@%p1 bra $L1; shfl.sync.bfly.b32 %r4|%p2, %r1, 1, 31, -1; $L1:", "the lanes of a shuffle"),
    ],
)  # fmt: skip
def test_what_is_undefined_is_an_error(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r2, [%rd3]; griddepcontrol.wait;", "touched before griddepcontrol.wait"),
        ("@%p1 bra $L1; griddepcontrol.wait; $L1:", "end without griddepcontrol.wait"),
    ],
)
def test_the_kernel_before_is_waited_for(body: str, message: str) -> None:
    run("prefetch.global.L2 [%rd3]; griddepcontrol.wait; ld.global.u32 %r2, [%rd3];", 90)
    with pytest.raises(PtxError, match=message):
        run(body, 90)


def test_launches_must_agree_with_the_kernel() -> None:
    with pytest.raises(PtxError, match="at most 64 threads in a block, got 96"):
        run("", threads=96)
    with pytest.raises(PtxError, match="expected clusters of 1, got 2"):
        run("", cluster=2)


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"unknown instruction vadd4\.u32\.u32\.u32: vadd4"):
        run("vadd4.u32.u32.u32 %r2, %r1, %r1, %r1;")


def compute(name: str, *operands: Any) -> Any:
    known = operation(name, Approximation())
    assert known is not None, name
    with np.errstate(all="ignore"):
        return known.function(*operands)


def floats(count: int, seed: int) -> Any:
    """Finite float32 values of all sizes."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 2 * count, np.uint32)
    values = bits.view(np.float32)
    return values[np.isfinite(values)][:count]


def exactly(values: Any) -> list[Fraction]:
    return [Fraction(float(value)) for value in values]


@pytest.mark.parametrize("mode", ["rn", "rm", "rp", "rz"])
def test_fma_rounds_once(mode: str) -> None:
    x, y = floats(2000, 1), floats(2000, 2)
    y = np.ldexp(np.frexp(y)[0], np.clip(-np.frexp(x)[1], -125, 127))  # products near 1
    z = floats(2000, 3)
    z[::2] = np.ldexp(np.frexp(z[::2])[0], np.random.default_rng(4).integers(-30, 3, 1000))
    z[::4] = -(x * y)[::4]  # only the product's rounding is left
    got = compute(f"fma.{mode}.f32", x, y, z)
    for a, b, c, result in zip(exactly(x), exactly(y), exactly(z), got, strict=True):
        exact = a * b + c
        below, above = (np.nextafter(result, np.float32(side)) for side in (-np.inf, np.inf))
        off = Fraction(float(result)) - exact
        low, high = Fraction(float(result)) - Fraction(float(below)), Fraction(float(above)) - Fraction(float(result))
        if mode == "rn":
            assert -high / 2 <= off <= low / 2
        elif mode == "rm" or (mode == "rz" and exact > 0):
            assert -high < off <= 0
        else:
            assert 0 <= off < low


@pytest.mark.parametrize(("name", "dtype"), [("cvt.rn.f16.f32", torch.float16), ("cvt.rn.bf16.f32", torch.bfloat16)])
def test_halves_are_those_of_torch(name: str, dtype: Any) -> None:
    values = np.concatenate([floats(20000, 5), np.float32(2) ** np.linspace(-30, 17, 20000, dtype=np.float32)])
    wanted = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(compute(name, values), wanted)
    pair = compute(name.replace(".f32", "x2.f32"), values, values[::-1])
    np.testing.assert_array_equal(pair, wanted.astype(np.uint32) << 16 | wanted[::-1])
    assert compute(name, np.full(1, np.nan, np.float32))[0] == 0x7FFF


def test_e4m3_is_that_of_torch_and_saturates() -> None:
    values = np.concatenate([np.linspace(-448, 448, 50001), np.linspace(-0.1, 0.1, 50001)]).astype(np.float32)
    wanted = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint16)
    name = "cvt.rn.satfinite.e4m3x2.f32"
    np.testing.assert_array_equal(compute(name, values, values[::-1]), wanted << 8 | wanted[::-1])
    beyond = np.array([1e9, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(compute(name, np.zeros(4, np.float32), beyond), [0x7E, 0x7E, 0xFE, 0x7F])


@pytest.mark.parametrize(
    ("name", "operands", "wanted"),
    [
        ("cvt.pack.sat.s8.s32.b32", (-300, 5, 0x1234ABCD), 0xABCD8005),
        ("prmt.b32", (0x33221100, 0x77665544, 0x7250), 0x77225500),
        ("prmt.b32", (0x33228000, 0x77665544, 0x0009), 0x000000FF),
        ("bfi.b32", (0x5, 0xFFFFFFFF, 4, 8), 0xFFFFF05F),
        ("mul.hi.s32", (-3, 1 << 30), 0xFFFFFFFF),
        ("shr.s32", (-8, 40), 0xFFFFFFFF),
        ("shr.u32", (0x80000000, 40), 0),
        ("shl.b32", (1, 32), 0),
        ("max.f16x2", (0x7E003C00, 0x40004400), 0x40004400),
        ("abs.bf16x2", (0xBF80C000,), 0x3F804000),
    ],
)
def test_instructions_on_bits(name: str, operands: tuple[int, ...], wanted: int) -> None:
    known = operation(name, Approximation())
    assert known is not None
    given = [np.array([o], np.int64).astype(TYPES[kind]) for o, kind in zip(operands, known.operands, strict=True)]
    assert int(compute(name, *given).view(np.uint32)[0]) == wanted


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 127.5, -128.5, 0.5, 1.5, -2.5])
def test_int8_saturates_and_nan_is_0(value: float) -> None:
    wanted = 0 if np.isnan(value) else int(np.clip(np.rint(value), -128, 127))
    assert compute("cvt.rni.sat.s8.f32", np.full(1, value, np.float32))[0] == wanted


def test_approximate_units_use_all_of_their_error_on_both_sides() -> None:
    x = np.linspace(0.25, 4, 10001, dtype=np.float32)
    exact = 1 / np.sqrt(x.astype(np.float64))
    for side in (-1.0, 1.0):
        known = Approximation(side=side).operation("rsqrt.approx.ftz.f32")
        assert known is not None
        off = (known.function(x) / exact - 1) * side * 2**22.9
        assert off.max() <= 1
        assert np.median(off) > 0.6
        assert off.min() > 0
    drawn = [Approximation(seed).operation("rsqrt.approx.f32") for seed in (1, 2)]
    assert not np.array_equal(*[each.function(x) for each in drawn if each is not None])
