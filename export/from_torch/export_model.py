"""Export a PyTorch model to a folder with an ONNX file: recognize, swap, check, capture, lower, save."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from ...models.attention.find_attention import AttentionRecognition, find_attention
from ...models.attention.silent_queries import reads_silent_queries
from ...models.calling.calls import call_form, named_arguments, named_tensors, split_arguments
from ...models.calling.example_inputs import as_tensors, example_inputs
from ...models.calling.media_parts import check_parts, media_record, modality_read
from ...models.calling.modalities import TEXT_INPUTS, left_out, text_only_note
from ...models.calling.parts import parts_for
from ...models.calling.rotary import RESTART_FIELD, restart_length
from ...models.dtypes import norm_dtype, torch_dtype, torch_name
from ...models.errors import MismatchError, UnsupportedError, UsageError
from ...models.hub.download import companions_of, companions_of_module
from ...models.hub.options import HubOptions
from ...models.loading import LoadedModel, LoadOptions, as_loaded, cast_floats
from ...models.precision import converted, model_dtype, saved_elements
from ...models.recognition.find_norms import find_norms
from ...models.recognition.site import Recognition
from ...models.weights.stand_ins import unread_bytes, unread_weights
from ..capture.attention_nodes import attention_nodes
from ..capture.capture import capture, detached
from ..capture.captured import Capture
from ..capture.swap import swapped
from ..capture.transformers_model import is_pretrained
from ..lowering.attention_table import check_attention, parse_attention
from ..lowering.plugin_functions import plugin_style
from ..lowering.table import DEFAULT_TARGET, Environment, LoweringRefusal, opset_for, parse_targets, resolve
from ..lowering.weight_quantizer import check_quantize, parse_quantize
from ..onnx_io.destinations import check_destination, check_shared_folder
from ..onnx_io.owned_files import MANIFEST
from ..onnx_io.place_weights import parse_weights
from .graph_norms import find_unswapped
from .save import MODEL_FILE, ExportResult, PreparedModel, Progress, SaveOptions, save_all


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(SaveOptions):
    """How a model is exported, and how its folder is written (`SaveOptions`).

    Attributes:
        dtype: `float32`, `float16`, `bfloat16` or `float64`, or another name of one, such as `fp16`; another dtype
            than the model's exports a converted copy, in which the parts that the model keeps in float32 stay in
            float32.
        dynamic: True makes every dim dynamic that the model does not fix; False makes all static; a mapping is passed
            to `torch.export` as `dynamic_shapes`.
        with_past: export a decoder of transformers with its KV cache: one file for prefill and decode.
        function: write local functions of the custom operators into the file of target `plugin`. ONNX Runtime requires
            them to run the file; TensorRT up to 10.6 runs them instead of the plugin.
        ort_trt: write the file of target `plugin` for ONNX Runtime's TensorRT provider: plugin nodes in domain
            `trt.plugins`, without local functions.
    """

    dtype: str | None = None
    dynamic: bool | Mapping[str, Any] = True
    with_past: bool = False
    function: bool = True
    ort_trt: bool = False


@overload
def export_model(
    model: nn.Module | str | Path | LoadedModel,
    path: str | os.PathLike[str],
    options: ExportOptions | None = ...,
    *,
    target: str = ...,
    **changes: Any,
) -> ExportResult: ...


@overload
def export_model(
    model: nn.Module | str | Path | LoadedModel,
    path: str | os.PathLike[str],
    options: ExportOptions | None = ...,
    *,
    target: Sequence[str],
    **changes: Any,
) -> list[ExportResult]: ...


def export_model(
    model: nn.Module | str | Path | LoadedModel,
    path: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    target: str | Sequence[str] = DEFAULT_TARGET,
    inputs: Any = None,
    details: Mapping[str, Any] | None = None,
    companions: Path | None = None,
    trust_remote_code: bool = False,
    hub: HubOptions | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> ExportResult | list[ExportResult]:
    """Export `model` with every RMSNorm in the form that `target` requires.

    Args:
        model: any module, whose original state is restored, also after an error; or what names one, as for
            `load_model`.
        path: the folder to create. With several targets, each gets a subfolder with its name. An earlier export there
            is replaced; a folder with other files is refused.
        options: how; `ExportOptions()` when None.
        target: one or several of `primitives`, `standard`, `ort`, `plugin`: a list, or a text such as `ort,standard`.
        inputs: arguments of the forward, as tensors or numpy arrays, plain values, and lists, tuples and dicts of
            them: a mapping by name, a tuple of positional arguments, or one tensor. Those of the model's factory when
            None, else token inputs are generated where it reads `input_ids`. Values that are not tensors are constants
            in the file. A dim of size 1 becomes static, so give at least 2 wherever it is to be dynamic.
        details: more fields for the manifest.
        companions: a folder to copy config and tokenizer files from; the model's own when None, also of a module that
            `from_pretrained` loaded.
        trust_remote_code: run Python code that comes with a transformers checkpoint.
        hub: how a model with a hub name is read: revision, subfolder, cache, token, offline.
        progress: called with a line of text at each step.
        changes: fields of `ExportOptions` that differ from `options`, such as `dtype="float16"`.

    Returns:
        The result; or for a list or several targets a list of results, in the order given.

    Raises:
        UsageError: an argument is wrong or the folder cannot be written to; nothing is left behind.
        UnsupportedError: the target, opset or dtype does not support a norm or `quantize`, or the exporter cannot
            capture the model.
        EnvironmentMissingError: `quantize` was given, and ONNX Runtime is not installed.
        MismatchError: the outputs of the swapped model are not bit for bit those of the original.
    """
    options = _changed(options, changes)
    targets = parse_targets(target)
    check_attention(options.attention, targets, with_past=options.with_past)
    for name in targets:
        opset_for(name, options.opset)
    check_quantize(parse_quantize(options.quantize), targets)
    style = plugin_style(options.function, options.ort_trt, targets)
    folder = Path(path)
    places = [folder] if len(targets) == 1 else [folder / name for name in targets]
    for place in places:
        if options.weights == "reference":
            check_shared_folder(place, (MODEL_FILE, MANIFEST))
        else:
            check_destination(place)
    if isinstance(model, str | Path) and progress is not None:
        progress(f"loading {model}")
    loading = LoadOptions(
        dtype=options.dtype, trust_remote_code=trust_remote_code, side_folder=existing_parent(folder), hub=hub
    )
    loaded = as_loaded(model, loading)
    feeds = _inputs_of(loaded, inputs)
    parts: tuple[str | None, ...] = (None,)
    if options.with_past:
        parts = parts_for(loaded.model, feeds or {}) or (None,)
    if options.weights == "reference" and None not in parts:
        raise UsageError("weights: the models of several parts cannot refer to one checkpoint; use link or pack.")
    prepared = prepare_parts(loaded.model, parts, options, inputs=feeds, targets=targets, progress=progress)
    companions = companions if companions is not None else loaded.folder
    notes = [*loaded.notes]
    if companions is None:
        companions, problem = companions_of_module(loaded.model) if loaded.hub is None else companions_of(loaded.hub)
        notes += [problem] if problem else []
    for one in prepared.values():
        one.details.update({**loaded.details, **(details or {})})
        one.notes += notes
        one.companions = companions
    results = [
        save_all(prepared, place, name, options, style if name == "plugin" else "function", progress)
        for name, place in zip(targets, places, strict=True)
    ]
    return results[0] if isinstance(target, str) and len(results) == 1 else results


def prepare(
    model: nn.Module,
    options: ExportOptions | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    targets: Sequence[str] = (),
    progress: Progress | None = None,
    **changes: Any,
) -> PreparedModel:
    """Recognize, check and capture a model: the steps that do not depend on the target.

    The arguments are those of `export_model`. A norm that one of `targets` does not support is refused before the
    capture.
    """
    options = _changed(options, changes)
    return prepare_parts(model, (None,), options, inputs=inputs, targets=targets, progress=progress)[None]


def prepare_parts(
    model: nn.Module,
    parts: Sequence[str | None],
    options: ExportOptions,
    *,
    inputs: Mapping[str, Any] | None = None,
    targets: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str | None, PreparedModel]:
    """`prepare` for each part of a model (see `part_of`), or for None, the whole; its norms are checked once."""
    progress = progress or _silent
    given = model
    model = given if options.dtype is None else converted(given, torch_dtype(options.dtype))
    dtype = options.dtype or torch_name(model_dtype(model) or torch.get_default_dtype())
    check_quantize(parse_quantize(options.quantize), targets, dtype)
    feeds = as_tensors(inputs) if inputs is not None else example_inputs(model)
    if model is not given:
        feeds = cast_floats(feeds, dtype)
    _refuse_scripted(model)
    others = sorted(set(feeds) - TEXT_INPUTS)
    if options.with_past and others and None in parts and is_pretrained(model):
        raise UnsupportedError(
            f"{type(model).__name__}: an export with a KV cache reads text only, and the inputs have "
            f"{', '.join(others)} too. Omit --with-past, or omit these inputs to export the model without them."
        )
    progress("finding the norms")
    recognition = find_norms(model)
    for target in targets:
        _refuse_early(recognition, target, options.opset, dtype)
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        progress(f"checking {len(recognition.sites)} norms in the running model")
        recognition = _checked(model, recognition, feeds)
        attention = AttentionRecognition()
        if options.attention != "decomposed":
            progress("checking its attentions")
            with unread_weights(model):
                attention = find_attention(model, functools.partial(_run, model, feeds))
                if attention.sites and reads_silent_queries(model, functools.partial(_run, model), feeds):
                    attention = replace(attention, reads_silent=True)
        modality = modality_read(model, feeds)
        if modality is not None and modality.part in parts:
            progress("checking that the parts compute what the model does")
            with unread_weights(model):
                feeds = check_parts(model, modality, detached(feeds))
        captured = {}
        for part in parts:
            progress("capturing the graph" if part is None else f"capturing the graph of the {part}")
            with swapped(model, recognition.sites), attention_nodes(model, attention):
                captured[part] = capture(
                    model,
                    detached(feeds),
                    opset=options.opset,
                    dynamic=options.dynamic,
                    with_past=options.with_past,
                    part=part,
                )
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    progress("finding the norms that are not modules")
    prepared = {part: _prepared(model, one, recognition, dtype, feeds, part) for part, one in captured.items()}
    for model_part in prepared.values():
        model_part.attention = attention
    return prepared


def _prepared(
    model: nn.Module,
    captured: Capture,
    recognition: Recognition,
    dtype: str,
    feeds: Mapping[str, Any],
    part: str | None,
) -> PreparedModel:
    """The captured graph with its norms, and what the manifest says of the model."""
    unswapped = find_unswapped(captured.model, model, recognition)
    recognition = Recognition(recognition.sites, unswapped.left(recognition.refusals))
    details = {**call_form(feeds).to_json(), "elements": saved_elements(model)}
    prepared = PreparedModel(captured, recognition, dtype, unswapped=unswapped, details=details, notes=unswapped.notes)
    if part is not None:
        prepared.details.update(media_record(model, feeds))
    restart = restart_length(model) if captured.with_past else None
    if restart is not None:
        prepared.details[RESTART_FIELD] = restart
        prepared.notes.append(
            f"the rotary embedding has other frequencies above {restart} tokens: a cache of fewer tokens must be "
            "computed again from all tokens when there are more, as rmsnorm generate and transformers do"
        )
    note = text_only_note(model, feeds)
    if note is not None:
        prepared.notes.append(note)
        prepared.details["left_out"] = left_out(model, feeds)
    unread = unread_bytes(model)
    if unread:
        prepared.notes.append(
            "the swapped norms and the graph were checked with other values in place of the large weights "
            f"({unread / 1e9:.1f} GB), which were not read; rmsnorm validate reads them"
        )
    return prepared


def _checked(model: nn.Module, recognition: Recognition, feeds: Mapping[str, Any]) -> Recognition:
    """Run the model with its norms swapped, refuse every norm that differs, and compare the outputs bit for bit."""
    if not recognition.sites:
        return recognition
    with torch.no_grad(), unread_weights(model):
        wanted = _tensors(_run(model, feeds))
        with swapped(model, recognition.sites, check=True) as report:
            got = _tensors(_run(model, feeds))
    refused = report.refusals(recognition)
    if refused:
        paths = {refusal.path for refusal in refused}
        kept = [site for site in recognition.sites if site.path not in paths]
        # Repeat without them: the remaining norms must give the outputs of the whole model.
        return _checked(model, Recognition(kept, [*recognition.refusals, *refused]), feeds)
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise MismatchError(
                f"output {index} of {type(model).__name__} is not bit for bit the same with its norms swapped, though "
                "each norm is. Check that the model is deterministic in eval mode."
            )
    return recognition


def _refuse_scripted(model: nn.Module) -> None:
    path = next((path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None)
    if path is not None:
        raise UnsupportedError(
            f"{path or 'the model'} is a TorchScript module (torch.jit.script, torch.jit.trace), whose code torch's "
            "exporter does not read. Give the module that it was made from."
        )


def _refuse_early(recognition: Recognition, target: str, opset: int | None, dtype: str) -> None:
    environment = Environment(opset=opset_for(target, opset), dtype=dtype)
    for site in recognition.sites:
        found = resolve(site.spec, "plain", target, environment)
        if isinstance(found, LoweringRefusal):
            raise found.to_error()


def _inputs_of(loaded: LoadedModel, inputs: Any) -> Mapping[str, Any] | None:
    """The inputs by the forward's parameter names: the given ones, with the factory's values for what they lack.

    Given tensors may have the names that the factory's nested inputs have in a file, as those of an .npz file have.
    """
    own = loaded.example_inputs
    if inputs is None:
        return own
    given = named_arguments(loaded.model.forward, inputs, "inputs")
    if own is None:
        return given
    form = call_form(own)
    constants = {name: own[name] for name in own if name in form.constants}
    inside = {name for argument in form.arguments.values() if argument.is_nested for name in argument.leaves}
    if not inside.isdisjoint(given):
        given = form.nested(given)
    return {**constants, **given}


def existing_parent(folder: Path) -> Path:
    """The folder in which another one is or will be; it has room for the model, which a system's folder may not."""
    return next(parent for parent in folder.absolute().parents if parent.is_dir())


def _changed(options: ExportOptions | None, changes: Mapping[str, Any]) -> ExportOptions:
    options = replace(options or ExportOptions(), **changes)
    parse_weights(options.weights)
    parse_attention(options.attention)
    parse_quantize(options.quantize)
    return options if options.dtype is None else replace(options, dtype=norm_dtype(options.dtype))


def _run(model: nn.Module, feeds: Mapping[str, Any]) -> Any:
    try:
        positional, keyword = split_arguments(model.forward, detached(feeds))
        return model(*positional, **keyword)
    except Exception as error:
        shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in feeds.items()}
        first = " ".join(str(error).split())[:300]
        raise UsageError(f"{type(model).__name__} failed on the example inputs {shapes}: {first}") from error


def _tensors(output: Any) -> list[Tensor]:
    tensors = []
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif is_dataclass(leaf):
            tensors += named_tensors(leaf, type(leaf).__name__).values()
    return tensors


def _silent(_: str) -> None:
    return None
