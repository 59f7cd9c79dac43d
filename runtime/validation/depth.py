"""Errors along the depth of a model, beside what each norm and each segment introduces by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..accuracy.compare_output import figures
from ..accuracy.error_stats import json_value
from ..norms.access import NormAccess
from ..norms.activation_store import ActivationStore, Key
from ..norms.adversarial_rows import AS_IT_RUNS
from ..norms.torch_norms import TorchNorms
from ..runners.base import Array
from .candidate import Candidate
from .norm_checks import NormCheck
from .run_cases import Run, wide
from .segment_checks import SegmentCheck

Side = Literal["input", "output"]
_SIDES: tuple[tuple[str, Side], ...] = (("x", "input"), ("y", "output"))


@dataclass(frozen=True, slots=True)
class DepthPoint:
    """The error at one place along the depth, relative to the RMS of the truth's row (its largest).

    Attributes:
        key: the norm.
        side: `input` or `output` of it.
        error: of the candidate, as the whole model runs.
        baseline_error: of PyTorch.
        introduced: what the part that ends here adds by itself, None where it could not be measured.
        baseline_introduced: the same of PyTorch.
    """

    key: Key
    side: Side
    error: float
    baseline_error: float
    introduced: float | None = None
    baseline_introduced: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The point as the JSON interface shows it."""
        numbers = {
            "error": self.error,
            "baseline_error": self.baseline_error,
            "introduced": self.introduced,
            "baseline_introduced": self.baseline_introduced,
        }
        return {"path": self.key[0], "call": self.key[1], "side": self.side, **json_value(numbers)}


def measure_depth(
    candidate: Candidate,
    access: NormAccess,
    norms: TorchNorms,
    run: Run,
    keys: list[Key],
    free: ActivationStore,
    introduced: Mapping[tuple[Key, str], tuple[float, float]],
) -> tuple[list[DepthPoint], str]:
    """Errors of both sides at every norm, as the whole model runs.

    Args:
        candidate: opened once more, to see whether looking at its values changed them.
        access: the candidate at its norms.
        norms: PyTorch at its norms.
        run: the case.
        keys: the norms, in order.
        free: what PyTorch has at them in float64.
        introduced: see `errors_introduced`.

    Returns:
        A point for the input and the output of each norm; and a note on what looking at the values changed.
    """

    def errors_into(found: dict[tuple[Key, str], float]) -> Callable[[Key, str, Array], None]:
        def sink(key: Key, role: str, value: Array) -> None:
            found[key, role] = figures(value, free.get(key, role)).max_rel_row

        return sink

    own: dict[tuple[Key, str], float] = {}
    theirs: dict[tuple[Key, str], float] = {}
    norms.trace(run.torch_feeds, keys, errors_into(own))
    exposed = access.trace(run.case.feeds, keys, errors_into(theirs))
    with candidate.opened() as runner:
        note = _exposure_note(exposed, runner.run(run.case.feeds))
    nothing = (None, None)
    return [
        DepthPoint(key, side, theirs[key, role], own[key, role], *introduced.get((key, role), nothing))
        for key in keys
        for role, side in _SIDES
    ], note


def errors_introduced(
    norms: Sequence[NormCheck], segments: Sequence[SegmentCheck]
) -> dict[tuple[Key, str], tuple[float, float]]:
    """What each norm and segment adds by itself: the candidate's error and PyTorch's, by the place where it ends."""
    found: dict[tuple[Key, str], tuple[float, float]] = {}
    for check in norms:
        for verdict in check.kinds:
            if verdict.name == AS_IT_RUNS.name and verdict.figures and verdict.baseline_figures:
                pair = (verdict.figures.max_rel_row, verdict.baseline_figures.max_rel_row)
                found[check.norm.key, "y"] = pair
    for segment in segments:
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
