"""The result of one fault (`judge_fault`): does it have an effect, is it detected, and does `bisect` locate it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.runtime.norms.access import CalledNorm
from rmsnorm_deploy.runtime.norms.activation_store import Key
from rmsnorm_deploy.runtime.norms.adversarial_rows import adversarial, turns
from rmsnorm_deploy.runtime.norms.graph_norms import GraphNorms
from rmsnorm_deploy.runtime.norms.onnx_norms import OnnxNorms
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.validation.api import bisect, validate

from .faults import Fault
from .runner_faults import RunnerFault, SpoiledRunner
from .subjects import Exports
from .surgery import Edit

INNOCENTS_ALLOWED = 3
_OPEN_DIM = 5  # size of a symbolic dim where a norm runs alone


@dataclass(frozen=True, slots=True)
class FaultResult:
    """The result of one fault.

    Attributes:
        fault: name of the fault.
        model: the model that it was planted in.
        target: target of the export.
        dtype: dtype of the model.
        alive: where it changed bits: `outputs`, `norm` (on adversarial rows only), `error` (it raises), or `dead`.
        verdict: `pass`, `fail` or `cannot be judged`, `error` for an error of this package, or `broken: ...` for any
            other exception.
        summary: the report's summary, or the error's message.
        wanted: places that bisect must name; empty for a candidate with outputs only.
        kind: what these places are: `norm`, `attention` or `segment`.
        named: whether bisect named all of them.
        innocents: correct norms that bisect named.
        culprits: all places that bisect named.
        seconds: duration.
        family: the kind of fault.
    """

    fault: str
    model: str
    target: str
    dtype: str
    alive: str
    verdict: str
    summary: str
    wanted: tuple[str, ...]
    kind: str
    named: bool
    innocents: tuple[str, ...]
    culprits: tuple[str, ...]
    seconds: float
    family: str = ""

    @property
    def caught(self) -> bool:
        """Whether the fault changed bits and `validate` detected it; what cannot be judged does not pass."""
        return self.alive != "dead" and self.verdict in ("fail", "error", "cannot be judged")

    @property
    def good(self) -> bool:
        """Whether the fault was detected and located as expected."""
        return self.caught and self.named and len(self.innocents) <= INNOCENTS_ALLOWED

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values."""
        return asdict(self) | {"caught": self.caught}


def judge_fault(fault: Fault | RunnerFault, exports: Exports) -> FaultResult:
    """Plant a fault, check that it changes bits, and run `validate` and `bisect`."""
    start = time.perf_counter()
    honest = exports.folder(fault.subject, fault.target)
    if isinstance(fault, RunnerFault):
        alive, verdict, summary = _judge_runner(fault, exports, honest)
        found: list[Mapping[str, str]] = []
        wanted: tuple[str, ...] = ()
        kind = "segment"
    else:
        place = exports.work / "fault"
        shutil.rmtree(place, ignore_errors=True)
        folder = fault.write(honest, place)
        alive = aliveness(fault, exports, folder)
        verdict, summary, _ = _ask(validate, folder, exports.model(fault.subject))
        wanted = fault.norms or fault.attentions or tuple(filter(None, [fault.before]))
        kind = "norm" if fault.norms else "attention" if fault.attentions else "segment"
        found = _ask(bisect, folder, exports.model(fault.subject))[2] if wanted else []
    names = {row["name"] for row in found if row["kind"] == kind}
    named = all(any(_is_place(name, place, kind) for name in names) for place in wanted)
    innocents = tuple(
        row["name"] for row in found if row["kind"] == "norm" and (kind != "norm" or row["name"] not in wanted)
    )
    return FaultResult(
        fault.name, fault.subject.label, fault.target, fault.dtype, alive, verdict, summary, wanted, kind, named,
        innocents, tuple(f"{row['kind']} {row['name']}" for row in found), round(time.perf_counter() - start, 2),
        fault.family,
    )  # fmt: skip


def aliveness(fault: Fault, exports: Exports, folder: Path) -> str:
    """Where the bits of the file with the fault differ from those of the fault-free one; see `FaultResult.alive`."""
    honest = exports.folder(fault.subject, fault.target)
    try:
        with OrtRunner(folder / "model.onnx") as runner:
            found = exports.witnesses(fault.subject, fault.target).differ(runner)
    except RmsnormDeployError:
        return "error"
    if found:
        return found
    return "norm" if any(_norm_differs(path, honest, folder) for path in fault.norms) else "dead"


def _judge_runner(fault: RunnerFault, exports: Exports, honest: Path) -> tuple[str, str, str]:
    with SpoiledRunner.open(honest, fault.spoil) as runner:
        alive = exports.witnesses(fault.subject, fault.target).differ(runner) or "dead"
    with SpoiledRunner.open(honest, fault.spoil) as runner:
        verdict, summary, _ = _ask(validate, runner, exports.model(fault.subject))
    return alive, verdict, summary


def _ask(tool: Any, candidate: Any, model: Any) -> tuple[str, str, list[Mapping[str, str]]]:
    """Verdict, summary and culprits; an exception that is not of this package is recorded as a failure of the tool."""
    try:
        report = tool(candidate, model)
    except RmsnormDeployError as error:
        return "error", f"{type(error).__name__}: {error}", []
    except Exception as error:
        return f"broken: {type(error).__name__}", str(error), []
    text = "; ".join([report.summary, *(reason for reason, _ in report.unjudged)])
    return report.verdict, text, [culprit.to_dict() for culprit in report.culprits]


def _is_place(name: str, wanted: str, kind: str) -> bool:
    return name == wanted if kind != "segment" else name.removesuffix(" (its gate)").endswith(f"... {wanted}")


def _norm_differs(path: str, honest: Path, folder: Path) -> bool:
    """Whether the results of a norm alone differ on rows of every kind."""
    key = (path, 0)
    if key not in GraphNorms(folder / "model.onnx").norms:
        return False
    called = _called(path, honest)
    results = []
    for place in (honest, folder):
        with OnnxNorms(place / "model.onnx", "cpu").alone([key]) as run:
            results.append([_bits(run({key: adversarial(called, turn, 0)[0]}), key) for turn in range(turns(called))])
    return results[0] != results[1]


def _bits(results: Mapping[Key, Any], key: Key) -> bytes:
    result = results[key]
    return result.y.tobytes() + (b"" if result.total is None else result.total.tobytes())


def _called(path: str, folder: Path) -> CalledNorm:
    norm = Edit(folder).norm(path)
    shape = tuple(dim if isinstance(dim, int) else _OPEN_DIM for dim in norm.x.shape or ())
    dtypes = [None if v is None else np.dtype(v.dtype.numpy()).name for v in (norm.x, norm.y, norm.gate)]  # type: ignore[union-attr]
    return CalledNorm((path, 0), norm.spec, shape, str(dtypes[0]), str(dtypes[1]), dtypes[2], True)
