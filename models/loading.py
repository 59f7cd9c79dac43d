"""Load a model from a built-in, Python code, a local folder or the Hugging Face hub."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import nn

from .calling.calls import named_arguments
from .calling.wrappers import look_through
from .checkpoint_keys import check_keys
from .companions import saved_weights
from .dtypes import NORM_DTYPES, torch_dtype
from .errors import EnvironmentMissingError, RmsnormDeployError, UsageError
from .hub.download import open_checkpoint
from .hub.options import HubOptions, HubSource, check_hub, hub_keywords, hub_options, without_token
from .precision import convert
from .regular_files import read_json
from .weights.checkpoint import pickles_allowed, refuse_pickles
from .weights.load_transformers import can_stay_at_rest, load_at_rest

Kind = Literal["transformers", "decoder", "python"]
BUILTINS = ("addition", "small")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        dtype: `float32`, `float16`, `bfloat16` or `float64`; None keeps the checkpoint's dtype. The parts that a model
            keeps in float32 stay in float32, see `convert`.
        trust_remote_code: run Python code that is part of a transformers checkpoint.
        allow_missing: names or patterns (`fnmatch`) of keys that a transformers checkpoint may lack, have besides, or
            have in another shape. Missing weights are random; the notes say which.
        allow_pickle: read weights that are pickled (`pytorch_model.bin`), as a whole, into memory.
        side_folder: where a temporary file is created for weights that are not used as they are stored; the system's
            folder when None.
        hub: how a model with a hub name is read; None for the options of `using_hub`, or the default ones.
    """

    dtype: str | None = None
    trust_remote_code: bool = False
    allow_missing: Sequence[str] = ()
    allow_pickle: bool = False
    side_folder: Path | None = None
    hub: HubOptions | None = None


@dataclass(slots=True)
class LoadedModel:
    """A model in eval mode.

    Attributes:
        model: the module.
        source: the name that the user gave; empty for a module.
        kind: what kind of source that was.
        folder: the local folder that it was read from, if any.
        example_inputs: arguments by name that a Python factory returned with its model, see `named_arguments`.
        task: `addition` for the model that adds numbers, else None.
        notes: remarks for the user.
        hub: where in the hub it came from, if it did.
    """

    model: nn.Module
    source: str
    kind: Kind
    folder: Path | None = None
    example_inputs: Mapping[str, Any] | None = None
    task: str | None = None
    notes: list[str] = field(default_factory=list)
    hub: HubSource | None = None

    @property
    def details(self) -> dict[str, Any]:
        """What a manifest says of where the model came from; empty for a module that was not loaded by name."""
        if not self.source:
            return {}
        details: dict[str, Any] = {"source": self.source}
        if self.hub is not None:
            details["hub"] = self.hub.to_dict()
        if self.task is not None:
            details["task"] = self.task
        if self.task == "addition":
            from .builtin.addition_task import TOKENIZER

            details["tokenizer"] = TOKENIZER
        return details


def as_loaded(
    model: nn.Module | str | Path | LoadedModel, options: LoadOptions | None = None, **changes: Any
) -> LoadedModel:
    """A model from what Python code has of it: a module, or what names one.

    Args:
        model: a module, which stays in its dtype; or see `load_model`.
        options: see `load_model`.
        changes: fields of `LoadOptions` that differ from `options`.

    Raises:
        UsageError: as `load_model`; or it is neither.
    """
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        return load_model(str(model), options, **changes)
    inside = look_through(model, "the name or folder of a model")
    check_eval_mode(inside.model, "the module")
    return LoadedModel(inside.model, "", "python", notes=inside.notes)


def load_model(source: str, options: LoadOptions | None = None, **changes: Any) -> LoadedModel:
    """Load a model. The weights of a checkpoint of transformers stay in its safetensors files until they are read.

    Args:
        source: `builtin:addition` or `builtin:small`; `package.module:factory` or `file.py:factory`, a callable that
            returns a module, or a module and its example inputs (a dict by the forward's parameter names, a tuple of
            positional arguments, or one tensor); a folder saved by this package or by `save_pretrained`; or a hub name
            such as `Qwen/Qwen3-0.6B`.
        options: how; `LoadOptions()` when None.
        changes: fields of `LoadOptions` that differ from `options`, such as `dtype="float16"`.

    Raises:
        UsageError: the source does not exist or is not a model; the message says what was searched for and where. Or a
            checkpoint's weights do not fit its model; the message lists the keys.
        EnvironmentMissingError: transformers is required and not installed.
    """
    options = replace(options or LoadOptions(), **changes)
    dtype = options.dtype
    if dtype is not None and dtype not in NORM_DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(NORM_DTYPES)}, got {dtype!r}.")
    if isinstance(options.allow_missing, str):
        raise UsageError(
            f"allow_missing: expected a list of names or patterns, got the text {options.allow_missing!r}."
        )
    if options.hub is not None:
        check_hub(options.hub)
    loaded = _dispatch(source, options)
    if dtype is not None and loaded.kind != "transformers":
        convert(loaded.model, torch_dtype(dtype))
        if loaded.example_inputs is not None:
            loaded.example_inputs = cast_floats(loaded.example_inputs, dtype)
    check_eval_mode(loaded.model, source)
    loaded.model.eval()
    return loaded


def check_eval_mode(model: nn.Module, where: str) -> None:
    """Refuse a module that cannot be put in eval mode, as that of an `ExportedProgram`; it is not changed.

    Raises:
        UsageError: its mode is fixed.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
    except NotImplementedError as error:
        raise UsageError(
            f"{where}: {type(model).__name__} cannot be put in eval mode ({error}), as the module of an "
            "ExportedProgram. Give the original module."
        ) from error
    finally:
        for module, flag in flags:
            module.training = flag


def names_python(source: str) -> bool:
    """Whether loading a source, of a model or of inputs, runs Python code: `module:factory` or `file.py:factory`."""
    name, colon, rest = source.rpartition(":")
    if not colon or name == "builtin":
        return False
    if len(name) == 1 and rest[:1] in ("\\", "/"):  # a drive of Windows
        return False
    return not os.path.exists(os.path.expanduser(source))


def _dispatch(source: str, options: LoadOptions) -> LoadedModel:
    name, _, rest = source.rpartition(":")
    if name == "builtin":
        _refuse_revision(source, options)
        return _builtin(source, rest)
    path = Path(source).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long, or a parent folder without read permission
        raise UsageError(f"{source[:80]!r} cannot be opened: {error.strerror or error}.") from error
    if is_folder and source:
        _refuse_revision(source, options)
        return _folder(source, path, options)
    if is_file:
        raise UsageError(
            f"{source} is a file. Give a folder with config.json and safetensors weights, or Python code as "
            f"{path.stem}.py:factory. Validate an exported .onnx file with: rmsnorm validate {path.name} "
            "--against MODEL"
        )
    if names_python(source):
        _refuse_revision(source, options)
        return _python(source, name, rest)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        raise UsageError(f"{source!r} is neither an existing folder nor a hub name (owner/model).")
    return _transformers(source, None, options)


def _refuse_revision(source: str, options: LoadOptions) -> None:
    """Refuse options that a model without a hub name does not have."""
    hub = options.hub or hub_options(source)
    for name, value in (("revision", hub.revision), ("subfolder", hub.subfolder)):
        if value is not None:
            raise UsageError(f"{name}: expected a model with a hub name (owner/model), got {source}. Omit {name}.")


def _builtin(source: str, name: str) -> LoadedModel:
    from .builtin.checkpoint import addition
    from .builtin.decoder import small_decoder

    if name == "addition":
        return LoadedModel(addition(), source, "decoder", task="addition")
    if name == "small":
        return LoadedModel(small_decoder(), source, "decoder")
    raise UsageError(f"unknown built-in model {name!r}; expected one of {', '.join(f'builtin:{n}' for n in BUILTINS)}.")


def _folder(source: str, path: Path, options: LoadOptions) -> LoadedModel:
    config = path / "config.json"
    if (path / "manifest.json").is_file() and not saved_weights(path):  # config.json is copied beside an exported model
        raise UsageError(f"{source} is an exported folder, not a PyTorch model. Give the model it was exported from.")
    if not config.exists():
        raise UsageError(f"{source} has no config.json, so it is not a saved model. Save one with save_pretrained.")
    values = read_json(config, "Save the model again with save_pretrained.")
    if not isinstance(values, dict):
        raise UsageError(f"{config}: expected an object with a model's config, got {type(values).__name__}.")
    from .builtin.checkpoint import FORMAT, load_decoder

    if values.get("format") == FORMAT:
        return LoadedModel(load_decoder(path), source, "decoder", path, task=values.get("task"))
    return _transformers(source, path, options)


def _transformers(source: str, folder: Path | None, options: LoadOptions) -> LoadedModel:
    import torch

    try:
        import transformers
    except ImportError as error:
        raise EnvironmentMissingError(
            f"{source!r} is loaded with transformers, which is not installed. "
            'Install it with: pip install "rmsnorm-deploy[hf]"'
        ) from error
    name = str(folder) if folder is not None else source
    hub = options.hub or hub_options(source)
    where = f"the folder {source}" if folder is not None else f"the hub name {source!r}"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = None if folder is not None else open_checkpoint(name, hub)
    place = folder if checkpoint is None else checkpoint.folder
    given = {} if checkpoint is None else hub_keywords(checkpoint.options)
    assert place is not None
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code, **given)
        cls = _architecture(transformers, config)
        at_rest = can_stay_at_rest(cls, config, place)
        allow_pickle = options.allow_pickle or pickles_allowed()
        if not at_rest and not allow_pickle:
            refuse_pickles(place)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # weights that are allowed to be missing get the same values at each load
            if at_rest:
                model, info = load_at_rest(cls, config, place, options.dtype, options.side_folder)
                model.name_or_path = model.config._name_or_path = name
            else:
                model, info = cls.from_pretrained(
                    name,
                    dtype=options.dtype or "auto",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **given,
                    **({} if allow_pickle else {"use_safetensors": True}),
                    **({"trust_remote_code": True} if options.trust_remote_code else {}),
                )
    except RmsnormDeployError:
        raise
    except Exception as error:  # transformers raises many kinds of errors for a source that it cannot load
        first = " ".join(without_token(str(error), hub).split())[:300]
        raise UsageError(f"{where} could not be loaded by transformers: {first}") from error
    notes = check_keys(where, info, options.allow_missing)
    return LoadedModel(model, source, "transformers", folder, notes=notes, hub=checkpoint)


def _architecture(transformers: ModuleType, config: Any) -> Any:
    """The class that the checkpoint names, else an auto class."""
    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return auto if isinstance(found, tuple | list) else found
    return transformers.AutoModel


def _python(source: str, name: str, attribute: str) -> LoadedModel:
    import torch

    factory = python_attribute(source, name, attribute)
    try:
        made = factory if isinstance(factory, nn.Module) else factory()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{source}: calling {attribute}() failed: {type(error).__name__}: {error}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module | torch.export.ExportedProgram):
        raise UsageError(
            f"{source}: expected {attribute}() to return a torch.nn.Module, or a tuple of a module and its example "
            f"inputs, got {_what(made)}."
        )
    inside = look_through(model)
    if inputs is not None:
        inputs = named_arguments(inside.model.forward, inputs, source)
    return LoadedModel(inside.model, source, "python", example_inputs=inputs, notes=inside.notes)


def _what(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in made) or 'nothing'}"
    return type(made).__name__


def python_attribute(source: str, name: str, attribute: str) -> Any:
    """An attribute of a user's Python module.

    Args:
        source: the source that the user gave, for the message.
        name: a module such as `package.module`, also searched for in the working directory, or a file `file.py`.
        attribute: name of the attribute.

    Raises:
        UsageError: the file, module or attribute does not exist, or importing it failed.
    """
    found = getattr(_import(source, name), attribute, None)
    if found is None:
        raise UsageError(f"{source}: the module {name!r} has no attribute {attribute!r}.")
    return found


def _import(source: str, name: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            if "" not in sys.path:
                sys.path.insert(0, "")  # the user's code is in the working directory
            return importlib.import_module(name)
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"{source}: the file {name} does not exist.")
        spec = importlib.util.spec_from_file_location(_module_name(path), path)
        if spec is None or spec.loader is None:
            raise UsageError(f"{source}: {name} is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.name]
            raise
        return module
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{source}: importing {name!r} failed: {type(error).__name__}: {error}") from error


def _module_name(path: Path) -> str:
    """The file's name, unless an importable module has that name: a user's json.py must not replace json."""
    try:
        known = importlib.util.find_spec(path.stem)
    except (ImportError, ValueError):
        known = None
    if known is None or (known.origin is not None and Path(known.origin).resolve() == path.resolve()):
        return path.stem
    return f"user_{path.stem}"


def cast_floats(inputs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Inputs with their floating-point tensors, also those inside of containers, in a dtype."""
    import torch
    from torch.utils._pytree import tree_map

    wanted = torch_dtype(dtype)

    def cast(value: Any) -> Any:
        return value.to(wanted) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: tree_map(cast, value) for name, value in inputs.items()}
