"""The proof that a rewritten file computes what the file before did, as a whole.

The whole model has no float64 truth. It is held to the file before, and to what one rounding at each norm makes of
that file's outputs: the yardstick is the file before with each norm's result multiplied by 1 +- eps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..export.rewrite import Rewritten
from ..export.write_norm import dtype_name
from ..models.errors import MismatchError, RmsnormDeployError
from .feeds import cast_feeds, make_feeds
from .metrics import OutputVerdict, judge
from .ort_runner import OrtRunner
from .rewrite_proof import Proof, Say
from .runner import Array, TensorInfo, numpy_dtype
from .ulp import format_of

# Batch and length of made-up inputs, and how often the yardstick is rounded anew.
_SHAPES, _ROUNDINGS = ((1, 3), (2, 9)), 3
# Weights beyond this many bytes are not repacked for the kernels, which would take longer than the run.
_LARGE_FILE = 1 << 30


def prove_model(
    rewritten: Rewritten,
    before: Path,
    after: Path,
    proof: Proof,
    *,
    feeds: Mapping[str, Array] | None,
    seed: int,
    say: Say,
) -> Proof:
    """Run both files as a whole and add the verdicts to the proof.

    Args:
        rewritten: both graphs.
        before: the file that was rewritten.
        after: the new one.
        proof: of the norms alone.
        feeds: inputs of the model; made up in two shapes where left out.
        seed: of made-up inputs and of the yardstick's roundings.
        say: progress.
    """
    say("running the whole model")
    large = sum(path.stat().st_size for path in after.parent.rglob("*") if path.is_file()) > _LARGE_FILE
    options = {"repack_weights": not large}
    rejected = _rejection(before, options)
    try:
        with OrtRunner(after, session_options=options) as runner:
            infos = runner.inputs()
    except RmsnormDeployError as error:
        if rejected is None:
            raise MismatchError(f"the file before loads in ONNX Runtime, and the new one does not: {error}") from error
        proof.unproven = f"neither the file before nor the new one loads in ONNX Runtime: {rejected}"
        return proof
    try:
        cases = _cases(rewritten.model, infos, feeds, seed)
        if rejected is not None:
            proof.notes.append(f"the file before does not load: {rejected}")
            proof.model = _finite(after, cases, options)
            return proof
        with OrtRunner(before, session_options=options) as runner:
            truths = [runner.run(case) for case in cases]
    except RmsnormDeployError as error:
        if feeds is not None:
            raise
        proof.unproven = f"the whole model was not compared: {' '.join(str(error).split())[:300]}"
        return proof
    with OrtRunner(after, session_options=options) as runner:
        results = [runner.run(case) for case in cases]
    yardsticks: list[list[dict[str, Array]]] = []
    for number in range(_ROUNDINGS):
        say(f"running the whole model with a rounding at each norm: {number + 1} of {_ROUNDINGS}")
        data = _rounded(rewritten, seed + number)
        with OrtRunner(data, weights_folder=before.parent, session_options=options) as runner:
            yardsticks.append([runner.run(case) for case in cases])
    proof.model = [
        _judged(name, results[index][name], truths[index][name], [side[index][name] for side in yardsticks])
        for index in range(len(cases))
        for name in truths[index]
    ]
    return proof


def _judged(name: str, candidate: Array, truth: Array, yardsticks: Sequence[Array]) -> OutputVerdict:
    """The verdict by the most sensitive of the yardsticks."""
    exact = np.asarray(truth)
    wide = exact.astype(np.float64) if exact.dtype.kind == "f" or exact.dtype.name == "bfloat16" else exact
    verdict = None
    for yardstick in yardsticks:
        verdict = judge(name, candidate, wide, yardstick, yardstick_name="the file before with a rounding at each norm")
        if verdict.passed:
            break
    assert verdict is not None
    return verdict


def _finite(after: Path, cases: Sequence[Mapping[str, Array]], options: Mapping[str, Any]) -> list[OutputVerdict]:
    """The new file by itself, where the one before does not load: it must run, and give what is finite."""
    verdicts = []
    with OrtRunner(after, session_options=options) as runner:
        for case in cases:
            for name, array in runner.run(case).items():
                values = array.astype(np.float64) if array.dtype.kind == "f" else np.zeros(1)
                finite = bool(np.isfinite(values).all())
                reason = "finite, where the file before does not load" if finite else "not finite"
                verdicts.append(OutputVerdict(name, finite, reason, None, None))
    return verdicts


def _rejection(before: Path, options: Mapping[str, Any]) -> str | None:
    """Why ONNX Runtime does not load the file before; None where it does."""
    try:
        with OrtRunner(before, session_options=options):
            return None
    except RmsnormDeployError as error:
        return " ".join(str(error).split())[:300]


def _cases(
    model: ir.Model, infos: Sequence[TensorInfo], feeds: Mapping[str, Array] | None, seed: int
) -> list[dict[str, Array]]:
    if feeds is not None:
        return [cast_feeds(feeds, infos)]
    vocabulary = _vocabulary(model)
    return [make_feeds(infos, batch, length, seed, vocabulary) for batch, length in _SHAPES]


def _vocabulary(model: ir.Model) -> int | None:
    """The number of token ids: rows of the smallest table that whole-number inputs look up."""
    sizes = []
    for value in model.graph.inputs:
        reached = {value}
        for _ in range(3):
            for use in [use for v in reached for use in v.uses()]:
                if use.node.op_type == "Gather" and use.idx == 1 and use.node.inputs[0] is not None:
                    table = use.node.inputs[0].shape
                    if table is not None and len(table) == 2 and isinstance(table[0], int):
                        sizes.append(table[0])
                elif use.node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze"):
                    reached.add(use.node.outputs[0])
    return min(sizes, default=None)


def _rounded(rewritten: Rewritten, seed: int) -> bytes:
    """The model before, with each norm's result multiplied by 1 +- eps of its dtype."""
    original = rewritten.original
    names = {site.before.y.name: number for number, site in enumerate(rewritten.sites)}
    model = original.clone()
    for node in list(model.graph.all_nodes()):
        for value in node.outputs:
            if value.name in names and value.dtype is not None and isinstance(node.graph, ir.Graph):
                _round(model.graph, value, node, seed, names[value.name])
    return ir.to_proto(model).SerializeToString()


def _round(root: ir.Graph, value: ir.Value, node: ir.Node, seed: int, number: int) -> None:
    dtype = value.dtype
    if dtype is None or not isinstance(node.graph, ir.Graph):
        return
    last = value.shape[-1] if value.shape is not None and len(value.shape) else 1
    rng = np.random.default_rng([seed, number])
    signs = rng.choice([-1.0, 1.0], last if isinstance(last, int) else 1)
    eps = format_of(numpy_dtype(dtype_name(dtype))).eps
    factor = ir.Value(
        name=f"rounding.{number}", const_value=ir.Tensor((1 + eps * signs).astype(dtype.numpy()), dtype=dtype)
    )
    factor.name = f"rounding.{number}"
    root.register_initializer(factor)
    uses = list(value.uses())
    made = ir.node("Mul", [value, factor], name=f"rounding.{number}")
    made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = f"{value.name}.rounded", value.type, value.shape
    node.graph.insert_after(node, made)
    for use in uses:
        use.node.replace_input_with(use.idx, made.outputs[0])
