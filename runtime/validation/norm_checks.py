"""The checks below the outputs: every norm alone on adversarial inputs, and every segment between two norms.

Both sides get the same values, which the deployment dtype holds exactly, so that only what a part itself introduces
is measured, and nothing that came from further up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.errors import RmsnormDeployError
from ...models.spec import NormSpec
from ..accuracy.compare_output import OutputVerdict, judge
from ..accuracy.errors import errors_of, rms
from ..accuracy.float_formats import format_of, ulp_size
from ..accuracy.tolerances import TOLERANCES, Limits
from ..norms.access import CalledNorm, NormAccess, NormFeed
from ..norms.activation_store import ActivationStore
from ..norms.adversarial_rows import KINDS, adversarial, turns
from ..norms.graph_norms import Key
from ..runners.base import Array

if TYPE_CHECKING:
    from ..norms.torch_norms import TorchNorms

AS_IT_RUNS = "as it runs"
# In half types a norm ends in one or two roundings, and what it does before them in float32 hardly shows; a candidate
# that rounds once more than PyTorch does has half an ULP more. Three decimals of room are for the float32 statistics.
_HALF_ULP_FACTOR, _HALF_ULP_FLOOR = 1.25, 0.6
# Rows of each kind that are judged, at least, and elements where rows are short.
_LEAST_ROWS, _ELEMENTS = 4, 1 << 13
# Where squares are all equal, or one of them outweighs the rest, the roundings of a sum taken in plain order all go the
# same way: ONNX Runtime's float32 norms were then off by width/128 eps, for widths of 2048 to 65,536, where PyTorch's
# cascade loses next to nothing. Twice that is let pass.
_PLAIN_SUMS = 1 / 64
_SUMS_GO_ONE_WAY = ("constant", "outlier channels", AS_IT_RUNS)
# PyTorch's own norm is further from the reference than this many eps x max(|truth|, row RMS): the reference computes
# something else. The RMS alone will not do: one of 4096 channels may be 64 times as large, and so is its rounding.
# With float32 statistics a half type shows its roundings only; statistics in a half type add up their own.
_SOUND = {"float16": 8.0, "bfloat16": 8.0, "float32": 512.0, "float64": 4096.0}
_SOUND_IN_HALF = 128.0
# On these, overflow and cancellation are no excuse.
TAME = ("normal", "outlier channels", "tiny", "constant", "single channel", AS_IT_RUNS)


@dataclass(frozen=True, slots=True)
class NormCheck:
    """One norm, alone: a verdict for each kind of input."""

    norm: CalledNorm
    form: str
    passed: bool
    reason: str
    kinds: list[OutputVerdict] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The check as the JSON interface shows it."""
        inputs = []
        for verdict in self.kinds:
            row = _brief(verdict)
            inputs.append({"kind": row.pop("name"), **row})
        return {
            "path": self.norm.key[0],
            "call": self.norm.key[1],
            "computes": self.norm.spec.describe(),
            "form": self.form,
            "passed": self.passed,
            "reason": self.reason,
            "inputs": inputs,
        }


@dataclass(frozen=True, slots=True)
class SegmentCheck:
    """What lies between norms, up to one norm's input or one output of the model.

    Attributes:
        name: from which norms to which.
        verdict: on the value at its end.
        contains: norms inside that could not be checked by themselves.
        end: the norm whose x is at its end; None for a gate or an output.
    """

    name: str
    verdict: OutputVerdict
    contains: list[str]
    end: Key | None = None

    def to_dict(self, index: int) -> dict[str, Any]:
        """The check as the JSON interface shows it."""
        row = _brief(self.verdict)
        row.pop("name")
        return {"name": self.name, "index": index, "contains": self.contains, **row}


def _brief(verdict: OutputVerdict) -> dict[str, Any]:
    """A verdict as JSON, with histogram and worst elements only where something is wrong: there are many of them."""
    row = verdict.to_dict()
    if verdict.passed:
        for figures in (row["figures"], row["baseline_figures"]):
            figures.update(histogram=None, worst=[])
    return row


def norm_name(key: Key) -> str:
    """A norm's name for people: its path, with the call's number where it is not the first."""
    path = key[0] or "the model itself"
    return path if key[1] == 0 else f"{path} (call {key[1] + 1})"


def check_norms(
    candidate: NormAccess,
    baseline: TorchNorms,
    called: Mapping[Key, CalledNorm],
    keys: list[Key],
    store: ActivationStore,
    seed: int,
    progress: Callable[[str], None],
) -> list[NormCheck]:
    """Run every norm alone: on what it gets as the model runs, and on rows of every kind in `norm_inputs.KINDS`.

    Args:
        candidate: the side that is checked.
        baseline: PyTorch.
        called: every norm that PyTorch called.
        keys: those to check, present on both sides.
        store: holds `fed_x` and `fed_gate` of the model as it runs.
        seed: of the adversarial rows.
        progress: progress.
    """
    verdicts: dict[Key, list[OutputVerdict]] = {key: [] for key in keys}
    forms = dict.fromkeys(keys, "plain")
    rounds = max((turns(called[key]) for key in keys), default=0)
    with candidate.alone(keys) as theirs, baseline.alone(keys) as ours:
        for turn in range(-1, rounds):
            progress(f"{len(keys)} norms alone: input {turn + 2} of {rounds + 1}")
            given = _given([called[key] for key in keys], store, turn, seed)
            feeds = {key: feed for key, (feed, _) in given.items()}
            got, wanted = theirs(feeds), ours(feeds)
            for key in keys:
                feed, kinds = given[key]
                total = got[key].total
                if total is not None:
                    forms[key] = "residual_add"
                    verdicts[key] += _sum_verdict(total, feed.x)
                verdicts[key] += _by_kind(called[key], feed, kinds, got[key].y, wanted[key].y, baseline)
    return [_norm_check(called[key], forms[key], verdicts[key]) for key in keys]


def check_segments(
    candidate: NormAccess,
    baseline: TorchNorms,
    feeds: tuple[Mapping[str, Array], Mapping[str, Array]],
    keys: list[Key],
    store: ActivationStore,
    reference_outputs: Mapping[str, Array],
    named: Callable[[dict[str, Array]], dict[str, Array]],
    describe: Callable[[Key | str], tuple[str, list[str]]],
    window: int | None,
) -> list[SegmentCheck]:
    """Run everything between the norms, fed with the store's values at each of them.

    Args:
        candidate: the side that is checked.
        baseline: PyTorch.
        feeds: the inputs of the candidate, and those of PyTorch.
        keys: norms to cut at, in order of execution.
        store: what `TorchNorms.write_truth` wrote; `own_x` and `own_gate` are added.
        truth_outputs: what `write_reference` returned, under the candidate's names.
        named: gives PyTorch's outputs those names.
        describe: the name of the segment before a norm or an output, and the norms inside it.
        window: how many norms at a time.
    """
    found: dict[tuple[Key, str], SegmentCheck] = {}

    def compare(key: Key, role: str, value: Array) -> None:
        verdict = judge(role, value, store.get(key, role), store.get(key, f"own_{role}"))
        name, inside = describe(key)
        is_x = role == "x"
        found[key, role] = SegmentCheck(name if is_x else f"{name} (its gate)", verdict, inside, key if is_x else None)

    own_outputs = baseline.between(feeds[1], keys, store, lambda k, role, v: store.put(k, f"own_{role}", v), None)
    outputs = candidate.between(feeds[0], keys, store, compare, window)
    checks = [found[key, role] for key in keys for role in ("x", "gate") if (key, role) in found]
    own = named(own_outputs)
    for name in (name for name in reference_outputs if name in outputs):
        segment, inside = describe(name)
        checks.append(SegmentCheck(segment, judge(name, outputs[name], reference_outputs[name], own[name]), inside))
    return checks


def _given(
    norms: list[CalledNorm], store: ActivationStore, turn: int, seed: int
) -> dict[Key, tuple[NormFeed, Array | None]]:
    """What goes into each norm, and the kind of each row; turn -1 is what the norm gets as the model runs."""
    made: dict[Any, tuple[NormFeed, Array]] = {}
    given: dict[Key, tuple[NormFeed, Array | None]] = {}
    for norm in norms:
        if turn < 0:
            gate = np.asarray(store.get(norm.key, "fed_gate")) if norm.gate_dtype is not None else None
            given[norm.key] = NormFeed(np.asarray(store.get(norm.key, "fed_x")), gate), None
            continue
        like = (norm.spec, norm.shape, norm.x_dtype, norm.gate_dtype)
        given[norm.key] = made[like] = made.get(like) or adversarial(norm, turn, seed)
    return given


def _by_kind(
    norm: CalledNorm, feed: NormFeed, kinds: Array | None, candidate: Array, baseline: Array, exact: TorchNorms
) -> list[OutputVerdict]:
    """A verdict for each kind, on as many of its rows as say enough: rows of a norm do not depend on each other."""
    if candidate.shape != baseline.shape:
        return [judge_norm("shape", norm, candidate, baseline.astype(np.float64), baseline)]
    tail = norm.shape[len(norm.shape) - norm.spec.trailing_dims :]
    x, mine, own = (side.reshape(-1, *tail) for side in (feed.x, candidate, baseline))
    gate = None if feed.gate is None else feed.gate.reshape(-1, *tail)
    chosen = {AS_IT_RUNS: _telling_rows(x)} if kinds is None else rows_by_kind(kinds, math.prod(tail))
    verdicts = []
    for kind, rows in chosen.items():
        if len(rows):
            reference = exact.exact(norm.key, NormFeed(x[rows], None if gate is None else gate[rows]))
            verdicts.append(judge_norm(kind, norm, mine[rows], reference, own[rows]))
    return verdicts


def rows_by_kind(kinds: Array, width: int) -> dict[str, Array]:
    """The rows to judge of each kind that is there; `kinds` is the kind of each row, `width` its elements."""
    most = max(_LEAST_ROWS, _ELEMENTS // max(width, 1))
    chosen = {kind.name: np.flatnonzero(kinds == number)[:most] for number, kind in enumerate(KINDS)}
    return {name: rows for name, rows in chosen.items() if len(rows)}


def _telling_rows(x: Array) -> Array:
    """Rows of what a norm gets as the model runs: evenly spaced, and those with the largest and smallest values."""
    count = len(x)
    most = max(4 * _LEAST_ROWS, 8 * _ELEMENTS // max(x[0].size, 1)) if count else 0
    if count <= most:
        return np.arange(count)
    sizes = np.abs(x.reshape(count, -1)).max(axis=1)
    ends = [int(np.argmax(sizes)), int(np.argmin(sizes))]
    return np.unique([*np.linspace(0, count - 1, most - 2).astype(int), *ends])


def judge_norm(
    kind: str, norm: CalledNorm, candidate: Array, reference: Array, baseline: Array, baseline_name: str = "PyTorch"
) -> OutputVerdict:
    """The verdict on one norm's result for one kind of input: that of `judge`, and for half types one on ULPs.

    It fails too when the baseline's own norm is not near the reference: then there is no truth to go by.
    """
    verdict = judge(kind, candidate, reference, baseline, baseline_name=baseline_name)
    mine, own = verdict.figures, verdict.baseline_figures
    if mine is None or own is None:
        return verdict
    dtype = baseline.dtype.name
    # A wide weight makes a wide result of what was rounded to x's dtype.
    rounded = norm.x_dtype if norm.spec.follows_weight and norm.x_dtype in ("float16", "bfloat16") else dtype
    off = _scaled_error(baseline, reference, rounded)
    if kind in TAME and not off <= sound_limit(norm.spec, rounded):
        reason = no_reference(norm.spec, off, f"{baseline_name}'s own norm")
        return OutputVerdict(kind, False, reason, mine, own)
    if not verdict.passed and dtype == "float32" and kind in _SUMS_GO_ONE_WAY:
        width = math.prod(norm.shape[len(norm.shape) - norm.spec.trailing_dims :])
        limit = (TOLERANCES[dtype].floor_max + _PLAIN_SUMS * width) * format_of(dtype).eps
        plain = judge(kind, candidate, reference, baseline, limits=Limits(atol=limit * _size(reference), rtol=limit))
        return plain if plain.passed else verdict
    if verdict.passed and dtype in ("float16", "bfloat16"):
        ulp, own_ulp = (_large_ulp(side, reference) for side in (candidate, baseline))
        allowed = max(_HALF_ULP_FLOOR, _HALF_ULP_FACTOR * own_ulp)
        if ulp > allowed:
            reason = f"error of {ulp:.3g} ULP where the result is not small, {allowed:.3g} allowed"
            return OutputVerdict(kind, False, f"{reason}; {baseline_name}'s own is {own_ulp:.3g} ULP", mine, own)
    return verdict


def sound_limit(spec: NormSpec, dtype: str) -> float:
    """How far PyTorch's own norm may be from the reference, in eps x max(|truth|, row RMS)."""
    in_half = spec.sums_in_half and dtype in ("float16", "bfloat16")
    return _SOUND_IN_HALF if in_half else _SOUND[dtype]


def no_reference(spec: NormSpec, off: float, whose: str = "PyTorch's own norm", unit: str = "eps x row scale") -> str:
    """The reason why a norm cannot be judged: PyTorch, or whose it is, does not compute what it was recognized by."""
    return (
        f"{whose} is {off:.3g} {unit} from the formula that it was recognized by "
        f"({spec.describe()}): there is no truth to go by"
    )


def _scaled_error(array: Array, reference: Array, dtype: str) -> float:
    """The largest error in eps(dtype) x max(|truth|, row RMS); infinite where a value is not finite and should be."""
    errors, form = errors_of(array, reference, None), format_of(dtype)
    scale = errors.scale.reshape(len(reference), -1)
    unit = np.maximum(form.eps * np.fmax(np.abs(scale), rms(scale)), form.smallest)
    off = errors.size.reshape(scale.shape) / unit
    return float(np.max(off, where=~np.isnan(off), initial=0.0))


def _large_ulp(array: Array, reference: Array) -> float:
    """The largest error in ULPs among elements of at least their row's RMS: small ones may be what a bias left over,
    or the product with a gate that is nearly shut, and have lost their digits before."""
    rows = reference.reshape(len(reference), -1)
    with np.errstate(invalid="ignore"):
        large = np.isfinite(rows) & (np.abs(rows) >= np.sqrt(np.mean(np.square(rows), axis=1, keepdims=True)))
        values = array.reshape(rows.shape).astype(np.float64)
        large &= np.isfinite(values)
    error = np.abs(values[large] - rows[large]) / ulp_size(rows[large], array.dtype)
    return float(np.max(error, initial=0.0))


def _size(reference: Array) -> float:
    """The RMS of an array without what is not finite."""
    finite = reference[np.isfinite(reference)]
    return float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0


def _sum_verdict(total: Array, x: Array) -> list[OutputVerdict]:
    """A fused residual add was given x in two parts whose sum is exact; only a wrong sum is worth a row."""
    same = total.shape == x.shape and np.array_equal(total.astype(np.float64), x.astype(np.float64), equal_nan=True)
    if same:
        return []
    return [OutputVerdict("sum", False, "the sum that the norm hands on is not that of its two inputs", None, None)]


def _norm_check(norm: CalledNorm, form: str, verdicts: list[OutputVerdict]) -> NormCheck:
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if not failed:
        return NormCheck(norm, form, True, f"right on {len(verdicts)} kinds of input", verdicts)
    kinds = ", ".join(dict.fromkeys(verdict.name for verdict in failed))
    return NormCheck(norm, form, False, f"wrong on: {kinds}; {failed[0].name}: {failed[0].reason}", verdicts)


def try_or_note(what: str, notes: list[str], run: Callable[[], list[Any]]) -> list[Any]:
    """The checks of `run`; where a part of the model cannot be run by itself, none, and a note that says why."""
    try:
        return run()
    except RmsnormDeployError as error:
        notes.append(f"{what} could not be checked: {error}")
        return []
