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
        variant: variant of the model, see `Subject`.
        family: the kind of fault.
    """

    name: str
    model: str
    target: str
    spoil: Spoil
    dtype: str = "float32"
    variant: str = "plain"
    family: str = "runner"

    @property
    def subject(self) -> Subject:
        """The exported model."""
        return Subject(self.model, self.dtype, self.variant)


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


def crash_if(condition: Callable[[Mapping[str, Array]], bool]) -> Spoil:
    """A crash on some inputs."""

    def spoil(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
        return crash(feeds, outputs, before) if condition(feeds) else outputs

    return spoil


def nan_if(condition: Callable[[Mapping[str, Array]], bool]) -> Spoil:
    """NaN in one element on some inputs."""

    def spoil(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
        return each(at((0, 0, 0), lambda v: np.nan))(feeds, outputs, before) if condition(feeds) else outputs

    return spoil


def stale_if_same_shape(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
    """The outputs of the previous run if they have the shapes of this run's, as of a buffer that is reused."""
    same = before is not None and all(before[name].shape == value.shape for name, value in outputs.items())
    return before if same and before is not None else outputs


def stale_cache(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
    """One tensor of the cache ends in the previous run's values."""
    name = "present.1.value"
    if before is None or outputs[name].shape[2] <= before[name].shape[2] or len(before[name]) != len(outputs[name]):
        return outputs
    return {**outputs, name: np.concatenate([outputs[name][:, :, :-1], before[name][:, :, -1:]], axis=2)}


def jitter() -> Spoil:
    """The lowest bits differ from run to run."""
    rng = np.random.default_rng(0)

    def spoil(feeds: Mapping[str, Array], outputs: Outputs, before: Outputs | None) -> Outputs:
        return {n: (v * (1 + 1e-7 * rng.integers(-1, 2, v.shape))).astype(v.dtype) for n, v in outputs.items()}

    return spoil


def rows_of(feeds: Mapping[str, Array]) -> int:
    return next(iter(feeds.values())).shape[0]


def tokens_of(feeds: Mapping[str, Array]) -> int:
    return next(iter(feeds.values())).shape[1]


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
    RunnerFault("runner crashes at batch above 2", "llama", "standard", crash_if(lambda f: rows_of(f) > 2)),
    RunnerFault("runner crashes above length 40", "mistral w40", "ort", crash_if(lambda f: tokens_of(f) > 40)),
    RunnerFault("runner crashes at length 1", "llama", "plugin", crash_if(lambda f: tokens_of(f) == 1),
                variant="past"),
    RunnerFault("NaN at batch 5", "qwen3", "ort", nan_if(lambda f: rows_of(f) == 5)),
    RunnerFault("NaN at masked rows only", "llama", "primitives",
                nan_if(lambda f: not f["attention_mask"].all())),
    RunnerFault("output of the run before if it has the same shape", "llama", "ort", stale_if_same_shape),
    RunnerFault("one element of the cache of the run before", "llama", "standard", stale_cache, variant="past"),
    RunnerFault("the lowest bits differ from run to run", "llama", "ort", jitter()),
    RunnerFault("cache in float16", "llama", "ort", lambda f, o, b: {
        n: v.astype(np.float16).astype(v.dtype) if n.startswith("present") else v for n, v in o.items()},
        variant="past"),
)  # fmt: skip
