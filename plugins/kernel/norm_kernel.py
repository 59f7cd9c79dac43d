"""What one CUDA kernel computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, assert_never, get_args

from ...models.dtypes import BYTES
from ...models.errors import UsageError
from ...models.spec import Gate, Scale

Op = Literal["rms_norm", "add_rms_norm"]
Dtype = Literal["float32", "float16", "bfloat16"]
Activation = Literal["silu", "sigmoid"]
Quantized = Literal["none", "int8", "float8_e4m3"]
Quantization = Literal["none", "static", "per_row"]

SOURCE_FOLDER: Final = Path(__file__).parent / "cuda"
HEADERS: Final = ("numbers.cuh", "rms_norm.cuh")
SOURCE: Final = "kernel.cu"

WIDEST: Final = 65536
_CHOICES = {
    "op": get_args(Op), "dtype": get_args(Dtype), "residual_dtype": get_args(Dtype), "weight_dtype": get_args(Dtype),
    "y_dtype": get_args(Dtype), "scale": get_args(Scale), "gate": get_args(Gate), "activation": get_args(Activation),
    "quantized": get_args(Quantized), "quantization": get_args(Quantization),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NormKernel:
    """One kernel's meaning; statistics are always float32. See `cuda/rms_norm.cuh` for the formula.

    Attributes:
        op: `rms_norm`, or `add_rms_norm`, which normalizes x + residual and writes that sum too.
        width: values normalized together, 1 to 65,536.
        epsilon: added to the mean of squares.
        dtype: of x and the gate.
        residual_dtype: of the residual and the sum; x's where it is None.
        weight_dtype: of the weight; x's where it is None.
        y_dtype: of the result before it is quantized; x's where it is None.
        scale: no scale, the weight, or 1 + weight (added in float32).
        cast_first: the normalized value is rounded to y's dtype before it is scaled, and so is the scale.
        exact_sum: the statistics are those of x + residual as it is in float32, not rounded to the sum's dtype.
        gate: a second input of x's shape multiplies before the norm, after it, or not at all.
        activation: of the gate.
        quantized: dtype of the output where it is quantized. int8 goes from -128 to 127, e4m3 to ±448; both saturate.
        quantization: by one float32 scale that is given, or by one for each row that is written, largest / 127 or 448.
        inner: how many rows share an outer stride: heads of a token, or groups of a row.
        weight_rows: rows of the weight, that rows of x go through in turn: `inner` for groups, else 1.
        strided: x, residual and gate have strides, in elements, of outer and inner rows; otherwise all is contiguous.

    Raises:
        UsageError: a value that no kernel may have.
    """

    width: int
    epsilon: float
    op: Op = "rms_norm"
    dtype: Dtype = "float16"
    residual_dtype: Dtype | None = None
    weight_dtype: Dtype | None = None
    y_dtype: Dtype | None = None
    scale: Scale = "weight"
    cast_first: bool = False
    exact_sum: bool = False
    gate: Gate = "none"
    activation: Activation = "silu"
    quantized: Quantized = "none"
    quantization: Quantization = "none"
    inner: int = 1
    weight_rows: int = 1
    strided: bool = False

    def __post_init__(self) -> None:
        for name in ("residual_dtype", "weight_dtype", "y_dtype"):
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
                f"a kernel has {self.inner} inner rows and {self.weight_rows} of the weight; give 1 or all."
            )
        if self.op == "rms_norm" and (self.exact_sum or self.residual_dtype != self.dtype):
            raise UsageError("exact_sum and residual_dtype are for add_rms_norm.")

    @property
    def adds(self) -> bool:
        """Whether there are a residual and a sum."""
        return self.op == "add_rms_norm"

    @property
    def has_weight(self) -> bool:
        """Whether the kernel reads a weight."""
        match self.scale:
            case "none":
                return False
            case "weight" | "one_plus_weight":
                return True
            case _:
                assert_never(self.scale)

    @property
    def has_gate(self) -> bool:
        """Whether the kernel reads a gate."""
        match self.gate:
            case "none":
                return False
            case "before" | "after":
                return True
            case _:
                assert_never(self.gate)

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
        """Of the output as it is stored."""
        return self.y_dtype_ if self.quantized == "none" else self.quantized

    @property
    def y_dtype_(self) -> str:
        """`y_dtype`, resolved."""
        return self.y_dtype or self.dtype

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of everything that has x's shape, as it is stored: x, residual and sum, gate, output."""
        residual = (self.residual_dtype or self.dtype,) if self.adds else ()
        return (self.dtype, *residual, self.out_dtype)

    def row_bytes(self) -> int:
        """Bytes read and written for each row; the weight, which stays in the cache, is left out."""
        read = BYTES[self.dtype] * (2 if self.has_gate else 1)
        streamed = 2 * BYTES[self.residual_dtype or self.dtype] if self.adds else 0
        return self.width * (read + streamed + BYTES[self.out_dtype]) + (4 if self.quantization == "per_row" else 0)

    def replace(self, **changes: object) -> NormKernel:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
