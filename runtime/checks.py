"""The checks below the outputs: every norm alone on adversarial inputs, and every stretch between two norms.

Both sides get the same values, which the deployment dtype holds exactly, so that only what a part itself introduces
is measured, and nothing that came from further up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..models.errors import RmsnormDeployError
from .graph_norms import Key
from .metrics import OutputVerdict, judge
from .norm_access import CalledNorm, NormAccess, NormFeed
from .norm_inputs import KINDS, adversarial, turns
from .runner import Array
from .tape import Tape
from .torch_norms import TorchNorms
from .ulp import format_of

AS_IT_RUNS = "as it runs"
# In half types a norm ends in one or two roundings, and what it does before them in float32 hardly shows; a candidate
# that rounds once more than PyTorch does has half an ULP more. Three decimals of room are for the float32 statistics.
_HALF_ULP_FACTOR, _HALF_ULP_FLOOR = 1.25, 0.6
# PyTorch's own norm is further from the reference than this many eps x row RMS: the reference computes something else.
# With float32 statistics a half type shows its roundings only; statistics in a half type add up their own.
_SOUND = {"float16": 8.0, "bfloat16": 8.0, "float32": 512.0, "float64": 4096.0}
_SOUND_IN_HALF = 128.0
# On these, overflow and cancellation are no excuse.
_TAME = ("normal", "outlier channels", "tiny", "constant", "single channel", AS_IT_RUNS)


@dataclass(frozen=True, slots=True)
class NormCheck:
    """One norm, alone: a verdict for each kind of input."""

    norm: CalledNorm
    form: str
    passed: bool
    reason: str
    kinds: list[OutputVerdict] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The check as the JSON interface shows it."""
        inputs = []
        for verdict in self.kinds:
            row = verdict.to_dict()
            inputs.append({"kind": row.pop("name"), **row})
        return {
            "path": self.norm.key[0],
            "call": self.norm.key[1],
            "computes": self.norm.spec.describe(),
            "form": self.form,
            "passed": self.passed,
            "reason": self.reason,
            "inputs": inputs,
        }


@dataclass(frozen=True, slots=True)
class StretchCheck:
    """What lies between norms, up to one norm's input or one output of the model.

    Attributes:
        name: from which norms to which.
        verdict: on the value at its end.
        contains: norms inside that could not be checked by themselves.
        end: the norm whose x is at its end; None for a gate or an output.
    """

    name: str
    verdict: OutputVerdict
    contains: list[str]
    end: Key | None = None

    def to_dict(self, index: int) -> dict[str, Any]:
        """The check as the JSON interface shows it."""
        row = self.verdict.to_dict()
        row.pop("name")
        return {"name": self.name, "index": index, "contains": self.contains, **row}


def norm_name(key: Key) -> str:
    """A norm's name for people: its path, with the call's number where it is not the first."""
    path = key[0] or "the model itself"
    return path if key[1] == 0 else f"{path} (call {key[1] + 1})"


def check_norms(
    candidate: NormAccess,
    yardstick: TorchNorms,
    called: Mapping[Key, CalledNorm],
    keys: list[Key],
    tape: Tape,
    seed: int,
    say: Callable[[str], None],
) -> list[NormCheck]:
    """Run every norm alone: on what it gets as the model runs, and on rows of every kind in `norm_inputs.KINDS`.

    Args:
        candidate: the side that is checked.
        yardstick: PyTorch.
        called: every norm that PyTorch called.
        keys: those to check, present on both sides.
        tape: holds `fed_x` and `fed_gate` of the model as it runs.
        seed: of the adversarial rows.
        say: progress.
    """
    verdicts: dict[Key, list[OutputVerdict]] = {key: [] for key in keys}
    forms = dict.fromkeys(keys, "plain")
    rounds = max((turns(called[key]) for key in keys), default=0)
    with candidate.alone(keys) as theirs, yardstick.alone(keys) as ours:
        for turn in range(-1, rounds):
            say(f"{len(keys)} norms alone: input {turn + 2} of {rounds + 1}")
            given = {key: _feed(called[key], tape, turn, seed) for key in keys}
            feeds = {key: feed for key, (feed, _) in given.items()}
            got, wanted = theirs(feeds), ours(feeds)
            for key in keys:
                feed, kinds = given[key]
                total = got[key].total
                if total is not None:
                    forms[key] = "add"
                    verdicts[key] += _sum_verdict(total, feed.x)
                verdicts[key] += _by_kind(called[key], got[key].y, yardstick.exact(key, feed), wanted[key].y, kinds)
    return [_norm_check(called[key], forms[key], verdicts[key]) for key in keys]


def check_stretches(
    candidate: NormAccess,
    yardstick: TorchNorms,
    feeds: tuple[Mapping[str, Array], Mapping[str, Array]],
    keys: list[Key],
    tape: Tape,
    truth_outputs: Mapping[str, Array],
    named: Callable[[dict[str, Array]], dict[str, Array]],
    describe: Callable[[Key | str], tuple[str, list[str]]],
    window: int | None,
) -> list[StretchCheck]:
    """Run everything between the norms, fed with the tape's values at each of them.

    Args:
        candidate: the side that is checked.
        yardstick: PyTorch.
        feeds: the inputs of the candidate, and those of PyTorch.
        keys: norms to cut at, in order of execution.
        tape: what `TorchNorms.write_truth` wrote; `own_x` and `own_gate` are added.
        truth_outputs: what `write_truth` returned, under the candidate's names.
        named: gives PyTorch's outputs those names.
        describe: the name of the stretch before a norm or an output, and the norms inside it.
        window: how many norms at a time.
    """
    found: dict[tuple[Key, str], StretchCheck] = {}

    def compare(key: Key, role: str, value: Array) -> None:
        verdict = judge(role, value, tape.get(key, role), tape.get(key, f"own_{role}"))
        name, inside = describe(key)
        is_x = role == "x"
        found[key, role] = StretchCheck(name if is_x else f"{name} (its gate)", verdict, inside, key if is_x else None)

    own_outputs = yardstick.between(feeds[1], keys, tape, lambda k, role, v: tape.put(k, f"own_{role}", v), None)
    outputs = candidate.between(feeds[0], keys, tape, compare, window)
    checks = [found[key, role] for key in keys for role in ("x", "gate") if (key, role) in found]
    own = named(own_outputs)
    for name in (name for name in truth_outputs if name in outputs):
        stretch, inside = describe(name)
        checks.append(StretchCheck(stretch, judge(name, outputs[name], truth_outputs[name], own[name]), inside))
    return checks


def _feed(norm: CalledNorm, tape: Tape, turn: int, seed: int) -> tuple[NormFeed, Array | None]:
    """Turn -1 is what the norm gets as the model runs."""
    if turn >= 0:
        return adversarial(norm, turn, seed)
    gate = np.asarray(tape.get(norm.key, "fed_gate")) if tape.has(norm.key, "fed_gate") else None
    return NormFeed(np.asarray(tape.get(norm.key, "fed_x")), gate), None


def _by_kind(
    norm: CalledNorm, candidate: Array, truth: Array, yardstick: Array, kinds: Array | None
) -> list[OutputVerdict]:
    if candidate.shape != yardstick.shape or kinds is None:
        return [judge_norm(AS_IT_RUNS if kinds is None else "adversarial", norm, candidate, truth, yardstick)]
    rows = len(kinds)
    sides = [side.reshape(rows, -1) for side in (candidate, truth, yardstick)]
    return [
        judge_norm(kind.name, norm, *(side[kinds == number] for side in sides))
        for number, kind in enumerate(KINDS)
        if np.any(kinds == number)
    ]


def judge_norm(kind: str, norm: CalledNorm, candidate: Array, truth: Array, yardstick: Array) -> OutputVerdict:
    """The verdict on one norm's result for one kind of input: that of `judge`, and for half types one on ULPs.

    It fails too when PyTorch's own norm is not near the reference: then there is no truth to go by.
    """
    verdict = judge(kind, candidate, truth, yardstick)
    mine, own = verdict.figures, verdict.yardstick_figures
    if mine is None or own is None:
        return verdict
    dtype = yardstick.dtype.name
    limit = _SOUND_IN_HALF if norm.spec.statistics == "input" and dtype in ("float16", "bfloat16") else _SOUND[dtype]
    off = own.max_rel_row / format_of(dtype).eps
    if kind in _TAME and not off <= limit:
        reason = f"PyTorch's own norm is {off:.3g} eps x row RMS from the formula that it was recognised by"
        return OutputVerdict(kind, False, f"{reason} ({norm.spec.describe()}): there is no truth to go by", mine, own)
    allowed = max(_HALF_ULP_FLOOR, _HALF_ULP_FACTOR * own.max_ulp)
    if verdict.passed and dtype in ("float16", "bfloat16") and not norm.spec.bias and mine.max_ulp > allowed:
        reason = f"error of {mine.max_ulp:.3g} ULP, {allowed:.3g} allowed; PyTorch's own is {own.max_ulp:.3g} ULP"
        return OutputVerdict(kind, False, reason, mine, own)
    return verdict


def _sum_verdict(total: Array, x: Array) -> list[OutputVerdict]:
    """A fused residual add was given x in two parts whose sum is exact; only a wrong sum is worth a row."""
    same = total.shape == x.shape and np.array_equal(total.astype(np.float64), x.astype(np.float64), equal_nan=True)
    if same:
        return []
    return [OutputVerdict("sum", False, "the sum that the norm hands on is not that of its two inputs", None, None)]


def _norm_check(norm: CalledNorm, form: str, verdicts: list[OutputVerdict]) -> NormCheck:
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if not failed:
        return NormCheck(norm, form, True, f"right on {len(verdicts)} kinds of input", verdicts)
    kinds = ", ".join(dict.fromkeys(verdict.name for verdict in failed))
    return NormCheck(norm, form, False, f"wrong on: {kinds}; {failed[0].name}: {failed[0].reason}", verdicts)


def try_or_note(what: str, notes: list[str], run: Callable[[], list[Any]]) -> list[Any]:
    """The checks of `run`; where a part of the model cannot be run by itself, none, and a note that says why."""
    try:
        return run()
    except RmsnormDeployError as error:
        notes.append(f"{what} could not be checked: {error}")
        return []
