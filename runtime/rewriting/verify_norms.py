"""Prove that each rewritten norm computes the same as the original norm, on rows of every kind (`prove_norms`).

Every rewritten norm is cut out of both graphs and run on rows of every kind in `adversarial_rows`. The reference is the
float64 result of the recognized formula, the baseline is the original norm: a norm that was recognized wrongly differs
from its reference, and one that was written wrongly has a larger error than the original.
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
# Results of norms run alone: arrays by the name of the cut and by role.
Results = dict[str, dict[str, Array]]

# Maximum number of norms in one session, of elements of all their inputs, and of elements of one norm's input.
_WINDOW, _WINDOW_ELEMENTS, _MOST_ELEMENTS = 64, 1 << 24, 1 << 16
# A file may state any size: 2 GiB of float64.
_MOST_STATED = 1 << 28
# Sizes of dynamic dims: the first, and the others. Ten rows contain every kind once.
_FIRST, _OTHERS = 2, 5


@dataclass(frozen=True, slots=True)
class SiteProof:
    """The proof of one norm.

    Attributes:
        number: its index in `Rewritten.sites`.
        path: its name in messages.
        verdict: `unproven` if the norm could not be run.
        reason: why.
        kinds: a verdict for each kind of row.
    """

    number: int
    path: str
    verdict: Verdict
    reason: str
    kinds: list[OutputVerdict] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The proof as JSON values."""
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
    """The proof of a rewritten model.

    Attributes:
        sites: the proof of each rewritten norm.
        attentions: the proof of each rewritten attention.
        model: a verdict for each output of the whole model, by shape; None before it ran.
        alone: whether only the rewritten file ran, because the original file cannot be loaded.
        notes: steps that could not be done as usual.
        unproven: why the whole model could not be compared; empty if it was compared.
    """

    sites: list[SiteProof] = field(default_factory=list)
    attentions: list[SiteProof] = field(default_factory=list)
    model: list[OutputVerdict] | None = None
    alone: bool = False
    notes: list[str] = field(default_factory=list)
    unproven: str = ""

    @property
    def verdict(self) -> Verdict:
        """`mismatch` if anything differs, `unproven` if anything could not be run, else `pass`."""
        alone = [*self.sites, *self.attentions]
        if any(site.verdict == "mismatch" for site in alone) or any(v.passed is False for v in self.model or ()):
            return "mismatch"
        unproven = self.unproven or any(site.verdict == "unproven" for site in alone)
        unproven = unproven or any(output.passed is None for output in self.model or ())
        return "unproven" if unproven else "pass"

    @property
    def reason(self) -> str:
        """The result of the proof in one line."""
        alone = [("norm", site) for site in self.sites] + [("attention", site) for site in self.attentions]
        for what, site in alone:
            if site.verdict == "mismatch":
                return f"{what} {site.path}: {site.reason}"
        for output in self.model or ():
            if not output.passed:
                return f"output {output.name}: {output.reason}"
        for what, site in alone:
            if site.verdict == "unproven":
                return f"{what} {site.path} could not be run: {site.reason}"
        if self.unproven:
            return self.unproven
        if not alone:
            whole = f"; the whole model, {len(self.model)} outputs" if self.model else ""
            return f"no norm was rewritten{whole}"
        parts = []
        if self.sites:
            parts.append(f"{len(self.sites)} norm{'s' * (len(self.sites) != 1)} alone on {len(KINDS)} kinds of rows")
        if self.attentions:
            parts.append(f"{len(self.attentions)} attention{'s' * (len(self.attentions) != 1)} alone")
        norms = "; ".join(parts)
        if self.alone:
            return f"{norms}; the whole model runs and is finite; the original file cannot be loaded"
        return f"{norms}; the whole model, {len(self.model or ())} outputs"

    def to_dict(self) -> dict[str, Any]:
        """The proof as JSON values, for the JSON interface and the manifest."""
        outputs = [{"name": v.name, "passed": v.passed, "reason": v.reason} for v in self.model or ()]
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "norms": [site.to_dict() for site in self.sites],
            "attentions": [site.to_dict() for site in self.attentions],
            "outputs": outputs,
            "notes": self.notes,
        }


# Norms alone ------------------------------------------------------------------------------------------------------


def prove_norms(rewritten: Rewritten, folder: Path, *, seed: int, progress: Progress) -> Proof:
    """Run every rewritten norm and its original on rows of every kind.

    Args:
        rewritten: both graphs.
        folder: the folder of the original's external data.
        seed: seed of the rows.
        progress: called with a line of text at each step.
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
        text = f"{which} did not run in ONNX Runtime in their original form, so PyTorch was the baseline: {cause}"
        proof.notes.append(text)
    return proof


def _windows(sites: Sequence[tuple[int, RewrittenSite]]) -> list[list[tuple[int, RewrittenSite]]]:
    """The norms in windows that fit into memory: a fixed shape may be large."""
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
    """Prove norms in one session; if that fails, each norm in its own session."""
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
    """Run the original norms; None if ONNX Runtime cannot run them, which may be the reason to rewrite them."""
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
    """Generated arrays for values that a norm reads from outside (such as a weight that is a graph input), by name."""
    arrays: dict[str, Array] = {}
    for value in values:
        shape = [dim for dim in value.shape or () if isinstance(dim, int)]
        if value.shape is None or len(shape) != len(value.shape) or value.dtype is None:
            raise UsageError(f"a norm reads the value {value.name}, whose shape or dtype is unknown.")
        rng = np.random.default_rng([seed, crc32((value.name or "").encode())])
        if not value.dtype.is_floating_point():
            raise UsageError(
                f"a norm reads the value {value.name}: expected floating-point, got {value.dtype.name.lower()}."
            )
        if math.prod(shape) > _MOST_STATED or min(shape, default=0) < 0:
            raise UsageError(
                f"a norm reads the value {value.name}: expected at most {_MOST_STATED} elements, got shape {shape}."
            )
        arrays[value.name or ""] = (1 + 0.3 * rng.standard_normal(shape)).astype(value.dtype.numpy())
    return arrays


class _Trial:
    """One norm before and after, and its inputs."""

    def __init__(self, number: int, site: RewrittenSite, seed: int) -> None:
        self.number, self.site, self.name = number, site.before, site.before.path or f"norm {number}"
        self._seed = seed
        before = site.before
        y_dtype = before.y.dtype or before.dtype
        self.called = CalledNorm(
            (before.path, number), before.spec, _possible_shape(before), onnx_name(before.dtype), onnx_name(y_dtype),
            None if before.gate is None else onnx_name(before.gate.dtype or before.dtype), True,
        )  # fmt: skip
        self.turns = max(turns(self.called), 1)
        self.before, self.after = _places(str(number), site)

    @property
    def place(self) -> str:
        """The name of both cuts."""
        return self.before.name

    def arrays(self, turn: int) -> dict[str, Array]:
        """The inputs by the roles of the cuts' inputs."""
        return self._made(turn)[1]

    def _made(self, turn: int) -> tuple[NormFeed, dict[str, Array], Array]:
        """The inputs of the norm, the same by roles, and the kind of each row."""
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
            reason = f"expected {theirs.dtype.name} as in the original file, got {mine.dtype.name}"
            return [OutputVerdict("dtype", False, reason, None, None)]
        spec, as_rounded = _as_rounded(self.called.spec, tensors)
        return check_norm(
            self.called, feed, kinds, mine, theirs,
            lambda rows: reference(spec, rows.x, gate=rows.gate, **as_rounded),
            baseline_name="the original file",
            # Where squares overflow, ONNX Runtime's result depends on what it fused; PyTorch's result is as good.
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
        raise UsageError(f"the {role} of norm {self.name} is computed by nodes that ONNX Runtime cannot run.")


def _places(name: str, site: RewrittenSite) -> tuple[NormPlace, NormPlace]:
    """The norm's place in both graphs, with the same inputs."""
    before = site.before
    operands: tuple[ir.Value, ...] = () if before.x is None else (before.x,)
    after: tuple[ir.Value, ...] = () if site.x is None else (site.x,)
    added = before.sum_of is not None and site.sum_of is not None
    if before.sum_of is not None and site.sum_of is not None:
        operands, after = before.sum_of, site.sum_of
    # The gate may be x itself, or one of the two operands whose sum is x.
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
    """The scale as the norm rounds it: if 1 is added in the weight's half type, that rounding is part of the norm."""
    weight = tensors["weight"]
    if weight is None or spec.scale_offset == 0.0 or spec.offset_in_float32:
        return spec, tensors
    scale = (1.0 + weight.astype(np.float64)).astype(weight.dtype)
    return spec.replace(scale="weight"), {**tensors, "weight": scale}


def _shape(site: GraphSite) -> tuple[int, ...]:
    """A shape for x, with sizes for dynamic dims; large leading dims are reduced unless the norm fixes them."""
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


def _possible_shape(site: GraphSite) -> tuple[int, ...]:
    """The shape for x, which is refused before memory is allocated for an impossible size."""
    shape = _shape(site)
    if math.prod(shape) > _MOST_STATED or min(shape, default=0) < 0:
        raise UsageError(
            f"{site.path or site.node or 'the norm'}: expected an input of at most {_MOST_STATED} elements, got "
            f"shape {list(shape)}."
        )
    return shape


def _in_torch(norm: CalledNorm, feed: NormFeed, tensors: Mapping[str, Array | None]) -> Array:
    """The norm as PyTorch computes it."""
    from ...models.eager import eager
    from ..runners.torch import to_numpy, to_torch

    arrays = (tensors["weight"], tensors["bias"], feed.gate)
    return to_numpy(eager(norm.spec, to_torch(feed.x), *(None if a is None else to_torch(a) for a in arrays)))
