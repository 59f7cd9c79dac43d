"""Rewrite the norms of an .onnx file for a target, and prove that the result computes the same (`rewrite_model`)."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...export.from_onnx.rewrite import Rewritten, fuse_quantized, rewrite, rewritten_attentions, rewritten_rows
from ...export.from_onnx.rewrite_attentions import check_rewriting
from ...export.graph.cache_names import is_past
from ...export.graph.site import GraphRefusal
from ...export.lowering.attention_table import AttentionMode, parse_attention
from ...export.lowering.plugin_functions import PluginStyle, plugin_style, style_notes, style_plugin_nodes
from ...export.lowering.table import DEFAULT_TARGET, parse_target
from ...export.onnx_io.atomic_files import copy_companions, new_file, new_folder, restrict_mode
from ...export.onnx_io.check_graph import check_graph
from ...export.onnx_io.destinations import check_destination, check_new_file
from ...export.onnx_io.manifest import tensor_rows, write_manifest
from ...export.onnx_io.owned_files import MANIFEST
from ...export.onnx_io.place_weights import weights_row
from ...export.onnx_io.read_model import ModelFile, read_model, to_ir
from ...export.onnx_io.write_model import write_model
from ...models.dtypes import onnx_name
from ...models.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from ..runners.base import Array
    from .verify_norms import Proof

Weights = Literal["copy", "link"]
WEIGHTS: tuple[Weights, ...] = ("copy", "link")
_LINKED = (
    "the weights are hard links to the original's: ONNX Runtime reads them, but onnx and onnx_ir refuse files with "
    "several hard links, including the original, until one of the two is deleted"
)


@dataclass(frozen=True, slots=True)
class RewriteResult:
    """A rewritten model on disk.

    Attributes:
        model: the new .onnx file.
        files: every file that was written.
        manifest: the record of the rewrite; a new folder contains it as `manifest.json`.
        rewritten: the graphs before and after.
        proof: the proof; None with `verify=False`.
    """

    model: Path
    files: list[Path]
    manifest: dict[str, Any]
    rewritten: Rewritten = field(repr=False)
    proof: Proof | None

    @property
    def folder(self) -> Path:
        """The folder of the new file."""
        return self.model.parent


def rewrite_model(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    target: str = DEFAULT_TARGET,
    opset: int | None = None,
    function: bool = True,
    ort_trt: bool = False,
    weights: Weights = "copy",
    attention: AttentionMode = "decomposed",
    verify: bool = True,
    inputs: Mapping[str, Array] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> RewriteResult:
    """Rewrite every RMSNorm of an .onnx file for a target, and prove that the result computes the same.

    Args:
        path: the file, from any exporter; it is never changed. Large weights are not read.
        output: a new folder, in which the file keeps its name: an earlier result there is replaced, any other content
            is an error. Or a new .onnx file in the original's folder, which refers to the same external data.
        target: `primitives`, `standard`, `ort` or `plugin`.
        opset: opset import of the result; None raises it only as far as the target requires.
        function: for target `plugin`, add the local functions that replace the plugin, as in `export_model`. The proof
            always uses them, because ONNX Runtime cannot run the file without them.
        ort_trt: for target `plugin`, write the file for ONNX Runtime's TensorRT provider.
        weights: `copy` copies external data to the new folder; `link` makes hard links there, which takes no time and
            no space, but onnx and onnx_ir refuse to read them.
        attention: `node` replaces each attention that the file spells out (product, scale, mask, Softmax, product) by
            the target's operator, if its nodes are proven to compute that; `decomposed` leaves attention as it is.
        verify: run every rewritten norm and attention and the whole model, before and after, in ONNX Runtime. One whose
            proof fails is left unchanged.
        inputs: inputs of the whole model for the proof; generated if None.
        seed: seed of the proof's random numbers.
        progress: called with a line of text at each step.

    Returns:
        The files that were written, the manifest and the proof.

    Raises:
        UsageError: the file is not a valid ONNX model, or an argument is wrong; no file is left behind.
        UnsupportedError: the target or the opset does not support the model.
        MismatchError: the outputs of the whole model differ.
        EnvironmentMissingError: onnxruntime is not installed; it is not required without `verify`.
    """
    progress = progress or (lambda text: None)
    if weights not in WEIGHTS:
        raise UsageError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}.")
    target = parse_target(target)
    mode = parse_attention(attention)
    check_rewriting(mode, target)
    style = plugin_style(function, ort_trt, [target])
    source, place = Path(path), Path(output).expanduser()
    beside = place.suffix == ".onnx"
    _check_place(source, place, beside)
    with _without_collection():
        progress("reading the graph")
        original = read_model(source)
        if (
            beside
            and original.external_files
            and place.absolute().parent.resolve() != source.absolute().parent.resolve()
        ):
            raise UsageError(
                f"{place}: a single file must be in the folder of {source}, because it refers to its external data. "
                "Name a file there, or a new folder."
            )
        check_graph(original.model, original.where)
        graph = to_ir(original)
        progress("finding the norms")
        rewritten = rewrite(graph, target, opset, attention=mode)
        proof = None
        if verify:
            rewritten, proof = _proven(rewritten, graph, target, opset, mode, source.parent, seed, progress)
        fuse_quantized(rewritten, target, opset)  # norms are proven without the fusion, the whole model with it
        job = _Job(original, source, rewritten, proof, target, style, inputs, seed, progress)
        if beside:
            with new_file(place) as partial:
                content = _write(job, partial.parent, partial.name, "reference")
            return RewriteResult(place, [place], content, rewritten, job.proof)
        with new_folder(place) as folder:
            content = _write(job, folder, source.name, weights)
            content["notes"] += copy_companions(source.parent, folder)
            progress("hashing the files")
            placed = {file.relative_to(source.parent).as_posix(): file for file in original.external_files}
            rows = {name: weights_row(file, folder / name) for name, file in placed.items()}
            content["weights"] = {"mode": weights, "files": rows}
            manifest = write_manifest(folder, content, dict.fromkeys(placed))
    files = [place / name for name in (*manifest["files"], MANIFEST)]
    return RewriteResult(place / source.name, files, manifest, rewritten, job.proof)


@dataclass(slots=True)
class _Job:
    """The state that writing the file and proving the whole model require."""

    original: ModelFile
    source: Path
    rewritten: Rewritten
    proof: Proof | None
    target: str
    style: PluginStyle
    inputs: Mapping[str, Array] | None
    seed: int
    progress: Callable[[str], None]


def _write(job: _Job, folder: Path, name: str, weights: Literal["copy", "link", "reference"]) -> dict[str, Any]:
    """Write the model, prove it as a whole, and return the content of the manifest."""
    proves = job.proof is not None and job.rewritten.changed
    if not proves:
        _restyle(job)
    job.progress("writing the model")
    notes = write_model(job.rewritten.model, job.original, folder, name, weights)
    if not job.rewritten.sites and not job.rewritten.notes and not job.rewritten.changed:
        shutil.copyfile(job.source, folder / name)  # nothing was rewritten: copy the original file
        restrict_mode(folder / name, [job.source])
    if weights == "link" and job.original.external_files and not notes:
        notes.append(_LINKED)
    if job.proof is not None and proves:
        from .verify_model import prove_model

        job.proof = prove_model(
            job.rewritten, job.source, folder / name, job.proof, feeds=job.inputs, seed=job.seed, progress=job.progress
        )
        if job.proof.verdict == "mismatch":
            reason = f"the file that was written for target {job.target} differs: {job.proof.reason}"
            raise MismatchError(f"{job.source}: {reason}")
        if job.style != "function":
            _restyle(job)  # after the proof: ONNX Runtime cannot run files of the other styles
            write_model(job.rewritten.model, job.original, folder, name, "reference")  # the weights are written
    job.original.check_unchanged()
    return _content(job, [*notes, *style_notes(job.rewritten.model, job.style)])


def _restyle(job: _Job) -> None:
    """Convert the custom operators to the requested style; `rewrite` writes them with functions."""
    if job.target == "plugin" and job.style != "function":
        style_plugin_nodes(job.rewritten.model, job.style)


def _proven(
    rewritten: Rewritten,
    graph: Any,
    target: str,
    opset: int | None,
    attention: AttentionMode,
    folder: Path,
    seed: int,
    progress: Any,
) -> tuple[Rewritten, Proof]:
    """Prove the norms and attentions alone, and rewrite again without those whose proof fails."""
    from .verify_attentions import prove_attentions
    from .verify_norms import prove_norms

    proof = prove_norms(rewritten, folder, seed=seed, progress=progress)
    proof.attentions = prove_attentions(rewritten, folder, seed=seed, progress=progress)
    wrong = {row.number: row.reason for row in proof.attentions if row.verdict == "mismatch"}
    failed = {row.number: row.reason for row in proof.sites if row.verdict == "mismatch"}
    if failed or wrong:
        sites = rewritten.sites
        refused = [
            GraphRefusal(sites[number].before.node, sites[number].before.path, f"its proof fails: {reason}")
            for number, reason in failed.items()
        ]
        rewritten = rewrite(graph, target, opset, skip=failed, attention=attention, failed=wrong)
        rewritten.refusals.extend(refused)
        proof = prove_norms(rewritten, folder, seed=seed, progress=progress)
        proof.attentions = prove_attentions(rewritten, folder, seed=seed, progress=progress)
    return rewritten, proof


def _content(job: _Job, notes: list[str]) -> dict[str, Any]:
    graph, rewritten = job.rewritten.model.graph, job.rewritten
    dtypes = [site.before.dtype for site in rewritten.sites]
    dtypes += [value.dtype for value in graph.outputs if value.dtype is not None and value.dtype.is_floating_point()]
    common = max(dict.fromkeys(dtypes), key=dtypes.count) if dtypes else None
    return {
        "source": str(job.source),
        "target": job.target,
        "opset": graph.opset_imports.get("", graph.opset_imports.get("ai.onnx")),
        "dtype": None if common is None else onnx_name(common),
        "with_past": any(is_past(str(value.name)) for value in graph.inputs),
        "model": job.source.name,
        "inputs": tensor_rows(list(graph.inputs)),
        "outputs": tensor_rows(list(graph.outputs)),
        "sites": rewritten_rows(rewritten),
        "refusals": [refusal.to_dict() for refusal in rewritten.refusals],
        "attention": rewritten_attentions(rewritten),
        "notes": [*rewritten.notes, *notes],
        "proof": None if job.proof is None else job.proof.to_dict(),
    }


def _check_place(source: Path, place: Path, beside: bool) -> None:
    """Check the output path before any slow work."""
    if beside:
        check_new_file(place)
        return
    if source.name == MANIFEST:
        raise UsageError(f"{source} has the name of the manifest that a rewrite writes; rename it.")
    check_destination(place, [source.absolute().parent, source])


@contextmanager
def _without_collection() -> Iterator[None]:
    """Disable garbage collection: a graph has millions of small objects, and collection takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
