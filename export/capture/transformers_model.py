"""Capture a model of transformers, with its own exporter (`capture_transformers`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from ...models.errors import EnvironmentMissingError, UnsupportedError
from ...models.experts import experts, has_experts
from ...models.versions import installed_version, too_old
from ..graph.metadata import CACHE_NAMES, PAST, PRESENT
from .captured import Capture

# Cache tensors of a layer, as transformers' exporter names them.
_CACHE = rf"(?:{'|'.join(CACHE_NAMES)})\.layers\.(\d+)\.(key|value)s$"
_PAST_INPUT = re.compile(rf"^(?:input\.)?{_CACHE}")
_PAST_OUTPUT = re.compile(rf"^(?:output\.)?{_CACHE}")


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is a transformers model, without importing transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__)


def capture_transformers(
    model: Any, inputs: dict[str, Any], opset: int, dynamic: bool | Mapping[str, Any], with_past: bool
) -> Capture:
    exporter, config_class = _transformers_exporter()
    config = config_class(
        opset_version=opset,
        dynamic=bool(dynamic),
        dynamic_shapes=dict(dynamic) if isinstance(dynamic, Mapping) else None,
    )
    notes = []
    if has_experts(model):
        notes.append("experts were captured with their batched_mm implementation, the only one that can be exported")
    with experts(model, "batched_mm"), torch.no_grad():
        target, sample = (model, {**inputs, "use_cache": False}) if not with_past else _decode_step(model, inputs)
        # The exporter removes arguments that are plain values, such as use_cache; torch's program does not have them.
        plain = {name: value for name, value in sample.items() if isinstance(value, bool | int | str)}
        with _recorded() as programs:
            exported = exporter.export(target, sample, config)
    # Older versions return torch's ONNXProgram, later ones an object of their own.
    program = exported.program if hasattr(exported, "program") else exported.model
    if with_past:
        _rename_cache(program)
    else:
        _drop_cache_outputs(program)
    _freeze_scalars(program, sample)
    _refuse_overflowed_mask(model, program)
    called = functools.partial(target, **plain)
    return Capture(program, with_past, notes, program=(called, programs[-1]) if programs else None)


def _is_program(value: Any) -> TypeGuard[torch.export.ExportedProgram]:
    return isinstance(value, torch.export.ExportedProgram)


@contextmanager
def _recorded() -> Iterator[list[torch.export.ExportedProgram]]:
    """The programs that `torch.onnx.export` translates, which transformers' exporter does not return."""
    programs: list[torch.export.ExportedProgram] = []
    original = torch.onnx.export

    def export(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        if result is not None and _is_program(result.exported_program):
            programs.append(result.exported_program)
        return result

    torch.onnx.export = export
    try:
        yield programs
    finally:
        torch.onnx.export = original


def _transformers_exporter() -> tuple[Any, Any]:
    """The exporter and config classes of transformers' ONNX exporter, which only this function imports."""
    if problem := too_old("transformers"):
        raise EnvironmentMissingError(f"exporting a transformers model: {problem}")
    try:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise EnvironmentMissingError(
            f"exporting a transformers model: the ONNX exporter of transformers {installed_version('transformers')} "
            f'cannot be imported ({error}). Install it with: pip install --upgrade "rmsnorm-deploy[hf]"'
        ) from error
    return OnnxExporter(), OnnxConfig


def _decode_step(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One decode step of several tokens with a cache of any length; with an empty cache it is the prefill step."""
    from transformers.exporters.utils import decompose_prefill_decode

    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not getattr(model, "can_generate", lambda: False)():
        raise UnsupportedError(
            f"{type(model).__name__} is not a decoder with a KV cache of transformers. Omit --with-past."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and bool(mask.all()):
        # The exporter removes a mask of only ones; with one padded position the mask remains an input.
        mask = mask.clone()
        mask[0, 0] = 0
    sample = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    target, step = decompose_prefill_decode(model, sample, multi_token_decode=True)["decode"]
    cache = next((step[name] for name in CACHE_NAMES if step.get(name) is not None), None)
    # A recurrent model has a cache without layers, or one whose layers have no keys; up to 5.23 its name differs, too.
    layers = getattr(cache, "layers", None)
    recurrent = layers is None or (len(layers) > 0 and not any(hasattr(layer, "keys") for layer in layers))
    if recurrent or "cache_params" in step:
        raise UnsupportedError(f"{type(model).__name__} has no KV cache (it is recurrent). Omit --with-past.")
    return target, step


def _rename_cache(program: ir.Model) -> None:
    for value in program.graph.inputs:
        if match := _PAST_INPUT.match(value.name or ""):
            value.name = f"{PAST}{match[1]}.{match[2]}"
    for value in program.graph.outputs:
        if match := _PAST_OUTPUT.match(value.name or ""):
            value.name = f"{PRESENT}{match[1]}.{match[2]}"
    _drop_outputs(program, [f"output.{name}" for name in CACHE_NAMES])


def _drop_cache_outputs(program: ir.Model) -> None:
    """Remove the cache outputs of a model without cache inputs, which T5 returns nevertheless."""
    _drop_outputs(program, CACHE_NAMES)


def _drop_outputs(program: ir.Model, names: Sequence[str]) -> None:
    """Remove the outputs of these names, and their parts `name.*`."""
    parts = tuple(f"{name}." for name in names)
    kept = [v for v in program.graph.outputs if v.name not in names and not (v.name or "").startswith(parts)]
    if len(kept) != len(program.graph.outputs):
        program.graph.outputs[:] = kept
        RemoveUnusedNodesPass()(program)


def _refuse_overflowed_mask(model: nn.Module, program: ir.Model) -> None:
    """Refuse a float64 graph whose attention mask is infinite: 0 * -inf is NaN.

    The mask is the lowest float64 value, and the upstream exporter converts it to float32, which gives -inf.

    Raises:
        UnsupportedError: the graph contains an infinite mask.
    """
    for node in program.graph.all_nodes():
        for value in node.inputs if node.op_type == "Mul" else ():
            constant = value.const_value if value is not None and value.dtype == ir.DataType.DOUBLE else None
            if constant is not None and constant.size == 1 and np.isinf(constant.numpy()).all():
                raise UnsupportedError(
                    f"{type(model).__name__} in float64: transformers' exporter writes the attention mask as infinity, "
                    "so the results would be NaN. Export in float32."
                )


def _freeze_scalars(program: ir.Model, sample: Mapping[str, Any]) -> None:
    """Make constants of the scalar inputs that belong to a cache (its window), which a caller cannot know."""
    for value in list(program.graph.inputs):
        if value.shape is None or len(value.shape) != 0:
            continue
        scalar = _at_path(sample, (value.name or "").removeprefix("input.").split("."))
        if not isinstance(scalar, torch.Tensor) or scalar.ndim != 0:
            continue
        program.graph.inputs.remove(value)
        if value.uses():
            value.const_value = ir.tensor(scalar.numpy(), name=value.name)
            program.graph.register_initializer(value)


def _at_path(value: Any, path: Sequence[str]) -> Any:
    """The value at a dotted path of keys, indices and attributes, or None."""
    for part in path:
        if isinstance(value, Mapping):
            value = value.get(part)
        elif part.isdigit() and isinstance(value, Sequence):
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = getattr(value, part, None)
    return value
