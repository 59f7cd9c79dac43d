"""Errors at every norm along the depth of a model (`measure_depth`), and the part that each step introduces."""

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
from .names import own_names
from .norm_checks import NormCheck
from .run_cases import Run, wide
from .segment_checks import SegmentCheck

Side = Literal["input", "output"]
_SIDES: tuple[tuple[str, Side], ...] = (("x", "input"), ("y", "output"))


@dataclass(frozen=True, slots=True)
class DepthPoint:
    """The largest error at one place along the depth, relative to the RMS of the reference's row.

    Attributes:
        key: the norm.
        side: `input` or `output` of the norm.
        error: error of the candidate in a run of the whole model.
        baseline_error: error of PyTorch.
        introduced: error of the norm or segment that ends here, run alone; None if it could not be measured.
        baseline_introduced: the same for PyTorch.
    """

    key: Key
    side: Side
    error: float
    baseline_error: float
    introduced: float | None = None
    baseline_introduced: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON values."""
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
    """Errors of both sides at every norm, in a run of the whole model.

    Args:
        candidate: opened again, to check whether exposing its values changes its outputs.
        access: the candidate's norms.
        norms: PyTorch's norms.
        run: the case.
        keys: the norms, in order of execution.
        free: PyTorch's values at the norms in float64.
        introduced: see `errors_introduced`.

    Returns:
        A point for the input and the output of each norm; and a note on the effect of exposing the values.
    """

    def errors_into(found: dict[tuple[Key, str], float]) -> Callable[[Key, str, Array], None]:
        def sink(key: Key, role: str, value: Array) -> None:
            if free.has(key, role):
                found[key, role] = figures(value, free.get(key, role)).max_rel_row

        return sink

    own: dict[tuple[Key, str], float] = {}
    theirs: dict[tuple[Key, str], float] = {}
    norms.trace(run.torch_feeds, keys, errors_into(own))
    feeds = own_names(run.case.feeds, candidate.inputs)
    exposed = access.trace(feeds, keys, errors_into(theirs))
    with candidate.opened() as runner:
        note = _exposure_note(exposed, runner.run(feeds))
    nothing = (None, None)
    return [
        DepthPoint(key, side, theirs[key, role], own[key, role], *introduced.get((key, role), nothing))
        for key in keys
        for role, side in _SIDES
    ], note


def errors_introduced(
    norms: Sequence[NormCheck], segments: Sequence[SegmentCheck]
) -> dict[tuple[Key, str], tuple[float, float]]:
    """The errors of each norm and segment run alone, the candidate's and PyTorch's, by the place where it ends."""
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
    """A note on whether exposing the values at the norms changed the outputs."""
    worst, changed = 0.0, 0
    for name, value in exposed.items():
        same = figures(value, wide(plain)[name], plain[name])
        worst, changed = max(worst, same.max_rel_row), changed + (same.differing or 0)
    if not changed:
        return "exposing the values at the norms did not change the outputs"
    return (
        f"exposing the values at the norms prevented some fusions of the runtime and changed {changed} elements of "
        f"the outputs by at most {worst:.3g} of the row RMS; the errors along the depth include that change"
    )
