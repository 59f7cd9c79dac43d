"""Honest runs: validations of exports without faults, for many models, dtypes, targets and inputs; all must pass."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmsnorm_deploy.runtime.validation.api import validate

from .subjects import TARGETS, Exports, Subject
from .surgery import Edit, respell
from .writers import TARGETS_OF, WRITERS

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
    Subject("mistral w40"),
    Subject("mistral w40", "float32", "past"),
    Subject("gemma2 w40"),
    Subject("gemma2 w40", "float32", "past"),
    Subject("gemma2 w40", "float16", "past"),
    Subject("qwen3", "float32", "past"),
    Subject("t5"),
    Subject("t5", "float16"),
)
SUBJECTS = (*(Subject(model, dtype) for dtype in DTYPES for model in _PLAIN), *_SPECIAL)
# Models whose files are written anew by other tools.
WRITTEN = (
    Subject("llama"),
    Subject("llama", "float32", "past"),
    Subject("t5"),
    Subject("gemma2 w40", "float32", "past"),
    Subject("qwen3", "float16"),
)
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
    """One run.

    Attributes:
        subject: the model.
        target: target of the export.
        seed: seed of the inputs.
        respelled: whether a norm is rewritten without a wrong step.
        writer: the tool that writes the file anew, a key of `WRITERS`; empty for none.
    """

    subject: Subject
    target: str
    seed: int
    respelled: bool = False
    writer: str = ""


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
    """The first `count` runs of a fixed order: models and targets, respelled norms, tools; then the next seed."""
    runs: list[HonestRun] = []
    seed = 0
    while len(runs) < count:
        runs += [HonestRun(subject, target, seed) for subject in SUBJECTS for target in TARGETS]
        plain = [subject for subject in SUBJECTS if subject.variant == "plain" and subject.model in RESPELLED]
        runs += [HonestRun(s, TARGETS[(n + seed) % len(TARGETS)], seed, True) for n, s in enumerate(plain)]
        runs += [
            HonestRun(subject, _one_of(TARGETS_OF.get(writer, TARGETS), n + m + seed), seed, writer=writer)
            for n, writer in enumerate(WRITERS)
            for m, subject in enumerate(WRITTEN)
            if not (writer == "outputs renamed" and subject.variant == "past")
        ]
        seed += 1
    return runs[:count]


def _one_of(targets: Sequence[str], number: int) -> str:
    return targets[number % len(targets)]


def run_honest(run: HonestRun, exports: Exports) -> HonestResult:
    """Validate one honest export."""
    folder = exports.folder(run.subject, run.target)
    if run.respelled:
        folder = respelled(folder, run.subject.model, exports.work / "respelled")
    label = run.subject.label + (" respelled" if run.respelled else "")
    if run.writer:
        label += f", {run.writer}"
    row = (label, run.subject.dtype, run.target, run.seed)
    try:
        if run.writer:
            folder = written_anew(folder, run.writer, exports.work / "written")
        report = validate(folder, exports.model(run.subject), seed=run.seed)
    except Exception as error:  # any error is a false alarm; the other runs continue
        return HonestResult(*row, False, f"{type(error).__name__}: {error}")
    reasons = tuple(f"{culprit.name}: {culprit.reason}" for culprit in report.culprits)
    return HonestResult(*row, report.verdict == "pass", report.summary, reasons)


def written_anew(folder: Path, writer: str, place: Path) -> Path:
    """A folder with the file that a tool wrote, and the manifest."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    WRITERS[writer](folder / "model.onnx", place / "model.onnx")
    shutil.copy(folder / "manifest.json", place)
    return place


def respelled(folder: Path, model: str, place: Path) -> Path:
    """A copy of an exported folder in which one norm is rewritten without a wrong step."""
    shutil.rmtree(place, ignore_errors=True)
    edit = Edit(folder)
    respell(edit, RESPELLED[model])
    return edit.save(place)
