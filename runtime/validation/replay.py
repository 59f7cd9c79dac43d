"""A validation as it is asked for on the command line, kept in its report, and run again from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.dtypes import torch_name
from ...models.errors import UsageError
from ...models.loading import LoadedModel, load_model
from ...models.outliers import apply_recorded
from ..accuracy.tolerances import parse_limits
from ..inputs.cases import Case, inputs_of, load_cases, made_up_for, prompt_cases
from ..inputs.exported import Exported, open_exported
from ..inputs.tokenizer import has_tokenizer
from ..report.report_file import read_report
from ..runners.base import TensorInfo
from ..runners.ort_graph import file_record
from .api import bisect, validate
from .result import ValidationReport

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class ValidationRequest:
    """What a validation is asked to do; every field is a JSON value.

    Attributes:
        candidate: an exported folder, an .onnx file, or a PyTorch model as for `load_model`.
        against: the PyTorch model, as for `load_model`.
        dtype: to load it in; the exported one when None.
        provider: ONNX Runtime's execution provider.
        seed: of made-up inputs.
        shapes: batch and length of made-up inputs; None for the default ones.
        inputs: see `load_cases`.
        prompts: see `prompt_cases`.
        tokenizer: for prompts; None looks beside the candidate, then beside the PyTorch model.
        atol: see `parse_limits`.
        rtol: see `parse_limits`.
        ulp: see `parse_limits`.
        outputs_only: leave norms and segments out.
        depth: measure errors along the depth.
        window: norms that are looked at together.
        bisect: the report is one of bisect.
    """

    candidate: str
    against: str
    dtype: str | None = None
    provider: str = "cpu"
    seed: int = 0
    shapes: list[list[int]] | None = None
    inputs: str | None = None
    prompts: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    atol: list[str] = field(default_factory=list)
    rtol: list[str] = field(default_factory=list)
    ulp: list[str] = field(default_factory=list)
    outputs_only: bool = False
    depth: bool = False
    window: int | None = None
    bisect: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The request as the report's settings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_report(cls, path: Path) -> tuple[ValidationRequest, dict[str, Any]]:
        """The request behind a report, and the report.

        Raises:
            UsageError: there is no such file, it is no report, or one of another version.
        """
        report = read_report(path)
        settings = report.get("settings")
        known = {f.name: f for f in dataclasses.fields(cls)}
        if not isinstance(settings, dict) or set(settings) != set(known):
            odd = ", ".join(sorted(set(settings or ()) ^ set(known)))
            raise UsageError(f"{path}: its settings are not those of a command ({odd}); run it anew.")
        for name, value in settings.items():
            if not _KINDS[str(known[name].type)](value):
                raise UsageError(f"{path}: its settings are not those of a command: {name} is {value!r}; run it anew.")
        return cls(**settings), report

    def run(self, *, trust_remote_code: bool = False, progress: Callable[[str], None]) -> ValidationReport:
        """Load both sides and validate.

        Args:
            trust_remote_code: run Python code that comes with a checkpoint. Never taken from a report.
            progress: progress.

        Raises:
            RmsnormDeployError: as `validate`, `load_model` and the readers of inputs.
        """
        limits = parse_limits(self.atol, self.rtol, self.ulp)
        if self.inputs is not None and self.prompts:
            raise UsageError("give either --inputs or --prompt, not both.")
        exported = None if is_model_source(self.candidate) else open_exported(self.candidate)
        progress(f"loading {self.against}")
        model = load_against(self.against, self.dtype, exported, trust_remote_code)
        other = None
        if exported is None:
            progress(f"loading {self.candidate}")
            other = load_model(self.candidate, trust_remote_code=trust_remote_code)
        report = (bisect if self.bisect else validate)(
            self.candidate if other is None else other.model,
            model,
            provider=self.provider,
            shapes=self._sizes,
            seed=self.seed,
            cases=lambda infos: self._cases(infos, exported, other, trust_remote_code),
            limits=limits,
            outputs_only=self.outputs_only,
            depth=self.depth,
            window=self.window,
            settings=self.to_dict(),
            progress=progress,
        )
        if self.inputs is not None and Path(self.inputs).is_file():
            report.provenance["inputs"] = file_record(Path(self.inputs))
        return report

    @property
    def _sizes(self) -> list[tuple[int, int]] | None:
        return None if self.shapes is None else [(batch, length) for batch, length in self.shapes]

    def _cases(
        self, infos: Sequence[TensorInfo], exported: Exported | None, other: LoadedModel | None, trust_remote_code: bool
    ) -> list[Case] | None:
        """The inputs that were asked for; None leaves them to be made up from what the candidate says of itself."""
        infos = infos if other is None else inputs_of(other)
        if self.inputs is not None:
            return load_cases(self.inputs, infos)
        if self.prompts:
            return prompt_cases(self.prompts, self._tokenizer(exported), infos, trust_remote_code)
        return None if other is None else made_up_for(other, self._sizes, self.seed)

    def _tokenizer(self, exported: Exported | None) -> str:
        if self.tokenizer is not None:
            return self.tokenizer
        folder = exported.folder if exported is not None else None
        return str(folder) if folder is not None and has_tokenizer(folder) else self.against


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_shapes(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return value is None or (pairs and all(_is_whole(size) for pair in value for size in pair))


# What a setting of each type may be in a report.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int": _is_whole,
    "int | None": lambda value: value is None or _is_whole(value),
    "bool": lambda value: isinstance(value, bool),
    "list[str]": lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value),
    "list[list[int]] | None": _is_shapes,
}


def is_model_source(text: str) -> bool:
    """Whether a candidate names a PyTorch model rather than an exported file."""
    place = Path(text).expanduser()
    if place.is_dir():
        return (place / "config.json").is_file() and not (place / "manifest.json").is_file()
    return ":" in text and not place.exists()


def load_against(source: str, dtype: str | None, exported: Exported | None, trust_remote_code: bool) -> nn.Module:
    """The PyTorch model in the dtype asked for, or else in the one that was exported, with the outliers that the
    export put into its weights.

    Raises:
        UsageError: as `load_model`.
    """
    model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code).model
    own = next((torch_name(p.dtype) for p in model.parameters() if p.is_floating_point()), None)
    wanted = exported.dtype if exported is not None else None
    if dtype is None and own is not None and wanted not in (None, own):
        # Only now: casting a model to the dtype it has already would change one that mixes dtypes.
        model = load_model(source, dtype=wanted, trust_remote_code=trust_remote_code).model
    if exported is not None:
        apply_recorded(model, exported.manifest)
    return model
