"""Stand-ins for both sides of a validation: runners that are functions, and verdicts, checks and segments by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.compare_output import OutputVerdict, judge
from rmsnorm_deploy.runtime.norms.access import CalledNorm
from rmsnorm_deploy.runtime.norms.activation_store import Key
from rmsnorm_deploy.runtime.runners.base import Array, TensorInfo
from rmsnorm_deploy.runtime.validation.norm_checks import NormCheck
from rmsnorm_deploy.runtime.validation.segment_checks import SegmentCheck

Compute = Callable[[Mapping[str, Array]], dict[str, Array]]


class FunctionRunner:
    """Runs a function, and keeps what it was fed.

    Args:
        compute: gives the outputs.
        inputs: what it says of its inputs.
        outputs: the names of the outputs that it says it has.
    """

    def __init__(self, compute: Compute, inputs: Sequence[TensorInfo] = (), outputs: Sequence[str] = ()) -> None:
        self._compute, self._inputs = compute, list(inputs)
        self._outputs = [TensorInfo(name, "float32", None) for name in outputs]
        self.fed: list[dict[str, Array]] = []
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True

    def inputs(self) -> list[TensorInfo]:
        return self._inputs

    def outputs(self) -> list[TensorInfo]:
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.fed.append(dict(feeds))
        return self._compute(feeds)

    def provenance(self) -> dict[str, Any]:
        return {"runner": "function"}


def called(path: str, number: int = 0, *, forced: bool = True, off: float = 0.0, **spec: Any) -> CalledNorm:
    """A call of a float32 norm of width 8, without a weight unless the spec says otherwise."""
    made = NormSpec(**{"eps": 1e-6, "scale": "none", **spec})
    return CalledNorm((path, number), made, (2, 8), "float32", "float32", None, forced, off)


def verdict(name: str, error: float = 0.0, own: float = 0.0) -> OutputVerdict:
    """The verdict on a row of ones, one element of which is off by `error`, in PyTorch by `own`."""
    true = np.ones((1, 64))
    mine, theirs = true.astype(np.float32), true.astype(np.float32)
    mine[0, 5] += np.float32(error)
    theirs[0, 5] += np.float32(own)
    return judge(name, mine, true, theirs)


def norm_check(norm: CalledNorm, passed: bool | None = True, kinds: Sequence[OutputVerdict] = ()) -> NormCheck:
    """A check of a norm that says `because` where it failed."""
    return NormCheck(norm, "plain", passed, "right" if passed else "because", list(kinds))


def segment(
    name: str, passed: bool | None = True, contains: Sequence[str] = (), end: Key | None = None, error: float = 0.0
) -> SegmentCheck:
    """A segment that ends in a value off by `error`, or by a whole where it is not to pass."""
    found = verdict("x", error if passed else 1.0)
    if passed is None:
        found = dataclasses.replace(found, passed=None)
    return SegmentCheck(name, found, list(contains), end)
