"""From an .onnx file to a folder in which its norms are in a target's form, with the proof."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..export.files import MANIFEST, check_destination, copy_companions, new_folder
from ..export.graph_check import check_graph
from ..export.graph_site import GraphRefusal
from ..export.manifest import rewritten_rows, tensor_rows, write_manifest
from ..export.model_file import ModelFile, read_model, to_ir
from ..export.model_writer import write_model
from ..export.rewrite import Rewritten, rewrite
from ..models.errors import MismatchError, UsageError
from .feeds import is_past
from .model_proof import prove_model
from .rewrite_proof import Proof, prove_norms
from .runner import Array

Weights = Literal["link", "copy"]
WEIGHTS: tuple[Weights, ...] = ("link", "copy")


@dataclass(frozen=True, slots=True)
class RewriteResult:
    """A rewritten model on disk.

    Attributes:
        folder: where it is.
        manifest: the manifest's content; the file is `folder / "manifest.json"`.
        rewritten: the graphs before and after.
        proof: None where none was asked for.
    """

    folder: Path
    manifest: dict[str, Any]
    rewritten: Rewritten = field(repr=False)
    proof: Proof | None

    @property
    def files(self) -> list[str]:
        """Names of all files, the manifest among them."""
        return [*self.manifest["files"], MANIFEST]


def rewrite_model(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    target: str = "ort",
    opset: int | None = None,
    weights: Weights = "link",
    verify: bool = True,
    inputs: Mapping[str, Array] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> RewriteResult:
    """Put every RMSNorm of an .onnx file into a target's form, and prove that it computes the same.

    Args:
        path: the file, whoever exported it; it is never written to. Large weights are not read.
        folder: the folder to make; the file keeps its name in it. An earlier result there is replaced, anything else
            is refused.
        target: `primitives`, `standard`, `ort` or `plugin`.
        opset: opset import of the result; None raises it only as far as the target needs.
        weights: external data get a second name in the folder (`link`, where the file system can) or are copied.
        verify: run every rewritten norm and the whole model, before and after, in ONNX Runtime. A norm whose proof
            fails is left as it was.
        inputs: inputs of the whole model for the proof; made up where left out.
        seed: of the proof's random numbers.
        progress: called with a line of text at each step.

    Raises:
        UsageError: the file is no sound ONNX model, or an argument is wrong; nothing is left behind.
        UnsupportedError: the target or the opset cannot do it.
        MismatchError: the whole model computes something else.
        EnvironmentMissingError: onnxruntime is not installed; without `verify` it is not needed.
    """
    say = progress or (lambda text: None)
    if weights not in WEIGHTS:
        raise UsageError(f"unknown choice {weights!r} for the weights; choose one of {', '.join(WEIGHTS)}.")
    check_destination(folder)
    with _without_collection():
        say("reading the graph")
        original = read_model(path)
        source = Path(path)
        _check_apart(source, Path(folder))
        check_graph(original.model, original.where)
        graph = to_ir(original)
        say("finding the norms")
        rewritten = rewrite(graph, target, opset)
        proof = Proof()
        if verify:
            rewritten, proof = _proven(rewritten, proof, graph, target, opset, source.parent, seed, say)
        with new_folder(folder) as place:
            say("writing the model")
            notes = _write(rewritten, original, place, weights)
            if verify and rewritten.changed:
                proof = prove_model(rewritten, source, place / source.name, proof, feeds=inputs, seed=seed, say=say)
                if proof.verdict == "mismatch":
                    raise MismatchError(f"{source}: written for {target}, it computes something else: {proof.reason}")
            copy_companions(source.parent, place)
            original.check_unchanged()
            say("hashing the files")
            content = _content(rewritten, source, target, proof if verify else None, notes)
            weights_files = [place / file.relative_to(source.parent) for file in original.external_files]
            manifest = write_manifest(place, content, weights_files)
    return RewriteResult(Path(folder), manifest, rewritten, proof if verify else None)


def _proven(
    rewritten: Rewritten, proof: Proof, graph: Any, target: str, opset: int | None, folder: Path, seed: int, say: Any
) -> tuple[Rewritten, Proof]:
    """The rewriting without the norms whose proof fails."""
    proof = prove_norms(rewritten, folder, seed=seed, say=say)
    failed = {row.number: row.reason for row in proof.sites if row.verdict == "mismatch"}
    if failed:
        sites = rewritten.sites
        refused = [
            GraphRefusal(sites[number].before.node, sites[number].before.path, f"its proof fails: {reason}")
            for number, reason in failed.items()
        ]
        rewritten = rewrite(graph, target, opset, skip=failed)
        rewritten.refusals.extend(refused)
        proof = prove_norms(rewritten, folder, seed=seed, say=say)
    return rewritten, proof


def _write(rewritten: Rewritten, original: ModelFile, place: Path, weights: Weights) -> list[str]:
    assert original.path is not None
    return write_model(rewritten.model, original, place, original.path.name, weights)


def _content(rewritten: Rewritten, source: Path, target: str, proof: Proof | None, notes: list[str]) -> dict[str, Any]:
    graph = rewritten.model.graph
    dtypes = [site.before.dtype for site in rewritten.sites]
    dtypes += [value.dtype for value in graph.outputs if value.dtype is not None and value.dtype.is_floating_point()]
    common = max(dict.fromkeys(dtypes), key=dtypes.count) if dtypes else None
    return {
        "source": str(source),
        "target": target,
        "opset": graph.opset_imports.get("", graph.opset_imports.get("ai.onnx")),
        "dtype": None if common is None else common.numpy().name,
        "with_past": any(is_past(str(value.name)) for value in graph.inputs),
        "model": source.name,
        "inputs": tensor_rows(list(graph.inputs)),
        "outputs": tensor_rows(list(graph.outputs)),
        "sites": rewritten_rows(rewritten),
        "refusals": [refusal.to_dict() for refusal in rewritten.refusals],
        "notes": [*rewritten.notes, *notes],
        "proof": None if proof is None else proof.to_dict(),
    }


def _check_apart(source: Path, folder: Path) -> None:
    if folder.expanduser().absolute() == source.absolute().parent:
        raise UsageError(f"{folder} is the folder of the model itself, which is never written to; name another.")


@contextmanager
def _without_collection() -> Iterator[None]:
    """Graphs are millions of small objects that live as long as the work does: looking for garbage takes half of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
