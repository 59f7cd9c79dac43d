"""Find the norms of a PyTorch model that are at risk in a dtype, on real inputs (`risk`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...export.lowering.table import TARGETS, parse_targets
from ...models.calling.calls import CallForm
from ...models.errors import RmsnormDeployError, UsageError
from ...models.recognition.find_norms import find_norms
from ...models.recognition.intercept import NormCall, at_norms
from ...models.recognition.site import Recognition
from ..report.page import Page, Shown
from ..report.printed import print_risk
from ..runners.base import Array
from ..runners.open import open_runner
from .measure import NormError, NormRows, error_in_onnxruntime, error_in_torch, reference_of
from .observe import DTYPES, Margins, NormSeen, NormWatch
from .rules import LEVELS, Level, RiskVerdict, counting_margins, judge_norm

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA = "rmsnorm_deploy.risk/1"
_NOT_ON_CPU = {"bfloat16": "ONNX Runtime has no bfloat16 kernels on the CPU"}
# A larger margin is irrelevant and is null in the JSON, except in float16.
_LARGEST_MARGIN = 1e6

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TargetError:
    """The error of ONNX Runtime with one target in one dtype, or the reason why it could not be measured."""

    error: NormError | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class NormRisk:
    """The risk of one norm.

    Attributes:
        seen: statistics of its inputs.
        errors: errors of PyTorch by dtype, on the sampled rows.
        targets: errors of ONNX Runtime by target and dtype, on the same rows.
        verdicts: verdicts by dtype.
    """

    seen: NormSeen
    errors: dict[str, NormError]
    targets: dict[str, dict[str, TargetError]]
    verdicts: dict[str, RiskVerdict]

    def least_margin(self, dtype: str) -> float:
        """The smallest margin to overflow that is relevant for this norm in `dtype`."""
        return min(row.margin for row in counting_margins(self.seen, dtype))

    def to_dict(self) -> dict[str, Any]:
        """Every statistic as JSON values; margins above 1e6 are null except in float16."""
        seen = dataclasses.asdict(self.seen)
        margins = {dtype: _margin_values(dtype, row) for dtype, row in self.seen.margins.items()}
        outliers = [{"channel": index, "ratio": ratio} for index, ratio in self.seen.outlier_channels]
        weight = self.seen.weight
        return {
            **seen,
            "spec": self.seen.spec.to_dict(),
            "computes": self.seen.spec.describe(),
            "width": list(self.seen.width),
            "margins": margins,
            "least_margin": {dtype: self.least_margin(dtype) for dtype in DTYPES},
            "outlier_channels": outliers,
            "weight": weight and {**dataclasses.asdict(weight), "ratio": weight.ratio},
            "errors": {dtype: dataclasses.asdict(error) for dtype, error in self.errors.items()},
            "targets": {
                target: {dtype: dataclasses.asdict(row) for dtype, row in rows.items()}
                for target, rows in self.targets.items()
            },
            "verdicts": {dtype: dataclasses.asdict(verdict) for dtype, verdict in self.verdicts.items()},
        }


@dataclass(frozen=True, slots=True)
class DtypeRisk:
    """The verdict on a whole model in one dtype: that of its worst norm."""

    verdict: Level
    norm: str
    reason: str


@dataclass(frozen=True, slots=True)
class RiskReport(Shown):
    """The risk of every norm in every dtype.

    Attributes:
        cases: number of inputs that the model ran on.
        norms: in the order of their first calls; a norm with several formulas or widths has a row for each.
        notes: what could not be measured, and why.
        recognition: every norm of the model, and every module that was refused.
    """

    cases: int
    norms: list[NormRisk]
    notes: list[str]
    recognition: Recognition

    @property
    def verdicts(self) -> dict[str, DtypeRisk]:
        """The verdict on each dtype; empty for a model without norms."""
        return {dtype: self._worst(dtype) for dtype in DTYPES} if self.norms else {}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; numbers that are not finite are strings."""
        report = {
            "schema": SCHEMA,
            "cases": self.cases,
            "verdicts": {dtype: dataclasses.asdict(verdict) for dtype, verdict in self.verdicts.items()},
            "norms": [norm.to_dict() for norm in self.norms],
            "notes": list(self.notes),
        }
        return {key: _json(value) for key, value in report.items()}

    def show(self, page: Page) -> None:
        """Print the table of norms, the notes, and the verdict on each dtype."""
        print_risk(page, self.to_dict())

    def _worst(self, dtype: str) -> DtypeRisk:
        def gravity(norm: NormRisk) -> tuple[int, float]:
            return LEVELS.index(norm.verdicts[dtype].verdict), norm.errors[dtype].max_units

        worst = max(self.norms, key=gravity)
        verdict = worst.verdicts[dtype]
        reason = verdict.reasons[0] if verdict.reasons else "it has the largest error, and no value is near a limit"
        return DtypeRisk(verdict.verdict, worst.seen.path, reason)


def risk(
    model: nn.Module,
    cases: Sequence[Mapping[str, Array]],
    *,
    targets: Sequence[str] = TARGETS,
    progress: Progress | None = None,
    form: CallForm | None = None,
) -> RiskReport:
    """Run a PyTorch model and find the norms that are at risk in float32, float16 and bfloat16.

    The rules and thresholds are in `runtime/risk/rules.py`. The errors in each dtype are measured on a sample of at
    most 256 rows of each norm, including those with the largest and the smallest values.

    Args:
        model: the model in any dtype, preferably the one it was trained in. It is restored afterwards, even after an
            error.
        cases: inputs by the names of the parameters of `forward`, one mapping for each run.
        targets: targets whose lowerings are measured in ONNX Runtime on the CPU.
        progress: called with a line of text at each step.
        form: which inputs are parts of nested arguments, and the arguments that are not tensors.

    Returns:
        The verdict on each norm, and on the model in each dtype.

    Raises:
        UsageError: there is no case, a target is unknown, or the inputs do not match the model.
    """
    targets = parse_targets(targets) if targets else []
    if not cases:
        raise UsageError("there are no inputs to run the model on; give at least one case.")
    progress = progress or (lambda _: None)
    progress("finding the norms")
    recognition = find_norms(model)
    notes: list[str] = []
    if recognition.refusals:
        notes.append(f"modules that were not recognized as RMSNorm were not checked: {len(recognition.refusals)}")
    if not recognition.sites:
        return RiskReport(len(cases), [], notes, recognition)
    watches = _Watches(notes)
    visiting = at_norms(model, recognition.sites, watches.visit, watches.unknown)
    with visiting, open_runner(model, form=form) as runner:
        for number, feeds in enumerate(cases, 1):
            progress(f"running case {number} of {len(cases)}")
            runner.run(feeds)
    unreached = [site.path for site in recognition.sites if site.path not in watches.reached]
    notes += [f"{path or 'the model itself'} was not called by any case" for path in unreached]
    norms = [_measured(watch, targets, progress) for watch in watches.all.values()]
    return RiskReport(len(cases), norms, notes, recognition)


class _Watches:
    """One watch for each norm, formula and width, in the order of their first calls."""

    def __init__(self, notes: list[str]) -> None:
        self.all: dict[tuple[Any, ...], NormWatch] = {}
        self.reached: set[str] = set()
        self._notes = notes

    def visit(self, path: str, number: int, call: NormCall, original: Callable[[], Tensor]) -> Tensor:
        del number
        result = original()
        self.reached.add(path)
        key = (path, call.spec, tuple(call.x.shape[-call.spec.trailing_dims :]))
        if key not in self.all:
            self.all[key] = NormWatch(path, call)
        self.all[key].observe(call, result)
        return result

    def unknown(self, path: str, names: str) -> None:
        self.reached.add(path)
        note = f"{path or 'the model itself'} is called with the arguments {names}, which are not supported"
        if note not in self._notes:
            self._notes.append(note)


def _measured(watch: NormWatch, targets: Sequence[str], progress: Progress) -> NormRisk:
    seen, rows = watch.seen(), watch.sample()
    progress(f"measuring {seen.path or 'the norm'}")
    reference = reference_of(rows)
    errors = {dtype: error_in_torch(rows, dtype, reference) for dtype in DTYPES}
    in_targets = {target: {dtype: _in_target(rows, dtype, target, reference) for dtype in DTYPES} for target in targets}
    known = {dtype: {target: row[dtype].error for target, row in in_targets.items()} for dtype in DTYPES}
    verdicts = {
        dtype: judge_norm(
            seen, rows, dtype, errors[dtype], {t: error for t, error in known[dtype].items() if error is not None}
        )
        for dtype in DTYPES
    }
    return NormRisk(seen, errors, in_targets, verdicts)


def _in_target(rows: NormRows, dtype: str, target: str, reference: Any) -> TargetError:
    if dtype in _NOT_ON_CPU:
        return TargetError(None, _NOT_ON_CPU[dtype])
    try:
        return TargetError(error_in_onnxruntime(rows, dtype, target, reference))
    except RmsnormDeployError as error:
        return TargetError(None, str(error))


def _margin_values(dtype: str, margins: Margins) -> dict[str, float | None]:
    values = dataclasses.asdict(margins)
    return {name: value if dtype == "float16" or value < _LARGEST_MARGIN else None for name, value in values.items()}


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list) else value
