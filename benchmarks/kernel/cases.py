"""The rows of the table: what is computed, on which tensors, and which rows fit in the time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel

EPSILON: Final = 1e-6
OPS: Final = ("rms_norm", "add_rms_norm")
DTYPES: Final = ("bfloat16", "float16", "float32")
# By the name on the command line: dtype of a quantized output, and how it is scaled.
OUTPUTS: Final = {
    "same": ("none", "none"),
    "fp8-static": ("float8_e4m3", "static"),
    "fp8-per-row": ("float8_e4m3", "per_row"),
    "int8-static": ("int8", "static"),
}
# The whole grid; 1001 is odd, so that no two elements are read at once.
WIDTHS: Final = (64, 128, 1001, 2048, 3072, 4096, 5120, 7168, 8192, 16384)
ROWS: Final = (1, 8, 64, 128, 132, 133, 2048, 8192, 32768)
# Width at which dtypes other than bfloat16 and quantized outputs are measured by default.
_MAIN_WIDTH: Final = 4096
# Bytes of all tensors of a graph, and the most and fewest launches in it; fewer if they exceed the memory.
GRAPH_BYTES: Final = 256 << 20
MOST_LAUNCHES: Final = 64
FEWEST_LAUNCHES: Final = 4
_MOST_BYTES: Final = 4 << 30
_TORCH: Final = {"int8": torch.int8, "float8_e4m3": torch.float8_e4m3fn}
# The next row takes at most as long as the slowest of so many rows before it.
_RECENT: Final = 5


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    kernel: NormKernel
    rows: int

    @property
    def op(self) -> str:
        """Operator with its quantized output."""
        quantized = "" if self.kernel.quantized == "none" else f" {self.kernel.quantized} {self.kernel.quantization}"
        return f"{self.kernel.op}{quantized}"

    @property
    def name(self) -> str:
        """Operator, dtype, rows and width."""
        return f"{self.op} {self.kernel.dtype} {self.rows}x{self.kernel.width}"

    @property
    def size(self) -> int:
        """Bytes that must be read and written, without the weight and the scale, which many rows share."""
        return self.rows * self.kernel.row_bytes()

    @property
    def launches(self) -> int:
        """Launches in a graph, each with tensors of its own."""
        wanted = max(FEWEST_LAUNCHES, min(MOST_LAUNCHES, GRAPH_BYTES // self.size))
        return max(1, min(wanted, _MOST_BYTES // self.size))


@dataclass(frozen=True)
class Tensors:
    """The tensors of one launch: x, residual, y and sum are [rows, width], weight [width], scale [1], row_scale [rows].

    What the operator does not have is None.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    scale: Tensor | None
    y: Tensor
    sum: Tensor | None
    row_scale: Tensor | None

    def inputs(self) -> list[Tensor]:
        """In the kernel's order."""
        return [t for t in (self.x, self.residual, self.weight, self.scale) if t is not None]

    def outputs(self) -> list[Tensor]:
        """In the kernel's order."""
        return [t for t in (self.y, self.sum, self.row_scale) if t is not None]

    def with_outputs(self, outputs: Sequence[Tensor]) -> Tensors:
        """The same inputs with other outputs, in the kernel's order.

        Raises:
            ValueError: their number is not that of the operator.
        """
        names = [name for name in ("y", "sum", "row_scale") if getattr(self, name) is not None]
        found = dict(zip(names, outputs, strict=True))
        if "row_scale" in found:
            found["row_scale"] = found["row_scale"].reshape(-1)
        return dataclasses.replace(self, **found)

    def part(self, rows: slice) -> Tensors:
        """Some of the rows."""
        names = ("x", "residual", "y", "sum", "row_scale")
        found = {name: tensor[rows] for name in names if (tensor := getattr(self, name)) is not None}
        return dataclasses.replace(self, **found)


def unwritten(shape: Sequence[int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A tensor of NaN, or of 127 in int8: an output that a kernel does not write is found to be wrong."""
    made = torch.empty(*shape, device=device, dtype=dtype)
    made.view(torch.int8).fill_(127 if dtype == torch.int8 else -1)
    return made


def tensors(case: Case, device: str = "cuda") -> Tensors:
    """New random inputs, and unwritten outputs."""
    kernel, shape = case.kernel, (case.rows, case.kernel.width)
    dtype = getattr(torch, kernel.dtype)
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    return Tensors(
        x,
        torch.randn(shape, device=device).to(dtype) if kernel.adds else None,
        (1 + 0.5 * torch.randn(kernel.width, device=device)).to(dtype),
        torch.tensor([0.02], device=device) if kernel.quantization == "static" else None,
        unwritten(shape, _TORCH.get(kernel.quantized, dtype), device),
        unwritten(shape, dtype, device) if kernel.adds else None,
        torch.full((case.rows,), math.nan, device=device) if kernel.quantization == "per_row" else None,
    )


def case_of(op: str, output: str, dtype: str, rows: int, width: int) -> Case:
    """One case; `output` is a key of OUTPUTS.

    Raises:
        UsageError: the kernel does not support a value.
    """
    quantized, quantization = OUTPUTS[output]
    return Case(
        NormKernel(width, EPSILON, op, dtype, quantized=quantized, quantization=quantization),  # type: ignore[arg-type]
        rows,
    )


def grid(
    rows: Sequence[int] = ROWS,
    widths: Sequence[int] = WIDTHS,
    ops: Sequence[str] = OPS,
    outputs: Sequence[str] = tuple(OUTPUTS),
    dtypes: Sequence[str] = ("bfloat16",),
) -> list[Case]:
    """Every combination; few rows first, so that a run that is stopped has measured every operator and width."""
    combined = itertools.product(rows, widths, outputs, ops, dtypes)
    return [case_of(op, output, dtype, count, width) for count, width, output, op, dtype in combined]


def whole_grid() -> list[Case]:
    """The rows of `--all`: the grid in bfloat16, and the other dtypes at one width."""
    return grid() + grid(widths=(_MAIN_WIDTH,), outputs=("same",), dtypes=DTYPES[1:])


def default_cases() -> list[Case]:
    """The rows that are measured without options, the most telling first."""
    plain = ("same",)
    quantized = tuple(name for name in OUTPUTS if name != "same")
    chosen = [
        *grid((1, 64, 2048), (_MAIN_WIDTH, 8192), outputs=plain),
        *grid((64, 2048), (_MAIN_WIDTH,), outputs=quantized),
        *grid((1, 2048), (3072, 5120, 7168), outputs=plain),
        *grid((1, 2048), (_MAIN_WIDTH,), outputs=plain, dtypes=DTYPES[1:]),
        *grid((64, 2048), (64, 128, 1001, 2048, 16384), outputs=plain),
        *grid((8192, 32768), (_MAIN_WIDTH,), outputs=plain),
        *grid((1, 8192), (_MAIN_WIDTH,), outputs=("fp8-static",)),
        *grid((64, 133), (3072, 5120, 7168), outputs=plain),
        *grid((32768,), (128, 8192), outputs=plain),
        *grid((8, 128, 132, 133), (_MAIN_WIDTH,), outputs=plain),
        *grid((1,), (64, 128, 1001, 2048, 16384), outputs=plain),
        *grid((133,), (8192,), outputs=plain),
    ]
    return list(dict.fromkeys(chosen))


class Budget:
    """Gives cases until the time is over.

    Args:
        seconds: for all cases together, from `began` on.
        began: seconds of the clock at the start.
        clock: seconds.

    Attributes:
        left: the cases that were not given.
    """

    def __init__(self, seconds: float, began: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._end = began + seconds
        self.left: list[Case] = []

    def given(self, cases: Sequence[Case]) -> Iterator[Case]:
        """The cases, in order, while the time that one of the last ones took is still left."""
        taken: list[float] = []
        for index, case in enumerate(cases):
            started = self._clock()
            if started + max(taken[-_RECENT:], default=0.0) > self._end:
                self.left = list(cases[index:])
                return
            yield case
            taken.append(self._clock() - started)
