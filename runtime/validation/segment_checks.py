"""Check every segment between norms (`check_segments`).

Both sides receive the same values at every norm, so that only the error of the segment itself is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.recognition.site import norm_name
from ..accuracy.compare_output import OutputVerdict, brief, judge
from ..accuracy.tolerances import Limits
from ..norms.access import CalledNorm, NormAccess
from ..norms.activation_store import ActivationStore, Key
from ..norms.torch_norms import TorchNorms
from ..runners.base import Array
from .run_cases import behind_padding, is_last_token, last_token


@dataclass(frozen=True, slots=True)
class SegmentCheck:
    """The check of a segment between norms, which ends at a norm's input or at an output of the model.

    Attributes:
        name: its first and its last norm.
        verdict: the verdict on the value at its end.
        contains: norms inside it that could not be checked alone.
        end: the norm whose x is its end; None for a gate or an output.
        attentions: modules of attentions inside it.
    """

    name: str
    verdict: OutputVerdict
    contains: list[str]
    end: Key | None = None
    attentions: frozenset[str] = frozenset()

    def to_dict(self, index: int) -> dict[str, Any]:
        """The check as JSON values."""
        row = brief(self.verdict)
        row.pop("name")
        return {"name": self.name, "index": index, "contains": self.contains, **row}


def check_segments(
    candidate: NormAccess,
    baseline: TorchNorms,
    feeds: tuple[Mapping[str, Array], Mapping[str, Array]],
    keys: list[Key],
    store: ActivationStore,
    describe: Callable[[Key | str], tuple[str, list[str]]],
    outputs: SegmentOutputs,
    limits: Limits | None = None,
) -> list[SegmentCheck]:
    """Run the segments between norms on the store's values.

    Args:
        candidate: the side that is checked.
        baseline: PyTorch.
        feeds: the inputs of the candidate, and those of PyTorch.
        keys: norms to cut at, in order of execution.
        store: filled by `TorchNorms.write_reference`; `own_x` and `own_gate` are added.
        describe: returns the name of the segment that ends at a norm or an output, and the norms inside it.
        outputs: the reference's outputs, and the names of PyTorch's outputs.
        limits: explicit limits that replace the comparison with PyTorch's own error.
    """
    found: dict[tuple[Key, str], SegmentCheck] = {}

    def compare(key: Key, role: str, value: Array) -> None:
        sides = judged_rows(feeds[0], value, store.get(key, role), store.get(key, f"own_{role}"))
        verdict = judge(role, *sides, limits=limits)
        name, inside = describe(key)
        is_x = role == "x"
        found[key, role] = SegmentCheck(
            name if is_x else f"{name} (its gate)", verdict, inside, key if is_x else None, attentions(key)
        )

    def attentions(end: Key | str) -> frozenset[str]:
        return candidate.sources(keys, end).attentions

    own_outputs = baseline.between(feeds[1], keys, store, lambda k, role, v: store.put(k, f"own_{role}", v))
    results = candidate.between(feeds[0], keys, store, compare)
    checks = [found[key, role] for key in keys for role in ("x", "gate") if (key, role) in found]
    own = outputs.named(own_outputs)
    for name in (name for name in outputs.reference if name in results):
        segment, inside = describe(name)
        got, true, wanted = results[name], outputs.reference[name], own[name]
        if is_last_token(got, wanted):
            true, wanted = last_token(true, got), last_token(wanted, got)
        verdict = judge(name, *judged_rows(feeds[0], got, true, wanted), limits=limits)
        checks.append(SegmentCheck(segment, verdict, inside, attentions=attentions(name)))
    return checks


def judged_rows(feeds: Mapping[str, Array], got: Array, true: Array, own: Array) -> tuple[Array, Array, Array]:
    """The rows of a value that are judged: not those of padding on the left, whose queries attend to nothing.

    Their attention differs between implementations. Where a model reads them, its outputs show it.

    Args:
        feeds: the inputs, with `attention_mask`, `[B, S]`, if there is padding.
        got: the candidate's value; `[B, S, ...]` or `[B, H, S, D]` where its tokens are known.
        true: the reference's.
        own: PyTorch's.
    """
    mask = feeds.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.all() or not got.shape == true.shape == own.shape:
        return got, true, own
    seen = behind_padding(mask)
    for axis in (1, 2):
        if got.ndim > axis + 1 and (got.shape[0], got.shape[axis]) == seen.shape:
            places = [np.moveaxis(side, axis, 1)[seen] for side in (got, true, own)]
            return places[0], places[1], places[2]
    return got, true, own


@dataclass(frozen=True, slots=True)
class SegmentOutputs:
    """The outputs with which segments that end in outputs are compared.

    Attributes:
        reference: the outputs that `TorchNorms.write_reference` returned, under the candidate's names.
        named: renames PyTorch's outputs to the candidate's names.
    """

    reference: Mapping[str, Array]
    named: Callable[[dict[str, Array]], dict[str, Array]]


def segment_names(
    candidate: NormAccess, called: Mapping[Key, CalledNorm], keys: list[Key], lost: frozenset[Key], cut: list[Key]
) -> Callable[[Key | str], tuple[str, list[str]]]:
    """A function that returns the name of a segment, given the norm or output at its end, and the norms inside it.

    A norm that could not be cut out is inside the segment that contains its nodes. A norm without nodes may be anywhere
    between the inputs of the segment and its end.

    Args:
        candidate: the side that is checked.
        called: the norms that PyTorch called, in order.
        keys: norms that the candidate has too.
        lost: norms that have no node at all in the candidate.
        cut: norms at which the model is cut.
    """
    order = list(called)

    def describe(end: Key | str) -> tuple[str, list[str]]:
        sources = candidate.sources(cut, end)
        first = -1 if sources.reads_inputs else min((order.index(key) for key in sources.keys), default=-1)
        last = order.index(end) if not isinstance(end, str) else len(order)
        between = order[first + 1 : last]
        inside = [
            norm_name(*key) for key in order
            if key not in keys and (key[0] in sources.paths or (key in between and key in lost))
        ]  # fmt: skip
        begin = norm_name(*max(sources.keys, key=order.index)) if sources.keys else "the inputs"
        return f"{begin} ... {end if isinstance(end, str) else norm_name(*end)}", inside

    return describe
