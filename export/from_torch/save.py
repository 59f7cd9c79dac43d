"""Write a prepared model as an exported folder (`save`), or its parts as folders in one (`save_all`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...models.attention.find_attention import AttentionRecognition
from ...models.companions import saved_weights
from ...models.errors import UnsupportedError
from ...models.recognition.site import Recognition
from ..capture.captured import Capture
from ..graph.requirements import in_place_metadata, requirement_metadata
from ..graph.sizes import SizeLimits, metadata_of
from ..graph.stored_weights import as_stored
from ..lowering.attention_table import AttentionMode
from ..lowering.plugin_functions import PluginStyle, style_notes
from ..lowering.quantized_weights import QuantizedWeights, quantize_weights, summed
from ..lowering.weight_quantizer import DOMAIN, LOWEST_ONNXRUNTIME, OPERATOR, check_quantize, parse_quantize
from ..onnx_io.atomic_files import copy_companions, into_folder, new_folder, restrict_mode
from ..onnx_io.manifest import tensor_rows, write_manifest
from ..onnx_io.owned_files import MANIFEST
from ..onnx_io.place_weights import PlacedWeights, WeightsMode, place_weights
from .graph_norms import UnswappedNorms
from .lower import attention_rows, lower_graph, site_rows

MODEL_FILE = "model.onnx"
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
        attention: its attentions.
        unswapped: the norms that are not modules, which were found in the graph.
        details: fields for the manifest.
        companions: the folder to copy config and tokenizer files from.
        notes: notes for the manifest.
    """

    capture: Capture
    recognition: Recognition
    dtype: str
    attention: AttentionRecognition = field(default_factory=AttentionRecognition)
    unswapped: UnswappedNorms = field(default_factory=UnswappedNorms)
    details: dict[str, Any] = field(default_factory=dict)
    companions: Path | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How a folder is written.

    Attributes:
        opset: opset import of the file, 18 to 23; None for the target's default (20; 23 for `standard`).
        weights: how the folder gets the weights that are in a checkpoint's safetensors files: `link` by hard links to
            these files, or as `pack` where the file system cannot link to them; `copy` by copies of these files;
            `pack` by one new file with all weights, each at a memory page of its own; `reference` writes the model and
            its manifest into the checkpoint's folder, or one that contains it, where it reads the files themselves.
        full_hash: also hash the checkpoint's files, which reads them, so that `verify` notices every change.
        quantize: `int4` or `int8` for weights of MatMuls in blocks of 4 or 8 bits, which ONNX Runtime alone reads; not
            for target `plugin`. With `link`, the other weights are packed, because links would keep the whole
            checkpoint.
        attention: `node` writes each attention that was proven to follow an `AttentionSpec` in the target's own form,
            see `rmsnorm targets`; `decomposed` writes the operators of its function; `in-place` writes nodes that put
            keys and values into the cache's own buffer, where they can (target `ort`).
    """

    opset: int | None = None
    weights: WeightsMode = "link"
    full_hash: bool = False
    quantize: str | None = None
    attention: AttentionMode = "node"


def save(
    prepared: PreparedModel,
    path: str | os.PathLike[str],
    target: str,
    options: SaveOptions | None = None,
    style: PluginStyle = "function",
    progress: Progress | None = None,
) -> ExportResult:
    """Lower a prepared model for one target and write its folder, completely or not at all.

    The arguments are those of `export_model`; `style` is how the file contains the custom operators of target `plugin`.
    """
    return _save(prepared, path, target, options or SaveOptions(), style, progress or _silent)


def _save(
    prepared: PreparedModel,
    path: str | os.PathLike[str],
    target: str,
    options: SaveOptions,
    style: PluginStyle,
    progress: Progress,
    part: bool = False,
) -> ExportResult:
    """`save`, also for a part of a model, in which there may be nothing to quantize."""
    scheme = parse_quantize(options.quantize)
    check_quantize(scheme, [target], prepared.dtype)
    progress(f"lowering for {target}")
    result = lower_graph(prepared.capture.model, target, options.opset, style, options.attention)
    lowered, unswapped = result.model, prepared.unswapped
    requires, quantized = result.requires, None
    if scheme is not None:
        quantized = quantize_weights(lowered, scheme)
        if not part:
            _check_any(quantized.to_json())
        if quantized.nodes:
            requires = {"onnxruntime": LOWEST_ONNXRUNTIME, **requires}
    if target != "plugin":  # TensorRT transposes weights when it builds an engine
        as_stored(lowered)
    refusals = [refusal.to_dict() for refusal in prepared.recognition.refusals]
    refusals += [refusal.to_dict() for refusal in (*unswapped.refusals, *result.refusals)]
    graph, limits = lowered.graph, prepared.capture.limits
    lowered.metadata_props.update(
        metadata_of(limits) | requirement_metadata(requires) | in_place_metadata(result.in_place)
    )
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
        "requires": requires,
        **({"rotary": {"nodes": len(result.rotaries)}} if result.rotaries else {}),
        "attention": attention_rows(prepared.attention, result.attentions),
        **({"in_place_cache": result.in_place} if result.in_place else {}),
        **({} if quantized is None else {"quantized": quantized.to_json()}),
        "notes": [*prepared.notes, *prepared.capture.notes, *style_notes(lowered, style), *_quantized_notes(quantized)],
    }
    shared = options.weights == "reference"
    with into_folder(path, (MODEL_FILE, MANIFEST)) if shared else new_folder(path) as folder:
        progress("writing the model" if quantized is None else "quantizing the weights and writing the model")
        placed = _write_model(lowered, folder, options, Path(path) if shared else None)
        content["notes"] += placed.notes
        content["weights"] = {"mode": placed.mode, "files": placed.linked}
        if prepared.companions is not None:
            if not shared:
                content["notes"] += copy_companions(prepared.companions, folder)
            for file in folder.glob(f"{MODEL_FILE}*"):
                restrict_mode(file, saved_weights(prepared.companions))
        hashes = placed.hashes if shared else placed.hashes | {n: row["sha256"] for n, row in placed.linked.items()}
        manifest = write_manifest(folder, content, hashes)
    return ExportResult(Path(path), target, manifest, prepared.recognition)


def save_all(
    prepared: Mapping[str | None, PreparedModel],
    path: str | os.PathLike[str],
    target: str,
    options: SaveOptions,
    style: PluginStyle,
    progress: Progress | None,
) -> ExportResult:
    """Write the folder of a model, or one with a folder for each of its parts and a manifest that lists them.

    Args:
        prepared: the whole model under None, or each part under its name.
        path, target, options, style, progress: see `save`.
    """
    if None in prepared:
        return save(prepared[None], path, target, options, style, progress)
    first = next(iter(prepared.values()))
    companions = first.companions
    with new_folder(path) as folder:
        results = {}
        for name, part in prepared.items():
            alone = replace(part, companions=None, details={**part.details, "part": name})
            results[str(name)] = _save(alone, folder / str(name), target, options, style, progress or _silent, True)
        manifests = [result.manifest for result in results.values()]
        notes = list(dict.fromkeys(note for manifest in manifests for note in manifest["notes"]))
        if companions is not None:
            notes += copy_companions(companions, folder)
            for file in folder.glob(f"*/{MODEL_FILE}*"):
                restrict_mode(file, saved_weights(companions))
        content = {
            **first.details,
            "target": target,
            "opset": manifests[0]["opset"],
            "dtype": first.dtype,
            "with_past": True,
            "components": list(results),
            "sites": _all_calls(manifests),
            "refusals": manifests[0]["refusals"],
            **({} if options.quantize is None else {"quantized": _checked_sum(manifests)}),
            "notes": notes,
        }
        hashes = {
            f"{part}/{name}": row["sha256"]
            for part, inner in zip(results, manifests, strict=True)
            for name, row in inner["files"].items()
        }
        manifest = write_manifest(folder, content, hashes)
    return ExportResult(Path(path), target, manifest, first.recognition)


def _checked_sum(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    quantized = summed(manifest["quantized"] for manifest in manifests)
    _check_any(quantized)
    return quantized


def _check_any(quantized: Mapping[str, Any]) -> None:
    if not quantized["nodes"]:
        left = ", ".join(f"{count} because {reason}" for reason, count in quantized["left"].items())
        raise UnsupportedError(
            f"quantize: no MatMul of the model has a constant weight that can be quantized to {quantized['profile']}"
            f"{f' (left: {left})' * bool(left)}. Export without --quantize."
        )


def _quantized_notes(quantized: QuantizedWeights | None) -> list[str]:
    if quantized is None or not quantized.nodes:
        return []
    scheme = quantized.scheme
    return [
        f"{quantized.nodes} MatMuls have weights in {scheme.name}, in blocks of {scheme.block_size} with a scale "
        f"({DOMAIN}::{OPERATOR}, which of all runtimes only ONNX Runtime has); rmsnorm validate judges the file by the "
        f"limits of --lossy {scheme.name}"
    ]


def _all_calls(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The norms of all parts, each once, with its calls in every part."""
    rows: dict[str, dict[str, Any]] = {}
    for site in (site for manifest in manifests for site in manifest["sites"]):
        row = rows.setdefault(site["path"], {**site, "calls": []})
        row["calls"] = [*row["calls"], *site["calls"]]
    return list(rows.values())


def _ranges(row: Mapping[str, Any], limits: SizeLimits) -> dict[str, Any]:
    found = {dim: list(limits.ranges[dim]) for dim in row["shape"] if dim in limits.ranges}
    return {"ranges": found} if found else {}


def _write_model(model: ir.Model, folder: Path, options: SaveOptions, final: Path | None = None) -> PlacedWeights:
    model.producer_name = "rmsnorm-deploy"
    mode = "pack" if options.quantize is not None and options.weights == "link" else options.weights
    placed = place_weights(model, folder, MODEL_FILE, mode, options.full_hash, final)
    ir.save(model, folder / MODEL_FILE)
    return placed


def _silent(_: str) -> None:
    return None
