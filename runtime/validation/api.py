"""Hold a deployed model against PyTorch: error against a float64 truth, with PyTorch's own error as the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.onnx_io.manifest import deviation_rows, versions
from ...models.dtypes import torch_name
from ...models.errors import UsageError
from ..accuracy.tolerances import Limits, check_limits
from ..inputs.cases import Case
from ..inputs.synthetic import DEFAULT_SHAPES
from ..norms.activation_store import ActivationStore
from ..report.report_file import BISECT_SCHEMA
from ..runners.base import Runner, TensorInfo
from ..runners.torch import TorchRunner
from .candidate import Candidate, candidate_of
from .pipeline import Examination, Progress
from .result import ValidationReport
from .run_cases import DECODE_SUFFIX, Run, by_position, made_up_cases, run_guarded

if TYPE_CHECKING:
    from torch import nn

CasesOf = Callable[[Sequence[TensorInfo]], Sequence[Case] | None]


def validate(
    candidate: str | Path | nn.Module | Runner,
    model: nn.Module,
    *,
    provider: str = "cpu",
    shapes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    cases: Sequence[Case] | CasesOf | None = None,
    limits: Mapping[str, Limits] | None = None,
    outputs_only: bool = False,
    depth: bool = False,
    window: int | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Run a deployed model and PyTorch on the same inputs; judge every output, every norm, and all that lies between.

    A decoder exported with its KV cache runs twice for each case: over the prompt with an empty cache, and over one
    more token with the cache that came out; both are held against PyTorch without a cache. Norms and segments are
    checked on the largest case.

    Args:
        candidate: an exported folder, an .onnx file, another PyTorch module, or an open runner.
        model: the PyTorch model, in the dtype that is deployed. It is not changed.
        provider: ONNX Runtime's execution provider: `cpu`, `cuda` or `tensorrt`.
        shapes: batch and length of each case; `(1, 1), (1, 7), (3, 33)` when None.
        seed: of the made-up inputs.
        cases: inputs in place of the made-up ones, or a function that makes them from the candidate's inputs (and
            may return None).
        limits: explicit limits by output name, `*` for all others, in place of the rule that PyTorch's own error is
            the baseline. They are for outputs; norms and segments are held to the table.
        outputs_only: leave norms and segments out.
        depth: measure how error grows along the depth.
        window: norms that are looked at together: fewer need less memory. None looks at all together.
        settings: what the report says was asked for.
        progress: called with a line of text at each step.

    Raises:
        UsageError: the candidate, its inputs and the model do not fit together.
        EnvironmentMissingError: ONNX Runtime or the provider is not there.
    """
    target = candidate_of(candidate, provider)
    _check_dtype(target, model)
    if window is not None and window < 1:
        raise UsageError(f"a window of {window} norms holds none; give at least 1, or none for all together.")
    progress = progress or (lambda _: None)
    report = ValidationReport(target.name)
    report.settings = dict(settings or {"seed": seed, "shapes": [list(s) for s in shapes or DEFAULT_SHAPES]})
    progress(f"opening {target.name}")
    with target.opened() as runner:
        infos = runner.inputs()
        given = cases(infos) if callable(cases) else cases
        runs = [Run(case) for case in given or made_up_cases(infos, model, shapes, seed)]
        for number, run in enumerate(runs, start=1):
            progress(f"{target.name}: {run.case.name} ({number} of {len(runs)})")
            run.got = run_guarded(runner, run.case, target.name)
        own_names = list(dict.fromkeys(name.removesuffix(DECODE_SUFFIX) for run in runs for name in run.got))
        report.provenance = {"candidate": runner.provenance()}
    check_limits(limits or {}, own_names)
    with TorchRunner(model, input_names=by_position(model, infos)) as baseline, ActivationStore() as store:
        work = Examination(target, model, baseline, runs, own_names, store, seed, window, progress)
        work.fill(report, limits or {}, with_norms=not outputs_only, depth=depth)
        report.provenance |= {"baseline": baseline.provenance(), "versions": versions()}
    report.deviations = deviation_rows(dict(target.manifest), "onnxruntime")
    report.refusals = list(target.manifest.get("refusals", ()))
    return report


def bisect(candidate: str | Path | nn.Module | Runner, model: nn.Module, **options: Any) -> ValidationReport:
    """Say which norm, or which segment between two norms, first introduces error, and how it grows from there.

    Arguments and errors as `validate`'s; `depth` is always on. The report's `culprits` are the answer.
    """
    report = validate(candidate, model, **{**options, "depth": True, "outputs_only": False})
    report.schema = BISECT_SCHEMA
    return report


def _check_dtype(target: Candidate, model: nn.Module) -> None:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    name, exported = None if dtype is None else torch_name(dtype), target.manifest.get("dtype")
    if exported is not None and name is not None and name != exported:
        raise UsageError(
            f"{target.name} was exported in {exported}, but the PyTorch model is in {name}. Load it in "
            f"{exported} (--dtype {exported}): the baseline must have the dtype that is deployed."
        )
