"""Prove that a rewritten file as a whole computes the same as the original file (`prove_model`).

There is no float64 reference for the whole model. Its outputs are compared with those of the original file; the
baseline is the original file with the result of each norm, and of each attention that was rewritten, multiplied by
1 +- eps, that is, with one rounding at each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...export.from_onnx.rewrite import Rewritten
from ...models.dtypes import numpy_dtype, onnx_name
from ...models.errors import EnvironmentMissingError, MismatchError, RmsnormDeployError
from ..accuracy.compare_output import OutputVerdict, judge
from ..accuracy.errors import errors_of, is_exact, kind_of
from ..accuracy.float_formats import format_of
from ..inputs.synthetic import cast_feeds, make_feeds
from ..runners.base import Array, TensorInfo
from ..runners.open import has_large_weights, open_runner
from .verify_norms import Progress, Proof

# Batch and length of generated inputs, and the number of baselines with other roundings that are tried before a
# difference is a mismatch: where a model selects (top k, experts), each rounding changes a few selections near a tie.
_SHAPES, _ROUNDINGS = ((1, 3), (2, 9)), 6
# The new file may change this many times as many integers as the roundings do: both are samples of the same near ties.
_CHOICES_FACTOR = 2
_BEFORE, _ROUNDED = "the original file", "the original file with a rounding at each norm"

Outputs = dict[str, Array]


def prove_model(
    rewritten: Rewritten,
    before: Path,
    after: Path,
    proof: Proof,
    *,
    feeds: Mapping[str, Array] | None,
    seed: int,
    progress: Progress,
) -> Proof:
    """Run both files as a whole and add the verdicts to the proof.

    Args:
        rewritten: both graphs.
        before: the original file.
        after: the rewritten file.
        proof: the proof of the norms alone.
        feeds: inputs of the model; generated in two shapes if None.
        seed: seed of the generated inputs and of the baseline's roundings.
        progress: called with a line of text at each step.

    Raises:
        MismatchError: the original file runs, but the rewritten file does not.
        UsageError: the original file does not run on the given inputs.
        EnvironmentMissingError: onnxruntime is not installed.
    """
    progress("running the whole model")
    large = has_large_weights([path for path in after.parent.rglob("*") if path.is_file()])
    options = {"repack_weights": not large}
    loaded = False
    try:
        with open_runner(before, session_options=options) as runner:
            loaded = True
            cases = _cases(rewritten.model, runner.inputs(), feeds, seed)
            references = [runner.run(case) for case in cases]
    except EnvironmentMissingError:
        raise
    except RmsnormDeployError as error:
        if not loaded:
            return _prove_alone(rewritten, after, proof, feeds, seed, options, _short(error))
        if feeds is not None:
            raise
        proof.unproven = f"the whole model was not compared: {_short(error)}"
        return proof
    try:
        with open_runner(after, session_options=options) as runner:
            results = [runner.run(case) for case in cases]
    except RmsnormDeployError as error:
        raise MismatchError(f"{_BEFORE} runs in ONNX Runtime, but the rewritten file does not: {error}") from error
    empty = [name for name in references[0] if not any(_says_something(case[name]) for case in references)]
    if empty and len(empty) == len(references[0]):
        proof.unproven = (
            f"the whole model was not compared: {_BEFORE} returns no finite values on these inputs; give --inputs"
        )
        return proof
    if empty:
        proof.notes.append(f"{', '.join(empty)} not compared: {_BEFORE} returns no finite values on these inputs")
    try:
        proof.model = _compared(rewritten, before, cases, references, results, seed, options, progress)
    except RmsnormDeployError as error:
        proof.unproven = f"the whole model was not compared: {_ROUNDED} does not run: {_short(error)}"
    return proof


def _compared(
    rewritten: Rewritten,
    before: Path,
    cases: Sequence[Mapping[str, Array]],
    references: Sequence[Outputs],
    results: Sequence[Outputs],
    seed: int,
    options: Mapping[str, Any],
    progress: Progress,
) -> list[OutputVerdict]:
    """A verdict for each output of each case; further roundings are tried until all pass, usually none is required."""
    keys = [(index, name) for index, reference in enumerate(references) for name in reference]
    baselines = {(index, name): references[index][name] for index, name in keys}
    verdicts = {
        (index, name): _judged(name, results[index][name], references[index][name], references[index][name])
        for index, name in keys
    }
    for number in range(_ROUNDINGS):
        if all(verdict.passed for verdict in verdicts.values()):
            break
        progress(f"running the whole model with a rounding at each norm: {number + 1}")
        data = _rounded(rewritten, seed + number)
        with open_runner(data, weights_folder=before.parent, session_options=options) as runner:
            rounded = [runner.run(case) for case in cases]
        for index, name in keys:
            reference = references[index][name]
            baseline = _worse(baselines[index, name], rounded[index][name], reference)
            baselines[index, name] = baseline
            if not verdicts[index, name].passed:
                verdicts[index, name] = _judged(name, results[index][name], reference, baseline)
    return list(verdicts.values())


def _worse(one: Array, other: Array, reference: Array) -> Array:
    """For each element, that of the two baselines which has the larger error."""
    if other.shape != reference.shape or kind_of(reference.dtype) == "unsupported":
        return one  # the shape depends on the values: a rounding that changes it gives no information on the elements
    wide = reference.astype(np.float64)
    sizes = [np.nan_to_num(errors_of(side, wide, None).size, nan=0.0, posinf=np.inf) for side in (one, other)]
    return np.where(sizes[1] > sizes[0], other, one)


def _judged(name: str, candidate: Array, reference: Array, baseline: Array) -> OutputVerdict:
    """The verdict on one output; integers may differ if the roundings change integers too."""
    if not is_exact(reference.dtype):
        wide = reference.astype(np.float64) if kind_of(reference.dtype) == "floating-point" else reference
        return judge(name, candidate, wide, baseline, baseline_name=_ROUNDED)
    verdict = judge(name, candidate, reference, reference, baseline_name=_BEFORE)
    changed = int(np.count_nonzero(baseline != reference))
    if verdict.passed or not changed or candidate.shape != reference.shape or not is_exact(candidate.dtype):
        return verdict
    count = int(np.count_nonzero(candidate != reference))
    reason = f"{count} of {reference.size} elements differ; a rounding at each norm changes {changed} of them"
    return OutputVerdict(name, count <= _CHOICES_FACTOR * changed, reason, None, None)


def _says_something(array: Array) -> bool:
    """Whether the array has any element that can be compared."""
    if kind_of(array.dtype) != "floating-point":
        return array.size > 0
    return bool(np.isfinite(array.astype(np.float64)).any())


def _prove_alone(
    rewritten: Rewritten,
    after: Path,
    proof: Proof,
    feeds: Mapping[str, Array] | None,
    seed: int,
    options: Mapping[str, Any],
    rejected: str,
) -> Proof:
    """Check the rewritten file alone if the original one cannot be loaded: it must run and return finite values."""
    verdicts = []
    try:
        with open_runner(after, session_options=options) as runner:
            for case in _cases(rewritten.model, runner.inputs(), feeds, seed):
                for name, array in runner.run(case).items():
                    finite = kind_of(array.dtype) != "floating-point" or np.isfinite(array.astype(np.float64)).all()
                    reason = f"{'finite' if finite else 'not finite'}; {_BEFORE} cannot be loaded"
                    verdicts.append(OutputVerdict(name, bool(finite), reason, None, None))
    except RmsnormDeployError as error:
        cause = _short(error)
        proof.unproven = (
            f"ONNX Runtime cannot load {_BEFORE} ({rejected}), and the rewritten file does not run: {cause}"
        )
        return proof
    proof.notes.append(f"{_BEFORE} cannot be loaded: {rejected}")
    proof.model, proof.alone = verdicts, True
    return proof


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _cases(
    model: ir.Model, infos: Sequence[TensorInfo], feeds: Mapping[str, Array] | None, seed: int
) -> list[dict[str, Array]]:
    if feeds is not None:
        return [cast_feeds(feeds, infos)]
    vocabulary = _vocabulary(model)
    return [make_feeds(infos, batch, length, seed, vocabulary) for batch, length in _SHAPES]


def _vocabulary(model: ir.Model) -> int | None:
    """The number of token ids: rows of the smallest table that is indexed by an input; None if there is none."""
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
    """The original model with the result of each norm and rewritten attention multiplied by 1 +- eps of its dtype."""
    original = rewritten.original
    model = original.clone()
    twins = dict(zip(original.graph.all_nodes(), model.graph.all_nodes(), strict=True))
    prefix = _free_name(model)
    for number, site in enumerate(rewritten.sites):
        node, index = site.before.y.producer(), site.before.y.index()
        if node is not None and index is not None:
            _round(model.graph, twins[node].outputs[index], f"{prefix}.{number}", [seed, number])
    for number, attention in enumerate(rewritten.attentions, len(rewritten.sites)):
        node = attention.original.producer()
        if node is not None:
            _round(model.graph, twins[node].outputs[0], f"{prefix}.{number}", [seed, number])
    return ir.to_proto(model).SerializeToString()


def _free_name(model: ir.Model) -> str:
    """A prefix that no name in the model has."""
    graphs = (model.graph, *model.graph.subgraphs())
    taken = {value.name or "" for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
    taken.update(value.name or "" for node in model.graph.all_nodes() for value in node.outputs)
    prefix = "rounding"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    return prefix


def _round(root: ir.Graph, value: ir.Value, name: str, seed: Sequence[int]) -> None:
    """Insert a rounding after a value, for all its readers and for graph outputs."""
    node, dtype = value.producer(), value.dtype
    if node is None or not isinstance(node.graph, ir.Graph) or dtype is None:
        return
    last = value.shape[-1] if value.shape is not None and len(value.shape) else 1
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], last if isinstance(last, int) else 1)
    eps = format_of(numpy_dtype(onnx_name(dtype))).eps
    tensor = ir.Tensor((1 + eps * signs).astype(dtype.numpy()), dtype=dtype, name=name)
    factor = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
    root.register_initializer(factor)
    uses = list(value.uses())
    made = ir.node("Mul", [value, factor], name=name)
    rounded = made.outputs[0]
    rounded.name, rounded.type, rounded.shape = f"{name}.y", value.type, value.shape
    node.graph.insert_after(node, made)
    for use in uses:
        use.node.replace_input_with(use.idx, rounded)
    for position, output in enumerate(node.graph.outputs):
        if output is value:
            node.graph.outputs[position] = rounded
    if rounded.is_graph_output():
        value.name, rounded.name = rounded.name, value.name
