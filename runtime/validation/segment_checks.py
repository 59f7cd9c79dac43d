"""The check of every segment between norms.

Both sides are fed the same values at every norm, so that only what a segment itself introduces is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..accuracy.compare_output import OutputVerdict, brief, judge
from ..norms.access import CalledNorm, NormAccess, norm_name
from ..norms.activation_store import ActivationStore, Key
from ..norms.torch_norms import TorchNorms
from ..runners.base import Array


@dataclass(frozen=True, slots=True)
class SegmentCheck:
    """What lies between norms, up to one norm's input or one output of the model.

    Attributes:
        name: from which norms to which.
        verdict: on the value at its end.
        contains: norms inside that could not be checked by themselves.
        end: the norm whose x is at its end; None for a gate or an output.
    """

    name: str
    verdict: OutputVerdict
    contains: list[str]
    end: Key | None = None

    def to_dict(self, index: int) -> dict[str, Any]:
        """The check as the JSON interface shows it."""
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
) -> list[SegmentCheck]:
    """Run the segments between norms, fed with the store's values at each of them.

    Args:
        candidate: the side that is checked.
        baseline: PyTorch.
        feeds: the inputs of the candidate, and those of PyTorch.
        keys: norms to cut at, in order of execution.
        store: what `TorchNorms.write_reference` wrote; `own_x` and `own_gate` are added.
        describe: the name of the segment before a norm or an output, and the norms inside it.
        outputs: the reference's outputs, and how to name PyTorch's.
    """
    found: dict[tuple[Key, str], SegmentCheck] = {}

    def compare(key: Key, role: str, value: Array) -> None:
        verdict = judge(role, value, store.get(key, role), store.get(key, f"own_{role}"))
        name, inside = describe(key)
        is_x = role == "x"
        found[key, role] = SegmentCheck(name if is_x else f"{name} (its gate)", verdict, inside, key if is_x else None)

    own_outputs = baseline.between(feeds[1], keys, store, lambda k, role, v: store.put(k, f"own_{role}", v))
    results = candidate.between(feeds[0], keys, store, compare)
    checks = [found[key, role] for key in keys for role in ("x", "gate") if (key, role) in found]
    own = outputs.named(own_outputs)
    for name in (name for name in outputs.reference if name in results):
        segment, inside = describe(name)
        checks.append(SegmentCheck(segment, judge(name, results[name], outputs.reference[name], own[name]), inside))
    return checks


@dataclass(frozen=True, slots=True)
class SegmentOutputs:
    """What the segments that end in outputs are held to.

    Attributes:
        reference: what `TorchNorms.write_reference` returned, under the candidate's names.
        named: gives PyTorch's outputs those names.
    """

    reference: Mapping[str, Array]
    named: Callable[[dict[str, Array]], dict[str, Array]]


def segment_names(
    candidate: NormAccess, called: Mapping[Key, CalledNorm], keys: list[Key], lost: frozenset[Key], cut: list[Key]
) -> Callable[[Key | str], tuple[str, list[str]]]:
    """Gives, for the norm or output at its end, the name of a segment and the norms inside it.

    A norm that could not be cut out is inside where its nodes are. One that has no node left may be anywhere between
    what goes into the segment and its end.

    Args:
        candidate: says what a segment is computed from.
        called: the norms that PyTorch called, in order.
        keys: those that the candidate has too.
        lost: those of which the candidate has no node at all.
        cut: those at which the model is cut.
    """
    order = list(called)

    def describe(end: Key | str) -> tuple[str, list[str]]:
        sources = candidate.sources(cut, end)
        first = -1 if sources.reads_inputs else min((order.index(key) for key in sources.keys), default=-1)
        last = order.index(end) if not isinstance(end, str) else len(order)
        between = order[first + 1 : last]
        inside = [
            norm_name(key) for key in order
            if key not in keys and (key[0] in sources.paths or (key in between and key in lost))
        ]  # fmt: skip
        begin = norm_name(max(sources.keys, key=order.index)) if sources.keys else "the inputs"
        return f"{begin} ... {end if isinstance(end, str) else norm_name(end)}", inside

    return describe
