"""Kernels of every form, their inputs, and their comparison with the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig, choose
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.runtime.accuracy.float_formats import ulp_size
from tests.helpers.plugins.kernels import NUMPY, Array, Kernels

ROWS = 3
EPSILON = 1e-6
# In ULPs of the float64 result; half types are rounded once from float32.
LIMITS = {"float32": 4.0, "float16": 0.51, "bfloat16": 0.51}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no scale": {"scale": "none"},
    "one plus": {"scale": "one_plus_weight"},
    "cast first": {"cast_first": True},
    "cast first, one plus": {"cast_first": True, "scale": "one_plus_weight"},
    "float32 weight": {"weight_dtype": "float32"},
    "silu before": {"gate": "before", "activation": "silu"},
    "sigmoid before": {"gate": "before", "activation": "sigmoid"},
    "silu after": {"gate": "after", "activation": "silu"},
    "sigmoid after": {"gate": "after", "activation": "sigmoid"},
    "cast first, silu before": {"cast_first": True, "gate": "before", "activation": "silu"},
    "cast first, silu after": {"cast_first": True, "gate": "after", "activation": "silu"},
    "groups": {"inner": 3, "weight_rows": 3},
    "strided": {"inner": 2, "strided": True},
}
ADD_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: OPTIONS[name] for name in ("plain", "no scale", "one plus", "cast first", "strided")},
    "float32 stream": {"residual_dtype": "float32"},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    f"{dtype} {how}": {"quantized": dtype, "quantization": how}
    for dtype in ("int8", "float8_e4m3")
    for how in ("static", "per_row")
}


def kernels(width: int) -> Iterator[tuple[str, NormKernel]]:
    for dtype in LIMITS:
        for op, options in (("rms_norm", OPTIONS), ("add_rms_norm", ADD_OPTIONS)):
            for name, changes in options.items():
                yield f"{op} {dtype} {name}", NormKernel(width, EPSILON, op, dtype, **changes)  # type: ignore[arg-type]


class Case:
    """Random inputs of one kernel: every row of another size, with an outlier at another place."""

    def __init__(self, kernel: NormKernel, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, kernel.width])
        self.kernel = kernel
        sizes = np.array([0.02, 3.0, 40.0])[:, None]
        outer = -(-ROWS // kernel.inner)
        self.strides: list[int] = []

        def rows(dtype: str, size: Any) -> tuple[Array, Array]:
            """The rows, and what they lie in."""
            values = (rng.standard_normal((ROWS, kernel.width)) * size).astype(NUMPY[dtype])
            values[np.arange(ROWS), (kernel.width // 2 + 5 * np.arange(ROWS)) % kernel.width] *= 8
            if not kernel.strided:
                return values, values
            inner = kernel.width + 16
            held = np.full((outer, kernel.inner + 1, inner), np.nan, NUMPY[dtype])
            for row in range(ROWS):
                held[row // kernel.inner, row % kernel.inner, : kernel.width] = values[row]
            self.strides += [(kernel.inner + 1) * inner, inner]
            return values, held

        self.x, x_held = rows(kernel.dtype, sizes)
        self.given: dict[str, Any] = {}
        self.residual = self.gate = self.weight = None
        if kernel.adds:
            self.residual, self.given["residual"] = rows(kernel.residual_dtype or kernel.dtype, sizes)
        if kernel.gate != "none":
            self.gate, self.given["gate"] = rows(kernel.dtype, 2.0)
        if kernel.scale != "none":
            weight = 0.3 * rng.standard_normal((kernel.weight_rows, kernel.width)) + (kernel.scale == "weight")
            self.weight = self.given["weight"] = weight.astype(NUMPY[kernel.weight_dtype or kernel.dtype])
        self.given |= {"x": x_held, "rows": ROWS, "strides": self.strides}

    @property
    def sum(self) -> Array:
        """What is normalized, as it is stored."""
        if self.residual is None:
            return self.x
        return (self.x.astype(np.float32) + self.residual.astype(np.float32)).astype(self.residual.dtype)

    def expected(self) -> Array:
        kernel = self.kernel
        spec = NormSpec(float(np.float32(EPSILON)), scale=kernel.scale, gate=kernel.gate, activation=kernel.activation)
        weight, h = None, self.sum.astype(np.float64)
        if self.weight is not None:
            weight = self.weight.astype(np.float64)[np.arange(ROWS) % kernel.weight_rows]
        gate = None if self.gate is None else self.gate.astype(np.float64)
        if not kernel.cast_first or kernel.y_dtype == "float32":  # float32 is what it is computed in
            return reference(spec, h, weight, gate=gate)

        def rounded(values: Array) -> Array:
            return values.astype(NUMPY[kernel.y_dtype]).astype(np.float64)

        scale = np.ones(()) if weight is None else weight + (kernel.scale == "one_plus_weight")
        bare = spec.replace(scale="none")
        if kernel.gate != "after":
            return rounded(reference(bare, h, gate=gate)) * rounded(scale)
        n = reference(bare.replace(gate="none", activation="none"), h)
        silu = self.gate.astype(np.float64) / (1 + np.exp(-self.gate.astype(np.float64)))
        return rounded(rounded(n) * rounded(scale)) * silu


def named_kernels(width: int) -> list[tuple[str, NormKernel, LaunchConfig]]:
    """All kernels of one width, laid out for few and for many rows."""
    return list(
        {
            (kernel, config): (name, kernel, config)
            for name, kernel in kernels(width)
            for config in (choose(kernel, rows, 90) for rows in (ROWS, None))
        }.values()
    )


def check_against_reference(named: list[Any], library: Kernels) -> None:
    for number, (name, kernel, config) in enumerate(named):
        case = Case(kernel)
        outputs = library.run(number, **case.given)
        if kernel.adds:
            np.testing.assert_array_equal(outputs["sum"], case.sum, err_msg=name)
        expected = case.expected()
        off = np.abs(outputs["y"].astype(np.float64) - expected) / ulp_size(expected, outputs["y"].dtype)
        # Rounded twice, a value next to a tie may fall to the other side: one ULP of the first rounding, scaled.
        limit = 2.51 if kernel.cast_first and kernel.dtype != "float32" else LIMITS[kernel.y_dtype]
        assert off.max() <= limit, f"{name}, {config}: {off.max():.3f} ULP"
        if kernel.cast_first and kernel.width >= 1000:
            assert np.mean(off > 0.5001) < 0.01 or kernel.dtype == "float32", name


def quantized_kernels(width: int) -> Iterator[NormKernel]:
    for dtype in LIMITS:
        for op in ("rms_norm", "add_rms_norm"):
            for changes in QUANTIZED.values():
                yield NormKernel(width, EPSILON, op, dtype, **changes)  # type: ignore[arg-type]


def with_unquantized(cases: Sequence[tuple[NormKernel, LaunchConfig]]) -> list[tuple[NormKernel, LaunchConfig]]:
    """Each kernel, and the same one without quantization behind it."""
    return [
        (each, config)
        for kernel, config in cases
        for each in (kernel, kernel.replace(quantized="none", quantization="none"))
    ]


def check_quantized(cases: Sequence[tuple[NormKernel, LaunchConfig]], library: Kernels) -> None:
    """Quantized output is that of the norm, quantized; for the kernels of `with_unquantized`."""
    for number in range(0, len(cases), 2):
        kernel = cases[number][0]
        case = Case(kernel)
        y = library.run(number + 1, **case.given)["y"].astype(np.float32)
        largest = np.float32(127.0 if kernel.quantized == "int8" else 448.0)
        if kernel.quantization == "static":
            scale = np.full(1, 0.01, np.float32)  # some values saturate
            got = library.run(number, **case.given, scale=scale)
        else:
            got = library.run(number, **case.given)
            scale = np.abs(y).max(axis=1, keepdims=True) / largest
            np.testing.assert_array_equal(got["row_scale"], scale[:, 0])
        scaled = y / scale
        if kernel.quantized == "int8":
            wanted = np.clip(np.rint(scaled), -128, 127).astype(np.int8)
        else:
            wanted = np.clip(scaled, -largest, largest).astype(NUMPY["float8_e4m3"])
        np.testing.assert_array_equal(got["y"].view(np.uint8), wanted.view(np.uint8), err_msg=str(kernel))


SPECIAL = [NormKernel(256, EPSILON, **changes) for changes in QUANTIZED.values()]


def check_quantized_nan_and_infinity(cases: Sequence[NormKernel], library: Kernels) -> None:
    """For kernels of `SPECIAL`."""
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float16)
    x[0, :2], x[1, 5] = (12, -12), np.nan  # row 0 overflows float16; all of row 1 is NaN
    weight = np.ones(256, np.float16)
    weight[:2] = 60000
    for number, kernel in enumerate(cases):
        given = {"scale": np.full(1, 0.5, np.float32)} if kernel.quantization == "static" else {}
        got = library.run(number, x, weight=weight, **given)
        y = got["y"].astype(np.float32)
        int8 = kernel.quantized == "int8"
        nan = 0.0 if int8 else np.nan
        assert np.array_equal(y[1], np.full(256, nan, np.float32), equal_nan=True), str(kernel)
        if kernel.quantization == "static":
            np.testing.assert_array_equal(y[0, :2], [127, -128] if int8 else [448, -448])
            assert (np.abs(y[0, 2:]) < 50).all()
            assert (y[0, 2:] != 0).any()
        else:
            np.testing.assert_array_equal(got["row_scale"][:2], [np.inf, 1])
            np.testing.assert_array_equal(y[0], [nan, nan] + [0] * 254)
        assert np.isfinite(y[2]).all()
