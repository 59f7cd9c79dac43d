"""Check every attention alone (`check_attentions`), on the inputs of a running model and on generated ones.

Both sides receive the same values. The candidate's error against the spec in float64 is compared with that of
PyTorch's own function, as the errors of norms are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...export.lowering.attention_table import OPERATOR
from ...export.lowering.in_place_cache import GROUPED
from ...models.attention.spec import AttentionSpec
from ...models.dtypes import HALF_DTYPES, numpy_dtype
from ..accuracy.compare_output import OutputVerdict, all_passed, judge, kind_rows
from ..accuracy.errors import LEAST_ROW, errors_of, row_scale_error, row_width
from ..accuracy.float_formats import format_of
from ..accuracy.tolerances import Limits
from ..norms.activation_store import Key
from ..runners.base import Array
from .attention_inputs import AS_IT_RUNS, KINDS, NOTHING, Heads, InputKind, drawn, kinds_for
from .file_attentions import AttentionPlace, FileAttentions
from .torch_attentions import AttentionFeed, CalledAttention

Progress = Callable[[str], None]
# Of a tame input: an error of PyTorch's own function beyond this many eps x row scale means that it computes another
# formula than the spec's.
_SOUND = {"float16": 64.0, "bfloat16": 64.0, "float32": 512.0, "float64": 4096.0}


# ONNX Runtime's operators return zeros where a query attends to nothing; the primitives average, as PyTorch does.
_ZEROS_FROM = (OPERATOR, GROUPED)
_ZEROS = "queries that attend to nothing get zeros, where PyTorch gives them an average of the values"


@dataclass(frozen=True, slots=True)
class AttentionCheck:
    """The check of one attention alone.

    Attributes:
        key: path of its module, and number of the call.
        computes: what its function computes in PyTorch.
        form: the operator of its main node in the file.
        passed: whether it passed on all kinds of input; None if that cannot be judged.
        reason: why.
        kinds: a verdict for each kind of input.
    """

    key: Key
    computes: str
    form: str
    passed: bool | None
    reason: str
    kinds: list[OutputVerdict] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON values, with the keys of a norm's."""
        return {
            "path": self.key[0],
            "call": self.key[1],
            "computes": self.computes,
            "form": self.form,
            "passed": self.passed,
            "reason": self.reason,
            "inputs": kind_rows(self.kinds),
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """An attention on both sides: its dtype of comparison, and whether its inputs have a bias."""

    place: AttentionPlace
    called: CalledAttention
    masked: bool

    @property
    def dtype(self) -> str:
        """The narrower of the two dtypes, in which both sides represent the inputs exactly."""
        return min((self.called.dtype, self.place.dtype), key=lambda name: numpy_dtype(name).itemsize)

    @property
    def heads(self) -> Heads:
        call = self.called.call
        return Heads(call.query.shape[1], call.key.shape[1], call.query.shape[3], call.value.shape[3])

    @property
    def spec(self) -> AttentionSpec:
        return dataclasses.replace(self.called.spec, causal=self.called.spec.causal and not self.masked)

    @property
    def like(self) -> tuple[Any, ...]:
        """Attentions with an equal key have equal results in PyTorch on equal inputs."""
        call, sink = self.called.call, self.called.sink
        sinks = None if sink is None else tuple(sink.flatten().tolist())
        return (
            type(call.module), call.function, self.spec, self.heads, self.masked, sinks, self.called.dtype,
            self.place.dtype,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """One input, and the results in PyTorch."""

    spec: AttentionSpec
    feed: AttentionFeed
    exact: Array
    own: Array


def check_attentions(
    file: FileAttentions,
    called: Mapping[Key, CalledAttention | str],
    seed: int,
    progress: Progress,
    notes: list[str],
    limits: Limits | None = None,
    window: int | None = None,
) -> list[AttentionCheck]:
    """Run the attentions of a file alone, on the inputs in PyTorch's run and on those of `KINDS`.

    Args:
        file: the attentions of the candidate.
        called: the calls of the PyTorch model, or why no spec describes them.
        seed: seed of the generated inputs.
        progress: called with a line of text for each input.
        notes: receives what cannot be checked, and why.
        limits: explicit limits that replace the comparison with PyTorch's own error.
        window: the number of attentions that are run together; None for all.
    """
    asked: list[_Asked] = []
    for key, place in file.places.items():
        call = called.get(key, "PyTorch did not call its function on these inputs")
        if isinstance(call, str):
            notes.append(f"{key[0]} could not be checked alone: {call}")
            continue
        asked.append(_Asked(place, call, "bias" in place.inputs or call.feed(masked=False)[1].bias is not None))
    checks = []
    for first in range(0, len(asked), window or max(len(asked), 1)):
        checks += _checked(file, asked[first : first + (window or len(asked))], seed, progress, limits)
    return checks


def _checked(
    file: FileAttentions, asked: Sequence[_Asked], seed: int, progress: Progress, limits: Limits | None
) -> list[AttentionCheck]:
    verdicts: dict[Key, list[OutputVerdict]] = {one.place.key: [] for one in asked}
    with file.alone(list(verdicts)) as run:
        for number, kind in enumerate((AS_IT_RUNS, *KINDS), start=1):
            progress(f"{len(asked)} attentions alone: input {number} of {len(KINDS) + 1}")
            made: dict[Any, _Given | None] = {}
            given: dict[Key, _Given] = {}
            for one in asked:
                like = one.place.key if kind is AS_IT_RUNS else one.like
                if like not in made:
                    made[like] = _given(one, kind, seed)
                found = made[like]
                if found is not None:
                    given[one.place.key] = found
            if not given:
                continue
            # A session runs all of its attentions: those without this kind of input get that of another one.
            spare = {one.place.key: given.get(one.place.key) or _given(one, AS_IT_RUNS, seed) for one in asked}
            results = run({key: found.feed for key, found in spare.items() if found is not None})
            for one in asked:
                key = one.place.key
                if key in given:
                    verdicts[key].append(_judged(kind, one, given[key], results[key], limits))
    return [
        AttentionCheck(
            one.place.key, one.spec.describe(), one.place.operator, *_summary(verdicts[one.place.key]),
            verdicts[one.place.key],
        )
        for one in asked
    ]  # fmt: skip


def _given(one: _Asked, kind: InputKind, seed: int) -> _Given | None:
    """An input with PyTorch's results; None for a kind that says nothing of this attention."""
    spec = one.spec
    if kind is AS_IT_RUNS:
        spec, feed = one.called.feed(masked=one.masked)
        feed = feed.cast(numpy_dtype(one.dtype)) if one.dtype != one.called.dtype else feed
    else:
        fitting = next((k for k in kinds_for(spec, masked=one.masked) if k.name == kind.name), None)
        if fitting is None:
            return None
        feed = drawn(fitting, spec, one.heads, one.dtype, seed, masked=one.masked)
    own = feed.cast(numpy_dtype(one.called.dtype))
    return _Given(spec, feed, one.called.exact(spec, feed), one.called.own(spec, own))


def _judged(kind: InputKind, asked: _Asked, given: _Given, result: Array, limits: Limits | None) -> OutputVerdict:
    """The verdict on one input: queries that attend to a key by their errors, and those that attend to none apart."""
    name = kind.name
    if result.shape != given.own.shape:
        reason = f"expected the shape {list(given.own.shape)} of PyTorch, got {list(result.shape)}"
        return OutputVerdict(name, False, reason, None, None)
    attended = given.feed.attended
    half = given.feed.query.dtype.name in HALF_DTYPES
    zeros = ~attended & (result == 0).all((2, 3)) & (asked.place.operator in _ZEROS_FROM)
    # In a half type the lowest value of a mask does not absorb a score: such rows are any average of the values.
    rows = ~zeros if kind.name == NOTHING and not half else attended
    mine, exact, own = (side[rows] for side in (result, given.exact, given.own))
    verdict = judge(name, mine, exact, own, limits=limits)
    if limits is None and verdict.passed is False and not kind.tame:
        other = asked.called.step_by_step(given.spec, given.feed.cast(given.own.dtype))[rows]
        second = judge(name, mine, exact, other, baseline_name="PyTorch step by step")
        verdict = second if second.passed else _within_roundings(verdict, mine, exact, given)
    if kind.tame:
        verdict = _unless_unsound(verdict, exact, own, given.spec)
    if verdict.passed and not attended.all():
        problem = _no_average(result, given, ~attended & ~zeros)
        verdict = dataclasses.replace(verdict, passed=False, reason=problem) if problem else verdict
    if verdict.passed and zeros.any() and not given.spec.sink:
        verdict = dataclasses.replace(verdict, reason=f"{verdict.reason}; {_ZEROS}")
    return verdict


def _within_roundings(verdict: OutputVerdict, mine: Array, exact: Array, given: _Given) -> OutputVerdict:
    """The verdict; passed if a rounding of the scores explains the error.

    A score s, the sum of products q k, has an error of about eps times the sum of |q k|, and exp makes it a relative
    error of the weight: up to four times that, times the largest value, is the error of a weighted average. With large
    scores PyTorch's own roundings may by chance be far smaller. In half types, sums and exp are computed in float32.
    """
    feed = given.feed
    if mine.dtype.name in HALF_DTYPES or not mine.size or not np.isfinite(mine).all():
        return verdict
    query, key = (np.abs(array.astype(np.float64)) for array in (feed.query, feed.key))
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scores = abs(given.spec.scale) * float(np.max(query @ key.swapaxes(2, 3)))
    allowed = 4.0 * format_of(mine.dtype).eps * (1.0 + scores) * float(np.max(np.abs(feed.value)))
    error = float(np.max(np.abs(mine.astype(np.float64) - exact)))
    if error > allowed:
        return verdict
    reason = f"error {error:.3g} of at most {allowed:.3g}, which roundings of scores of {scores:.3g} explain"
    return dataclasses.replace(verdict, passed=True, reason=reason)


def _unless_unsound(verdict: OutputVerdict, exact: Array, own: Array, spec: AttentionSpec) -> OutputVerdict:
    """The verdict; not judged where PyTorch's own function does not compute the spec, so that no reference is valid."""
    if not own.size:
        return verdict
    units = row_scale_error(errors_of(own, exact, None), row_width(own.shape, LEAST_ROW), format_of(own.dtype))
    off = float(np.max(units, where=~np.isnan(units), initial=0.0))
    if off <= _SOUND[own.dtype.name]:
        return verdict
    reason = (
        f"PyTorch's own attention differs by {off:.3g} eps x row scale from {spec.describe()}, so there is no valid "
        "reference"
    )
    return dataclasses.replace(verdict, passed=None, reason=reason)


def _no_average(result: Array, given: _Given, silent: Array) -> str | None:
    """Why the rows of queries that attend to nothing are not an average of the values, or None."""
    values, rows = given.feed.value.astype(np.float64), result.astype(np.float64)
    repeated = np.repeat(values, rows.shape[2] // values.shape[1], axis=1)
    low, high = (np.broadcast_to(f(repeated, 2)[:, None], rows.shape)[silent] for f in (np.min, np.max))
    if given.spec.sink:  # whose value is zero
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    slack = 8.0 * format_of(result.dtype).eps * max(float(np.max(np.abs(values), initial=0.0)), math.ulp(0.0))
    got = rows[silent]
    if not np.isfinite(got).all():
        return f"{np.count_nonzero(~np.isfinite(got))} elements are not finite in rows that attend to nothing"
    beyond = (got < low - slack) | (got > high + slack)
    if beyond.any():
        return f"{np.count_nonzero(beyond)} elements of rows that attend to nothing are not an average of the values"
    return None


def _summary(verdicts: Sequence[OutputVerdict]) -> tuple[bool | None, str]:
    """Whether an attention passed on all kinds of input, None if that cannot be judged, and the reason in one line."""
    passed = all_passed(verdict.passed for verdict in verdicts)
    if passed:
        return True, f"correct on {len(verdicts)} kinds of inputs"
    bad = [verdict for verdict in verdicts if verdict.passed is passed]
    names = ", ".join(verdict.name for verdict in bad)
    return passed, f"{'wrong' if passed is False else 'not judged'} on: {names}; {bad[0].name}: {bad[0].reason}"
