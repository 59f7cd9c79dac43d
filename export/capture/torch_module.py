"""Capture any module with `torch.onnx.export` (`capture_module`)."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...models.calling.calls import CallForm, call_form, named_tensors, split_arguments
from ...models.errors import UnsupportedError, UsageError
from ..sizes.measured_dims import MeasuredDims, fixed_note, measured_dims
from .captured import Capture

# What a module keeps for its own hooks.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
# What errors say that may come from a dim of another size than the example's.
_ABOUT_SIZES = re.compile(r"\bsizes?\b|\bshapes?\b|\bdim|\bs\d+\b|constraint", re.IGNORECASE)


def capture_module(model: nn.Module, inputs: dict[str, Any], opset: int, dynamic: bool | Mapping[str, Any]) -> Capture:
    form = call_form(inputs)
    tensors = form.flat(inputs)
    flat = _FlatModel(model, form)
    shapes: Any = None
    if dynamic:
        chosen = flat_dims(form, inputs, dynamic) if isinstance(dynamic, Mapping) else dict.fromkeys(tensors, True)
        shapes = {name: _auto_dims(tensors[name]) if dims is True else dims for name, dims in chosen.items()}
    notes: list[str] = []
    try:
        program = _exported(model, flat, tensors, opset, shapes)
    except Exception as error:
        if dynamic is not True or not _ABOUT_SIZES.search(str(error)):
            raise
        found = _with_measured_dims(model, flat, tensors, opset, shapes)
        if found is None:
            raise
        program, notes = found
    if program is None:
        raise UnsupportedError(f"torch.onnx.export returned nothing for {type(model).__name__}.")
    exported = program.exported_program
    if exported is not None:
        _name(program.model.graph.outputs, _distinct(_output_names(model, flat.outputs), tensors))
        _name(program.model.graph.inputs, list(tensors))
    captured = Capture(program.model, notes=notes, fixed_dims=_fixed_dims(exported))
    if isinstance(exported, torch.export.ExportedProgram):
        captured.program = (flat, exported)
    return captured


def _exported(model: nn.Module, flat: _FlatModel, tensors: dict[str, Any], opset: int, shapes: Any) -> Any:
    with torch.no_grad(), flat.in_place_of_the_forward(tensors):
        return torch.onnx.export(
            model, (), kwargs=tensors, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
        )


def _with_measured_dims(
    model: nn.Module, flat: _FlatModel, tensors: dict[str, Any], opset: int, shapes: Any
) -> tuple[Any, list[str]] | None:
    """The program with the dims that the model itself allows, and a note on those it does not; None without one."""
    for dims in measured_dims(flat, tensors).attempts():
        flat.dims = dims
        try:
            program = _exported(model, flat, tensors, opset, dims.dynamic_shapes(shapes))
        except Exception:  # the first error is the one to explain
            continue
        return program, [fixed_note(tensors, dims.fixed)] if dims.fixed else []
    return None


class _FlatModel:
    """A model that is called with flat, named tensors and returns the tensors of its result as a flat tuple.

    Args:
        model: the model.
        form: how it is called.
    """

    def __init__(self, model: nn.Module, form: CallForm) -> None:
        self._model, self._form = model, form
        self.outputs: list[str] = []
        self.dims = MeasuredDims()

    def __call__(self, **tensors: Any) -> tuple[torch.Tensor, ...]:
        self.dims.check(tensors)
        positional, keyword = split_arguments(self._model.forward, self._form.nested(tensors))
        found = named_tensors(self._model(*positional, **keyword), type(self._model).__name__)
        if not found:
            raise UnsupportedError(f"{type(self._model).__name__} returns no tensors, so there is nothing to export.")
        self.outputs = list(found)
        return tuple(found.values())

    @contextmanager
    def in_place_of_the_forward(self, names: Iterable[str]) -> Iterator[None]:
        """The model with this as its forward and without its own hooks, which run inside of it."""
        own = vars(self._model)
        before = {name: own[name] for name in ("forward", *_HOOKS) if name in own}

        def forward(**tensors: Any) -> tuple[torch.Tensor, ...]:
            with _exchanged(self._model, before):
                return self(**tensors)

        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with _exchanged(self._model, {"forward": forward, **{name: OrderedDict() for name in _HOOKS}}):
            yield


@contextmanager
def _exchanged(model: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """The module with these values of its forward and its hooks, as attributes of the instance."""
    own = vars(model)
    before = {name: own.pop(name) for name in ("forward", *_HOOKS) if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name, None)
        own.update(before)


def flat_dims(form: CallForm, inputs: Mapping[str, Any], dynamic: Mapping[str, Any]) -> dict[str, Any]:
    """A user's `dynamic_shapes` by the names of the flat inputs; they may be nested as the arguments are.

    Raises:
        UsageError: it has a name that is not an input's.
    """
    unknown = [name for name in dynamic if name not in inputs and name not in form.tensors]
    if unknown:
        raise UsageError(
            f"dynamic: expected names of inputs ({', '.join(inputs)}), got {', '.join(map(str, unknown))}."
        )
    found = {name: dynamic.get(name) for name in form.tensors}
    for key, argument in form.arguments.items():
        if argument.is_nested and dynamic.get(key) is not None:
            parts = pytree.tree_structure(inputs[key]).flatten_up_to(dynamic[key])
            found.update({name: part for name, part in zip(argument.leaves, parts, strict=True) if name in found})
    return found


def _name(values: Iterable[Any], names: list[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def _output_names(model: nn.Module, found: list[str]) -> list[str]:
    """The module's `output_names` where it has them for each output, else the names in its result."""
    declared = getattr(model, "output_names", None)
    return list(declared) if declared is not None and len(declared) == len(found) else found


def _distinct(outputs: list[str], inputs: Mapping[str, Any]) -> list[str]:
    """The names of the outputs; one that is an input's too gets a suffix, because a graph has each name once."""
    return [f"{name}_output" if name in inputs else name for name in outputs]


def _fixed_dims(program: torch.export.ExportedProgram | None) -> dict[str, str]:
    """Symbols of the dims that were requested as dynamic and that the model fixes, with their values."""
    constraints = program.range_constraints if program is not None else {}
    return {str(symbol): str(int(r.lower)) for symbol, r in constraints.items() if r.lower == r.upper}


def _auto_dims(value: torch.Tensor) -> dict[int, Any]:
    return dict.fromkeys(range(value.ndim), torch.export.Dim.AUTO)
