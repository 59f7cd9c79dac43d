"""Open both sides of a validation, given as objects or by name (`open_sides`), and their inputs (`cases_for`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.dtypes import torch_name
from ...models.errors import UsageError
from ...models.loading import LoadedModel, load_model
from ...models.outliers import apply_recorded
from ..inputs.cases import inputs_of, load_cases, made_up_for, prompt_cases
from ..inputs.exported import Exported, open_exported
from ..inputs.plan import Plan, plan_cases
from ..inputs.tokenizer import has_tokenizer
from ..runners.base import Runner, TensorInfo
from .candidate import Candidate, candidate_of
from .options import ValidationOptions
from .run_cases import made_up_cases

if TYPE_CHECKING:
    from torch import nn

# What was not tried where the user chose the inputs.
_GIVEN = "generated inputs: omit the given ones, or repeat without them"
_FACTORY = "other inputs than those of the factory: give them with --inputs"
_SHAPES = "padding, special token ids and other generated inputs: omit --shape, or repeat without it"


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides of a validation.

    Attributes:
        candidate: the side that is compared with PyTorch.
        model: the PyTorch model, in the dtype that is deployed.
        against: the name by which the user gave the PyTorch model; None for a module.
        loaded: the candidate if it is a PyTorch model that was given by name, else None.
        folder: the candidate's exported folder, or None.
        named: whether both sides were given by name, so that the report can be run again.
    """

    candidate: Candidate
    model: nn.Module
    against: str | None
    loaded: LoadedModel | None
    folder: Path | None
    named: bool


def open_sides(
    candidate: str | Path | nn.Module | Runner,
    model: str | Path | nn.Module,
    options: ValidationOptions,
    trust_remote_code: bool,
    progress: Callable[[str], None],
) -> Sides:
    """Load both sides.

    Raises:
        UsageError: the candidate is not a path, a PyTorch module or a runner; the model is not a module or a model's
            name; a file does not exist; or the two have different dtypes.
    """
    from torch import nn

    if not isinstance(model, str | Path | nn.Module):
        raise UsageError(
            f"expected a PyTorch module, or the name or folder of one, to compare with; got {type(model).__name__}."
        )
    is_source = isinstance(candidate, str) and is_model_source(candidate)
    exported = open_exported(candidate) if isinstance(candidate, str | Path) and not is_source else None
    against = None if isinstance(model, nn.Module) else str(model)
    if not isinstance(model, nn.Module):
        progress(f"loading {model}")
        model = load_against(
            str(model), options.dtype, exported, trust_remote_code, own_dtype=options.lossy is not None
        )
    loaded = None
    thing: Any = candidate if exported is None else exported
    if is_source:
        progress(f"loading {candidate}")
        loaded = load_model(str(candidate), trust_remote_code=trust_remote_code)
        thing = loaded.model
    side = candidate_of(thing, options)
    if options.lossy is None:
        _check_dtype(side, model)
    named = isinstance(candidate, str | Path) and against is not None
    return Sides(side, model, against, loaded, None if exported is None else exported.folder, named)


def cases_for(sides: Sides, infos: Sequence[TensorInfo], options: ValidationOptions, trust_remote_code: bool) -> Plan:
    """The inputs that the options specify, else generated ones.

    Args:
        sides: both sides.
        infos: the candidate's inputs.
        options: `inputs`, `prompts` and `tokenizer`; else `shapes` and `seed`.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        UsageError: the inputs do not exist, or they do not match the model.
    """
    known = infos if sides.loaded is None else inputs_of(sides.loaded)
    if options.inputs is not None:
        return Plan(load_cases(options.inputs, known), [_GIVEN])
    if options.prompts:
        cases = prompt_cases(options.prompts, _tokenizer(sides, options), known, trust_remote_code)
        return Plan(cases, [_GIVEN])
    if sides.loaded is not None and sides.loaded.example_inputs is not None:
        return Plan(made_up_for(sides.loaded, options.shapes, options.seed), [_FACTORY])
    if sides.loaded is not None:
        infos = [TensorInfo(info.name, "int64", ("batch", "sequence")) for info in known]
    if options.shapes is None:
        return plan_cases(infos, sides.model, options.seed, sides.candidate.limits, options.thorough)
    return Plan(made_up_cases(infos, sides.model, options.shapes, options.seed), [_SHAPES])


def _tokenizer(sides: Sides, options: ValidationOptions) -> str:
    if options.tokenizer is not None:
        return options.tokenizer
    if sides.folder is not None and has_tokenizer(sides.folder):
        return str(sides.folder)
    source = sides.against or str(getattr(sides.model, "name_or_path", ""))
    if not source:
        raise UsageError(
            "prompts require a tokenizer, and neither the candidate nor the PyTorch model has one; name it "
            "(--tokenizer MODEL, tokenizer=...)."
        )
    return source


def is_model_source(text: str) -> bool:
    """Whether a candidate names a PyTorch model rather than an exported file."""
    place = Path(text).expanduser()
    if place.is_dir():
        return (place / "config.json").is_file() and not (place / "manifest.json").is_file()
    return ":" in text and not place.exists()


def load_against(
    source: str, dtype: str | None, exported: Exported | None, trust_remote_code: bool, *, own_dtype: bool = False
) -> nn.Module:
    """Load the PyTorch model in the requested dtype, or else in the exported dtype, with the outliers that the export
    injected into its weights. With `own_dtype` the model keeps its own dtype instead of the exported one.

    Raises:
        UsageError: as in `load_model`.
    """
    model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code).model
    own = dtype_of(model)
    wanted = exported.dtype if exported is not None and not own_dtype else None
    if dtype is None and own is not None and wanted not in (None, own):
        # Load it again only if the dtype differs: a cast would change a model that mixes dtypes.
        model = load_model(source, dtype=wanted, trust_remote_code=trust_remote_code).model
    if exported is not None:
        apply_recorded(model, exported.manifest)
    return model


def _check_dtype(candidate: Candidate, model: nn.Module) -> None:
    own, exported = dtype_of(model), candidate.manifest.get("dtype")
    if exported is not None and own is not None and own != exported:
        raise UsageError(
            f"{candidate.name} was exported in {exported}, but the PyTorch model is in {own}. Load it in "
            f"{exported} (--dtype {exported}): the baseline must have the deployed dtype. To judge what the "
            "conversion loses, give a profile (--lossy)."
        )


def dtype_of(model: nn.Module) -> str | None:
    """PyTorch's name of the dtype of the first floating-point parameter; None without one."""
    return next((torch_name(p.dtype) for p in model.parameters() if p.is_floating_point()), None)
