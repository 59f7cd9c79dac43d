"""Capture any module with `torch.onnx.export` (`capture_module`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...models.errors import UnsupportedError
from .captured import Capture


def capture_module(model: nn.Module, inputs: dict[str, Any], opset: int, dynamic: bool | Mapping[str, Any]) -> Capture:
    shapes: Any = None
    if isinstance(dynamic, Mapping):
        shapes = dict(dynamic)
    elif dynamic:
        shapes = {name: _auto_dims(value) for name, value in inputs.items()}
    with torch.no_grad():
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
        )
    if program is None:
        raise UnsupportedError(f"torch.onnx.export returned nothing for {type(model).__name__}.")
    exported = program.exported_program
    if exported is not None:
        names = _output_names(model, exported)
        for value, name in zip(program.model.graph.outputs, names, strict=True):
            value.name = name
    captured = Capture(program.model, fixed_dims=_fixed_dims(exported))
    if isinstance(exported, torch.export.ExportedProgram):
        captured.program = (model, exported)
    return captured


def _output_names(model: nn.Module, program: torch.export.ExportedProgram) -> list[str]:
    """The module's `output_names`; else the keys of a mapping, `output` for one tensor, `output_0` ... for several."""
    spec = program.call_spec.out_spec
    if spec is None:
        return []
    leaves = torch.utils._pytree.tree_flatten_with_path(
        torch.utils._pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    )[0]
    declared = getattr(model, "output_names", None)
    if declared is not None and len(declared) == len(leaves):
        return list(declared)
    names = ["_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in leaves]
    return [f"output_{name}" if name.isdigit() else name or "output" for name in names]


def _fixed_dims(program: torch.export.ExportedProgram | None) -> dict[str, str]:
    """Symbols of the dims that were requested as dynamic and that the model fixes, with their values."""
    constraints = program.range_constraints if program is not None else {}
    return {str(symbol): str(int(r.lower)) for symbol, r in constraints.items() if r.lower == r.upper}


def _auto_dims(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return dict.fromkeys(range(value.ndim), torch.export.Dim.AUTO)
    if isinstance(value, list | tuple):
        return type(value)(_auto_dims(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _auto_dims(item) for key, item in value.items()}
    return None
