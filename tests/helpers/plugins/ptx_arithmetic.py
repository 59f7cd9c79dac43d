"""What the value instructions of PTX compute, on arrays of one value per thread.

`operation(name)` is the instruction's result type, its operands' types and its function. Everything is exact to the bit
except the approximate units, which are off by as much as the PTX ISA allows, see `Approximation`. An `add` or `mul`
without `.rn` may be contracted by the assembler; it is not here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Side = float | None
TYPES: Final[dict[str, Any]] = {
    "pred": np.bool_, "f32": np.float32, "f16": np.float16,
    **{f"{kind}{bits}": getattr(np, f"{name}{bits}")
       for kind, name in (("u", "uint"), ("b", "uint"), ("s", "int")) for bits in (8, 16, 32, 64)},
}  # fmt: skip
_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "e4m3": 0x7F}
_HALVES: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Operation:
    """One instruction: the types of the result and of the operands, and the function of arrays of those types."""

    result: str
    operands: tuple[str, ...]
    function: Callable[..., Array]


class Approximation:
    """How far approximate units are off, as a part of what the PTX ISA allows: -1 to 1, or drawn for each thread."""

    # Largest relative errors of the PTX ISA; 2^-22 for ex2 is that of its newest version.
    ERRORS: Final = {
        "rsqrt": 2**-22.9, "ex2": 2.0**-22, "rcp": 2.0**-23, "sqrt": 2.0**-23, "tanh": 2.0**-11, "div": 2.0**-22,
    }  # fmt: skip
    _EXACT: Final[dict[str, Callable[..., Array]]] = {
        "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "tanh": np.tanh,
        "div": np.divide,
    }  # fmt: skip

    def __init__(self, seed: int = 0, side: Side = None) -> None:
        self._random, self._side = np.random.default_rng(seed), side

    def operation(self, name: str) -> Operation | None:
        """`rsqrt.approx.ftz.f32` and its like."""
        unit, *modifiers = name.split(".")
        if unit not in self._EXACT or modifiers not in (["approx", "f32"], ["approx", "ftz", "f32"]):
            return None
        count = 2 if unit == "div" else 1
        return Operation("f32", ("f32",) * count, partial(self._approximate, unit, "ftz" in modifiers))

    def _approximate(self, unit: str, flush: bool, *given: Array) -> Array:
        exact = self._EXACT[unit](*((_flushed(x) if flush else x).astype(np.float64) for x in given))
        part = (
            np.full(exact.shape, self._side)
            if self._side is not None
            else self._random.choice([-1.0, 0.0, 1.0], exact.shape)
        )
        result = (exact * (1 + part * self.ERRORS[unit])).astype(np.float32)
        # Rounding must not leave what is allowed.
        over = np.abs(result.astype(np.float64) - exact) > np.abs(exact) * self.ERRORS[unit]
        result = np.where(over & np.isfinite(result), np.nextafter(result, exact.astype(np.float32)), result)
        return _flushed(result) if flush else result


def operation(name: str, approximation: Approximation) -> Operation | None:
    """The operation of an instruction; None for an unknown one."""
    return _OPERATIONS.get(name) or approximation.operation(name)


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def _fma(x: Array, y: Array, z: Array, mode: str) -> Array:
    """x * y + z, rounded once: in float64 the product is exact, and the sum is rounded to odd before it is narrowed."""
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    inexact = np.isfinite(total) & np.isfinite(error) & (error != 0) & ((total.view(np.uint64) & np.uint64(1)) == 0)
    total = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    nearest = total.astype(np.float32)
    if mode == "rn":
        return nearest
    down, up = np.float32(-np.inf), np.float32(np.inf)
    if mode == "rm":
        return np.where(nearest > total, np.nextafter(nearest, down), nearest)
    if mode == "rp":
        return np.where(nearest < total, np.nextafter(nearest, up), nearest)
    return np.where(np.abs(nearest) > np.abs(total), np.nextafter(nearest, np.float32(0)), nearest)


def _half_bits(kind: str, x: Array, mode: str = "rn") -> Array:
    """float32 to 16 bits."""
    half = x.astype(_HALVES[kind])
    if mode == "rz":
        half = np.where(np.abs(half.astype(np.float32)) > np.abs(x), np.nextafter(half, half.dtype.type(0)), half)
    return np.where(np.isnan(x), np.uint16(_NAN[kind]), half.view(np.uint16))


def _eight_bits(x: Array) -> Array:
    """float32 to e4m3, saturated."""
    value = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(_NAN["e4m3"]), value)


def _pair(kind: str, high: Array, low: Array, mode: str = "rn", relu: bool = False) -> Array:
    high, low = (np.maximum(x, np.float32(0)) if relu else x for x in (high, low))
    return (_half_bits(kind, high, mode).astype(np.uint32) << 16) | _half_bits(kind, low, mode)


def _packed(function: Callable[..., Array], kind: str, *words: Array) -> Array:
    """A function of the halves of words."""
    dtype = _HALVES[kind]
    results = []
    for shift in (0, 16):
        parts = [(word >> np.uint32(shift)).astype(np.uint16).view(dtype).astype(np.float32) for word in words]
        results.append(function(*parts).astype(dtype).view(np.uint16).astype(np.uint32))
    return results[0] | results[1] << np.uint32(16)


def _to_integer(x: Array, kind: str, how: str) -> Array:
    """float32 to an integer: saturated, NaN to 0."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](x.astype(np.float64))
    limits = np.iinfo(TYPES[kind])
    return np.where(np.isnan(x), 0, np.clip(whole, limits.min, limits.max)).astype(TYPES[kind])


def _pack_saturated(a: Array, b: Array, c: Array, limits: tuple[int, int]) -> Array:
    """cvt.pack: a and b in the low half, a above b; c's low half above them."""
    first, second = (np.clip(x, *limits).astype(np.int8).view(np.uint8).astype(np.uint32) for x in (a, b))
    return (c << np.uint32(16)) | (first << np.uint32(8)) | second


def _permute(a: Array, b: Array, selectors: Array) -> Array:
    """prmt: each byte of the result is one of the eight of a and b, or its sign in all bits."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(1, np.uint32)
    for i in range(4):
        selector = (selectors >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((selector & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        result = result | np.where(selector & 8, sign, byte) << np.uint32(8 * i)
    return result


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi."""
    ones = np.uint64(1) << np.minimum(length & 255, 32).astype(np.uint64)
    mask = ((ones - np.uint64(1)) << np.minimum(position & 255, 32).astype(np.uint64)).astype(np.uint32)
    return (b & ~mask) | ((a.astype(np.uint64) << position.astype(np.uint64)).astype(np.uint32) & mask)


def _shift(x: Array, by: Array, left: bool) -> Array:
    bits = 8 * x.dtype.itemsize
    held = np.minimum(by, np.uint32(bits - 1)).astype(x.dtype)
    shifted = x << held if left else x >> held
    over = (x >> x.dtype.type(bits - 1)) if not left and x.dtype.kind == "i" else np.zeros_like(x)
    return np.where(by >= bits, over, shifted)


def _high(x: Array, y: Array) -> Array:
    wide = np.int64 if x.dtype.kind == "i" else np.uint64
    return ((x.astype(wide) * y.astype(wide)) >> wide(8 * x.dtype.itemsize)).astype(x.dtype)


_COMPARISONS: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _ordered(compare: Callable[[Array, Array], Array], with_nan: bool, x: Array, y: Array) -> Array:
    nan = np.isnan(x) | np.isnan(y)
    return compare(x, y) | nan if with_nan else compare(x, y) & ~nan


def _integers() -> dict[str, Operation]:
    found: dict[str, Operation] = {}
    for kind, bits in itertools.product("us", (16, 32, 64)):
        t = f"{kind}{bits}"
        two: dict[str, Callable[..., Array]] = {
            "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
        }  # fmt: skip
        found |= {f"{name}.{t}": Operation(t, (t, t), function) for name, function in two.items()}
        found[f"mad.lo.{t}"] = Operation(t, (t, t, t), lambda x, y, z: x * y + z)
        found[f"shr.{t}"] = Operation(t, (t, "u32"), partial(_shift, left=False))
        found |= {f"setp.{name}.{t}": Operation("pred", (t, t), f) for name, f in _COMPARISONS.items()}
        if kind == "s":
            found |= {f"neg.{t}": Operation(t, (t,), np.negative), f"abs.{t}": Operation(t, (t,), np.abs)}
        if bits < 64:
            wide = f"{kind}{2 * bits}"
            found[f"mul.wide.{t}"] = Operation(
                wide, (t, t), lambda x, y, w=wide: x.astype(TYPES[w]) * y.astype(TYPES[w])
            )
            found[f"mad.wide.{t}"] = Operation(
                wide, (t, t, wide), lambda x, y, z, w=wide: x.astype(TYPES[w]) * y.astype(TYPES[w]) + z
            )
            found[f"mul.hi.{t}"] = Operation(t, (t, t), _high)
    for t in ("pred", "b16", "b32", "b64"):
        bitwise: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        found |= {f"{name}.{t}": Operation(t, (t, t), function) for name, function in bitwise.items()}
        found[f"not.{t}"] = Operation(t, (t,), np.invert)
        if t != "pred":
            found[f"shl.{t}"] = Operation(t, (t, "u32"), partial(_shift, left=True))
            found[f"setp.eq.{t}"], found[f"setp.ne.{t}"] = (
                Operation("pred", (t, t), _COMPARISONS[c]) for c in ("eq", "ne")
            )
    for t in (t for t in TYPES if t != "f16"):
        found[f"mov.{t}"] = Operation(t, (t,), np.copy)
        found[f"selp.{t}"] = Operation(t, (t, t, "pred"), lambda x, y, p: np.where(p, x, y))
    found["prmt.b32"] = Operation("b32", ("b32",) * 3, _permute)
    found["bfi.b32"] = Operation("b32", ("b32", "b32", "u32", "u32"), _insert)
    return found


def _floats() -> dict[str, Operation]:
    found: dict[str, Operation] = {}
    for suffix in (".f32", ".rn.f32"):
        for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            found[name + suffix] = Operation("f32", ("f32", "f32"), function)
    found["div.rn.f32"] = Operation("f32", ("f32", "f32"), np.divide)
    found["rcp.rn.f32"] = Operation("f32", ("f32",), lambda x: np.float32(1) / x)
    found["sqrt.rn.f32"] = Operation("f32", ("f32",), np.sqrt)
    found["max.f32"], found["min.f32"] = (
        Operation("f32", ("f32",) * 2, np.fmax),
        Operation("f32", ("f32",) * 2, np.fmin),
    )
    found["neg.f32"] = Operation("b32", ("b32",), lambda x: x ^ np.uint32(0x80000000))
    found["abs.f32"] = Operation("b32", ("b32",), lambda x: x & np.uint32(0x7FFFFFFF))
    for mode in ("rn", "rm", "rp", "rz"):
        found[f"fma.{mode}.f32"] = Operation("f32", ("f32",) * 3, partial(_fma, mode=mode))
    for name, compare in _COMPARISONS.items():
        found[f"setp.{name}.f32"] = Operation("pred", ("f32", "f32"), partial(_ordered, compare, False))
        found[f"setp.{name}u.f32"] = Operation("pred", ("f32", "f32"), partial(_ordered, compare, True))
    found["setp.nan.f32"] = Operation("pred", ("f32", "f32"), lambda x, y: np.isnan(x) | np.isnan(y))
    found["setp.num.f32"] = Operation("pred", ("f32", "f32"), lambda x, y: ~(np.isnan(x) | np.isnan(y)))
    for kind in _HALVES:
        found[f"abs.{kind}x2"] = Operation("b32", ("b32",), lambda x: x & np.uint32(0x7FFF7FFF))
        found[f"max.{kind}x2"] = Operation("b32", ("b32", "b32"), partial(_packed, np.fmax, kind))
        found[f"max.NaN.{kind}x2"] = Operation("b32", ("b32", "b32"), partial(_packed, np.maximum, kind))
        found[f"min.{kind}x2"] = Operation("b32", ("b32", "b32"), partial(_packed, np.fmin, kind))
    return found


def _conversions() -> dict[str, Operation]:
    found: dict[str, Operation] = {"cvt.f32.f16": Operation("f32", ("f16",), lambda x: x.astype(np.float32))}
    widths = [f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)]
    for to, of in itertools.permutations(widths, 2):
        found[f"cvt.{to}.{of}"] = Operation(to, (of,), lambda x, t=TYPES[to]: x.astype(t))
    for kind, mode in itertools.product(_HALVES, ("rn", "rz")):
        found[f"cvt.{mode}.{kind}.f32"] = Operation("b16", ("f32",), partial(_half_bits, kind, mode=mode))
        found[f"cvt.{mode}.{kind}x2.f32"] = Operation("b32", ("f32", "f32"), partial(_pair, kind, mode=mode))
        found[f"cvt.{mode}.relu.{kind}x2.f32"] = Operation(
            "b32", ("f32",) * 2, partial(_pair, kind, mode=mode, relu=True)
        )
    found["cvt.rn.satfinite.e4m3x2.f32"] = Operation(
        "b16", ("f32", "f32"), lambda high, low: _eight_bits(high).astype(np.uint16) << 8 | _eight_bits(low)
    )
    for how, kind, sat in itertools.product(("rni", "rzi", "rmi", "rpi"), ("s8", "u8", "s32", "u32"), ("", ".sat")):
        found[f"cvt.{how}{sat}.{kind}.f32"] = Operation(kind, ("f32",), partial(_to_integer, kind=kind, how=how))
    for kind in ("s32", "u32"):
        found[f"cvt.rn.f32.{kind}"] = Operation("f32", (kind,), lambda x: x.astype(np.float32))
    found["cvt.sat.f32.f32"] = Operation(
        "f32", ("f32",), lambda x: np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1))
    )
    for kind, limits in (("s8", (-128, 127)), ("u8", (0, 255))):
        found[f"cvt.pack.sat.{kind}.s32.b32"] = Operation(
            "b32", ("s32", "s32", "b32"), partial(_pack_saturated, limits=limits)
        )
    return found


_OPERATIONS: Final = {**_integers(), **_floats(), **_conversions()}
