"""Compare a deployed model with PyTorch (`validate`), and locate where errors are introduced (`bisect`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.onnx_io.manifest import deviation_rows, versions
from ...models.recognition.find_norms import find_norms
from ..accuracy.tolerances import PARTS, check_limits
from ..inputs.cases import Case, given_cases
from ..inputs.plan import Plan
from ..norms.access import as_deployed
from ..norms.activation_store import ActivationStore
from ..norms.torch_norms import TorchNorms
from ..report.report_file import BISECT_SCHEMA, VALIDATE_SCHEMA
from ..runners.base import Runner, TensorInfo
from ..runners.open import open_runner
from ..runners.ort_graph import file_record
from .depth import DepthPoint, errors_introduced, measure_depth
from .norm_checks import unsound_norms
from .options import ValidationOptions
from .pipeline import (
    Baseline,
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
    try_or_note,
)
from .replay import SIDES
from .result import ValidationReport
from .run_cases import by_position, last_token_notes
from .sides import Sides, cases_for, dtype_of, open_sides

if TYPE_CHECKING:
    from torch import nn

Cases = Sequence[Case | Mapping[str, Any]]


def validate(
    candidate: str | Path | nn.Module | Runner,
    model: str | Path | nn.Module,
    options: ValidationOptions | None = None,
    *,
    cases: Cases | Callable[[Sequence[TensorInfo]], Cases] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> ValidationReport:
    """Run a deployed model and PyTorch on the same inputs; judge every output, every norm, and every segment between.

    A decoder exported with its KV cache runs twice for each case: on the prompt with an empty cache, and on one more
    token with the returned cache; both results are compared with PyTorch without a cache. Norms and segments are
    checked on the largest case.

    Args:
        candidate: an exported folder, an .onnx file, another PyTorch module (or its name, as for `load_model`), or an
            open runner.
        model: the PyTorch model, in the dtype that is deployed, or its name, as for `load_model`. It is not changed.
        options: the options; `ValidationOptions()` if None.
        cases: inputs that replace those of `options`: a `Case`, or a mapping of input name to numpy array or torch
            tensor, for each run; or a function that returns them, given the candidate's inputs.
        trust_remote_code: run Python code that comes with a checkpoint or a tokenizer.
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
    sides = open_sides(candidate, model, options, trust_remote_code, progress)
    side = sides.candidate
    progress(f"opening {side.name}")
    with side.opened() as runner:
        infos = runner.inputs()
        if cases is None:
            plan = cases_for(sides, infos, options, trust_remote_code)
        else:
            plan = Plan(given_cases(cases(infos) if callable(cases) else cases, infos))
        runs = run_candidate(runner, side.name, plan.cases, progress)
        provenance = {"candidate": runner.provenance()}
    check_limits(options.limits, runs.names, PARTS)
    if options.lossy is not None:
        runs = runs.for_torch(dtype_of(sides.model))
    cached = any(run.present for run in runs.runs)
    names_of_inputs = by_position(sides.model, infos)
    with open_runner(sides.model, input_names=names_of_inputs, include_cache=cached) as torch_runner:
        baseline = Baseline(sides.model, torch_runner, find_norms(sides.model))
        report = _examined(sides, runs, baseline, options, progress)
        report.untried[:0] = plan.untried
        provenance |= {"baseline": torch_runner.provenance(), "versions": versions()}
    if options.inputs is not None and Path(options.inputs).is_file():
        provenance["inputs"] = file_record(Path(options.inputs))
    names = (candidate if sides.named and cases is None else None, sides.against)
    settings = {**dict(zip(SIDES, (None if n is None else str(n) for n in names), strict=True)), **options.to_dict()}
    return dataclasses.replace(
        report,
        deviations=deviation_rows(dict(side.manifest), "onnxruntime"),
        refusals=list(side.manifest.get("refusals", ())),
        settings=settings,
        provenance=provenance,
        schema=BISECT_SCHEMA if options.bisect else VALIDATE_SCHEMA,
    )


def bisect(
    candidate: str | Path | nn.Module | Runner,
    model: str | Path | nn.Module,
    options: ValidationOptions | None = None,
    **more: Any,
) -> ValidationReport:
    """Locate the norm, or the segment between two norms, that first introduces error, and how the error grows.

    Arguments and errors are those of `validate`. The report's `culprits` are the result.
    """
    return validate(candidate, model, options, **{**more, "bisect": True})


def _examined(
    sides: Sides, runs: CandidateRuns, baseline: Baseline, options: ValidationOptions, progress: Progress
) -> ValidationReport:
    """All stages after the candidate's runs."""
    candidate = sides.candidate
    runs, own = run_baseline(baseline, runs, progress)
    largest = runs.runs[runs.largest]
    access = None
    if candidate.norms is not None and not options.outputs_only:
        access = candidate.norms(largest.own_feeds)
    matched = MatchedNorms() if options.outputs_only else match_norms(candidate, access, own.called)
    deployed = as_deployed(own.called, access) if access is not None and options.lossy is not None else None
    norms = TorchNorms(baseline.model, baseline.runner, baseline.recognition, own.called, deployed)
    with ActivationStore() as fed, ActivationStore() as free:
        stores = Stores(fed, free)
        references = compute_references(
            baseline, norms, runs, matched.keys, stores, with_depth=options.with_depth, progress=progress
        )
        rows = judge_outputs(runs, own, references, options.all_limits)
        warnings = signal_warnings(own, rows)
        notes = [*missing_outputs(candidate, runs, own), *last_token_notes(runs.runs, own.outputs), *matched.notes]
        points: list[DepthPoint] = []
        if access is None or not matched.keys:
            parts = PartChecks(unsound_norms(own.called.values()))
        else:
            parts = check_parts(access, norms, runs, own, matched, references, stores, options, progress)
            notes += parts.notes
            if options.with_depth:
                progress("errors along the depth")
                introduced = errors_introduced(parts.norms, parts.segments)

                def depth() -> list[DepthPoint]:
                    found, note = measure_depth(candidate, access, norms, largest, matched.keys, free, introduced)
                    notes.append(note)
                    return found

                points = try_or_note("errors along the depth", notes, depth)
    return ValidationReport(
        candidate.name, rows, parts.norms, parts.segments, points, notes, warnings, list(own.untried)
    )
