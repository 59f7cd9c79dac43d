"""Prove that each rewritten attention computes the same as the original one (`prove_attentions`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...export.from_onnx.rewrite import Rewritten
from ...export.from_onnx.rewrite_attentions import RewrittenAttention
from ...export.recognition.attention_proof import CASES, attend, feeds_of
from ...models.errors import EnvironmentMissingError, RmsnormDeployError
from ..accuracy.compare_output import OutputVerdict, judge
from ..norms.check_norm import summary_of
from ..norms.cut import Cut, cut_out, run_alone
from ..runners.base import Array
from .verify_norms import Progress, SiteProof

_NAME = "attention"
_ORIGINAL = "the original file"
_SILENT = "nothing to attend to"


def prove_attentions(rewritten: Rewritten, folder: Path, *, seed: int, progress: Progress) -> list[SiteProof]:
    """Run every rewritten attention and its original in ONNX Runtime, on random inputs of several sizes.

    The reference is the formula in float64, the baseline the original attention.

    Args:
        rewritten: both graphs.
        folder: the folder of the original's external data.
        seed: seed of the inputs.
        progress: called with a line of text for each attention.

    Raises:
        EnvironmentMissingError: onnxruntime is not installed.
    """
    proofs = []
    for number, row in enumerate(rewritten.attentions):
        progress(f"running attentions alone: {number + 1} of {len(rewritten.attentions)}")
        name = row.before.path or f"attention {number}"
        try:
            verdicts = _verdicts(rewritten, row, folder, seed)
        except EnvironmentMissingError:
            raise
        except RmsnormDeployError as error:
            proofs.append(SiteProof(number, name, "unproven", " ".join(str(error).split())[:300]))
            continue
        passed, reason = summary_of(verdicts)
        proofs.append(SiteProof(number, name, "pass" if passed else "mismatch", reason, verdicts))
    return proofs


def _verdicts(rewritten: Rewritten, row: RewrittenAttention, folder: Path, seed: int) -> list[OutputVerdict]:
    site = row.before
    roles = {value: f"x{index}" for index, value in enumerate(dict.fromkeys(site.inputs))}
    after = {roles[value]: now for value, now in zip(site.inputs, row.inputs, strict=True)}
    before = {role: value for value, role in roles.items()}
    targets = [value for value in site.targets if value not in roles]
    before |= {f"shape{index}": value for index, value in enumerate(targets)}
    names = roles | {value: f"shape{index}" for index, value in enumerate(targets)}
    kinds = []
    for case in CASES:
        kinds.append((f"{case[0]} x {case[1]} queries, {case[2]} keys", case, False))
    if _absorbs(row):
        kinds.append((_SILENT, CASES[0], True))
    feeds = []
    for number, (_, case, silent) in enumerate(kinds):
        made = feeds_of(site, case, np.random.default_rng([seed, number]), silent=silent)
        feeds.append({value: _stored(value, array) for value, array in made.items()})
    original = _run(rewritten.original, before, row.original, folder, [_named(names, one) for one in feeds])
    result = _run(rewritten.model, after, row.result, folder, [_named(names, one) for one in feeds])
    turned = row.original is not site.y
    verdicts = []
    for (kind, _, _), given, own, mine in zip(kinds, feeds, original, result, strict=True):
        wide = {v: a.astype(np.float64) if a.dtype.kind not in "biu" else a for v, a in given.items()}
        exact = attend(site, wide)
        exact = exact.transpose(0, 2, 1, 3) if turned else exact
        verdicts.append(judge(kind, mine, exact, own, baseline_name=_ORIGINAL))
    return verdicts


def _absorbs(row: RewrittenAttention) -> bool:
    """Whether the original gives a query that attends to nothing the average of the values, whatever its scores are."""
    parts = row.before.parts
    finite = len(parts) == 1 and np.isfinite(parts[0].number)
    return finite and row.before.query.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _stored(value: ir.Value, array: Array) -> Array:
    """An input in the dtype of the file, which has no infinite numbers."""
    assert value.dtype is not None
    if not value.dtype.is_floating_point():
        return array
    kind = value.dtype.numpy()
    import ml_dtypes

    return np.maximum(array, float(ml_dtypes.finfo(kind).min)).astype(kind)


def _named(names: Mapping[ir.Value, str], feeds: Mapping[ir.Value, Array]) -> dict[str, Array]:
    return {names[value]: array for value, array in feeds.items() if value in names}


def _run(
    model: ir.Model, inputs: dict[str, ir.Value], y: ir.Value, folder: Path, feeds: list[dict[str, Array]]
) -> list[Array]:
    cut = cut_out(model, [Cut(_NAME, inputs, {"y": y})])
    options: dict[str, Any] = {"intra_op_num_threads": 1}
    with run_alone(cut, "cpu", folder, {}, session_options=options) as run:
        return [run({_NAME: {role: feed[role] for role in inputs}})[_NAME]["y"] for feed in feeds]
