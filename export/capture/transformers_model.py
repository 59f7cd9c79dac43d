"""Capture a model of transformers, with its own exporter (`capture_transformers`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from ...models.calling.experts import experts, has_experts
from ...models.calling.media_parts import EMBEDDING, ENCODER_PARTS, beyond_rounding
from ...models.calling.parts import DECODER, is_encoder_decoder
from ...models.calling.rotary import traceable_rotary
from ...models.errors import EnvironmentMissingError, UnsupportedError
from ...models.versions import installed_version, too_old
from ...models.weights.stand_ins import unread_weights
from ..graph.cache_names import cache_name, is_present, past_name, present_name
from ..graph.metadata import PAST
from .captured import Capture
from .part_graphs import (
    embeds_sample,
    finish_embedding,
    keep_part,
    lost_states,
    media_sample,
    name_outputs,
    part_sample,
)
from .recurrences import traceable_recurrences

# Arguments that decide what a model returns.
_OUTPUT_FLAGS = frozenset({"output_attentions", "output_hidden_states", "return_dict", "use_cache"})
# What the exporter puts before the names of inputs and outputs that are equal.
_INPUT, _OUTPUT = "input.", "output."


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is a transformers model, without importing transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__)


def capture_transformers(
    model: Any,
    inputs: dict[str, Any],
    opset: int,
    dynamic: bool | Mapping[str, Any],
    with_past: bool,
    part: str | None = None,
) -> Capture:
    """Capture a model, or a part of it; see `capture`."""
    exporter, config_class = _transformers_exporter()
    config = config_class(
        opset_version=opset,
        # Such an encoder computes its positions and patches from the size of the image or sound, which is fixed here.
        dynamic=bool(dynamic) and part not in ENCODER_PARTS,
        dynamic_shapes=dict(dynamic) if isinstance(dynamic, Mapping) else None,
    )
    notes = []
    if has_experts(model):
        notes.append("experts were captured with their batched_mm implementation, the only one that can be exported")
    with experts(model, "batched_mm"), traceable_rotary(model), traceable_recurrences(model), torch.no_grad():
        with unread_weights(model):
            task = _task(model, inputs, with_past, part)
        # The exporter removes arguments that are plain values, such as use_cache; torch's program does not have them.
        plain = {name: value for name, value in task.sample.items() if isinstance(value, bool | int | str)}
        with _recorded() as programs:
            exported = exporter.export(task.target, task.sample, config)
    # Older versions return torch's ONNXProgram, later ones an object of their own.
    program = exported.program if hasattr(exported, "program") else exported.model
    task.finish(program)
    _drop_returned_inputs(program)
    _refuse_overflowed_mask(model, program)
    called = functools.partial(_as_captured if task.cached else _call, task.target, plain)
    return Capture(program, task.cached, notes + task.notes, program=(called, programs[-1]) if programs else None)


@dataclass(frozen=True, slots=True)
class _Task:
    """What is captured, what it is called with, and what is done to the graph then.

    Attributes:
        target: the module.
        sample: its arguments.
        finish: names the inputs and outputs of the graph, and drops those that are not wanted.
        cached: whether a cache is among the inputs.
        notes: for the manifest.
    """

    target: Any
    sample: dict[str, Any]
    finish: Callable[[ir.Model], None]
    cached: bool = False
    notes: list[str] = field(default_factory=list)


def _task(model: Any, inputs: dict[str, Any], with_past: bool, part: str | None) -> _Task:
    who = type(model).__name__
    if part == EMBEDDING or part in ENCODER_PARTS:
        target, sample = media_sample(model, part, inputs)
        modality = ENCODER_PARTS.get(part)
        notes = [modality.note] if modality is not None else []
        return _Task(target, sample, finish_embedding if part == EMBEDDING else name_outputs, notes=notes)
    if part is not None and is_encoder_decoder(model):
        sample = part_sample(model, part, inputs)
        return _Task(model, sample, functools.partial(_finish_part, who, part, sample), cached=True)
    if with_past:
        target, sample = _decode_step(model, inputs)
        target, sample = (target, sample) if part is None else embeds_sample(target, sample, inputs)
        return _Task(target, sample, functools.partial(_finish_decoder, who, sample), cached=True)
    sample = {**inputs, "use_cache": False}
    return _Task(model, sample, functools.partial(_finish_without_cache, sample))


def _finish_part(who: str, part: str, sample: Mapping[str, Any], program: ir.Model) -> None:
    _freeze_scalars(program, sample)
    keep_part(program, part)
    if part == DECODER:
        _check_cache(program, who)


def _finish_decoder(who: str, sample: Mapping[str, Any], program: ir.Model) -> None:
    _freeze_scalars(program, sample)
    _name_cache(program)
    _check_cache(program, who)


def _finish_without_cache(sample: Mapping[str, Any], program: ir.Model) -> None:
    _drop_cache_outputs(program)
    _freeze_scalars(program, sample)


def _call(target: Any, plain: Mapping[str, Any], **inputs: Any) -> Any:
    """Call a model as the exporter does, which sets the flags of outputs in the model's config, where it has them."""
    config = getattr(target, "config", None)
    with ExitStack() as stack:
        for name in _OUTPUT_FLAGS & plain.keys():
            if hasattr(config, name):
                stack.enter_context(mock.patch.object(config, name, plain[name]))
        return target(**inputs, **{name: value for name, value in plain.items() if name not in _OUTPUT_FLAGS})


def _as_captured(target: Any, plain: Mapping[str, Any], **inputs: Any) -> Any:
    """Call a model as it was captured: all tokens in the cache of a sliding window, and a state before any chunk."""
    from transformers.exporters.utils import apply_patches

    with apply_patches("dynamo"), traceable_recurrences(target):
        return target(**inputs, **plain)


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
    from transformers.exporters.utils import apply_patches, decompose_prefill_decode

    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not getattr(model, "can_generate", lambda: False)():
        raise UnsupportedError(
            f"{type(model).__name__} is not a decoder with a KV cache of transformers. Omit --with-past."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and bool(mask.all()):
        # The exporter removes a mask of only ones; with one padded position the mask remains an input.
        padded = mask.clone()
        padded[0, 0] = 0
        _check_padding(model, inputs["input_ids"], mask, padded)
        mask = padded
    sample = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    # The patches of the exporter hold here too: they keep all tokens in the cache of a sliding window, which the graph
    # does as well, so that the lengths of all layers are one dim.
    with apply_patches("dynamo"):
        target, step = decompose_prefill_decode(model, sample, multi_token_decode=True)["decode"]
    if step.get("attention_mask") is None and mask is not None and _takes(model, "attention_mask"):
        # generate() omits the mask in a decode step of a recurrent model, and the first call needs it.
        step["attention_mask"] = torch.cat([mask, mask.new_ones(step["input_ids"].shape)], dim=1)
    return target, step


def _check_padding(model: Any, ids: Tensor, mask: Tensor, padded: Tensor) -> None:
    """Check that padding in one row changes no other row.

    Raises:
        UnsupportedError: it does: without padding the model attends to later tokens, and with it, it does not.
    """
    ids, mask, padded = (torch.cat([first, second]) for first, second in ((ids, ids), (mask, mask), (padded, mask)))
    rows = len(ids) // 2
    wanted, got = (model(input_ids=ids, attention_mask=given).logits[rows:] for given in (mask, padded))
    off = beyond_rounding(got, wanted)
    if off is not None:
        raise UnsupportedError(
            f"{type(model).__name__}: padding in one row changes the logits of another by {off}, so "
            " the model uses another attention mask where no token is padded, and one graph with a cache cannot have "
            "both. Omit --with-past."
        )


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _name_cache(program: ir.Model) -> None:
    """Name the cache's inputs and outputs, and drop the numbers in it that do not change."""
    for value in program.graph.inputs:
        value.name = past_name((value.name or "").removeprefix(_INPUT)) or value.name
    for value in program.graph.outputs:
        value.name = present_name((value.name or "").removeprefix(_OUTPUT)) or value.name
    kept = [v for v in program.graph.outputs if not is_present(v.name or "") or v.shape is None or len(v.shape) > 0]
    program.graph.outputs[:] = kept


def _check_cache(program: ir.Model, who: str) -> None:
    """Check that every tensor of the cache goes in and comes out.

    Raises:
        UnsupportedError: one does not, so that the state after a step would be lost; or there is no cache.
    """
    if not any((value.name or "").startswith(PAST) for value in program.graph.inputs):
        raise UnsupportedError(f"{who} has no cache that transformers' exporter captures. Omit --with-past.")
    if not any(is_present(value.name or "") for value in program.graph.outputs):
        raise UnsupportedError(
            f"{who} returns no cache, so it keeps its state in its modules, which a graph cannot. Omit --with-past."
        )
    lost = lost_states(program)
    if lost:
        raise UnsupportedError(
            f"{who}: expected every tensor of the cache as an input and as an output, got {', '.join(lost[:4])} as one "
            "of them only, so the state after a step would be lost. Omit --with-past."
        )


def _drop_cache_outputs(program: ir.Model) -> None:
    """Remove the cache outputs of a model without cache inputs, which T5 returns nevertheless."""
    kept = [v for v in program.graph.outputs if cache_name((v.name or "").removeprefix(_OUTPUT)) is None]
    if len(kept) != len(program.graph.outputs):
        program.graph.outputs[:] = kept
        RemoveUnusedNodesPass()(program)


def _drop_returned_inputs(program: ir.Model) -> None:
    """Remove the outputs that are an input, unchanged, of the same name, and give the input its name back."""
    inputs = {(value.name or "").removeprefix(_INPUT): value for value in program.graph.inputs}
    kept = []
    for value in program.graph.outputs:
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Identity" else value
        if source is None or source is not inputs.get((value.name or "").removeprefix(_OUTPUT)):
            kept.append(value)
    if len(kept) == len(program.graph.outputs):
        return
    program.graph.outputs[:] = kept
    RemoveUnusedNodesPass()(program)
    taken = {value.name for value in kept}
    for name, value in inputs.items():
        if name not in taken:
            value.name = name


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
        scalar = _at_path(sample, (value.name or "").removeprefix(_INPUT).split("."))
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
