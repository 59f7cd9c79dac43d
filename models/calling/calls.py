"""How a model is called (`CallForm`), and the names of the tensors that it returns (`named_tensors`).

A file has flat, named inputs and outputs. PyTorch's arguments and results may be nested, and some of them no tensors.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils._pytree import TreeSpec

_PLAIN = (type(None), bool, int, float, str)
_CACHE_KEYS = ("past_key_values", "cache_params", "cache")
_CACHE_TENSORS = ("keys", "values", "conv_states", "recurrent_states", "indexer_keys")


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a forward: the names of its leaves, in order, and how they are nested."""

    leaves: tuple[str, ...]
    structure: TreeSpec

    @property
    def is_nested(self) -> bool:
        """Whether the argument is a container, rather than one tensor or value."""
        return not self.structure.is_leaf()


@dataclass(frozen=True, slots=True)
class CallForm:
    """How flat, named tensors become the arguments of a model.

    Attributes:
        arguments: the arguments by name. `args_0` is the first that a parameter `*args` takes.
        constants: the leaves that are not tensors, by name. They are constants in a file.
    """

    arguments: Mapping[str, Argument] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors, in order."""
        leaves = (name for argument in self.arguments.values() for name in argument.leaves)
        return tuple(name for name in leaves if name not in self.constants)

    def required(self, forward: Callable[..., Any]) -> list[str]:
        """The tensors that must be given: those of nested arguments and of arguments without a default."""
        parameters = inspect.signature(forward).parameters
        optional = {name for name, parameter in parameters.items() if parameter.default is not parameter.empty}
        inside = {
            n for key, found in self.arguments.items() if found.is_nested or key not in optional for n in found.leaves
        }
        return [name for name in self.tensors if name in inside]

    def flat(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors among the arguments from which `call_form` made this form, by name."""
        from torch.utils._pytree import tree_leaves

        values = {
            name: value
            for key, argument in self.arguments.items()
            for name, value in zip(argument.leaves, tree_leaves(arguments[key]), strict=True)
        }
        return {name: values[name] for name in self.tensors}

    def nested(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, from the tensors by name.

        A tensor that the form does not have is an argument itself. An argument without any of its tensors is omitted.

        Raises:
            UsageError: only some tensors of an argument are given.
        """
        from torch.utils._pytree import tree_unflatten

        known = {**self.constants, **tensors}
        found: dict[str, Any] = {}
        for key, argument in self.arguments.items():
            missing = [name for name in argument.leaves if name not in known]
            if missing and any(name in tensors for name in argument.leaves):
                raise UsageError(
                    f"argument {key}: expected all of its tensors ({', '.join(argument.leaves)}), got no "
                    f"{', '.join(missing)}."
                )
            if not missing:
                found[key] = tree_unflatten([known[name] for name in argument.leaves], argument.structure)
        inside = set(self.tensors)
        return {**found, **{name: value for name, value in tensors.items() if name not in inside}}

    def to_json(self) -> dict[str, Any]:
        """The fields `constants` and `arguments` of a manifest; empty if all arguments are tensors."""
        from torch.utils._pytree import treespec_dumps

        constants = {
            name: value if isinstance(value, _PLAIN) else {"python": str(value)}
            for name, value in self.constants.items()
        }
        nested = {}
        for key, argument in self.arguments.items():
            if argument.is_nested:
                try:
                    structure = json.loads(treespec_dumps(argument.structure))
                except NotImplementedError:  # a class that is registered without a name for this
                    structure = None
                nested[key] = {"leaves": list(argument.leaves), "structure": structure}
        return {**({"constants": constants} if constants else {}), **({"arguments": nested} if nested else {})}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CallForm | None:
        """The form in a manifest, see `to_json`; None if it has values that only Python code can give."""
        from torch.utils._pytree import tree_structure, treespec_loads

        constants, nested = content.get("constants", {}), content.get("arguments", {})
        if not all(isinstance(value, _PLAIN) for value in constants.values()):
            return None
        inside = {name for row in nested.values() for name in row["leaves"]}
        arguments = {name: Argument((name,), tree_structure(None)) for name in constants if name not in inside}
        for key, row in nested.items():
            try:
                structure = treespec_loads(json.dumps(row["structure"]))
            except Exception:  # a class that is not registered here, or a format of another torch
                return None
            if structure.num_leaves != len(row["leaves"]):
                return None
            arguments[key] = Argument(tuple(row["leaves"]), structure)
        return cls(arguments, constants)


def call_form(arguments: Mapping[str, Any]) -> CallForm:
    """The form of a call.

    Args:
        arguments: by name: tensors or arrays, plain values, and lists, tuples, dicts and other containers of them that
            are registered with `torch.utils._pytree`. A tensor inside of one has a name such as `batch_input_ids`.

    Raises:
        UsageError: an argument has an object that is none of these.
    """
    import torch

    found: dict[str, Argument] = {}
    constants: dict[str, Any] = {}
    taken: set[str] = {key for key, value in arguments.items() if isinstance(value, torch.Tensor | np.ndarray)}
    for key, value in arguments.items():
        leaves, structure = _leaves(value)
        names = []
        for path, leaf in leaves:
            name = re.sub(r"\W", "_", "_".join([key, *path]))
            while path and name in taken:
                name += "_"
            taken.add(name)
            names.append(name)
            if not isinstance(leaf, torch.Tensor | np.ndarray):
                constants[name] = _constant(key, leaf)
        found[key] = Argument(tuple(names), structure)
    return CallForm(found, constants)


def _leaves(value: Any) -> tuple[list[tuple[list[str], Any]], TreeSpec]:
    """The leaves of a value, each with its path, and their structure."""
    from torch.utils import _pytree as pytree

    try:
        leaves, structure = pytree.tree_flatten_with_path(value)
    except ValueError:  # a class that is registered without paths
        plain, structure = pytree.tree_flatten(value)
        return [([str(number)], leaf) for number, leaf in enumerate(plain)], structure
    return [([_step(key) for key in path], leaf) for path, leaf in leaves], structure


def _step(key: Any) -> str:
    """A step of a path: the key of a mapping, the index of a sequence, or the name of a field."""
    return str(next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), key))


def _constant(key: str, leaf: Any) -> Any:
    import enum

    import torch

    if isinstance(leaf, (*_PLAIN, complex, torch.dtype, torch.device, enum.Enum)):
        return leaf
    if isinstance(leaf, np.generic):
        return leaf.item()
    raise UsageError(
        f"argument {key}: expected tensors, plain values (None, bool, int, float, str), and lists, tuples and dicts of "
        f"them, got {type(leaf).__name__}. Register a dataclass with torch.export.register_dataclass, or wrap the "
        "model in a module whose forward takes tensors."
    )


def named_arguments(forward: Callable[..., Any], inputs: Any, where: str) -> dict[str, Any]:
    """A model's inputs by the names of its forward's parameters.

    Args:
        forward: the forward.
        inputs: a mapping, which is by name already; a tuple or list of positional arguments; or one tensor or array.
        where: what returned the inputs, for messages.

    Raises:
        UsageError: the inputs are none of these, or more than the parameters.
    """
    import torch

    if isinstance(inputs, Mapping):
        return {str(name): value for name, value in inputs.items()}
    if isinstance(inputs, torch.Tensor | np.ndarray):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | list):
        raise UsageError(
            f"{where}: expected inputs as a dict by the forward's parameter names, a tuple or list of positional "
            f"arguments, or one tensor or array, got {type(inputs).__name__}."
        )
    parameters = _parameters(forward).values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if rest is None and len(inputs) > len(names):
        raise UsageError(
            f"{where}: expected at most {len(names)} positional inputs ({', '.join(names) or 'none'}), got "
            f"{len(inputs)}."
        )
    names += [f"{rest}_{number}" for number in range(len(inputs) - len(names))]
    return dict(zip(names, inputs, strict=False))


def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(forward).parameters
    except ValueError:  # of a TorchScript module; its tensors are by name already
        return {"args": inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)}


def split_arguments(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for a forward, from arguments by name; see `named_arguments`."""
    parameters = _parameters(forward)
    rest = next((p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    extra = [name for name in arguments if name not in parameters and _is_numbered(name, rest)]
    positional: list[Any] = []
    used = set(extra)
    for name, parameter in parameters.items():
        is_first = parameter.kind is parameter.POSITIONAL_ONLY
        if not (is_first or (extra and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)):
            break
        if name not in arguments and parameter.default is parameter.empty:
            break
        positional.append(arguments.get(name, parameter.default))
        used.add(name)
    positional += [arguments[name] for name in extra]
    return positional, {name: value for name, value in arguments.items() if name not in used}


def _is_numbered(name: str, rest: str | None) -> bool:
    return rest is not None and re.fullmatch(rf"{rest}_\d+", name) is not None


def named_tensors(value: Any, where: str, include_cache: bool = False) -> dict[str, Tensor]:
    """The tensors in a module's result by name, in order.

    The names are the keys of mappings and the fields of dataclasses and named tuples; `output` for one tensor, and
    `output_0`, `output_1` for a tuple (`output_0_1` if nested). None and plain values are left out.

    Args:
        value: the result.
        where: the module's name, for messages.
        include_cache: return the tensors of key-value caches too.

    Raises:
        UnsupportedError: the result has something else.
    """
    return dict(_named(value, "", where, include_cache))


def _named(value: Any, name: str, where: str, include_cache: bool) -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield name or "output", value
        return
    if isinstance(value, _PLAIN):
        return
    if name in _CACHE_KEYS or type(value).__name__.endswith("Cache"):
        if include_cache:
            yield from _cache(value, name or "cache", where)
        return
    for key, item in _items(value, name, where):
        yield from _named(item, key, where, include_cache)


def _items(value: Any, name: str, where: str) -> list[tuple[str, Any]]:
    """The parts of a container, each with its name."""
    if isinstance(value, Mapping):
        parts = [(str(key), item) for key, item in value.items()]
    elif hasattr(value, "_fields"):
        parts = [(field_name, getattr(value, field_name)) for field_name in value._fields]
    elif isinstance(value, list | tuple):
        return [(f"{name or 'output'}_{index}", item) for index, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        raise UnsupportedError(
            f"{where}: output {name or 'output'}: expected a tensor, or a tuple, list, mapping or dataclass of them, "
            f"got {type(value).__name__}. Wrap the module in one that returns tensors only."
        )
    return [(f"{name}_{key}" if name else key, item) for key, item in parts]


def _cache(cache: Any, name: str, where: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of each layer, named by their path as transformers' own exporters name them."""
    sides = [side for side in ("self_attention_cache", "cross_attention_cache") if hasattr(cache, side)]
    for side in sides:
        yield from _cache(getattr(cache, side), f"{name}.{side}", where)
    layers = getattr(cache, "layers", None)
    if layers is None:
        for key, item in [] if sides else _items(cache, name, where):
            yield from _named(item, key, where, True)
        return
    for index, layer in enumerate(layers):
        for part in _CACHE_TENSORS:
            value = getattr(layer, part, None)
            states = value.items() if isinstance(value, Mapping) else [(None, value)]
            for number, state in states:
                path = f"{name}.layers.{index}.{part}" + ("" if number is None else f".{number}")
                yield from _named(state, path, where, True)
