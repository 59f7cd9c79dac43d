"""Check every norm alone (`check_norms`), on the inputs of a running model and on adversarial rows.

Both sides receive the same values, which the deployment dtype represents exactly, so that only the error of the norm
itself is measured, without errors from earlier layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ...models.errors import RmsnormDeployError
from ..accuracy.compare_output import OutputVerdict, kind_rows
from ..accuracy.tolerances import Limits
from ..norms.access import CalledNorm, NormAccess, NormBaseline, NormFeed
from ..norms.activation_store import ActivationStore, Key
from ..norms.adversarial_rows import adversarial, turns
from ..norms.check_norm import check_norm, check_sum, no_reference, sound_limit, summary_of
from ..norms.formula import differences
from ..runners.base import Array

Progress = Callable[[str], None]

# A norm's own code in float64 may differ from the reference by the order of its sums.
_SAME_FORMULA = 1e-9


@dataclass(frozen=True, slots=True)
class NormCheck:
    """The check of one norm alone.

    Attributes:
        norm: the call.
        form: `plain`, or `residual_add` if a residual add is fused into the candidate's norm.
        passed: whether it passed on all kinds of rows; None if that cannot be judged.
        reason: why.
        kinds: a verdict for each kind of row.
    """

    norm: CalledNorm
    form: str
    passed: bool | None
    reason: str
    kinds: list[OutputVerdict] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON values."""
        return {
            "path": self.norm.key[0],
            "call": self.norm.key[1],
            "computes": self.norm.spec.describe(),
            "form": self.form,
            "passed": self.passed,
            "reason": self.reason,
            "inputs": kind_rows(self.kinds),
        }


def check_norms(
    candidate: NormAccess,
    baseline: NormBaseline,
    norms: Sequence[CalledNorm],
    store: ActivationStore,
    seed: int,
    progress: Progress,
    limits: Limits | None = None,
) -> list[NormCheck]:
    """Run norms alone: on their inputs in the running model, and on rows of every kind in `adversarial_rows.KINDS`.

    Args:
        candidate: the side that is checked.
        baseline: PyTorch.
        norms: the norms to check, present on both sides.
        store: contains `fed_x` and `fed_gate` of the running model.
        seed: seed of the adversarial rows.
        progress: called with a line of text for each input.
        limits: explicit limits that replace the comparison with PyTorch's own error.
    """
    verdicts: dict[Key, list[OutputVerdict]] = {norm.key: [] for norm in norms}
    forms = dict.fromkeys(verdicts, "plain")
    rounds = max((turns(norm) for norm in norms), default=0)
    with candidate.alone(verdicts) as theirs, baseline.alone(verdicts) as ours:
        for turn in range(-1, rounds):
            progress(f"{len(norms)} norms alone: input {turn + 2} of {rounds + 1}")
            given = _given(norms, store, turn, seed)
            feeds = {key: feed for key, (feed, _) in given.items()}
            got, wanted = theirs(feeds), ours(feeds)
            for norm in norms:
                key, (feed, kinds), result = norm.key, given[norm.key], got[norm.key]
                if result.total is not None:
                    forms[key] = "residual_add"
                    verdicts[key] += check_sum(result.total, feed.x)
                exact = partial(baseline.exact, key)
                verdicts[key] += check_norm(norm, feed, kinds, result.y, wanted[key].y, exact, limits=limits)
    return [NormCheck(norm, forms[norm.key], *summary_of(verdicts[norm.key]), verdicts[norm.key]) for norm in norms]


def without_reference(checks: Iterable[NormCheck], disagreements: Mapping[Key, float]) -> list[NormCheck]:
    """The checks; those of norms whose own code in float64 does not compute the recognized formula are not judged.

    Args:
        checks: checks of norms.
        disagreements: difference between each norm's own float64 result and the reference, relative to the row scale.
    """
    found = []
    for check in checks:
        off = disagreements.get(check.norm.key, 0.0)
        if off > _SAME_FORMULA:
            reason = no_reference(check.norm.spec, off, "PyTorch's own code in float64", "x row scale")
            check = dataclasses.replace(check, passed=None, reason=reason)
        found.append(check)
    return found


def unsound_norms(called: Iterable[CalledNorm]) -> list[NormCheck]:
    """Checks, without a judgment, of the norms that do not compute the recognized formula in the running model.

    Norms with statistics in a half type are skipped: their statistics may overflow in PyTorch itself.
    """
    return [
        NormCheck(norm, "plain", None, no_reference(norm.spec, norm.off))
        for norm in called
        if not norm.spec.sums_in_half and norm.off > sound_limit(norm.spec, norm.y_dtype)
    ]


def failed(check: NormCheck, reason: str) -> NormCheck:
    """A failed copy of the check, with this reason."""
    return dataclasses.replace(check, passed=False, reason=reason)


def with_cause(check: NormCheck, access: NormAccess, norms: NormBaseline) -> NormCheck:
    """A check; the reason of a failed one ends with how the candidate's formula and weight differ from PyTorch's."""
    key = check.norm.key
    if check.passed is not False:
        return check
    found = access.formula(key)
    if found is None:
        return check
    if isinstance(found, str):
        return failed(check, f"{check.reason}; its nodes in the file are no RMSNorm that is known: {found}")
    causes = differences(found, norms.formula(key))
    return failed(check, "; ".join([check.reason, *causes]))


def try_or_note(what: str, notes: list[str], run: Callable[[], list[Any]]) -> list[Any]:
    """The checks of `run`; if a part of the model cannot be run alone, an empty list, and a note with the reason."""
    try:
        return run()
    except RmsnormDeployError as error:
        notes.append(f"{what} could not be checked: {error}")
        return []


def _given(
    norms: Sequence[CalledNorm], store: ActivationStore, turn: int, seed: int
) -> dict[Key, tuple[NormFeed, Array | None]]:
    """The inputs of each norm, and the kind of each row; turn -1 returns the inputs in the running model."""
    made: dict[Any, tuple[NormFeed, Array]] = {}
    given: dict[Key, tuple[NormFeed, Array | None]] = {}
    for norm in norms:
        if turn < 0:
            gate = np.asarray(store.get(norm.key, "fed_gate")) if norm.gate_dtype is not None else None
            given[norm.key] = NormFeed(np.asarray(store.get(norm.key, "fed_x")), gate), None
            continue
        like = (norm.spec, norm.shape, norm.x_dtype, norm.gate_dtype)
        given[norm.key] = made[like] = made.get(like) or adversarial(norm, turn, seed)
    return given
