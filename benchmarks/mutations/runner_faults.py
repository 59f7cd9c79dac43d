"""Faults of runners: a runtime returns outputs that its model did not compute. Only outputs are affected.

Rounding a float16 model's outputs to bfloat16 is not among them: that error is as large as PyTorch's own error in
float16, so the rule for outputs allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from rmsnorm_deploy.runtime.runners.base import TensorInfo
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner

from .subjects import Subject
from .surgery import Array

Outputs = dict[str, Array]
# Receives the feeds, the outputs of this run and those of the previous run (None in the first run).
Spoil = Callable[[Mapping[str, Array], Outputs, Outputs | None], Outputs]


@dataclass(frozen=True, slots=True)
class RunnerFault:
    """One fault in what a runner returns.

    Attributes:
        name: description of the fault.
        model: the model that it runs, see `Subject`.
        target: target of the export.
        spoil: changes the outputs.
        dtype: dtype of the model.
    """

    name: str
    model: str
    target: str
    spoil: Spoil
    dtype: str = "float32"

    @property
    def subject(self) -> Subject:
        """The exported model."""
        return Subject(self.model, self.dtype)


@dataclass(slots=True)
class SpoiledRunner:
    """An ONNX Runtime runner whose outputs are spoiled."""

    runner: OrtRunner
    spoil: Spoil
    before: Outputs | None = field(default=None)

    @classmethod
    def open(cls, folder: Path, spoil: Spoil) -> Self:
        """A runner of an exported folder."""
        return cls(OrtRunner(folder / "model.onnx"), spoil)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def inputs(self) -> list[TensorInfo]:
        """See `Runner.inputs`."""
        return self.runner.inputs()

    def outputs(self) -> list[TensorInfo]:
        """See `Runner.outputs`."""
        return self.runner.outputs()

    def run(self, feeds: Mapping[str, Array]) -> Outputs:
        """See `Runner.run`; the outputs are spoiled."""
        outputs = self.runner.run(feeds)
        spoiled = self.spoil(feeds, {name: value.copy() for name, value in outputs.items()}, self.before)
        self.before = outputs
        return spoiled

    def provenance(self) -> dict[str, Any]:
        """See `Runner.provenance`."""
        return self.runner.provenance()


def each(change: Callable[[Array], Array]) -> Spoil:
    """The same change of every output."""
    return lambda feeds, outputs, before: {name: change(value) for name, value in outputs.items()}


def at(index: Any, change: Callable[[Array], Any]) -> Callable[[Array], Array]:
    """A change of some elements."""

    def apply(value: Array) -> Array:
        value[index] = change(value[index])
        return value

    return apply


def largest_off(value: Array) -> Array:
    """The largest element is 1% larger."""
    value.flat[np.argmax(np.abs(value))] *= 1.01
    return value


def last_token_beyond(length: int) -> Callable[[Array], Array]:
    return lambda value: at((slice(None), -1), lambda v: v * 1.01)(value) if value.shape[1] > length else value


def second_batch(value: Array) -> Array:
    return at(1, lambda v: v * 1.01)(value) if value.shape[0] > 1 else value


def stale(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
    """The outputs of the previous run, resized to the shapes of this run."""
    return {n: v if before is None else np.resize(before[n], v.shape) for n, v in outputs.items()}


def exchanged(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
    return dict(zip(outputs, reversed(list(outputs.values())), strict=True))


def one_missing(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
    return dict(list(outputs.items())[:-1])


def crash(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


RUNNER_FAULTS: tuple[RunnerFault, ...] = (
    RunnerFault("NaN in one row", "addition", "ort", each(at((0, 0), lambda v: v * np.nan))),
    RunnerFault("one Inf", "llama", "primitives", each(at((0, 0, 3), lambda v: np.inf)), "float16"),
    RunnerFault("output of the run before", "addition", "primitives", stale),
    RunnerFault("batch elements swapped", "llama", "ort", each(lambda v: v[::-1].copy())),
    RunnerFault("last token wrong at length above 32", "addition", "standard", each(last_token_beyond(32))),
    RunnerFault("second batch element wrong", "llama", "plugin", each(second_batch)),
    RunnerFault("outputs rounded to bfloat16", "addition", "plugin",
                each(lambda v: v.astype(ml_dtypes.bfloat16).astype(v.dtype))),
    RunnerFault("one element 1% off", "addition", "primitives", each(largest_off)),
    RunnerFault("one element 1% off", "llama", "standard", each(largest_off)),
    RunnerFault("outputs in another order", "assorted", "standard", exchanged),
    RunnerFault("output of dtype float64", "llama", "primitives", each(lambda v: v.astype(np.float64))),
    RunnerFault("output of dtype float32 from a float16 model", "llama", "ort",
                each(lambda v: v.astype(np.float32)), "float16"),
    RunnerFault("output missing", "assorted", "ort", one_missing),
    RunnerFault("only output missing", "llama", "ort", one_missing),
    RunnerFault("output without its batch dim", "llama", "ort", each(lambda v: v[0])),
    RunnerFault("runner crashes", "addition", "ort", crash),
)  # fmt: skip
