"""Open both sides of a validation, given as objects or by name (`open_sides`), and their inputs (`cases_for`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.graph.cache_names import is_past
from ...models.calling.calls import CallForm, call_form
from ...models.calling.parts import part_of
from ...models.calling.wrappers import look_through
from ...models.dtypes import norm_dtype, torch_name
from ...models.errors import UsageError
from ...models.hub.options import recorded_options
from ...models.loading import LoadedModel, check_eval_mode, load_model, names_python
from ...models.outliers import apply_recorded
from ...models.precision import model_dtype, saved_elements
from ..inputs.cases import PER_TOKEN, factory_arrays, inputs_of, load_cases, made_up_for, prompt_cases
from ..inputs.derived import FACTORY_CASE, derived_cases, factory_case
from ..inputs.exported import Exported, open_exported
from ..inputs.plan import Plan, plan_cases
from ..inputs.tokenizer import ADDITION_MODEL, has_tokenizer
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
        hint: that the export came from another model than the one that is compared; else empty.
        inputs: the arguments that the PyTorch model's factory returned with it, by name; None if there are none.
        form: how PyTorch is called with the file's flat inputs.
    """

    candidate: Candidate
    model: nn.Module
    against: str | None
    loaded: LoadedModel | None
    folder: Path | None
    named: bool
    hint: str = ""
    inputs: Mapping[str, Any] | None = None
    form: CallForm = field(default_factory=CallForm)


def open_sides(
    candidate: str | Path | nn.Module | Runner,
    model: str | Path | nn.Module | None,
    options: ValidationOptions,
    trust_remote_code: bool,
    progress: Callable[[str], None],
    allow_code: bool = False,
) -> Sides:
    """Load both sides.

    Args:
        candidate: the side that is compared with PyTorch.
        model: the PyTorch model; None for the one that the manifest of an exported folder names.
        options: the dtype, and what the candidate requires.
        trust_remote_code: run Python code that comes with a checkpoint.
        progress: called with a line of text at each step.
        allow_code: run Python code that the manifest names.

    Raises:
        UsageError: the candidate is not a path, a PyTorch module or a runner; the model is not a module or a model's
            name; a file does not exist; the two have different dtypes; or there is no model, and no manifest names one
            that can be loaded.
    """
    from torch import nn

    is_source = isinstance(candidate, str) and is_model_source(candidate)
    exported = open_exported(candidate) if isinstance(candidate, str | Path) and not is_source else None
    against = open_against(candidate, exported, model, options, trust_remote_code, progress, allow_code)
    inputs, compared = against.inputs, against.model
    loaded = None
    thing: Any = candidate if exported is None else exported
    if isinstance(thing, nn.Module):
        thing = look_through(thing).model
    if is_source:
        progress(f"loading {candidate}")
        loaded = load_model(str(candidate), trust_remote_code=trust_remote_code)
        thing = loaded.model
    if loaded is not None and loaded.example_inputs is not None:
        inputs = loaded.example_inputs
    part = None if exported is None else exported.manifest.get("part")
    if exported is not None and part is not None:
        compared, inputs = part_of(compared, part, exported.manifest), None
    form = _form(exported, inputs)
    side = candidate_of(thing, options, form)
    if options.lossy is None:
        with hinting(against.hint):
            _check_dtype(side, compared)
    by_name = isinstance(candidate, str | Path) and against.name is not None
    folder = None if exported is None else exported.folder
    return Sides(side, compared, against.name, loaded, folder, by_name, against.hint, inputs, form)


@dataclass(frozen=True, slots=True)
class Against:
    """The PyTorch model that a candidate is compared with.

    Attributes:
        model: the model, in eval mode.
        name: the name by which the user or the manifest gave it; None for a module.
        inputs: see `Sides`.
        hint: see `Sides`.
    """

    model: nn.Module
    name: str | None
    inputs: Mapping[str, Any] | None = None
    hint: str = ""


def open_against(
    candidate: object,
    exported: Exported | None,
    model: str | Path | nn.Module | None,
    options: ValidationOptions,
    trust_remote_code: bool,
    progress: Callable[[str], None],
    allow_code: bool,
) -> Against:
    """Load the PyTorch model; `exported` is what the candidate names, and the rest is as in `open_sides`."""
    from torch import nn

    if not isinstance(model, str | Path | nn.Module | None):
        raise UsageError(
            f"expected a PyTorch module, or the name or folder of one, to compare with; got {type(model).__name__}."
        )
    origin = None if exported is None else _origin(exported)
    by_manifest = model is None
    if model is None:
        model = _allowed_origin(candidate, origin, allow_code)
    if isinstance(model, nn.Module):
        model = look_through(model).model
        check_eval_mode(model, "the module to compare with")
        return Against(model, None)
    name = str(model)
    progress(f"loading {name}")
    try:
        named = load_against(name, options.dtype, exported, trust_remote_code, own_dtype=options.lossy is not None)
    except UsageError as error:
        if not by_manifest:
            raise
        raise UsageError(
            f"{candidate}: its manifest says that it was exported from {origin}, which cannot be loaded: {error} "
            "A relative path starts at the working directory. If the model is elsewhere, name it (--against MODEL)."
        ) from error
    hint = ""
    if origin is not None and not _same_source(origin, name):
        hint = f"this export came from {origin}, and --against names {name}"
    return Against(named.model, name, named.example_inputs, hint)


def _form(exported: Exported | None, inputs: Mapping[str, Any] | None) -> CallForm:
    """How PyTorch is called: as the export recorded it, else as the factory's inputs say.

    Raises:
        UsageError: the export has values that only Python code can give, and no factory gives them.
    """
    own = None if inputs is None else call_form(inputs)
    manifest = {} if exported is None else exported.manifest
    recorded = CallForm.from_json(manifest)
    if recorded is not None and recorded.arguments:
        return recorded
    if own is not None or recorded is not None:
        return own or CallForm()
    raise UsageError(
        f"the file was exported with arguments that a manifest cannot hold (constants: "
        f"{manifest.get('constants', {})}). Name the factory that returns the model with its inputs "
        "(--against file.py:function)."
    )


@contextmanager
def hinting(hint: str) -> Iterator[None]:
    """Add a hint, if there is one, to the message of a `UsageError`."""
    try:
        yield
    except UsageError as error:
        if not hint:
            raise
        raise UsageError(f"{error} Note that {hint}.") from error


def _origin(exported: Exported) -> str | None:
    """The PyTorch model that an export came from; None if its manifest does not name one."""
    source = exported.manifest.get("source")
    # The manifest of a rewrite names the .onnx file that was rewritten.
    return source if isinstance(source, str) and source and not source.endswith(".onnx") else None


def _allowed_origin(candidate: object, origin: str | None, allow_code: bool) -> str:
    if origin is None:
        raise UsageError(
            f"--against MODEL is missing, and {candidate} has no manifest that names the PyTorch model it was exported "
            "from; name the model (--against MODEL, or model=... in Python)."
        )
    if names_python(origin) and not allow_code:
        raise UsageError(
            f"{candidate}: its manifest names Python code that a validation would run: {origin}. Read that code, and "
            "if you trust it, add --allow-code (allow_code=True in Python), or name the model (--against MODEL)."
        )
    return origin


def _same_source(a: str, b: str) -> bool:
    """Whether two names of models are the same: equal, or the same folder or file on this disk."""
    return a == b or _resolved(a) == _resolved(b)


def _resolved(source: str) -> tuple[str, str]:
    """The real path that a source names, and what it names in that file; the source itself if there is no such path."""
    if os.path.exists(os.path.expanduser(source)):
        return os.path.realpath(os.path.expanduser(source)), ""
    name, colon, rest = source.rpartition(":")
    if colon and os.path.exists(os.path.expanduser(name)):
        return os.path.realpath(os.path.expanduser(name)), rest
    return source, ""


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
        return Plan(load_cases(options.inputs, known, sides.candidate.inputs), [_GIVEN])
    if options.prompts:
        cases = prompt_cases(options.prompts, _tokenizer(sides, options), known, trust_remote_code)
        return Plan(cases, [_GIVEN])
    if sides.loaded is not None and sides.loaded.example_inputs is not None:
        return Plan(made_up_for(sides.loaded, options.shapes, options.seed), [_FACTORY])
    if sides.loaded is not None:
        infos = [TensorInfo(info.name, "int64", ("batch", "sequence")) for info in known]
    plan = Plan() if sides.inputs is None or options.shapes is not None else _from_factory(sides, infos, options)
    if plan.cases and not _reads_tokens(infos):
        return plan
    if options.shapes is None:
        generated = plan_cases(infos, sides.model, options.seed, sides.candidate.limits, options.thorough)
        return Plan([*plan.cases[:1], *generated.cases], [*plan.untried[: not plan.cases], *generated.untried])
    return Plan(made_up_cases(infos, sides.model, options.shapes, options.seed), [_SHAPES])


def _from_factory(sides: Sides, infos: Sequence[TensorInfo], options: ValidationOptions) -> Plan:
    """The factory's inputs and cases like them; no case and the reason where they are not inputs of the file."""
    first = factory_case(infos, factory_arrays(sides.inputs or {}))
    if isinstance(first, str):
        return Plan(untried=[f"{FACTORY_CASE}: {first}"])
    return derived_cases(infos, first, options.seed, sides.candidate.limits, options.thorough)


def _reads_tokens(infos: Sequence[TensorInfo]) -> bool:
    """Whether every input is one whose values are generated by its name."""
    names = {info.name for info in infos if not is_past(info.name)}
    return "input_ids" in names and names <= set(PER_TOKEN)


def _tokenizer(sides: Sides, options: ValidationOptions) -> str:
    if options.tokenizer is not None:
        return options.tokenizer
    if sides.folder is not None and has_tokenizer(sides.folder):
        return str(sides.folder)
    against = sides.against or ""
    is_factory = ":" in against and against != ADDITION_MODEL and not Path(against).expanduser().exists()
    source = "" if is_factory else against
    source = source or str(getattr(sides.model, "name_or_path", ""))
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
) -> LoadedModel:
    """Load the PyTorch model in the requested dtype, or else in the exported dtype, with the outliers that the export
    injected into its weights. With `own_dtype` the model keeps its own dtype instead of the exported one. Of a model
    with a hub name, the exported commit is loaded, unless another revision is asked for.

    Raises:
        UsageError: as in `load_model`.
    """
    dtype = None if dtype is None else norm_dtype(dtype)
    hub = recorded_options(source, None if exported is None else exported.manifest.get("hub"))
    loaded = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code, hub=hub)
    own = dtype_of(loaded.model)
    wanted = exported.dtype if exported is not None and not own_dtype else None
    if dtype is None and own is not None and wanted not in (None, own):
        # Load it again only if the dtype differs: a cast would change a model that mixes dtypes.
        loaded = load_model(source, dtype=wanted, trust_remote_code=trust_remote_code, hub=hub)
    if exported is not None:
        apply_recorded(loaded.model, exported.manifest)
    return loaded


def _check_dtype(candidate: Candidate, model: nn.Module) -> None:
    own, exported = dtype_of(model), candidate.manifest.get("dtype")
    elements, parts = candidate.manifest.get("elements"), saved_elements(model)
    if elements and set(elements) == set(parts) and _most(elements) == _most(parts):
        return
    if elements and own == exported:
        raise UsageError(
            f"{candidate.name} was exported from a model with parts in {_listed(elements)}, but those of the PyTorch "
            f"model are in {_listed(parts)}. Give the model as it was exported: from_pretrained(dtype=...) keeps some "
            "modules in float32, and model.to(dtype) or model.half() does not."
        )
    if exported is not None and own is not None and own != exported:
        raise UsageError(
            f"{candidate.name} was exported in {exported}, but the PyTorch model is in {own}. Load it in "
            f"{exported} (--dtype {exported}): the baseline must have the deployed dtype. To judge what the "
            "conversion loses, give a profile (--lossy)."
        )


def dtype_of(model: nn.Module) -> str | None:
    """The name of the dtype of most of the model's floating-point parameters; None without one."""
    dtype = model_dtype(model)
    return None if dtype is None else torch_name(dtype)


def _most(elements: Mapping[str, int]) -> str:
    return max(elements, key=lambda name: elements[name])


def _listed(elements: Mapping[str, int]) -> str:
    return " and ".join(f"{name} ({count} elements)" for name, count in sorted(elements.items()))
