"""NormKernel: what one CUDA kernel computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, assert_never, get_args

from ...models.dtypes import BYTES
from ...models.errors import UsageError
from ...models.spec import Activation, Gate, Scale, reads_gate, reads_weight

Op = Literal["rms_norm", "add_rms_norm"]
Dtype = Literal["float32", "float16", "bfloat16"]
Quantized = Literal["none", "int8", "float8_e4m3"]
Quantization = Literal["none", "static", "per_row"]

SOURCE_FOLDER: Final = Path(__file__).parent / "cuda"
HEADERS: Final = ("numbers.cuh", "rms_norm.cuh")
SOURCE: Final = "kernel.cu"

WIDEST: Final = 65536
_CHOICES = {
    "op": get_args(Op), "dtype": get_args(Dtype), "residual_dtype": get_args(Dtype), "weight_dtype": get_args(Dtype),
    "scale": get_args(Scale), "gate": get_args(Gate), "activation": get_args(Activation),
    "quantized": get_args(Quantized), "quantization": get_args(Quantization),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NormKernel:
    """What one kernel computes; statistics are always float32. See `cuda/rms_norm.cuh` for the formula.

    Attributes:
        op: `rms_norm`, or `add_rms_norm`, which normalizes x + residual and also writes the sum.
        width: elements normalized together, 1 to 65,536.
        epsilon: added to the mean of squares.
        dtype: dtype of x and the gate.
        residual_dtype: dtype of the residual, the sum and the result before quantization; None for x's.
        weight_dtype: dtype of the weight; None for x's.
        scale: no scale, the weight, or 1 + weight (added in float32).
        cast_first: whether the normalized value and the scale are rounded to y's dtype before they are multiplied.
        gate: a second input of x's shape multiplies before the norm, after it, or not at all.
        activation: activation of the gate; none without one.
        quantized: dtype of a quantized output, or none. int8 saturates at -128 and 127, e4m3 at ±448, also an infinite
            y. NaN stays NaN in e4m3 and becomes 0 in int8, as a GPU converts it; ONNX does not define the
            latter, and ONNX Runtime's CPU provider returns -128.
        quantization: `static`: by one given float32 scale; `per_row`: by the largest absolute value of the row / 127 or
            448 (1 if all are 0), which is an output. The largest passes over NaN; if it is infinite, so is the scale,
            and y / scale is NaN where y is infinite and 0 elsewhere.
        inner: number of rows with a common outer stride: heads of a token, or groups of a row.
        weight_rows: rows of the weight, which rows of x use in turn: `inner` for groups, else 1.
        strided: whether x, residual and gate have strides of outer and inner rows, in elements; else all is contiguous.

    Raises:
        UsageError: a field has an invalid value.
    """

    width: int
    epsilon: float
    op: Op = "rms_norm"
    dtype: Dtype = "float16"
    residual_dtype: Dtype | None = None
    weight_dtype: Dtype | None = None
    scale: Scale = "weight"
    cast_first: bool = False
    gate: Gate = "none"
    activation: Activation = "none"
    quantized: Quantized = "none"
    quantization: Quantization = "none"
    inner: int = 1
    weight_rows: int = 1
    strided: bool = False

    def __post_init__(self) -> None:
        for name in ("residual_dtype", "weight_dtype"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.dtype)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"a kernel's {name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}."
                )
        if not 1 <= self.width <= WIDEST:
            raise UsageError(f"a kernel's width is {self.width}; it must be from 1 to {WIDEST}.")
        if not 0 <= self.epsilon < float("inf"):
            raise UsageError(f"a kernel's epsilon is {self.epsilon}; it must be a finite number of at least 0.")
        if (self.quantized == "none") != (self.quantization == "none"):
            raise UsageError("a kernel's quantized and quantization must both be given, or neither.")
        if self.inner < 1 or self.weight_rows not in (1, self.inner):
            raise UsageError(
                f"weight_rows of a kernel: expected 1 or inner ({self.inner}, at least 1), got {self.weight_rows}."
            )
        if (self.gate == "none") != (self.activation == "none"):
            raise UsageError("a kernel's gate and activation must both be given, or neither.")
        if self.adds and self.has_gate:
            raise UsageError("a kernel's gate requires op rms_norm.")
        if not self.adds and self.residual_dtype != self.dtype:
            raise UsageError("a kernel's residual_dtype requires op add_rms_norm.")

    @property
    def adds(self) -> bool:
        """Whether there are a residual and a sum."""
        return self.op == "add_rms_norm"

    @property
    def has_weight(self) -> bool:
        """Whether the kernel reads a weight."""
        return reads_weight(self.scale)

    @property
    def has_gate(self) -> bool:
        """Whether the kernel reads a gate."""
        return reads_gate(self.gate)

    @property
    def gates_first(self) -> bool:
        """Whether the gate multiplies x before the norm."""
        match self.gate:
            case "none" | "after":
                return False
            case "before":
                return True
            case _:
                assert_never(self.gate)

    @property
    def out_dtype(self) -> str:
        """Dtype of the output in memory."""
        return self.y_dtype if self.quantized == "none" else self.quantized

    @property
    def y_dtype(self) -> Dtype:
        """Dtype of the result before quantization: that of what is normalized."""
        return self.residual_dtype or self.dtype

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes in memory of all tensors of x's shape: x and gate, residual and sum, output."""
        residual = (self.residual_dtype or self.dtype,) if self.adds else ()
        return (self.dtype, *residual, self.out_dtype)

    def row_bytes(self) -> int:
        """Bytes read and written per row, without the weight, which stays in the cache."""
        read = BYTES[self.dtype] * (2 if self.has_gate else 1)
        streamed = 2 * BYTES[self.residual_dtype or self.dtype] if self.adds else 0
        return self.width * (read + streamed + BYTES[self.out_dtype]) + (4 if self.quantization == "per_row" else 0)

    def replace(self, **changes: object) -> NormKernel:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
