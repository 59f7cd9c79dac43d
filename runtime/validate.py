"""Hold a deployed model against PyTorch: error against a float64 truth, with PyTorch's own error as the yardstick."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.cache_names import PRESENT
from ..export.inputs import vocabulary_size
from ..export.manifest import deviation_rows, versions
from ..models.calls import at_norms
from ..models.errors import RmsnormDeployError, UsageError
from ..models.recognise import recognise
from .candidate import Candidate, candidate_of
from .cases import Case
from .checks import AS_IT_RUNS, NormCheck, check_norms, check_stretches, norm_name, try_or_note
from .feeds import DEFAULT_SHAPES, is_past, make_feeds, present_to_past
from .graph_norms import Key
from .metrics import OutputVerdict, figures, judge
from .norm_access import CalledNorm, NormAccess
from .runner import Array, Runner, TensorInfo
from .tape import Tape
from .tolerances import Limits, check_limits, limits_of
from .torch_norms import TorchNorms
from .torch_runner import TorchRunner
from .truth import exactly, in_float64
from .validation_report import BISECT_SCHEMA, DepthPoint, ValidationReport

if TYPE_CHECKING:
    from torch import nn

_DECODE_SUFFIX = "@decode"
# A norm's own code in float64 may differ from the reference by the order of its sums.
_SAME_FORMULA = 1e-9

Progress = Callable[[str], None]
Outputs = dict[str, Array]
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
    more token with the cache that came out; both are held against PyTorch without a cache. Norms and stretches are
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
            the yardstick. They are for outputs; norms and stretches are held to the table.
        outputs_only: leave norms and stretches out.
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
    say = progress or (lambda _: None)
    report = ValidationReport(target.name)
    report.settings = dict(settings or {"seed": seed, "shapes": [list(s) for s in shapes or DEFAULT_SHAPES]})
    say(f"opening {target.name}")
    with target.opened() as runner:
        infos = runner.inputs()
        given = cases(infos) if callable(cases) else cases
        runs = [_Run(case) for case in given or made_up_cases(infos, model, shapes, seed)]
        for number, run in enumerate(runs, start=1):
            say(f"{target.name}: {run.case.name} ({number} of {len(runs)})")
            run.got = _run_guarded(runner, run.case, target.name)
        own_names = list(dict.fromkeys(name.removesuffix(_DECODE_SUFFIX) for run in runs for name in run.got))
        report.provenance = {"candidate": runner.provenance()}
    check_limits(limits or {}, own_names)
    with TorchRunner(model, input_names=_by_position(model, infos)) as yardstick, Tape() as tape:
        work = _Work(target, model, yardstick, runs, own_names, tape, seed, window, say)
        work.compare_outputs(report, limits or {}, with_norms=not outputs_only, depth=depth)
        report.provenance |= {"yardstick": yardstick.provenance(), "versions": versions()}
    report.deviations = deviation_rows(dict(target.manifest), "onnxruntime")
    report.refusals = list(target.manifest.get("refusals", ()))
    return report


def bisect(candidate: str | Path | nn.Module | Runner, model: nn.Module, **options: Any) -> ValidationReport:
    """Say which norm, or which stretch between two norms, first introduces error, and how it grows from there.

    Arguments and errors as `validate`'s; `depth` is always on. The report's `culprits` are the answer.
    """
    report = validate(candidate, model, **{**options, "depth": True, "outputs_only": False})
    report.schema = BISECT_SCHEMA
    return report


@dataclass(slots=True)
class _Run:
    """A case, and what both sides made of it."""

    case: Case
    got: Outputs = field(default_factory=dict)
    wanted: Outputs = field(default_factory=dict)

    @property
    def torch_feeds(self) -> dict[str, Array]:
        """PyTorch runs without a cache."""
        return {name: value for name, value in self.case.feeds.items() if not is_past(name)}

    @property
    def size(self) -> int:
        """Elements that go in."""
        return sum(value.size for value in self.torch_feeds.values())


@dataclass(slots=True)
class _Work:
    """What the steps of one validation share."""

    target: Candidate
    model: nn.Module
    yardstick: TorchRunner
    runs: list[_Run]
    names: list[str]
    tape: Tape
    seed: int
    window: int | None
    say: Progress
    called: dict[Key, CalledNorm] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)
    lost: set[Key] = field(default_factory=set)

    def compare_outputs(
        self, report: ValidationReport, limits: Mapping[str, Limits], *, with_norms: bool, depth: bool
    ) -> None:
        """Fill the report."""
        largest = max(self.runs, key=lambda run: run.size)
        recognition = recognise(self.model)
        norms = TorchNorms(self.model, self.yardstick, recognition)
        for number, run in enumerate(self.runs, start=1):
            self.say(f"PyTorch: {run.case.name} ({number} of {len(self.runs)})")
            if run is largest and with_norms:
                self.called, run.wanted = norms.survey(run.torch_feeds)
            else:
                run.wanted = self.yardstick.run(run.torch_feeds)
        access = self.target.norms(largest.torch_feeds) if with_norms else None
        if with_norms:
            self._match(access, report)
        with Tape() as free:
            with in_float64(self.model):
                for number, run in enumerate(self.runs, start=1):
                    self.say(f"PyTorch in float64: {run.case.name} ({number} of {len(self.runs)})")
                    traced = depth and run is largest and bool(self.keys)
                    truth = self._truth(norms, run, free if traced else None, recognition.sites)
                    report.rows += [(run.case.name, v) for v in self._judged(run, truth, limits)]
                if self.keys:
                    self.say("PyTorch in float64, norm by norm")
                    outputs, disagreements = norms.write_truth(_wide(largest.torch_feeds), self.tape)
            if access is None or not self.keys:
                return
            truth_outputs = _named(outputs, self.names)
            self._check_parts(report, access, norms, largest, truth_outputs, disagreements)
            if depth:
                report.depth = self._depth(report, access, norms, largest, free)

    def _truth(self, norms: TorchNorms, run: _Run, free: Tape | None, sites: Sequence[Any]) -> Outputs:
        feeds = _wide(run.torch_feeds)
        if free is not None:
            return norms.trace_truth(feeds, self.keys, free.put)
        with at_norms(self.model, sites, exactly):
            return self.yardstick.run(feeds)

    def _judged(self, run: _Run, truth: Outputs, limits: Mapping[str, Limits]) -> list[OutputVerdict]:
        true, wanted = _named(truth, self.names), _named(run.wanted, self.names)
        return [_judge_output(name, value, true, wanted, limits) for name, value in run.got.items()]

    def _match(self, access: NormAccess | None, report: ValidationReport) -> None:
        """Which norms are on both sides, in PyTorch's order; the report says which are not, and why."""
        present = set(access.keys) if access is not None else set()
        if not present:
            if self.called:
                report.notes.append(
                    f"{self.target.name} does not say which of its nodes are norms, so only its outputs were compared"
                )
            return
        self.keys = [key for key in self.called if key in present]
        refused = {row["path"]: row["reason"] for row in self.target.manifest.get("refusals", ())}
        problems = access.problems if access is not None else {}
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
        largest: _Run,
        truth_outputs: Outputs,
        disagreements: Mapping[Key, float],
    ) -> None:
        def alone() -> list[NormCheck]:
            checks = []
            for part in _windows(self.keys, self.window):
                checks += check_norms(access, norms, self.called, part, self.tape, self.seed, self.say)
            return checks

        report.norms = try_or_note("norms", report.notes, alone)
        report.norms = [self._unsound(check, disagreements) for check in report.norms]
        unused = set(getattr(access, "unused", list)())
        report.norms = [_failed(c, "nothing in the file reads its result") if c.norm.key in unused else c
                        for c in report.norms]  # fmt: skip
        cut = [key for key in self.keys if self.called[key].forced]
        self.say(f"the stretches between {len(cut)} norms")
        feeds = (largest.case.feeds, largest.torch_feeds)
        report.stretches = try_or_note(
            "stretches between norms", report.notes,
            lambda: check_stretches(
                access, norms, feeds, cut, self.tape, truth_outputs, lambda outputs: _named(outputs, self.names),
                lambda end: self._stretch(cut, end), self.window,
            ),
        )  # fmt: skip

    @staticmethod
    def _unsound(check: NormCheck, disagreements: Mapping[Key, float]) -> NormCheck:
        off = disagreements.get(check.norm.key, 0.0)
        if off <= _SAME_FORMULA:
            return check
        formula = check.norm.spec.describe()
        return _failed(
            check, f"PyTorch's own code in float64 is {off:.3g} x row RMS from the formula that it was recognised by "
            f"({formula}): there is no truth to go by",
        )  # fmt: skip

    def _stretch(self, cut: list[Key], end: Key | str) -> tuple[str, list[str]]:
        """The name of the stretch that ends before a norm or an output, and the norms inside it.

        A norm that could not be cut out is inside where its nodes are. One that has no node left may be anywhere
        between what goes into the stretch and its end.
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
        self, report: ValidationReport, access: NormAccess, norms: TorchNorms, largest: _Run, free: Tape
    ) -> list[DepthPoint]:
        """Errors along the depth as the whole model runs, beside what each part introduces by itself."""

        def errors_into(found: dict[tuple[Key, str], float]) -> Callable[[Key, str, Array], None]:
            def sink(key: Key, role: str, value: Array) -> None:
                found[key, role] = figures(value, free.get(key, role)).max_rel_row

            return sink

        own: dict[tuple[Key, str], float] = {}
        theirs: dict[tuple[Key, str], float] = {}
        self.say("errors along the depth")
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


def made_up_cases(
    infos: Sequence[TensorInfo], model: nn.Module, shapes: Sequence[tuple[int, int]] | None, seed: int
) -> list[Case]:
    """Seeded inputs in several shapes, one more token for a decoder with a cache.

    Raises:
        UsageError: a shape is not positive, or an input's values cannot be made up.
    """
    vocabulary = vocabulary_size(model)
    extra = 1 if any(is_past(info.name) for info in infos) else 0
    cases: list[Case] = []
    for batch, length in shapes or DEFAULT_SHAPES:
        if batch < 1 or length < 1:
            raise UsageError(f"shape {batch}x{length} is no batch and length; both must be at least 1.")
        feeds = make_feeds(infos, batch, length + extra, seed, vocabulary)
        if not any(_same_shapes(feeds, other.feeds) for other in cases):
            name = f"{batch}x{length}" + (" then 1 more" if extra else "")
            cases.append(Case(name if _is_dynamic(infos) else "the file's own shape", feeds))
    return cases


def _by_position(model: nn.Module, infos: Sequence[TensorInfo]) -> list[str] | None:
    """The candidate's input names, where they are not those of PyTorch's parameters and go in by their order."""
    names = [info.name for info in infos if not is_past(info.name)]
    return None if set(names) <= set(inspect.signature(model.forward).parameters) else names


def _run_guarded(runner: Runner, case: Case, name: str) -> Outputs:
    """The candidate's outputs.

    Raises:
        UsageError: it fails, or returns other outputs than it says.
    """
    try:
        outputs = _run_candidate(runner, case)
    except RmsnormDeployError:
        raise
    except Exception as error:  # a runner of the user's own may raise anything
        raise UsageError(f"{name} failed on case {case.name}: {type(error).__name__}: {error}") from error
    returned = {output.removesuffix(_DECODE_SUFFIX) for output in outputs}
    missing = [
        info.name for info in runner.outputs() if info.name not in returned and not info.name.startswith(PRESENT)
    ]
    if missing or not outputs:
        raise UsageError(
            f"{name} did not return {', '.join(missing) or 'anything'} on case {case.name}; "
            f"it returned {', '.join(outputs) or 'nothing'}."
        )
    return outputs


def _run_candidate(runner: Runner, case: Case) -> Outputs:
    cached = any(is_past(name) for name in case.feeds)
    if not cached or case.feeds["input_ids"].shape[1] == 1:
        return {n: v for n, v in runner.run(case.feeds).items() if not (cached and n.startswith(PRESENT))}
    return _run_with_cache(runner, case.feeds)


def _run_with_cache(runner: Runner, feeds: Mapping[str, Array]) -> Outputs:
    """All tokens but the last with an empty cache, then the last one with the cache that came out."""
    length = feeds["input_ids"].shape[1]
    tokens = ("input_ids", "position_ids", "token_type_ids")
    first = {k: v[:, : length - 1] if k in (*tokens, "attention_mask") else v for k, v in feeds.items()}
    prefill = runner.run(first)
    step = {k: v[:, length - 1 :] if k in tokens else v for k, v in feeds.items()}
    step.update({k: v for k, v in present_to_past(prefill).items() if k in feeds})
    decode = runner.run(step)
    outputs = {name: value for name, value in prefill.items() if not name.startswith(PRESENT)}
    outputs.update({f"{k}{_DECODE_SUFFIX}": v for k, v in decode.items() if not k.startswith(PRESENT)})
    return outputs


def _judge_output(
    name: str,
    candidate: Array,
    truth: Mapping[str, Array],
    yardstick: Mapping[str, Array],
    limits: Mapping[str, Limits],
) -> OutputVerdict:
    key = name.removesuffix(_DECODE_SUFFIX)
    true, wanted = truth[key], yardstick[key]
    if name.endswith(_DECODE_SUFFIX):
        true, wanted = true[:, -1:], wanted[:, -1:]
    elif candidate.ndim == wanted.ndim and candidate.ndim > 1 and candidate.shape[1] == wanted.shape[1] - 1:
        true, wanted = true[:, :-1], wanted[:, :-1]  # the prompt's part of a case that goes on with one more token
    found = limits_of(limits, key)
    verdict = judge(name, candidate, true, wanted, limits=found)
    if candidate.dtype != wanted.dtype and verdict.passed and found is None:
        reason = f"it is {candidate.dtype.name} where PyTorch gives {wanted.dtype.name}; explicit limits let that pass"
        return OutputVerdict(name, False, reason, verdict.figures, verdict.yardstick_figures)
    return verdict


def _introduced(report: ValidationReport) -> dict[tuple[Key, str], tuple[float, float]]:
    """What each norm and stretch adds by itself: the candidate's error and PyTorch's."""
    found: dict[tuple[Key, str], tuple[float, float]] = {}
    for check in report.norms:
        for verdict in check.kinds:
            if verdict.name == AS_IT_RUNS and verdict.figures and verdict.yardstick_figures:
                pair = (verdict.figures.max_rel_row, verdict.yardstick_figures.max_rel_row)
                found[check.norm.key, "y"] = pair
    for stretch in report.stretches:
        mine, own = stretch.verdict.figures, stretch.verdict.yardstick_figures
        if stretch.end is not None and mine is not None and own is not None:
            found[stretch.end, "x"] = (mine.max_rel_row, own.max_rel_row)
    return found


def _exposure_note(exposed: Mapping[str, Array], plain: Mapping[str, Array]) -> str:
    """Whether looking at the values at the norms changed what was looked at."""
    worst, changed = 0.0, 0
    for name, value in exposed.items():
        same = figures(value, _wide(plain)[name], plain[name])
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


def _wide(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value.astype(np.float64) if _is_float(value) else value for name, value in feeds.items()}


def _is_dynamic(infos: Sequence[TensorInfo]) -> bool:
    return any(not isinstance(dim, int) for info in infos for dim in info.shape or ())


def _same_shapes(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return all(a[name].shape == b[name].shape for name in a)


def _named(returned: Outputs, names: Sequence[str]) -> Outputs:
    """PyTorch's outputs under the candidate's names: the same name where it has one, else in order."""
    wanted = [name for name in names if not name.startswith(PRESENT)]
    if set(wanted) <= set(returned):
        return {name: returned[name] for name in wanted}
    if len(wanted) != len(returned):
        raise UsageError(
            f"the candidate returns {len(wanted)} outputs ({', '.join(wanted)}), the PyTorch model {len(returned)} "
            f"({', '.join(returned)}). Is it the model that was exported?"
        )
    return dict(zip(wanted, returned.values(), strict=True))


def _check_dtype(target: Candidate, model: nn.Module) -> None:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    name, exported = str(dtype).removeprefix("torch."), target.manifest.get("dtype")
    if exported is not None and dtype is not None and name != exported:
        raise UsageError(
            f"{target.name} was exported in {exported}, but the PyTorch model is in {name}. Load it in "
            f"{exported} (--dtype {exported}): the yardstick must have the dtype that is deployed."
        )


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
