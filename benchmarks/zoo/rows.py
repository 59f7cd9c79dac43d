"""The steps of one entry: recognize, export, validate, cache, tokens, upstream."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rmsnorm_deploy import export_model, find_norms, validate
from rmsnorm_deploy.export.onnx_io.manifest import read_manifest
from rmsnorm_deploy.models.calling.example_inputs import example_inputs
from rmsnorm_deploy.models.calling.media_parts import modality_read
from rmsnorm_deploy.models.calling.parts import DECODER
from rmsnorm_deploy.models.errors import EnvironmentMissingError, MismatchError, UnsupportedError, UsageError
from rmsnorm_deploy.runtime.inputs.cases import factory_arrays
from rmsnorm_deploy.runtime.inputs.exported import component_folders

from .catalog import ENTRIES
from .entries import Entry, norms_there, padded_prompt
from .tokens import difference, media_difference, onnx_tokens, torch_tokens

STEPS = ("recognize", "export", "validate", "cache", "tokens", "upstream")
# `wrong` is what the user would not notice: the export succeeds, and its numbers or tokens are not PyTorch's.
Status = Literal["ok", "wrong", "refused", "not judged", "failed", "none", "not installed"]
_LONGEST = 600


@dataclass(frozen=True, slots=True)
class Step:
    """The result of one step.

    Attributes:
        step: its name; `build` if the model could not be built.
        status: `ok`; `wrong`; `refused` (an error of this package); `failed` (any other error); `none` (does not
            apply); `not installed` (a library is missing).
        detail: what was found, or the message.
        seconds: its time.
    """

    step: str
    status: Status
    detail: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def run_row(name: str, steps: Sequence[str]) -> Iterator[Step]:
    """Run the steps of one entry, in their order.

    Args:
        name: of the entry.
        steps: some of `STEPS`.
    """
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entry = ENTRIES[name]
    built = _timed("build", lambda: _built(entry))
    if built.status != "ok":
        yield built
        return
    with tempfile.TemporaryDirectory() as folder:
        row = _Row(entry, Path(folder))
        for step in STEPS:
            if step in steps:
                yield _timed(step, getattr(row, step))


def _timed(step: str, work: Callable[[], tuple[Status, str]]) -> Step:
    start = time.perf_counter()
    try:
        status, detail = work()
    except EnvironmentMissingError as error:
        status, detail = "not installed", str(error)
    except (MismatchError, UnsupportedError, UsageError) as error:
        status, detail = "refused", str(error)
    except Exception as error:
        status, detail = "failed", f"{type(error).__name__}: {error}"
    return Step(step, status, " ".join(detail.split())[:_LONGEST], round(time.perf_counter() - start, 1))


def _built(entry: Entry) -> tuple[Status, str]:
    try:
        entry.make()
    except ImportError as error:
        return "not installed", str(error)
    return "ok", ""


class _Row:
    def __init__(self, entry: Entry, folder: Path) -> None:
        self._entry, self._folder = entry, folder
        self._model = entry.make()

    def _inputs(self) -> dict[str, Any] | None:
        return self._entry.inputs(self._model) if self._entry.inputs is not None else None

    def recognize(self) -> tuple[Status, str]:
        recognition, there = find_norms(self._model), norms_there(self._entry, self._model)
        found, refused = len(recognition.sites), recognition.refusals
        if found < there <= found + len(refused):
            return "refused", f"{found}/{there}: {refused[0].path}: {refused[0].reason}"
        return "ok" if found == there else "wrong", f"{found}/{there}"

    def _media(self) -> dict[str, Any] | None:
        """The inputs, where they have images or sounds that an export with a cache reads."""
        given = self._inputs()
        return given if given is not None and modality_read(self._model, given) is not None else None

    def export(self) -> tuple[Status, str]:
        result = export_model(self._model, self._folder / "plain", inputs=self._inputs())
        return "ok", f"{len(result.manifest['sites'])} norms"

    def validate(self) -> tuple[Status, str]:
        folder = self._folder / "plain"
        if not folder.is_dir():
            return "none", "not exported"
        given = self._inputs()
        report = validate(folder, self._model, cases=None if given is None else [factory_arrays(given)])
        problems = [*map(str, report.culprits), *map(str, report.unjudged), *report.notes]
        verdicts: dict[str, Status] = {"pass": "ok", "fail": "wrong", "cannot be judged": "not judged"}
        return verdicts[report.verdict], f"{report.verdict} {'; '.join(problems)}"

    def cache(self) -> tuple[Status, str]:
        if not _generates(self._model):
            return "none", "it does not generate tokens"
        folder = self._folder / "cache"
        export_model(self._model, folder, inputs=self._media(), with_past=True)
        decoder = component_folders(folder).get(DECODER, folder)
        return "ok", f"{sum('past' in row['name'] for row in read_manifest(decoder)['inputs'])} cache inputs"

    def tokens(self) -> tuple[Status, str]:
        if not _generates(self._model):
            return "none", "it does not generate tokens"
        folder = next((f for f in (self._folder / "cache", self._folder / "plain") if f.is_dir()), None)
        if folder is None or (folder.name == "plain" and not self._model.config.is_encoder_decoder):
            return "none", "not exported with a cache"
        media = self._media()
        if media is not None:
            agree, where = media_difference(self._model, folder, media)
            return "ok" if agree else "wrong", where or f"equal ({folder.name}, with {', '.join(media)})"
        prompt = padded_prompt()
        wanted = torch_tokens(copy.deepcopy(self._model), prompt)
        got = onnx_tokens(folder, prompt, wanted)
        agree, where = difference(wanted, got)
        if not agree and difference(torch_tokens(copy.deepcopy(self._model), prompt, use_cache=False), got)[0]:
            return "ok", "equal to PyTorch without its cache; with it, PyTorch differs from itself"
        return "ok" if agree else "wrong", where or f"equal ({folder.name})"

    def upstream(self) -> tuple[Status, str]:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        model = self._entry.make()
        given = self._inputs()
        inputs = example_inputs(model) if given is None else given
        with torch.no_grad():
            exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
        return "ok", f"{sum(1 for _ in exported.program.graph)} nodes"


def _generates(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())
