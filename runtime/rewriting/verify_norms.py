"""The proof that rewritten norms compute what the norms before did: each alone, on rows of every kind.

Every rewritten norm is cut out of both graphs and run on rows of every kind in `adversarial_rows`. The truth is the
float64 reference of the formula that the norm was recognized by, the baseline is the norm as it was: a norm that was
recognized wrongly is far from its truth, and one that was written wrongly is worse than it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import onnx_ir as ir

from ...export.from_onnx.rewrite import Rewritten, RewrittenSite
from ...export.graph.constants import constant
from ...export.graph.site import GraphSite
from ...models.dtypes import onnx_name
from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UsageError
from ...models.reference import reference
from ...models.spec import NormSpec
from ..accuracy.compare_output import OutputVerdict
from ..norms.access import CalledNorm, NormFeed
from ..norms.adversarial_rows import KINDS, adversarial, turns
from ..norms.check_norm import check_norm, check_sum, summary_of
from ..norms.cut import CutModel, NormPlace, cut_out, run_alone
from ..runners.base import Array

Verdict = Literal["pass", "mismatch", "unproven"]
Progress = Callable[[str], None]
# What norms alone gave: arrays by role and by the name of the cut.
Results = dict[str, dict[str, Array]]

# Norms that are run in one session, elements of all their inputs, and elements from which a norm's input is made small.
_WINDOW, _WINDOW_ELEMENTS, _MOST_ELEMENTS = 64, 1 << 24, 1 << 16
# Sizes of dims that the file leaves open: the first, and the others. Ten rows show every kind once.
_FIRST, _OTHERS = 2, 5


@dataclass(frozen=True, slots=True)
class SiteProof:
    """One norm.

    Attributes:
        number: which of `Rewritten.sites`.
        path: its name for people.
        verdict: `unproven` where the norm could not be run.
        reason: why.
        kinds: a verdict for each kind of row.
    """

    number: int
    path: str
    verdict: Verdict
    reason: str
    kinds: list[OutputVerdict] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The proof as the JSON interface shows it."""
        worst = [v.figures.max_rel_row for v in self.kinds if v.figures is not None]
        return {
            "path": self.path,
            "verdict": self.verdict,
            "reason": self.reason,
            "kinds": len(self.kinds),
            "max_rel_row": max(worst, default=None),
        }


@dataclass(slots=True)
class Proof:
    """All of it.

    Attributes:
        sites: each norm that was written anew.
        model: a verdict for each output of the whole model, by shape; None before it ran.
        alone: the file before does not load, so the new one ran by itself.
        notes: what could not be done as usual.
        unproven: why the whole model could not be compared; empty where it was.
    """

    sites: list[SiteProof] = field(default_factory=list)
    model: list[OutputVerdict] | None = None
    alone: bool = False
    notes: list[str] = field(default_factory=list)
    unproven: str = ""

    @property
    def verdict(self) -> Verdict:
        """`mismatch` if anything differs, `unproven` if anything could not be run, else `pass`."""
        if any(site.verdict == "mismatch" for site in self.sites) or any(not v.passed for v in self.model or ()):
            return "mismatch"
        unproven = self.unproven or any(site.verdict == "unproven" for site in self.sites)
        return "unproven" if unproven else "pass"

    @property
    def reason(self) -> str:
        """One line on what was proven, or why not."""
        for site in self.sites:
            if site.verdict == "mismatch":
                return f"norm {site.path}: {site.reason}"
        for output in self.model or ():
            if not output.passed:
                return f"output {output.name}: {output.reason}"
        unproven = [site for site in self.sites if site.verdict == "unproven"]
        if unproven:
            return f"norm {unproven[0].path} could not be run: {unproven[0].reason}"
        if self.unproven:
            return self.unproven
        if not self.sites:
            whole = f"; the whole model, {len(self.model)} outputs" if self.model else ""
            return f"no norm was written anew{whole}"
        norms = f"{len(self.sites)} norm{'s' * (len(self.sites) != 1)} alone on {len(KINDS)} kinds of rows"
        if self.alone:
            return f"{norms}; the whole model runs and is finite, where the file before does not load"
        return f"{norms}; the whole model, {len(self.model or ())} outputs"

    def to_dict(self) -> dict[str, Any]:
        """The proof as the JSON interface and the manifest show it."""
        outputs = [{"name": v.name, "passed": v.passed, "reason": v.reason} for v in self.model or ()]
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "norms": [site.to_dict() for site in self.sites],
            "outputs": outputs,
            "notes": self.notes,
        }


# Norms alone ------------------------------------------------------------------------------------------------------


def prove_norms(rewritten: Rewritten, folder: Path, *, seed: int, progress: Progress) -> Proof:
    """Run every norm that was written anew, before and after, on rows of every kind.

    Args:
        rewritten: both graphs.
        folder: where the external data of the original lie.
        seed: of the rows.
        progress: progress.
    """
    proof = Proof()
    wanted = [(number, site) for number, site in enumerate(rewritten.sites) if site.changed]
    rejected: dict[str, list[str]] = {}
    for window in _windows(wanted):
        first = len(proof.sites)
        progress(f"running norms alone: {first + 1} to {first + len(window)} of {len(wanted)}")
        proof.sites += _prove_window(rewritten, window, folder, seed, rejected)
    for cause, names in rejected.items():
        which = f"{names[0]} and {len(names) - 1} more norms" if len(names) > 1 else names[0]
        text = f"{which} did not run in ONNX Runtime as the file had them, so PyTorch stood in for them: {cause}"
        proof.notes.append(text)
    return proof


def _windows(sites: Sequence[tuple[int, RewrittenSite]]) -> list[list[tuple[int, RewrittenSite]]]:
    """As many norms at a time as fit: a shape that is fixed may be large."""
    windows: list[list[tuple[int, RewrittenSite]]] = []
    room = 0
    for number, site in sites:
        elements = math.prod(_shape(site.before))
        if not windows or len(windows[-1]) == _WINDOW or elements > room:
            windows.append([])
            room = _WINDOW_ELEMENTS
        windows[-1].append((number, site))
        room -= elements
    return windows


def _prove_window(
    rewritten: Rewritten,
    sites: Sequence[tuple[int, RewrittenSite]],
    folder: Path,
    seed: int,
    rejected: dict[str, list[str]],
) -> list[SiteProof]:
    """All in one session where they run together; each in its own where one of them does not."""
    try:
        trials = [_Trial(number, site, seed) for number, site in sites]
        after = cut_out(rewritten.model, [trial.after.cut() for trial in trials])
        before = cut_out(rewritten.original, [trial.before.cut() for trial in trials])
        given = _given([*before.given.values(), *after.given.values()], seed)
        candidate = _run(after, trials, folder, given)
        own = _run_before(before, trials, folder, given, rejected)
        return [trial.judged(candidate, own, given) for trial in trials]
    except EnvironmentMissingError:
        raise
    except RmsnormDeployError as error:
        if len(sites) > 1:
            return [row for site in sites for row in _prove_window(rewritten, [site], folder, seed, rejected)]
        return [SiteProof(sites[0][0], sites[0][1].before.path, "unproven", str(error))]


def _run_before(
    model: CutModel, trials: Sequence[_Trial], folder: Path, given: Mapping[str, Array], rejected: dict[str, list[str]]
) -> list[Results] | None:
    """The norms as they were; None where ONNX Runtime does not run them, which is a reason to rewrite."""
    try:
        return _run(model, trials, folder, given)
    except RmsnormDeployError as error:
        if len(trials) > 1:
            raise
        rejected.setdefault(" ".join(str(error).split())[:240], []).append(trials[0].name)
        return None


def _run(model: CutModel, trials: Sequence[_Trial], folder: Path, given: Mapping[str, Array]) -> list[Results]:
    one_thread = {"intra_op_num_threads": 1}
    with run_alone(model, "cpu", folder, given, session_options=one_thread) as run:
        return [run({t.place: t.arrays(turn) for t in trials}) for turn in range(max(t.turns for t in trials))]


def _given(values: Iterable[ir.Value], seed: int) -> dict[str, Array]:
    """Values for what a norm reads from outside, such as a weight that is a graph input, by the value's name."""
    arrays: dict[str, Array] = {}
    for value in values:
        shape = [dim for dim in value.shape or () if isinstance(dim, int)]
        if value.shape is None or len(shape) != len(value.shape) or value.dtype is None:
            raise UsageError(f"{value.name} goes into a norm, and its shape is not known.")
        rng = np.random.default_rng([seed, crc32((value.name or "").encode())])
        if not value.dtype.is_floating_point():
            raise UsageError(f"{value.name} goes into a norm, and is {value.dtype.name.lower()}.")
        arrays[value.name or ""] = (1 + 0.3 * rng.standard_normal(shape)).astype(value.dtype.numpy())
    return arrays


class _Trial:
    """One norm before and after, and what it is run on."""

    def __init__(self, number: int, site: RewrittenSite, seed: int) -> None:
        self.number, self.site, self.name = number, site.before, site.before.path or f"norm {number}"
        self._seed = seed
        before = site.before
        y_dtype = before.y.dtype or before.dtype
        self.called = CalledNorm(
            (before.path, number), before.spec, _shape(before), onnx_name(before.dtype), onnx_name(y_dtype),
            None if before.gate is None else onnx_name(before.gate.dtype or before.dtype), True,
        )  # fmt: skip
        self.turns = max(turns(self.called), 1)
        self.before, self.after = _places(str(number), site)

    @property
    def place(self) -> str:
        """The name of both cuts."""
        return self.before.name

    def arrays(self, turn: int) -> dict[str, Array]:
        """What goes in, by the roles of the cuts' inputs."""
        return self._made(turn)[1]

    def _made(self, turn: int) -> tuple[NormFeed, dict[str, Array], Array]:
        """What the norm is run on, the same by roles, and the kind of each row."""
        feed, kinds = adversarial(self.called, turn % self.turns, self._seed)
        return *self.before.split(feed), kinds

    def judged(
        self, candidate: Sequence[Results], own: Sequence[Results] | None, given: Mapping[str, Array]
    ) -> SiteProof:
        """The verdict on the norm, kind by kind."""
        verdicts: list[OutputVerdict] = []
        for turn in range(self.turns):
            feed, _, kinds = self._made(turn)
            mine = candidate[turn][self.place]
            theirs = None if own is None else own[turn][self.place]
            tensors = {role: self._tensor(role, theirs, given) for role in ("weight", "bias")}
            if theirs is not None and "sum" in mine and "sum" in theirs:
                verdicts += check_sum(mine["sum"], theirs["sum"])
            y = _in_torch(self.called, feed, tensors) if theirs is None else theirs["y"]
            verdicts += self._verdicts(feed, kinds, mine["y"], y, tensors)
        passed, reason = summary_of(verdicts)
        return SiteProof(self.number, self.name, "pass" if passed else "mismatch", reason, verdicts)

    def _verdicts(
        self, feed: NormFeed, kinds: Array, mine: Array, theirs: Array, tensors: Mapping[str, Array | None]
    ) -> list[OutputVerdict]:
        if mine.dtype != theirs.dtype:
            reason = f"expected {theirs.dtype.name}, as the file before gives, got {mine.dtype.name}"
            return [OutputVerdict("dtype", False, reason, None, None)]
        spec, as_rounded = _as_rounded(self.called.spec, tensors)
        return check_norm(
            self.called, feed, kinds, mine, theirs,
            lambda rows: reference(spec, rows.x, gate=rows.gate, **as_rounded),
            baseline_name="the file before",
            # Where squares overflow, ONNX Runtime's result goes by what it fused; PyTorch's own is as good.
            second_baseline=lambda rows: _in_torch(self.called, rows, tensors),
        )  # fmt: skip

    def _tensor(self, role: str, own: Mapping[str, Array] | None, given: Mapping[str, Array]) -> Array | None:
        value = getattr(self.site, role)
        if value is None:
            return None
        array = constant(value)
        if array is not None:
            return array
        if own is not None:
            return own[role]
        if value.name in given:
            return given[value.name]
        raise UsageError(f"the {role} of {self.name} is computed by nodes that ONNX Runtime does not run.")


def _places(name: str, site: RewrittenSite) -> tuple[NormPlace, NormPlace]:
    """Where the norm stands in both graphs; both are fed the same."""
    before = site.before
    operands: tuple[ir.Value, ...] = () if before.x is None else (before.x,)
    after: tuple[ir.Value, ...] = () if site.x is None else (site.x,)
    added = before.sum_of is not None and site.sum_of is not None
    if before.sum_of is not None and site.sum_of is not None:
        operands, after = before.sum_of, site.sum_of
    # A norm may be gated by what it normalizes, or by one of the two that this is the sum of.
    own = {**({"x": before.x} if added else {}), **{f"x{i}": value for i, value in enumerate(operands)}}
    gate_role = next((role for role, value in own.items() if value is not None and value is before.gate), None)
    has_sum = added and before.x is not None and site.x is not None
    live = {
        role: value
        for role, value in (("weight", before.weight), ("bias", before.bias))
        if value is not None and constant(value) is None
    }
    sums = (before.x, site.x) if has_sum else (None, None)
    return (
        NormPlace(name, operands, before.gate, before.y, sums[0], gate_role, live),
        NormPlace(name, after, site.gate, site.y, sums[1], gate_role),
    )


def _as_rounded(spec: NormSpec, tensors: Mapping[str, Array | None]) -> tuple[NormSpec, Mapping[str, Array | None]]:
    """The scale as the norm rounds it: where 1 is added in the weight's own half type, that is part of the norm."""
    weight = tensors["weight"]
    if weight is None or spec.scale_offset == 0.0 or spec.offset_in_float32:
        return spec, tensors
    scale = (1.0 + weight.astype(np.float64)).astype(weight.dtype)
    return spec.replace(scale="weight"), {**tensors, "weight": scale}


def _shape(site: GraphSite) -> tuple[int, ...]:
    """A shape for x: numbers for open dims, and small ones for large leading dims that no node of the norm fixes."""
    dims: list[int | None] = list(site.shape) if site.shape is not None else [None, None]
    count = site.spec.trailing_dims
    tail = dims[len(dims) - count :]
    if site.shape is None or any(dim is None for dim in tail):
        weight = None if site.weight is None else site.weight.shape
        known: list[int | None] = [dim for dim in weight or () if isinstance(dim, int)]
        tail = known[-count:] if len(known) >= count else [site.spec.group_size or 16] * count
    leading = dims[: len(dims) - count]
    sizes = [dim if dim is not None else _OTHERS if index else _FIRST for index, dim in enumerate(leading)]
    fixed = any(node.op_type in ("Reshape", "Expand") for node in site.nodes)
    if not fixed and math.prod(sizes) * math.prod(t or 1 for t in tail) > _MOST_ELEMENTS:
        sizes = [min(size, _OTHERS if index else _FIRST) for index, size in enumerate(sizes)]
    return (*sizes, *(dim or 1 for dim in tail))


def _in_torch(norm: CalledNorm, feed: NormFeed, tensors: Mapping[str, Array | None]) -> Array:
    """The norm as PyTorch computes it."""
    from ...models.eager import eager
    from ..runners.torch import to_numpy, to_torch

    arrays = (tensors["weight"], tensors["bias"], feed.gate)
    return to_numpy(eager(norm.spec, to_torch(feed.x), *(None if a is None else to_torch(a) for a in arrays)))
