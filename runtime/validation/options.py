"""The options of a validation (`ValidationOptions`), shared by the command line, replay and `validate`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...models.errors import UsageError
from ..accuracy.lossy import PROFILES, limits_with
from ..accuracy.tolerances import PARTS, Limits
from ..engines.api import RUNNERS

_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationOptions:
    """How a deployed model is compared with PyTorch. The report contains every field, so that it can be run again.

    Attributes:
        dtype: dtype to load the PyTorch model in if it is given by name; the exported dtype if None.
        provider: ONNX Runtime's execution provider: `cpu`, `cuda` or `tensorrt`; with options as in `cuda:use_tf32=0`.
        seed: seed of generated inputs and adversarial rows.
        shapes: batch and length of each generated input; those of `plan_cases` if None.
        inputs: a source of inputs that replace generated ones, see `load_cases`.
        prompts: texts that replace generated inputs, see `prompt_cases`.
        tokenizer: tokenizer for prompts; if None, that of the candidate, or else that of the PyTorch model.
        limits: explicit limits by output name, `*` for all others, which replace the comparison with PyTorch's own
            error. The names `@norms` and `@segments` stand for all norms and all segments; those without limits are
            judged by the tolerance table.
        lossy: a profile of limits for quantized and converted files, a name in `PROFILES`: `int8`, `int4`, `fp16` or
            `bf16`. Single limits of it are replaced by `limits`, and the candidate may have another dtype. None is that
            of the quantized weights that the manifest of an exported folder names, if there are any.
        thorough: try generated inputs that take long too: lengths past every window that the config names, all token
            ids, and several seeds.
        outputs_only: skip norms and segments.
        depth: measure how error grows along the depth.
        window: number of norms that are processed together: a smaller number takes less memory. None means all.
        bisect: the report is one of `bisect`, which locates where error is introduced.
        runners: what runs the candidate, one report for all: `ort` (ONNX Runtime), `tensorrt` or `rtx` (an engine; one
            is built if the candidate is none). Empty for ONNX Runtime, or for the product that built an engine.
        deep: check norms and segments in TensorRT too, in engines of their own whose norms are marked as outputs.

    Raises:
        UsageError: a value is out of range, or two options exclude each other.
    """

    # Used by pydantic when a report is run again: types must match, and unknown fields are rejected.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid"}

    dtype: str | None = None
    provider: str = "cpu"
    seed: int = 0
    shapes: tuple[tuple[int, int], ...] | None = None
    inputs: str | None = None
    prompts: tuple[str, ...] = ()
    tokenizer: str | None = None
    limits: Mapping[str, Limits] = field(default_factory=dict)
    lossy: str | None = None
    thorough: bool = False
    outputs_only: bool = False
    depth: bool = False
    window: int | None = None
    bisect: bool = False
    runners: tuple[str, ...] = ()
    deep: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise UsageError(f"prompts: expected a list of texts, got {self.prompts!r}.")
        # Users may pass lists; tuples make the options equal after a round trip through JSON.
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.shapes is not None:
            object.__setattr__(self, "shapes", tuple((batch, length) for batch, length in self.shapes))
        for batch, length in self.shapes or ():
            if batch < 1 or length < 1:
                raise UsageError(f"shape {batch}x{length}: expected a batch and a length of at least 1.")
        if self.window is not None and self.window < 1:
            raise UsageError(f"window: expected at least 1 norm, or None for all, got {self.window}.")
        object.__setattr__(self, "runners", (self.runners,) if isinstance(self.runners, str) else tuple(self.runners))
        unknown = [name for name in self.runners if name not in RUNNERS]
        if unknown or len(set(self.runners)) < len(self.runners):
            raise UsageError(
                f"runners: expected {', '.join(RUNNERS)}, each at most once, got {', '.join(self.runners)}."
            )
        if self.deep and self.outputs_only:
            raise UsageError("deep checks norms and segments; it cannot be combined with outputs_only.")
        if self.seed < 0:
            raise UsageError(f"seed: expected a number of at least 0, got {self.seed}.")
        if self.inputs is not None and self.prompts:
            raise UsageError("inputs and prompts are both given; give only one of them.")
        if self.thorough and (self.inputs is not None or self.prompts or self.shapes is not None):
            raise UsageError("thorough adds generated inputs; it cannot be combined with inputs, prompts or shapes.")
        if self.bisect and self.outputs_only:
            raise UsageError("bisect checks norms and segments; it cannot be combined with outputs_only.")

        if self.lossy is not None and self.lossy not in PROFILES:
            raise UsageError(f"lossy: expected one of {', '.join(PROFILES)}, or none, got {self.lossy!r}.")
        for name in PARTS:
            if self.outputs_only and name in self.limits:
                raise UsageError(f"limits are given for {name}, but outputs_only skips norms and segments; omit one.")

    @property
    def all_limits(self) -> dict[str, Limits]:
        """The explicit limits, and those of the profile where there is none of that kind."""
        return limits_with(self.lossy, self.limits)

    @property
    def with_depth(self) -> bool:
        """Whether errors along the depth are measured.

        `bisect` requires them, and so does `deep`, which compares an engine whose norms are marked with the other one.
        """
        return self.depth or self.bisect or self.deep

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        values = dataclasses.asdict(self)
        values["limits"] = {name: dataclasses.asdict(limits) for name, limits in self.limits.items()}
        values["shapes"] = None if self.shapes is None else [list(shape) for shape in self.shapes]
        return {**values, "prompts": list(self.prompts), "runners": list(self.runners)}


def parse_shapes(texts: Sequence[str] | None) -> tuple[tuple[int, int], ...] | None:
    """Batch and length in texts such as `3x33`; None if there is no text.

    Raises:
        UsageError: a text has another form.
    """
    found = []
    for text in texts or ():
        match = _SHAPE.fullmatch(text.lower())
        if match is None:
            raise UsageError(f"shape: expected a batch and a length of at least 1, such as 3x33, got {text!r}.")
        found.append((int(match[1]), int(match[2])))
    return tuple(found) or None


def with_own_profile(options: ValidationOptions, folder: Path) -> ValidationOptions:
    """The options with the profile of an exported folder's quantized weights, where they name none.

    Raises:
        UsageError: the folder has no manifest, or one that names a profile that is unknown.
    """
    from ...export.onnx_io.manifest import read_manifest

    profile = quantized_profile(read_manifest(folder)) if options.lossy is None else None
    if profile is None:
        return options
    if profile not in PROFILES:
        raise UsageError(
            f"{folder}: its manifest says that its weights are {profile!r}, expected one of {', '.join(PROFILES)}. "
            "Name the limits with --lossy."
        )
    return dataclasses.replace(options, lossy=profile)


def quantized_profile(manifest: Mapping[str, Any]) -> str | None:
    """The profile of the quantized weights that a manifest names; None without quantized weights."""
    quantized = manifest.get("quantized") or {}
    profile = quantized.get("profile")
    return None if profile is None else str(profile)
