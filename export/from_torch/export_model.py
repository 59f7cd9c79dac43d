"""Export a PyTorch model to a folder with an ONNX file: recognize, swap, check, capture, lower, save."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, overload

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...models.calls import call_form, named_arguments, named_tensors, split_arguments
from ...models.companions import folder_of, weight_files
from ...models.dtypes import norm_dtype, torch_dtype, torch_name
from ...models.errors import MismatchError, UnsupportedError, UsageError
from ...models.loading import LoadedModel, as_loaded, cast_floats
from ...models.recognition.find_norms import find_norms
from ...models.recognition.site import Recognition
from ..capture.capture import capture, detached
from ..capture.captured import Capture
from ..capture.example_inputs import as_tensors, example_inputs
from ..capture.swap import swapped
from ..graph.sizes import SizeLimits, metadata_of
from ..lowering.plugin_functions import PluginStyle, plugin_style, style_notes
from ..lowering.table import DEFAULT_TARGET, Environment, LoweringRefusal, opset_for, parse_targets, resolve
from ..onnx_io.atomic_files import copy_companions, new_folder, restrict_mode
from ..onnx_io.destinations import check_destination
from ..onnx_io.manifest import tensor_rows, write_manifest
from ..onnx_io.owned_files import MANIFEST
from .graph_norms import UnswappedNorms, find_unswapped
from .lower import lower_graph, site_rows

MODEL_FILE = "model.onnx"
# Weights above this many bytes are stored in model.onnx.data, because protobuf files are limited to 2 GB.
_EXTERNAL_BYTES = 1024
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """One exported folder.

    Attributes:
        folder: path of the folder.
        target: the target of the lowering.
        manifest: content of the manifest; the file is `folder / "manifest.json"`.
        recognition: the modules that were recognized, and those that were refused and are not norms in the captured
            graph either; the manifest also has the norms that were found in the graph.
    """

    folder: Path
    target: str
    manifest: dict[str, Any]
    recognition: Recognition

    @property
    def files(self) -> list[str]:
        """Names of all files, including the manifest."""
        return [*self.manifest["files"], MANIFEST]


@dataclass(slots=True)
class PreparedModel:
    """A model that was recognized and captured; it can be lowered for any number of targets.

    Attributes:
        capture: the captured graph.
        recognition: its modules; without the refused ones whose norms were found in the graph.
        dtype: dtype of its parameters.
        unswapped: the norms that are not modules, which were found in the graph.
        details: fields for the manifest.
        companions: the folder to copy config and tokenizer files from.
        notes: notes for the manifest.
    """

    capture: Capture
    recognition: Recognition
    dtype: str
    unswapped: UnswappedNorms = field(default_factory=UnswappedNorms)
    details: dict[str, Any] = field(default_factory=dict)
    companions: Path | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
        dtype: `float32`, `float16`, `bfloat16` or `float64`, or another name of one, such as `fp16`; another dtype
            than the model's exports a converted copy.
        opset: opset import of the file, 18 to 23; None for the target's default (20; 23 for `standard`).
        dynamic: True makes every dim dynamic that the model does not fix; False makes all static; a mapping is passed
            to `torch.export` as `dynamic_shapes`.
        with_past: export a decoder of transformers with its KV cache: one file for prefill and decode.
        function: write local functions of the custom operators into the file of target `plugin`. ONNX Runtime requires
            them to run the file; TensorRT up to 10.6 runs them instead of the plugin.
        ort_trt: write the file of target `plugin` for ONNX Runtime's TensorRT provider: plugin nodes in domain
            `trt.plugins`, without local functions.
    """

    dtype: str | None = None
    opset: int | None = None
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
        progress: called with a line of text at each step.
        changes: fields of `ExportOptions` that differ from `options`, such as `dtype="float16"`.

    Returns:
        The result; or for a list or several targets a list of results, in the order given.

    Raises:
        UsageError: an argument is wrong or the folder cannot be written to; nothing is left behind.
        UnsupportedError: the target, opset or dtype does not support a norm, or the exporter cannot capture the model.
        MismatchError: the outputs of the swapped model are not bit for bit those of the original.
    """
    options = _changed(options, changes)
    targets = parse_targets(target)
    for name in targets:
        opset_for(name, options.opset)
    style = plugin_style(options.function, options.ort_trt, targets)
    folder = Path(path)
    places = [folder] if len(targets) == 1 else [folder / name for name in targets]
    for place in places:
        check_destination(place)
    if isinstance(model, str | Path) and progress is not None:
        progress(f"loading {model}")
    loaded = as_loaded(model, dtype=options.dtype, trust_remote_code=trust_remote_code)
    feeds = _inputs_of(loaded, inputs)
    prepared = prepare(loaded.model, options, inputs=feeds, targets=targets, progress=progress)
    prepared.details.update({**loaded.details, **(details or {})})
    prepared.notes += loaded.notes
    prepared.companions = companions if companions is not None else loaded.folder
    if prepared.companions is None:
        prepared.companions, problem = folder_of(loaded.model)
        prepared.notes += [problem] if problem else []
    results = [
        save(
            prepared,
            place,
            name,
            opset=options.opset,
            style=style if name == "plugin" else "function",
            progress=progress,
        )
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
    options, progress = _changed(options, changes), progress or _silent
    converted = options.dtype is not None and options.dtype != _dtype_of(model)
    model = _in_dtype(model, options.dtype)
    feeds = as_tensors(inputs) if inputs is not None else example_inputs(model)
    if converted:
        feeds = cast_floats(feeds, str(options.dtype))
    _refuse_scripted(model)
    progress("finding the norms")
    recognition = find_norms(model)
    for target in targets:
        _refuse_early(recognition, target, options.opset, _dtype_of(model))
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        progress(f"checking {len(recognition.sites)} norms in the running model")
        recognition = _checked(model, recognition, feeds)
        progress("capturing the graph")
        with swapped(model, recognition.sites):
            captured = capture(
                model,
                detached(feeds),
                opset=options.opset,
                dynamic=options.dynamic,
                with_past=options.with_past,
            )
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    progress("finding the norms that are not modules")
    unswapped = find_unswapped(captured.model, model, recognition)
    recognition = Recognition(recognition.sites, unswapped.left(recognition.refusals))
    details = call_form(feeds).to_json()
    return PreparedModel(captured, recognition, _dtype_of(model), unswapped, details, notes=unswapped.notes)


def save(
    prepared: PreparedModel,
    path: str | os.PathLike[str],
    target: str,
    *,
    opset: int | None = None,
    style: PluginStyle = "function",
    progress: Progress | None = None,
) -> ExportResult:
    """Lower a prepared model for one target and write its folder, completely or not at all.

    The arguments are those of `export_model`; `style` is how the file contains the custom operators of target `plugin`.
    """
    progress = progress or _silent
    progress(f"lowering for {target}")
    result = lower_graph(prepared.capture.model, target, opset, style)
    lowered, unswapped = result.model, prepared.unswapped
    refusals = [refusal.to_dict() for refusal in prepared.recognition.refusals]
    refusals += [refusal.to_dict() for refusal in (*unswapped.refusals, *result.refusals)]
    graph, limits = lowered.graph, prepared.capture.limits
    lowered.metadata_props.update(metadata_of(limits))
    content = {
        **prepared.details,
        "target": target,
        "opset": graph.opset_imports[""],
        "dtype": prepared.dtype,
        "with_past": prepared.capture.with_past,
        "model": MODEL_FILE,
        "inputs": [{**row, **_ranges(row, limits)} for row in tensor_rows(list(graph.inputs))],
        "outputs": tensor_rows(list(graph.outputs)),
        **({"conditions": [*limits.conditions]} if limits.conditions else {}),
        "sites": site_rows(prepared.recognition, result.sites, unswapped),
        "refusals": refusals,
        "notes": [*prepared.notes, *prepared.capture.notes, *style_notes(lowered, style)],
    }
    with new_folder(path) as folder:
        progress("writing the model")
        _write_model(lowered, folder)
        if prepared.companions is not None:
            content["notes"] += copy_companions(prepared.companions, folder)
            for file in folder.glob(f"{MODEL_FILE}*"):
                restrict_mode(file, weight_files(prepared.companions))
        progress("hashing the files")
        manifest = write_manifest(folder, content)
    return ExportResult(Path(path), target, manifest, prepared.recognition)


def _ranges(row: Mapping[str, Any], limits: SizeLimits) -> dict[str, Any]:
    found = {dim: list(limits.ranges[dim]) for dim in row["shape"] if dim in limits.ranges}
    return {"ranges": found} if found else {}


def _write_model(model: ir.Model, folder: Path) -> None:
    model.producer_name = "rmsnorm-deploy"
    data = folder / f"{MODEL_FILE}.data"
    ir.save(model, folder / MODEL_FILE, external_data=data.name, size_threshold_bytes=_EXTERNAL_BYTES)
    if data.is_file() and data.stat().st_size == 0:
        data.unlink()


def _checked(model: nn.Module, recognition: Recognition, feeds: Mapping[str, Any]) -> Recognition:
    """Run the model with its norms swapped, refuse every norm that differs, and compare the outputs bit for bit."""
    if not recognition.sites:
        return recognition
    with torch.no_grad():
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


def _changed(options: ExportOptions | None, changes: Mapping[str, Any]) -> ExportOptions:
    options = replace(options or ExportOptions(), **changes)
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


def _in_dtype(model: nn.Module, dtype: str | None) -> nn.Module:
    if dtype is None or dtype == _dtype_of(model):
        return model
    return copy.deepcopy(model).to(torch_dtype(dtype))


def _dtype_of(model: nn.Module) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return torch_name(dtype)


def _silent(_: str) -> None:
    return None
