"""Capture a model whose norms are swapped as an ONNX graph, which can then be lowered for any target."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError
from ...models.experts import experts, has_experts
from ..graph.metadata import PAST, PRESENT
from ..graph.sizes import SizeLimits
from ..lowering.table import DEFAULT_OPSET
from .ranges import size_limits
from .second_sizes import check_second_sizes, example_sizes

# Cache tensors of a layer, as transformers' exporter names them.
_PAST_INPUT = re.compile(r"^(?:input\.)?past_key_values\.layers\.(\d+)\.(key|value)s$")
_PAST_OUTPUT = re.compile(r"^(?:output\.)?past_key_values\.layers\.(\d+)\.(key|value)s$")
_TOKEN_INPUTS = ("input_ids", "position_ids", "token_type_ids")


@dataclass(slots=True)
class Capture:
    """A captured model.

    Attributes:
        model: the graph, with one `rmsnorm_deploy.capture::Norm` for each call of a norm. Its weights are the torch
            tensors themselves, not copies.
        with_past: whether the KV cache is an input and an output.
        notes: changes that were required to capture the model, for the manifest.
        fixed_dims: symbols in the graph's shapes that the model fixes, with their values.
        program: torch's program that the graph was made from, and what was captured; None if torch returns none.
        limits: the sizes of dynamic dims for which the graph is valid.
    """

    model: ir.Model
    with_past: bool = False
    notes: list[str] = field(default_factory=list)
    fixed_dims: dict[str, str] = field(default_factory=dict)
    program: tuple[Any, torch.export.ExportedProgram] | None = None
    limits: SizeLimits = field(default_factory=SizeLimits)


def capture_opset(opset: int | None) -> int:
    """The opset to capture at: at most 20, because later opsets change other operators too."""
    return DEFAULT_OPSET if opset is None else min(opset, DEFAULT_OPSET)


def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    opset: int | None = None,
    dynamic: bool | Mapping[str, Any] = True,
    with_past: bool = False,
) -> Capture:
    """Capture `model` called with `inputs`.

    Args:
        model: in eval mode, its norms swapped.
        inputs: keyword arguments of its forward, tensors of at least 2 in every dim that is to be dynamic.
        opset: opset import of the exported file.
        dynamic: True makes every dim dynamic that the model does not fix; False makes all static; a mapping is passed
            to `torch.export` as `dynamic_shapes`.
        with_past: make the KV cache an input and an output (decoders of transformers).

    Raises:
        UnsupportedError: the upstream exporter cannot capture the model; the message contains the cause.
    """
    is_transformers = is_pretrained(model)
    if with_past and not is_transformers:
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model, so there is no KV cache to export. Omit --with-past."
        )
    with _quiet():
        try:
            if is_transformers:
                captured = _capture_transformers(model, dict(inputs), capture_opset(opset), dynamic, with_past)
            else:
                captured = _capture_module(model, dict(inputs), capture_opset(opset), dynamic)
        except (RmsnormDeployError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise _explained(model, error) from error
        names = _name_dims(captured.model, captured.fixed_dims)
        _check_sizes(captured, names)
    return captured


def _check_sizes(captured: Capture, names: Mapping[str, str]) -> None:
    """Set the limits of a graph with dynamic dims, and compare it with the model at other sizes."""
    if captured.program is None:
        return
    model, program = captured.program
    dynamic = {symbol: name for symbol, name in names.items() if not name.isdigit()}
    example = example_sizes(program, {symbol: symbol for symbol in dynamic})
    limits = size_limits(program, dynamic, example)
    if captured.with_past:
        # torch's conditions and lower ends describe the example's mask and cache, not what the graph computes.
        highs = {name: (0, ends[1]) for name, ends in limits.ranges.items() if ends[1] is not None}
        limits = SizeLimits(highs)
    outputs = [str(value.name) for value in captured.model.graph.outputs]
    checked = check_second_sizes(model, program, dynamic, limits, outputs)
    captured.limits = checked.limits
    captured.notes += checked.notes
    captured.program = None  # it holds a second copy of the graph


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is a transformers model, without importing transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__)


# transformers -----------------------------------------------------------------------------------------------------


def _capture_transformers(
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
            program = exporter.export(target, sample, config).program
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
    try:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise EnvironmentMissingError(
            f"exporting a transformers model requires transformers with its ONNX exporter ({error}). "
            'Install it with: pip install "rmsnorm-deploy[hf]"'
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
    cache = step.get("past_key_values")
    if cache is None or "cache_params" in step or not hasattr(cache, "layers"):
        raise UnsupportedError(f"{type(model).__name__} has no KV cache (it is recurrent). Omit --with-past.")
    return target, step


def _rename_cache(program: ir.Model) -> None:
    for value in program.graph.inputs:
        if match := _PAST_INPUT.match(value.name or ""):
            value.name = f"{PAST}{match[1]}.{match[2]}"
    for value in program.graph.outputs:
        if match := _PAST_OUTPUT.match(value.name or ""):
            value.name = f"{PRESENT}{match[1]}.{match[2]}"
    _drop_outputs(program, "output.past_key_values")


def _drop_cache_outputs(program: ir.Model) -> None:
    """Remove the cache outputs of a model without cache inputs, which T5 returns nevertheless."""
    _drop_outputs(program, "past_key_values")


def _drop_outputs(program: ir.Model, prefix: str) -> None:
    kept = [value for value in program.graph.outputs if not (value.name or "").startswith(prefix)]
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


# Any other module -------------------------------------------------------------------------------------------------


def _capture_module(model: nn.Module, inputs: dict[str, Any], opset: int, dynamic: bool | Mapping[str, Any]) -> Capture:
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
    return Capture(
        program.model, fixed_dims=_fixed_dims(exported), program=(model, exported) if _is_program(exported) else None
    )


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


# Names and messages -----------------------------------------------------------------------------------------------


def _name_dims(model: ir.Model, fixed: Mapping[str, str]) -> dict[str, str]:
    """Replace the symbols in all shapes of the graph: dynamic dims by descriptive names, fixed dims by their values.

    Returns:
        The name or value of each symbol.
    """
    names = {**fixed, **_fixed_cache_dims(model)}
    for value in model.graph.inputs:
        for index, dim in enumerate(value.shape or ()):
            symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if symbol is not None and symbol not in names:
                names[symbol] = _dim_name(value.name or "input", index, model)
    if not names:
        return names
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(dim: Any) -> Any:
        if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
            return dim
        text = pattern.sub(lambda m: names[m[1]], str(dim.value))
        return int(text) if text.isdigit() else ir.SymbolicDim(text)

    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is not None:
                value.shape = ir.Shape([renamed(dim) for dim in value.shape])
    return names


def _fixed_cache_dims(model: ir.Model) -> dict[str, str]:
    """Symbols for the heads and the head size of a cache input, with the values that the cache outputs have."""
    outputs = {value.name: value for value in model.graph.outputs}
    fixed = {}
    for value in model.graph.inputs:
        present = outputs.get((value.name or "").replace(PAST, PRESENT, 1))
        if present is None or present is value or value.shape is None or present.shape is None:
            continue
        for dim, known in zip(value.shape, present.shape, strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and isinstance(known, int):
                fixed[dim.value] = str(known)
    return fixed


def _dim_name(name: str, index: int, model: ir.Model) -> str:
    past = any((value.name or "").startswith(PAST) for value in model.graph.inputs)
    if name.startswith(PAST):
        return {0: "batch", 2: "past_sequence"}.get(index, f"cache_dim_{index}")
    if name in _TOKEN_INPUTS:
        return ("batch", "sequence")[index] if index < 2 else f"{name}_dim_{index}"
    if name == "attention_mask" and index < 2:
        return ("batch", "total_sequence" if past else "sequence")[index]
    if name == "decoder_input_ids" and index < 2:
        return ("batch", "decoder_sequence")[index]
    return "batch" if index == 0 else f"{name}_dim_{index}"


def _explained(model: nn.Module, error: Exception) -> UnsupportedError:
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)  # type: ignore[arg-type]
    text = next((str(c).strip() for c in reversed(causes) if str(c).strip()), type(error).__name__)
    first = " ".join(text.splitlines()[0].split())[:400]
    advice = "Try other example inputs, a newer torch or transformers, or an attention implementation of 'eager'."
    if "complex" in text.lower():
        advice = (
            "The model uses complex numbers (usually in its rotary embedding), which ONNX does not support. Try a "
            "version of the model that rotates with cos and sin, or replace that module before exporting."
        )
    elif "grouped_mm" in text or "experts" in text.lower():
        advice = 'Try model.set_experts_implementation("batched_mm") before exporting.'
    return UnsupportedError(f"{type(model).__name__} could not be captured by torch's exporter: {first}. {advice}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the upstream exporters, whose output would hide this package's messages and corrupt JSON output."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def detached(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the inputs that a model may change."""
    return {name: copy.deepcopy(value) for name, value in inputs.items()}
