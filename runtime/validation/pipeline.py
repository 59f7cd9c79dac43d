"""One examination of a candidate: its outputs, its norms alone, what lies between them, and errors along the depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...models.recognition.find_norms import find_norms
from ...models.recognition.intercept import at_norms
from ..accuracy.compare_output import OutputVerdict, figures
from ..accuracy.tolerances import Limits
from ..norms.access import CalledNorm, NormAccess
from ..norms.activation_store import ActivationStore
from ..norms.float64_model import exactly, in_float64
from ..norms.graph_norms import Key
from ..norms.torch_norms import TorchNorms
from ..runners.base import Array
from ..runners.torch import TorchRunner
from .candidate import Candidate
from .norm_checks import (
    AS_IT_RUNS,
    NormCheck,
    check_norms,
    check_segments,
    no_reference,
    norm_name,
    sound_limit,
    try_or_note,
)
from .result import DepthPoint, ValidationReport
from .run_cases import Outputs, Run, judge_output, named, wide

if TYPE_CHECKING:
    from torch import nn

# A norm's own code in float64 may differ from the reference by the order of its sums.
_SAME_FORMULA = 1e-9

Progress = Callable[[str], None]


@dataclass(slots=True)
class Examination:
    """A candidate and PyTorch, the runs of both, and what is known of the norms so far.

    Attributes:
        target: the candidate.
        model: the PyTorch model.
        baseline: runs it.
        runs: each case, with what the candidate made of it.
        names: the candidate's outputs.
        store: what PyTorch has at its norms.
        seed: of adversarial inputs.
        window: norms that are looked at together; None for all.
        progress: progress.
        called: the norms that PyTorch called on the largest case, in order.
        keys: those of them that the candidate has too.
        lost: those of which the candidate has no node at all.
    """

    target: Candidate
    model: nn.Module
    baseline: TorchRunner
    runs: list[Run]
    names: list[str]
    store: ActivationStore
    seed: int
    window: int | None
    progress: Progress
    called: dict[Key, CalledNorm] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)
    lost: set[Key] = field(default_factory=set)

    def fill(self, report: ValidationReport, limits: Mapping[str, Limits], *, with_norms: bool, depth: bool) -> None:
        """Fill the report."""
        largest = max(self.runs, key=lambda run: run.size)
        recognition = find_norms(self.model)
        norms = TorchNorms(self.model, self.baseline, recognition)
        for number, run in enumerate(self.runs, start=1):
            self.progress(f"PyTorch: {run.case.name} ({number} of {len(self.runs)})")
            if run is largest:
                self.called, run.wanted = norms.survey(run.torch_feeds)
            else:
                run.wanted = self.baseline.run(run.torch_feeds)
        others = [name for name in largest.wanted if name not in self.names and set(self.names) & set(largest.wanted)]
        report.notes += [f"PyTorch also returns {name}, which {self.target.name} does not" for name in others]
        access = self.target.norms(largest.torch_feeds) if with_norms else None
        if with_norms:
            self._match(access, report)
        with ActivationStore() as free:
            with in_float64(self.model):
                for number, run in enumerate(self.runs, start=1):
                    self.progress(f"PyTorch in float64: {run.case.name} ({number} of {len(self.runs)})")
                    traced = depth and run is largest and bool(self.keys)
                    reference = self._reference(norms, run, free if traced else None, recognition.sites)
                    report.rows += [(run.case.name, v) for v in self._judged(run, reference, limits)]
                if self.keys:
                    self.progress("PyTorch in float64, norm by norm")
                    outputs, disagreements = norms.write_reference(wide(largest.torch_feeds), self.store)
            if access is None or not self.keys:
                report.norms = self._unrecognized()
                return
            report.notes += access.remarks
            reference_outputs = named(outputs, self.names)
            self._check_parts(report, access, norms, largest, reference_outputs, disagreements)
            if depth:
                report.depth = try_or_note(
                    "errors along the depth", report.notes, lambda: self._depth(report, access, norms, largest, free)
                )

    def _reference(self, norms: TorchNorms, run: Run, free: ActivationStore | None, sites: Sequence[Any]) -> Outputs:
        feeds = wide(run.torch_feeds)
        if free is not None:
            return norms.trace_reference(feeds, self.keys, free.put)
        with at_norms(self.model, sites, exactly):
            return self.baseline.run(feeds)

    def _judged(self, run: Run, reference: Outputs, limits: Mapping[str, Limits]) -> list[OutputVerdict]:
        true, wanted = named(reference, self.names), named(run.wanted, self.names)
        return [judge_output(name, value, true, wanted, limits) for name, value in run.got.items()]

    def _match(self, access: NormAccess | None, report: ValidationReport) -> None:
        """Which norms are on both sides, in PyTorch's order; the report says which are not, and why."""
        present = set(access.keys) if access is not None else set()
        problems = access.problems if access is not None else {}
        if not present and not problems:
            if self.called:
                report.notes.append(
                    f"{self.target.name} does not say which of its nodes are norms, so only its outputs were compared"
                )
            return
        self.keys = [key for key in self.called if key in present]
        refused = {row["path"]: row["reason"] for row in self.target.manifest.get("refusals", ())}
        for key in (key for key in self.called if key not in present):
            reason = problems.get(key[0]) or refused.get(key[0])
            if reason is None:
                self.lost.add(key)
                reason = "none of its nodes names it"
            report.notes.append(f"{norm_name(key)} could not be checked by itself: {reason}")
        for key in sorted(present - set(self.called)):
            report.notes.append(f"{norm_name(key)} was not reached by these inputs, so it was not checked")

    def _check_parts(
        self,
        report: ValidationReport,
        access: NormAccess,
        norms: TorchNorms,
        largest: Run,
        reference_outputs: Outputs,
        disagreements: Mapping[Key, float],
    ) -> None:
        def alone() -> list[NormCheck]:
            checks = []
            for part in _windows(self.keys, self.window):
                checks += check_norms(access, norms, self.called, part, self.store, self.seed, self.progress)
            return checks

        report.norms = try_or_note("norms", report.notes, alone)
        report.norms = [self._unsound(check, disagreements) for check in report.norms]
        checked = {check.norm.key for check in report.norms}
        report.norms += [check for check in self._unrecognized() if check.norm.key not in checked]
        unused = access.unused()
        report.norms = [_failed(c, "nothing in the file reads its result") if c.norm.key in unused else c
                        for c in report.norms]  # fmt: skip
        cut = [key for key in self.keys if self.called[key].forced]
        self.progress(f"the segments between {len(cut)} norms")
        feeds = (largest.case.feeds, largest.torch_feeds)
        report.segments = try_or_note(
            "segments between norms", report.notes,
            lambda: check_segments(
                access, norms, feeds, cut, self.store, reference_outputs, lambda outputs: named(outputs, self.names),
                lambda end: self._segment(cut, end), self.window,
            ),
        )  # fmt: skip

    def _unrecognized(self) -> list[NormCheck]:
        """Norms that do not compute, as the model runs, what they were recognized by; a truth with them is none.

        Norms whose statistics overflow in a half type do not either; those are PyTorch's own fault.
        """
        return [
            NormCheck(norm, "plain", False, no_reference(norm.spec, norm.off))
            for norm in self.called.values()
            if not norm.spec.sums_in_half and norm.off > sound_limit(norm.spec, norm.y_dtype)
        ]

    @staticmethod
    def _unsound(check: NormCheck, disagreements: Mapping[Key, float]) -> NormCheck:
        off = disagreements.get(check.norm.key, 0.0)
        if off <= _SAME_FORMULA:
            return check
        return _failed(check, no_reference(check.norm.spec, off, "PyTorch's own code in float64", "x row scale"))

    def _segment(self, cut: list[Key], end: Key | str) -> tuple[str, list[str]]:
        """The name of the segment that ends before a norm or an output, and the norms inside it.

        A norm that could not be cut out is inside where its nodes are. One that has no node left may be anywhere
        between what goes into the segment and its end.
        """
        order = list(self.called)
        sources = self.target.sources(cut, end)
        first = -1 if sources.reads_inputs else min((order.index(key) for key in sources.keys), default=-1)
        last = order.index(end) if not isinstance(end, str) else len(order)
        between = order[first + 1 : last]
        inside = [
            norm_name(key) for key in order
            if key not in self.keys and (key[0] in sources.paths or (key in between and key in self.lost))
        ]  # fmt: skip
        begin = norm_name(max(sources.keys, key=order.index)) if sources.keys else "the inputs"
        return f"{begin} ... {end if isinstance(end, str) else norm_name(end)}", inside

    def _depth(
        self, report: ValidationReport, access: NormAccess, norms: TorchNorms, largest: Run, free: ActivationStore
    ) -> list[DepthPoint]:
        """Errors along the depth as the whole model runs, beside what each part introduces by itself."""

        def errors_into(found: dict[tuple[Key, str], float]) -> Callable[[Key, str, Array], None]:
            def sink(key: Key, role: str, value: Array) -> None:
                found[key, role] = figures(value, free.get(key, role)).max_rel_row

            return sink

        own: dict[tuple[Key, str], float] = {}
        theirs: dict[tuple[Key, str], float] = {}
        self.progress("errors along the depth")
        norms.trace(largest.torch_feeds, self.keys, errors_into(own), None)
        exposed = access.trace(largest.case.feeds, self.keys, errors_into(theirs), self.window)
        with self.target.opened() as runner:
            report.notes.append(_exposure_note(exposed, runner.run(largest.case.feeds)))
        introduced = _introduced(report)
        points = []
        for key in self.keys:
            for role, side in (("x", "input"), ("y", "output")):
                mine, pytorch = introduced.get((key, role), (None, None))
                points.append(DepthPoint(key, side, theirs[key, role], own[key, role], mine, pytorch))  # type: ignore[arg-type]
        return points


def _introduced(report: ValidationReport) -> dict[tuple[Key, str], tuple[float, float]]:
    """What each norm and segment adds by itself: the candidate's error and PyTorch's."""
    found: dict[tuple[Key, str], tuple[float, float]] = {}
    for check in report.norms:
        for verdict in check.kinds:
            if verdict.name == AS_IT_RUNS and verdict.figures and verdict.baseline_figures:
                pair = (verdict.figures.max_rel_row, verdict.baseline_figures.max_rel_row)
                found[check.norm.key, "y"] = pair
    for segment in report.segments:
        mine, own = segment.verdict.figures, segment.verdict.baseline_figures
        if segment.end is not None and mine is not None and own is not None:
            found[segment.end, "x"] = (mine.max_rel_row, own.max_rel_row)
    return found


def _exposure_note(exposed: Mapping[str, Array], plain: Mapping[str, Array]) -> str:
    """Whether looking at the values at the norms changed what was looked at."""
    worst, changed = 0.0, 0
    for name, value in exposed.items():
        same = figures(value, wide(plain)[name], plain[name])
        worst, changed = max(worst, same.max_rel_row), changed + (same.differing or 0)
    if not changed:
        return "exposing the values at the norms left every bit of the outputs as it is without"
    return (
        f"exposing the values at the norms kept the runtime from some of its fusions and changed {changed} elements of "
        f"the outputs, by {worst:.3g} of the row RMS at most; the depth shows the model so changed"
    )


def _failed(check: NormCheck, reason: str) -> NormCheck:
    return NormCheck(check.norm, check.form, False, reason, check.kinds)


def _windows(keys: list[Key], window: int | None) -> list[list[Key]]:
    size = window or max(len(keys), 1)
    return [keys[first : first + size] for first in range(0, len(keys), size)]
