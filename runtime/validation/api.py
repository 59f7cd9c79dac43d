"""Compare a deployed model with PyTorch (`validate`), and locate where errors are introduced (`bisect`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.graph.metadata import IN_GRAPH
from ...export.onnx_io.manifest import deviation_rows, versions
from ...models.errors import UsageError
from ...models.recognition.find_norms import find_norms
from ...models.recognition.site import Recognition
from ..accuracy.tolerances import NORMS, PARTS, check_limits
from ..attention.attention_checks import AttentionCheck, check_attentions
from ..attention.file_attentions import FileAttentions
from ..attention.torch_attentions import CalledAttention, recorded_attentions
from ..inputs.cases import Case, given_cases
from ..inputs.exported import component_folders
from ..inputs.plan import Plan
from ..norms.access import NormAccess, as_deployed
from ..norms.activation_store import ActivationStore, Key
from ..norms.onnx_norms import OnnxNorms
from ..norms.torch_norms import TorchNorms
from ..report.report_file import BISECT_SCHEMA, VALIDATE_SCHEMA
from ..runners.base import Runner, TensorInfo
from ..runners.open import open_runner
from ..runners.ort_graph import file_record
from ..runners.providers import reduced_precision
from .candidate import Candidate
from .components import validate_components, validate_runners
from .depth import DepthPoint, errors_introduced, measure_depth
from .names import Renamed, RenamedTorch, match_inputs, own_names, renamed_infos
from .norm_checks import try_or_note, unsound_norms
from .options import ValidationOptions, quantized_profile, with_own_profile
from .pipeline import (
    Baseline,
    BaselineRuns,
    CandidateRuns,
    MatchedNorms,
    PartChecks,
    Progress,
    Stores,
    check_parts,
    compute_references,
    judge_outputs,
    match_norms,
    missing_outputs,
    run_baseline,
    run_candidate,
    signal_warnings,
    why_no_norm,
)
from .recorded_checks import check_recorded
from .replay import SIDES
from .result import ValidationReport
from .run_cases import last_token_notes
from .sides import Sides, cases_for, dtype_of, hinting, is_model_source, open_sides

if TYPE_CHECKING:
    from torch import nn

Cases = Sequence[Case | Mapping[str, Any]]


def validate(
    candidate: str | Path | nn.Module | Runner,
    model: str | Path | nn.Module | None = None,
    options: ValidationOptions | None = None,
    *,
    cases: Cases | Callable[[Sequence[TensorInfo]], Cases] | None = None,
    trust_remote_code: bool = False,
    allow_code: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> ValidationReport:
    """Run a deployed model and PyTorch on the same inputs; judge every output, every norm, and every segment between.

    A decoder exported with its KV cache runs twice for each case: on the prompt with an empty cache, and on one more
    token with the returned cache; both results are compared with PyTorch without a cache. Norms and segments are
    checked on the largest case.

    Args:
        candidate: an exported folder, of one model or of an encoder and its decoder; an .onnx file; an engine; another
            PyTorch module, or its name, as for `load_model`; or an open runner.
        model: the PyTorch model, in the dtype that is deployed, or its name, as for `load_model`. It is not changed.
            None for the model that the manifest of an exported folder names.
        options: the options; `ValidationOptions()` if None.
        cases: inputs that replace those of `options`: a `Case`, or a mapping of input name to numpy array or torch
            tensor, for each run; or a function that returns them, given the candidate's inputs. The names are those of
            the candidate or of PyTorch.
        trust_remote_code: run Python code that comes with a checkpoint or a tokenizer.
        allow_code: run the Python code that the manifest names, if `model` is None.
        progress: called with a line of text at each step.
        changes: fields of `ValidationOptions` that differ from `options`, such as `provider="cuda"`.

    Returns:
        The report, with the verdict.

    Raises:
        UsageError: the candidate, its inputs and the model do not match.
        EnvironmentMissingError: ONNX Runtime or the provider is not installed.
    """
    options = dataclasses.replace(options or ValidationOptions(), **changes)
    progress = progress or (lambda _: None)
    is_path = isinstance(candidate, str | Path) and not is_model_source(str(candidate))
    if isinstance(candidate, str | Path) and is_path and Path(candidate).expanduser().is_dir():
        options = with_own_profile(options, Path(candidate).expanduser())
    if len(options.runners) > 1:
        again = functools.partial(
            validate, candidate, model, cases=cases, trust_remote_code=trust_remote_code, allow_code=allow_code,
            progress=progress,
        )  # fmt: skip
        return validate_runners(candidate, options, again)
    components = component_folders(candidate) if isinstance(candidate, str | Path) and is_path else {}
    if components and isinstance(candidate, str | Path):
        if cases is not None:
            raise UsageError(f"{candidate} holds several models: {', '.join(components)}. Give inputs to one of them.")
        each = functools.partial(_validated, trust_remote_code=trust_remote_code, progress=progress)
        return validate_components(
            Path(candidate).expanduser(), components, model, options, each,
            trust_remote_code=trust_remote_code, allow_code=allow_code, progress=progress,
        )  # fmt: skip
    return _validated(candidate, model, options, cases, trust_remote_code, allow_code, progress=progress)


def _validated(
    candidate: str | Path | nn.Module | Runner,
    model: str | Path | nn.Module | None,
    options: ValidationOptions,
    cases: Cases | Callable[[Sequence[TensorInfo]], Cases] | None = None,
    trust_remote_code: bool = False,
    allow_code: bool = False,
    *,
    progress: Progress,
) -> ValidationReport:
    """Validate one model; see `validate`."""
    sides = open_sides(candidate, model, options, trust_remote_code, progress, allow_code)
    with hinting(sides.hint):
        report, provenance = _compared(sides, options, cases, trust_remote_code, progress)
    if options.inputs is not None and Path(options.inputs).is_file():
        provenance["inputs"] = file_record(Path(options.inputs))
    names = (candidate if sides.named and cases is None else None, sides.against)
    settings = {**dict(zip(SIDES, (None if n is None else str(n) for n in names), strict=True)), **options.to_dict()}
    return dataclasses.replace(
        report,
        deviations=deviation_rows(dict(sides.candidate.manifest), sides.candidate.runtime),
        refusals=list(sides.candidate.manifest.get("refusals", ())),
        settings=settings,
        provenance=provenance,
        schema=BISECT_SCHEMA if options.bisect else VALIDATE_SCHEMA,
    )


def bisect(
    candidate: str | Path | nn.Module | Runner,
    model: str | Path | nn.Module | None = None,
    options: ValidationOptions | None = None,
    **more: Any,
) -> ValidationReport:
    """Locate the norm, or the segment between two norms, that first introduces error, and how the error grows.

    Arguments and errors are those of `validate`. The report's `culprits` are the result.
    """
    return validate(candidate, model, options, **{**more, "bisect": True})


def _norms_of(sides: Sides) -> Recognition:
    """The norms of the PyTorch model that the candidate has as modules.

    An export names the norms that it found in the captured graph: they are checked with the formula of the graph, also
    where a module would be recognized alone. Of a part of a model, those of the part's graph are left.
    """
    found, manifest = find_norms(sides.model), sides.candidate.manifest
    rows = {site["path"]: site for site in manifest.get("sites", ())}
    in_graph = {path for path, row in rows.items() if row.get("found") == IN_GRAPH}
    kept = [site for site in found.sites if site.path not in in_graph]
    if "part" in manifest:
        kept = [site for site in kept if rows.get(site.path, {}).get("calls")]
    return dataclasses.replace(found, sites=kept)


def _compared(
    sides: Sides,
    options: ValidationOptions,
    cases: Cases | Callable[[Sequence[TensorInfo]], Cases] | None,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[ValidationReport, dict[str, Any]]:
    """Run both sides and judge them; the report, and the provenance of both."""
    side = sides.candidate
    progress(f"opening {side.name}")
    with side.opened() as runner:
        infos = runner.inputs()
        matched = match_inputs(infos, sides.model, side.manifest.get("inputs", ()), side.name, sides.form)
        side = dataclasses.replace(side, inputs=matched.names)
        sides = dataclasses.replace(sides, candidate=side)
        shown = renamed_infos(infos, matched.names)
        if cases is None:
            plan = cases_for(sides, shown, options, trust_remote_code)
        else:
            plan = Plan(given_cases(cases(infos) if callable(cases) else cases, shown, matched.names))
        runs = run_candidate(Renamed(runner, matched.names), side.name, plan.cases, progress)
        provenance = {"candidate": runner.provenance()}
    check_limits(options.limits, runs.names, PARTS)
    if options.lossy is not None:
        runs = runs.for_torch(dtype_of(sides.model))
    cached = any(run.present for run in runs.runs)
    with open_runner(sides.model, include_cache=cached, form=sides.form) as torch_runner:
        baseline = Baseline(sides.model, RenamedTorch(torch_runner, matched.kept), _norms_of(sides))
        report = _examined(sides, runs, baseline, options, progress)
        report.untried[:0] = [*plan.untried, *runs.untried]
        remark = reduced_precision(provenance["candidate"])
        if remark is not None and report.verdict == "fail" and dtype_of(sides.model) == "float32":
            report.warnings.append(remark)
        report.notes[:0] = [*([sides.hint] if sides.hint else []), *_profile_notes(sides, options), *matched.notes]
        provenance |= {"baseline": torch_runner.provenance(), "versions": versions()}
    return report, provenance


def _profile_notes(sides: Sides, options: ValidationOptions) -> list[str]:
    """That the limits are those of the profile that the manifest names; the same whether the user named it too."""
    profile = quantized_profile(sides.candidate.manifest)
    if profile is None or profile != options.lossy:
        return []
    return [f"the manifest says that the file has {profile} weights: it is judged by the limits of --lossy {profile}"]


def _examined(
    sides: Sides, runs: CandidateRuns, baseline: Baseline, options: ValidationOptions, progress: Progress
) -> ValidationReport:
    """All stages after the candidate's runs."""
    candidate = sides.candidate
    called: dict[Key, CalledAttention | str] = {}
    watched = recorded_attentions(baseline.model, _attention_paths(candidate, options), called)
    baseline = dataclasses.replace(baseline, watched=watched)
    runs, own = run_baseline(baseline, runs, progress, candidate.name)
    baseline = dataclasses.replace(baseline, runner=RenamedTorch(baseline.runner, outputs=own.names))
    largest = runs.runs[runs.largest]
    access = None
    if candidate.norms is not None and not options.outputs_only:
        access = candidate.norms(own_names(largest.own_feeds, candidate.inputs))
    matched = MatchedNorms() if options.outputs_only else _matched(candidate, access, own, baseline)
    deployed = as_deployed(own.called, access) if access is not None and options.lossy is not None else None
    norms = TorchNorms(baseline.model, baseline.runner, baseline.recognition, own.called, deployed)
    with ActivationStore() as fed, ActivationStore() as free:
        stores = Stores(fed, free)
        references = compute_references(
            baseline, norms, runs, matched.keys, stores, with_depth=options.with_depth, progress=progress
        )
        rows = judge_outputs(runs, own, references, options.all_limits)
        warnings = signal_warnings(own, rows)
        notes = [
            *own.notes,
            *missing_outputs(candidate, runs, own),
            *last_token_notes(runs.runs, own.outputs),
            *matched.notes,
        ]
        points: list[DepthPoint] = []
        if access is None or not matched.keys:
            parts = PartChecks(unsound_norms(own.called.values()))
        else:
            parts = check_parts(
                access, norms, runs, own, matched, references, stores, options, progress, candidate.inputs
            )
            notes += parts.notes
            if options.with_depth:
                progress("errors along the depth")
                introduced = errors_introduced(parts.norms, parts.segments)

                def depth() -> list[DepthPoint]:
                    found, note = measure_depth(candidate, access, norms, largest, matched.keys, free, introduced)
                    notes.append(note)
                    return found

                points = try_or_note("errors along the depth", notes, depth)
        if access is not None:
            feeds = own_names(largest.case.feeds, candidate.inputs)
            checks, remarks = check_recorded(candidate, access, baseline.model, own.called, feeds, options, progress)
            parts.norms.extend(checks)
            notes += remarks
    attentions = _checked_attentions(candidate, access, called, options, progress, notes)
    unchecked = ""
    if not parts.norms and not options.outputs_only:
        unchecked = why_no_norm(candidate, baseline.recognition, own.called, [*matched.notes, *parts.notes])
    return ValidationReport(
        candidate.name, rows, parts.norms, parts.segments, points, notes, warnings, list(own.untried),
        unchecked=unchecked, hint=sides.hint, attentions=attentions,
    )  # fmt: skip


def _attention_paths(candidate: Candidate, options: ValidationOptions) -> set[str]:
    """The modules whose attentions are nodes of the candidate, if its parts are checked."""
    if candidate.norms is None or options.outputs_only:
        return set()
    return {row["path"] for row in candidate.manifest.get("attention", ()) if row.get("node") is not None}


def _checked_attentions(
    candidate: Candidate,
    access: NormAccess | None,
    called: Mapping[Key, CalledAttention | str],
    options: ValidationOptions,
    progress: Progress,
    notes: list[str],
) -> list[AttentionCheck]:
    """The check of every attention alone; the notes say which could not be checked."""
    rows = candidate.manifest.get("attention", ())
    if not rows or not isinstance(access, OnnxNorms):
        return []
    file, limits = FileAttentions(access, rows), options.all_limits.get(NORMS)
    notes += file.notes
    return try_or_note(
        "attentions", notes,
        lambda: check_attentions(file, called, options.seed, progress, notes, limits, options.window),
    )  # fmt: skip


def _matched(candidate: Candidate, access: NormAccess | None, own: BaselineRuns, baseline: Baseline) -> MatchedNorms:
    """The norms that both sides have; the notes say why PyTorch's modules of other norms in the file are none."""
    reasons = {refusal.path: refusal.reason for refusal in baseline.recognition.refusals}
    known = {site.path for site in baseline.recognition.sites}
    paths = [] if access is None else [path for path, _ in access.keys if path not in known]
    unrecognized = {path: reasons.get(path, "no formula that is known computes what it does") for path in paths}
    return match_norms(candidate, access, own.called, unrecognized)
