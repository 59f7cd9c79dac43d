"""The inputs of a run (`Case`): given by the user as arrays, files, Python code or prompts, or generated."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.calling.calls import call_form
from ...models.calling.example_inputs import example_inputs, vocabulary_size
from ...models.dtypes import numpy_dtype
from ...models.errors import UsageError
from ...models.loading import LoadedModel, python_attribute
from ..runners.base import ANY_DTYPE, Array, TensorInfo, check_feeds
from ..runners.open import open_runner
from ..runners.torch import to_numpy
from .arrays import ARRAY_SUFFIXES, read_arrays
from .synthetic import DEFAULT_SHAPES, cast_feeds, make_feeds, with_empty_cache
from .tokenizer import load_tokenizer

# Inputs with one element per token of a prompt, for models that do not specify their shapes.
PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
_PROMPT_SHOWN = 24


@dataclass(frozen=True, slots=True)
class Case:
    """The inputs of one run, and their name in reports.

    Attributes:
        name: the name in reports.
        feeds: arrays by input name.
        calls: of a model with a KV cache, the numbers of tokens of each call after the first; `(1,)` if empty.
        optional: whether the case is left out if PyTorch itself does not run it.
        long: whether the case is long or has many rows, so that norms and segments are checked on another one.
    """

    name: str
    feeds: dict[str, Array]
    calls: tuple[int, ...] = ()
    optional: bool = False
    long: bool = False


def load_cases(source: str, infos: Sequence[TensorInfo], names: Mapping[str, str] | None = None) -> list[Case]:
    """Load the cases from a file, a folder or Python code.

    Arrays are cast to the dtypes of the inputs where that is safe, see `cast_feeds`; a KV cache that is not given
    starts empty.

    Args:
        source: an .npz or .safetensors file, one case; a folder of them, one case each in the order of their names;
            or Python code, `file.py:function` or `package.module:function`. The function takes no arguments and
            returns or yields dicts of input name to numpy array or torch tensor, or pairs of a case's name and such a
            dict.
        infos: the model's inputs. Inputs of a PyTorch module, whose dtype is `any`, are not checked here: the module
            itself rejects them.
        names: the name in `infos` by another name of that input, which the arrays may have too.

    Raises:
        UsageError: the source does not exist, it contains no case, or a case does not match the inputs.
    """
    cases = [
        Case(name, with_empty_cache(cast_feeds(_called(feeds, names), infos), infos))
        for name, feeds in _named_arrays(source)
    ]
    for case in cases:
        _check(case, infos)
    return cases


def prompt_cases(
    prompts: Sequence[str], tokenizer: str, infos: Sequence[TensorInfo], trust_remote_code: bool = False
) -> list[Case]:
    """One case of batch 1 for each prompt.

    The mask, the positions and an empty KV cache are added to the tokens, as in generated inputs.

    Args:
        prompts: texts, at least one.
        tokenizer: see `load_tokenizer`.
        infos: the model's inputs, among them `input_ids`.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        UsageError: the model has no `input_ids`, there is no tokenizer, a prompt has no tokens, or the tokens do not
            match the inputs (a model of fixed shape).
        EnvironmentMissingError: transformers is not installed.
    """
    if not prompts:
        raise UsageError("there is no prompt; give at least one.")
    inputs = [_per_token(info) for info in infos]
    ids_info = next((info for info in inputs if info.name == "input_ids"), None)
    if ids_info is None:
        names = ", ".join(info.name for info in infos) or "nothing"
        raise UsageError(
            f"a prompt requires a model that reads input_ids; this model reads {names}. Give arrays instead."
        )
    reader = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    cases = []
    for number, prompt in enumerate(prompts, start=1):
        ids = reader.encode(prompt)
        feeds = make_feeds(inputs, 1, len(ids), 0, vocabulary=1)
        feeds["input_ids"] = np.array([ids], numpy_dtype(ids_info.dtype))
        shown = prompt if len(prompt) <= _PROMPT_SHOWN else f"{prompt[: _PROMPT_SHOWN - 1]}…"
        cases.append(Case(f"prompt {number} {shown!r}", feeds))
        _check(cases[-1], infos)
    return cases


def inputs_of(loaded: LoadedModel) -> list[TensorInfo]:
    """The inputs of a PyTorch model: those that its factory returned, else tokens, else the parameters of `forward`.

    The signature of `forward` specifies neither dtypes nor the optional parameters that are used; the model itself
    rejects inputs that do not match.
    """
    if loaded.example_inputs is not None:
        arrays = factory_arrays(loaded.example_inputs)
        return [TensorInfo(name, array.dtype.name, None) for name, array in arrays.items()]
    if "input_ids" in inspect.signature(loaded.model.forward).parameters:
        return [TensorInfo(name, ANY_DTYPE, None) for name in example_inputs(loaded.model)]
    with open_runner(loaded.model) as runner:
        return runner.inputs()


def made_up_for(loaded: LoadedModel, shapes: Sequence[tuple[int, int]] | None = None, seed: int = 0) -> list[Case]:
    """Cases for a PyTorch model: the inputs that its factory returned, else tokens in several shapes.

    Raises:
        UsageError: the model does not read tokens, and its factory returned no inputs.
    """
    if loaded.example_inputs is not None:
        return [Case("the factory's inputs", factory_arrays(loaded.example_inputs))]
    infos = [TensorInfo(name, "int64", ("batch", "sequence")) for name in example_inputs(loaded.model)]
    vocabulary = vocabulary_size(loaded.model)
    return [Case(f"{b}x{n}", make_feeds(infos, b, n, seed, vocabulary)) for b, n in shapes or DEFAULT_SHAPES]


def factory_arrays(inputs: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors among the arguments that a factory returned, as flat, named arrays; see `CallForm`."""
    found = call_form(inputs).flat(inputs)
    return {name: to_numpy(value) if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def _called(feeds: Mapping[str, Any], names: Mapping[str, str] | None) -> dict[str, Any]:
    """The feeds under the names of a model's inputs."""
    return {(names or {}).get(name, name): value for name, value in feeds.items()}


def given_cases(
    items: Sequence[Case | Mapping[str, Any]], infos: Sequence[TensorInfo], names: Mapping[str, str] | None = None
) -> list[Case]:
    """The cases that are given as Python objects.

    Args:
        items: a `Case`, or a mapping of input name to numpy array or torch tensor, for each run.
        infos: the model's inputs; see `load_cases`.
        names: see `load_cases`.

    Raises:
        UsageError: there is no case, or one has another type or does not match the inputs.
    """
    if isinstance(items, Mapping | Case) or not isinstance(items, Sequence):
        raise UsageError(f"cases: expected a list of mappings of input name to array, got {type(items).__name__}.")
    if not items:
        raise UsageError("cases is empty; give at least one, or None for generated inputs.")
    cases = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, Case):
            cases.append(dataclasses.replace(item, feeds=_called(item.feeds, names)))
            continue
        if not isinstance(item, Mapping):
            raise UsageError(f"case {number}: expected a mapping of input name to array, got {type(item).__name__}.")
        feeds = {str(name): _array(f"case {number}", str(name), value) for name, value in item.items()}
        cases.append(Case(f"case {number}", with_empty_cache(cast_feeds(_called(feeds, names), infos), infos)))
    for case in cases:
        _check(case, infos)
    return cases


def _check(case: Case, infos: Sequence[TensorInfo]) -> None:
    if any(info.dtype != ANY_DTYPE for info in infos):
        check_feeds(infos, case.feeds, f"case {case.name}")


def _named_arrays(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(source).expanduser()
    name, colon, function = source.rpartition(":")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in ARRAY_SUFFIXES and file.is_file())
        if not files:
            raise UsageError(f"{source} contains no {' or '.join(ARRAY_SUFFIXES)} file; put one for each case there.")
        yield from ((file.name, read_arrays(file)) for file in files)
    elif path.suffix == ".py" and path.is_file():
        raise UsageError(f"{source}: expected {source}:function, with a function that returns the inputs.")
    elif path.is_file() or not colon:
        yield path.name, read_arrays(path)
    else:
        yield from _made(source, python_attribute(source, name, function))


def _made(source: str, function: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The cases that a user's function returns or yields, each with a name."""
    try:
        made = function()
        # A generator raises its errors while it is iterated.
        items = [made] if isinstance(made, Mapping) or not isinstance(made, Iterable) else list(made)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{source}: calling it failed: {type(error).__name__}: {error}") from error
    if not items:
        raise UsageError(f"{source} returned no case; return or yield at least one dict of arrays.")
    for number, item in enumerate(items, start=1):
        named = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        name, feeds = item if named else (f"case {number}", item)
        if not isinstance(feeds, Mapping):
            raise UsageError(
                f"{source}: case {number}: expected a dict of input name to array, or a pair of a name and such a "
                f"dict, got {type(feeds).__name__}."
            )
        yield name, {str(key): _array(source, str(key), value) for key, value in feeds.items()}


def _array(source: str, name: str, value: Any) -> Array:
    import torch

    if isinstance(value, torch.Tensor):
        try:
            return to_numpy(value)
        except TypeError as error:
            raise UsageError(f"{source}: {name} is {value.dtype}, a dtype that numpy does not support.") from error
    if not isinstance(value, np.ndarray):
        raise UsageError(f"{source}: {name}: expected a numpy array or a torch tensor, got {type(value).__name__}.")
    return value


def _per_token(info: TensorInfo) -> TensorInfo:
    """An input with the shape and dtype of a prompt's tokens, where the model does not specify them."""
    if info.name not in PER_TOKEN:
        return info
    return dataclasses.replace(
        info,
        dtype="int64" if info.dtype == ANY_DTYPE else info.dtype,
        shape=("batch", "sequence") if info.shape is None else info.shape,
    )
