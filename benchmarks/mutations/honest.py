"""Honest runs: validations of exports without faults, for many models, dtypes, targets and inputs; all must pass."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmsnorm_deploy.runtime.validation.api import validate

from .subjects import TARGETS, Exports, Subject
from .surgery import Edit, respell

DTYPES = ("float32", "float16")
# Each model in both dtypes, then special variants of some models.
_PLAIN = ("addition", "llama", "gemma3", "olmo2", "assorted", "mamba2")
_SPECIAL = (
    Subject("qwen3"),
    Subject("llama", "float32", "past"),
    Subject("llama", "float16", "past"),
    Subject("gemma3", "float32", "past"),
    Subject("addition", "float32", "outliers"),
    Subject("llama", "float32", "outliers"),
    Subject("llama", "float16", "outliers"),
    Subject("gemma3", "float16", "outliers"),
    Subject("llama", "float32", "redrawn"),
    Subject("llama", "float16", "redrawn"),
    Subject("olmo2", "float16", "redrawn"),
)
SUBJECTS = (*(Subject(model, dtype) for dtype in DTYPES for model in _PLAIN), *_SPECIAL)
# Norms that are rewritten without a wrong step, to check that the rewriting itself is not a fault.
RESPELLED = {
    "llama": "model.layers.1.input_layernorm",
    "addition": "layers.1.attention_norm",
    "olmo2": "model.layers.0.self_attn.q_norm",
    "gemma3": "model.norm",
    "mamba2": "backbone.layers.0.mixer.norm",
    "assorted": "after",
}


@dataclass(frozen=True, slots=True)
class HonestRun:
    """One run: a model, a target, the seed of the inputs, and whether a norm is rewritten without a wrong step."""

    subject: Subject
    target: str
    seed: int
    respelled: bool = False


@dataclass(frozen=True, slots=True)
class HonestResult:
    """The result of `validate` for an honest run.

    Attributes:
        model: the model and its variant.
        dtype: dtype of the model.
        target: target of the export.
        seed: seed of the inputs.
        passed: whether the verdict was `pass`.
        summary: the report's summary, or the error's message.
        reasons: the reason of each failed part.
    """

    model: str
    dtype: str
    target: str
    seed: int
    passed: bool
    summary: str
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values."""
        return asdict(self)


def honest_runs(count: int) -> list[HonestRun]:
    """The first `count` runs of a fixed order: every model, target and respelled norm once, then the next seed."""
    runs: list[HonestRun] = []
    seed = 0
    while len(runs) < count:
        runs += [HonestRun(subject, target, seed) for subject in SUBJECTS for target in TARGETS]
        plain = [subject for subject in SUBJECTS if subject.variant == "plain" and subject.model in RESPELLED]
        runs += [HonestRun(s, TARGETS[(n + seed) % len(TARGETS)], seed, True) for n, s in enumerate(plain)]
        seed += 1
    return runs[:count]


def run_honest(run: HonestRun, exports: Exports) -> HonestResult:
    """Validate one honest export."""
    folder = exports.folder(run.subject, run.target)
    if run.respelled:
        folder = respelled(folder, run.subject.model, exports.work / "respelled")
    label = run.subject.label + (" respelled" if run.respelled else "")
    row = (label, run.subject.dtype, run.target, run.seed)
    try:
        report = validate(folder, exports.model(run.subject), seed=run.seed)
    except Exception as error:  # any error is a false alarm; the other runs continue
        return HonestResult(*row, False, f"{type(error).__name__}: {error}")
    reasons = tuple(f"{culprit.name}: {culprit.reason}" for culprit in report.culprits)
    return HonestResult(*row, report.verdict == "pass", report.summary, reasons)


def respelled(folder: Path, model: str, place: Path) -> Path:
    """A copy of an exported folder in which one norm is rewritten without a wrong step."""
    shutil.rmtree(place, ignore_errors=True)
    edit = Edit(folder)
    respell(edit, RESPELLED[model])
    return edit.save(place)
