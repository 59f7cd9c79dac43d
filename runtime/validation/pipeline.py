"""The stages of a validation. Each stage is a function of the complete results of earlier stages.

run_candidate -> run_baseline -> match_norms -> compute_references -> judge_outputs -> check_parts -> measure_depth
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...export.graph.cache_names import is_present
from ...models.calling.rotary import dynamic_rotary
from ...models.dtypes import HALF_DTYPES
from ...models.errors import OutsideProfileError, RmsnormDeployError, UsageError, few
from ...models.recognition.intercept import at_norms
from ...models.recognition.site import Recognition, norm_name
from ..accuracy.baseline import signal_warning
from ..accuracy.compare_output import OutputVerdict
from ..accuracy.tolerances import NORMS, SEGMENTS, Limits
from ..inputs.cases import Case
from ..norms.access import CalledNorm, NormAccess, windows
from ..norms.activation_store import ActivationStore, Key
from ..norms.float64_model import exactly, in_float64
from ..norms.torch_norms import TorchNorms, survey_norms
from ..runners.base import Array, DecoderSession, Runner
from .candidate import Candidate
from .names import match_outputs, names_for_torch, own_names, renamed
from .norm_checks import (
    NormCheck,
    check_norms,
    failed,
    try_or_note,
    unsound_norms,
    with_cause,
    without_reference,
)
from .options import ValidationOptions
from .run_cases import Call, Outputs, Run, call_ends, judge_run, named, repeats, run_guarded, wide, with_cache_names
from .segment_checks import SegmentCheck, SegmentOutputs, check_segments, segment_names

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CandidateRuns:
    """The candidate's outputs for every case.

    Attributes:
        runs: at least one, in the order of the cases.
        names: the candidate's outputs.
        outside: the cases whose shapes no optimization profile of an engine covers.
    """

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    outside: tuple[str, ...] = ()

    @property
    def untried(self) -> list[str]:
        """What was not tried because of the engine's profiles, for the report."""
        if not self.outside:
            return []
        return [
            f"{len(self.outside)} inputs with shapes outside of the engine's profiles ({few(self.outside)}): build "
            "an engine for them with rmsnorm build --profile"
        ]

    @property
    def largest(self) -> int:
        """The index of the case on which norms and segments are checked: the largest that runs and is not long."""

        def rank(number: int) -> tuple[bool, bool, int]:
            run = self.runs[number]
            return not run.error, not run.case.long, run.size

        return max(range(len(self.runs)), key=rank)

    def for_torch(self, dtype: str | None) -> CandidateRuns:
        """The runs, with floating-point inputs for PyTorch in `dtype`."""
        return dataclasses.replace(self, runs=tuple(dataclasses.replace(run, torch_dtype=dtype) for run in self.runs))


@dataclass(frozen=True, slots=True)
class Baseline:
    """PyTorch: the model in the deployed dtype, its runner, its norms, and what records the largest case's run."""

    model: nn.Module
    runner: DecoderSession
    recognition: Recognition
    watched: AbstractContextManager[None] = field(default_factory=nullcontext)


@dataclass(frozen=True, slots=True)
class BaselineRuns:
    """PyTorch's outputs for every case.

    Attributes:
        outputs: in the order of the candidate's runs, a KV cache among them.
        called: the norms that it called in the largest case, in order.
        untried: the cases that PyTorch itself does not run, with the reason.
        names: the candidate's name by PyTorch's, of the outputs that PyTorch names differently.
        notes: which output is taken for which.
    """

    outputs: tuple[Outputs, ...]
    called: Mapping[Key, CalledNorm]
    untried: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MatchedNorms:
    """The norms that both sides have.

    Attributes:
        keys: norms on both sides, in PyTorch's order.
        lost: norms that have no node at all in the candidate.
        notes: what cannot be checked, and why.
    """

    keys: list[Key] = field(default_factory=list)
    lost: frozenset[Key] = frozenset()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class References:
    """The results of PyTorch in float64.

    Attributes:
        outputs: the outputs for every case.
        from_norms: outputs of the largest case, computed from the last norms' values rounded to the deployed dtypes.
        disagreements: difference between each norm's own code in float64 and the reference, relative to the row scale.
    """

    outputs: tuple[Outputs, ...]
    from_norms: Outputs
    disagreements: Mapping[Key, float]


@dataclass(frozen=True, slots=True)
class Stores:
    """Values at the norms: `fed` as written by `TorchNorms.write_reference`, `free` as traced without rounding."""

    fed: ActivationStore
    free: ActivationStore


@dataclass(frozen=True, slots=True)
class PartChecks:
    """The checks of every norm and every segment, and notes on what could not be checked."""

    norms: list[NormCheck]
    segments: list[SegmentCheck] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_candidate(runner: Runner, name: str, cases: Sequence[Case], progress: Progress) -> CandidateRuns:
    """Run every case; if some are optional, the first of these and the one for norms and segments run twice.

    Raises:
        UsageError: the candidate fails on a case that is not optional, or does not return the outputs that it declares.
    """
    runs: list[Run] = []
    outside: dict[str, OutsideProfileError] = {}
    for number, case in enumerate(cases, start=1):
        progress(f"{name}: {case.name} ({number} of {len(cases)})")
        try:
            run = run_guarded(runner, case, name)
        except OutsideProfileError as error:
            if not case.optional:
                raise
            outside[case.name] = error
            continue
        except RmsnormDeployError as error:
            if not case.optional:
                raise
            runs.append(Run(case, (), error=f"it fails, and PyTorch does not: {error}"))
            continue
        runs.append(run)
    if outside and not runs:
        raise next(iter(outside.values()))
    for number in _repeated(CandidateRuns(tuple(runs), ())):
        progress(f"{name}: {runs[number].case.name} again")
        runs[number] = repeats(runner, runs[number])
    names = dict.fromkeys(name for run in runs for call in run.calls for name in call.outputs)
    return CandidateRuns(tuple(runs), tuple(names), tuple(outside))


def _in_calls(baseline: Baseline, run: Run) -> bool:
    """Whether PyTorch's result depends on the calls in which it reads the tokens: its rotary embedding follows them."""
    return len(run.calls) > 1 and bool(dynamic_rotary(baseline.model))


def _run_torch(baseline: Baseline, run: Run, feeds: Mapping[str, Array]) -> Outputs:
    if _in_calls(baseline, run):
        return baseline.runner.run_calls(feeds, call_ends(run.case))
    return baseline.runner.run(feeds)


def _repeated(candidate: CandidateRuns) -> list[int]:
    """The indices of the runs that are repeated."""
    optional = [number for number, run in enumerate(candidate.runs) if run.case.optional and not run.error]
    return sorted({optional[0], candidate.largest}) if optional else []


def run_baseline(
    baseline: Baseline, candidate: CandidateRuns, progress: Progress, name: str = "the candidate"
) -> tuple[CandidateRuns, BaselineRuns]:
    """Run every case in PyTorch, record the norms of the largest case, and match the names of the outputs.

    Returns:
        The candidate's runs without the optional cases that PyTorch does not run, and without the outputs that PyTorch
        does not return; and PyTorch's, under the candidate's names.

    Raises:
        UsageError: PyTorch fails on a case that is not optional, or the outputs do not match.
    """
    kept: list[Run] = []
    outputs: list[Outputs] = []
    called: Mapping[Key, CalledNorm] = {}
    untried = []
    for number, run in enumerate(candidate.runs):
        progress(f"PyTorch: {run.case.name} ({number + 1} of {len(candidate.runs)})")
        try:
            if number == candidate.largest:
                with baseline.watched:
                    survey = survey_norms(baseline.model, baseline.runner, baseline.recognition, run.torch_feeds)
                called, found = survey.called, survey.outputs
            if number != candidate.largest or _in_calls(baseline, run):
                found = _run_torch(baseline, run, run.torch_feeds)
        except RmsnormDeployError as error:
            if not run.case.optional:
                raise
            untried.append(f"{run.case.name}: PyTorch itself does not run it ({error})")
            continue
        kept.append(run)
        outputs.append(with_cache_names(found))
    if not kept:
        raise UsageError(
            f"{type(baseline.model).__name__} runs none of the generated inputs: {untried[0]}. Give inputs."
        )
    runs = CandidateRuns(tuple(kept), candidate.names)
    largest = runs.runs[runs.largest]
    if not largest.calls:
        return runs, BaselineRuns(tuple(outputs), called, tuple(untried))
    returned = outputs[runs.largest]
    matched = match_outputs(largest.calls[0].outputs, returned, name, type(baseline.model).__name__)
    names = names_for_torch(matched, returned, candidate.names)
    own = BaselineRuns(tuple(renamed(o, names) for o in outputs), called, tuple(untried), names, matched.notes)
    if not matched.extra:
        return runs, own
    kept = [dataclasses.replace(run, calls=tuple(_without(call, matched.extra) for call in run.calls)) for run in kept]
    return CandidateRuns(tuple(kept), tuple(n for n in candidate.names if n not in matched.extra)), own


def _without(call: Call, names: Sequence[str]) -> Call:
    return dataclasses.replace(call, outputs={n: value for n, value in call.outputs.items() if n not in names})


def match_norms(
    candidate: Candidate,
    access: NormAccess | None,
    called: Mapping[Key, CalledNorm],
    unrecognized: Mapping[str, str] | None = None,
) -> MatchedNorms:
    """The norms that both sides have, and why the others cannot be checked.

    Args:
        candidate: the side that is checked.
        access: its norms; None if it gives no access to them.
        called: the norms that PyTorch called.
        unrecognized: modules of PyTorch that are not recognized as norms, with the reason, by path.
    """
    present = set(access.keys) if access is not None else set()
    problems = access.problems if access is not None else {}
    if not present and not problems:
        note = f"{candidate.name} has no metadata that identify its norms, so only its outputs were compared"
        return MatchedNorms(notes=[note] if called and not candidate.no_norms else [])
    refused = {row["path"]: row["reason"] for row in candidate.manifest.get("refusals", ())}
    lost, notes = set(), []
    for key in (key for key in called if key not in present):
        reason = problems.get(key[0]) or refused.get(key[0])
        if reason is None:
            lost.add(key)
            reason = "no node of the candidate names this norm in its metadata"
        notes.append(f"{norm_name(*key)} could not be checked alone: {reason}")
    recorded = access.recorded if access is not None else {}
    for key in sorted(present - set(called) - set(recorded)):
        reason = (unrecognized or {}).get(key[0])
        if reason is None:
            notes.append(f"{norm_name(*key)} was not called on these inputs, so it was not checked")
        else:
            notes.append(f"{norm_name(*key)} could not be checked alone: PyTorch's module is not recognized: {reason}")
    return MatchedNorms([key for key in called if key in present], frozenset(lost), notes)


def compute_references(
    baseline: Baseline,
    norms: TorchNorms,
    candidate: CandidateRuns,
    keys: Sequence[Key],
    stores: Stores,
    *,
    with_depth: bool,
    progress: Progress,
) -> References:
    """Run every case in float64, and the largest case a second time with rounding at every norm.

    Args:
        baseline: PyTorch.
        norms: its norms.
        candidate: the cases.
        keys: the norms that are checked.
        stores: receive the values at these norms; `free` only if `with_depth` is set.
        with_depth: store the values at the norms of the run in float64 from end to end too.
        progress: called with a line of text for each case.
    """
    outputs = []
    with in_float64(baseline.model):
        for number, run in enumerate(candidate.runs):
            progress(f"PyTorch in float64: {run.case.name} ({number + 1} of {len(candidate.runs)})")
            feeds = wide(run.torch_feeds)
            if with_depth and keys and number == candidate.largest:
                found = norms.trace_reference(feeds, list(keys), stores.free.put)
                if not _in_calls(baseline, run):
                    outputs.append(with_cache_names(found))
                    continue
            with at_norms(baseline.model, baseline.recognition.sites, exactly):
                outputs.append(with_cache_names(_run_torch(baseline, run, feeds)))
        if not keys:
            return References(tuple(outputs), {}, {})
        progress("PyTorch in float64, norm by norm")
        feeds = wide(candidate.runs[candidate.largest].torch_feeds)
        from_norms, disagreements = norms.write_reference(feeds, stores.fed)
    return References(tuple(outputs), from_norms, disagreements)


def judge_outputs(
    candidate: CandidateRuns, baseline: BaselineRuns, references: References, limits: Mapping[str, Limits]
) -> list[tuple[str, OutputVerdict]]:
    """A verdict on every output of every case, with the case's name."""
    rows = []
    for run, own, reference in zip(candidate.runs, baseline.outputs, references.outputs, strict=True):
        rows += [(run.case.name, row) for row in judge_run(run, reference, own, limits, candidate.names)]
    return rows


def signal_warnings(baseline: BaselineRuns, rows: Sequence[tuple[str, OutputVerdict]]) -> list[str]:
    """A warning for each output whose signal PyTorch itself loses in the deployed dtype, from its worst case."""
    dtypes = {value.dtype.name for outputs in baseline.outputs for value in outputs.values()}
    half = next((dtype for dtype in HALF_DTYPES if dtype in dtypes), None)
    if half is None:
        return []
    worst: dict[str, tuple[str, OutputVerdict]] = {}
    for case, row in rows:
        name = row.name.partition("@")[0].partition(" ")[0]
        if name not in worst or _loss(row) > _loss(worst[name][1]):
            worst[name] = case, row
    warnings = ((name, case, signal_warning(row, half)) for name, (case, row) in worst.items())
    return [f"output {name} of {case}: {warning}" for name, case, warning in warnings if warning]


def _loss(row: OutputVerdict) -> float:
    return row.baseline_figures.rms_rel_row if row.baseline_figures else 0.0


def check_parts(
    access: NormAccess,
    norms: TorchNorms,
    candidate: CandidateRuns,
    baseline: BaselineRuns,
    matched: MatchedNorms,
    references: References,
    stores: Stores,
    options: ValidationOptions,
    progress: Progress,
    inputs: Mapping[str, str] | None = None,
) -> PartChecks:
    """Check every norm alone and every segment between norms; see `Candidate` for `inputs`."""
    called, run = baseline.called, candidate.runs[candidate.largest]
    feeds = own_names(run.case.feeds, inputs or {})
    notes, limits = list(access.remarks), options.all_limits

    def alone() -> list[NormCheck]:
        checks: list[NormCheck] = []
        for part in windows(matched.keys, options.window):
            asked = [norms.deployed[key] for key in part]
            checks += check_norms(access, norms, asked, stores.fed, options.seed, progress, limits.get(NORMS))
        return checks

    checks = without_reference(try_or_note("norms", notes, alone), references.disagreements)
    checked = {check.norm.key for check in checks}
    checks += [check for check in unsound_norms(called.values()) if check.norm.key not in checked]
    checks = [with_cause(check, access, norms) for check in checks]
    unused = access.unused
    checks = [failed(c, "its result is not read in the file") if c.norm.key in unused else c for c in checks]
    cut = [key for key in matched.keys if called[key].forced]
    progress(f"the segments between {len(cut)} norms")
    describe = segment_names(access, called, matched.keys, matched.lost, cut)
    outputs = SegmentOutputs(named(references.from_norms, candidate.names), lambda found: named(found, candidate.names))
    segments = try_or_note(
        "segments between norms", notes,
        lambda: check_segments(
            access, norms, (feeds, run.torch_feeds), cut, stores.fed, describe, outputs,
            limits.get(SEGMENTS),
        ),
    )  # fmt: skip
    return PartChecks(checks, segments, notes)


def why_no_norm(
    candidate: Candidate, recognition: Recognition, called: Mapping[Key, CalledNorm], notes: Sequence[str]
) -> str:
    """Why no norm at all was checked.

    Args:
        candidate: the side that is checked.
        recognition: the norms of PyTorch.
        called: those that it called.
        notes: the notes of `match_norms` and `check_parts`.
    """
    if candidate.no_norms:
        return candidate.no_norms
    if candidate.norms is None:
        return f"{candidate.name} is a runner, which gives no access to its norms"
    if notes:
        more = f" (and {len(notes) - 1} more, see the notes)" if len(notes) > 1 else ""
        return f"{notes[0]}{more}"
    if not recognition.sites:
        reasons = [f"{refusal.path or 'the model itself'}: {refusal.reason}" for refusal in recognition.refusals[:1]]
        return "; ".join(["no module of PyTorch's model is recognized as an RMSNorm", *reasons])
    return "PyTorch calls none of its norms on these inputs" if not called else "both sides have none in common"


def missing_outputs(candidate: Candidate, runs: CandidateRuns, baseline: BaselineRuns) -> list[str]:
    """Notes on outputs of PyTorch that the candidate does not return, if their outputs have names in common."""
    returned = [name for name in baseline.outputs[runs.largest] if not is_present(name)]
    if not set(runs.names) & set(returned):
        return []
    return [
        f"PyTorch also returns {name}, which {candidate.name} does not" for name in returned if name not in runs.names
    ]
