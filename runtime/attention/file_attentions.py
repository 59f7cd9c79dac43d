"""The attentions in an ONNX file (`FileAttentions`): locate them by the metadata on their nodes, and run them alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ...export.graph.metadata import ATTENTION_KEY, VALUES_KEY
from ...export.lowering.in_place_cache import GROUPED
from ...models.dtypes import numpy_dtype
from ...models.recognition.site import norm_name
from ..norms.activation_store import Key
from ..norms.cut import Cut
from ..norms.graph_norms import cut_name, read_by
from ..norms.onnx_norms import OnnxNorms
from ..runners.base import Array
from .torch_attentions import AttentionFeed

# The values at which an attention is cut out; sinks are constants, which stay in it as a norm's weight does.
INPUTS = ("query", "key", "value", "bias", "past_key", "past_value")
# Those that hold the heads of a token in one row where `AttentionPlace.heads` is given.
_IN_ROWS = ("query", "key", "value")
_ABSENT = "no node of the candidate names this attention in its metadata"


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlace:
    """One attention in a graph.

    Attributes:
        key: module path and number of the call.
        operator: the operator of its main node.
        inputs: the values that it reads, by the names in `INPUTS`.
        y: its result.
        heads: H, where the values have all heads of a token in one row, `[B, S, H D]`; otherwise None.
        dtype: numpy's name of the dtype of its query.
    """

    key: Key
    operator: str
    inputs: Mapping[str, ir.Value]
    y: ir.Value
    heads: int | None
    dtype: str


class FileAttentions:
    """The attentions of a file.

    Args:
        access: the norms of the same file.
        rows: the attentions in the manifest of the file.

    Attributes:
        places: the attentions that can be cut out, in graph order.
        problems: the paths of the others, with the reason.
    """

    def __init__(self, access: OnnxNorms, rows: Iterable[Mapping[str, Any]]) -> None:
        self._access = access
        self.problems: dict[str, str] = {}
        self.places: dict[Key, AttentionPlace] = {}
        wanted = []
        for row in rows:
            if row.get("node") is None:
                self.problems[row["path"]] = f"the export did not capture it: {row.get('reason', 'no reason is known')}"
            else:
                wanted.append(row["path"])
        wanted = [path for path in wanted if path not in self.problems]
        if access.in_engines and wanted:
            reason = "its inputs have many shapes, and TensorRT would need an engine for each of them"
            self.problems.update(dict.fromkeys(wanted, reason))
            return
        values = {str(value.name): value for value in access.graph.values()}
        numbers: Counter[str] = Counter()
        for node in access.graph.model.graph:
            record = _json(node.metadata_props.get(ATTENTION_KEY))
            if record is None or record.get("path") not in wanted:
                continue
            key = (str(record["path"]), numbers[record["path"]])
            numbers[record["path"]] += 1
            place = self._place(key, node, values)
            if isinstance(place, str):
                self.problems[key[0]] = place
            else:
                self.places[key] = place
        self.problems |= {path: _ABSENT for path in wanted if path not in numbers}

    @property
    def notes(self) -> list[str]:
        """A note on each attention that cannot be checked alone."""
        return [f"{norm_name(path)} could not be checked alone: {reason}" for path, reason in self.problems.items()]

    @contextmanager
    def alone(self, keys: Sequence[Key]) -> Iterator[Any]:
        """A function that runs each of these attentions alone; it takes feeds and returns results by key."""
        places = {cut_name(key): self.places[key] for key in keys}
        cuts = [Cut(name, dict(place.inputs), {"y": place.y}) for name, place in places.items()]
        with self._access.cut_out(cuts) as run_cuts:

            def run(feeds: Mapping[Key, AttentionFeed]) -> dict[Key, Array]:
                given = {name: _arrays(place, feeds[place.key]) for name, place in places.items()}
                results = run_cuts(given)
                return {place.key: _heads_of(place, results[name]["y"]) for name, place in places.items()}

            yield run

    def _place(self, key: Key, main: ir.Node, values: Mapping[str, ir.Value]) -> AttentionPlace | str:
        names = _json(main.metadata_props.get(VALUES_KEY))
        if names is None or not {"query", "key", "value", "y"} <= names.keys():
            return f"its node has no metadata {VALUES_KEY} that name its inputs and its result"
        # A bias that nothing reads may have been removed: then the attention does without it.
        roles = {role: name for role, name in names.items() if role != "bias" or name in values}
        missing = [name for name in roles.values() if name not in values]
        if missing:
            return f"its metadata name the value {missing[0]!r}, which is missing in the file"
        inputs = {role: values[roles[role]] for role in INPUTS if role in roles}
        if len(set(inputs.values())) < len(inputs):
            return "its metadata name one value twice"
        y = values[roles["y"]]
        nodes, outside = _between(y, set(inputs.values()))
        if main not in nodes:
            return "its metadata name a result that other nodes compute"
        if outside:
            return f"it also reads {', '.join(sorted(outside))}, computed from the model's inputs"
        heads = None
        if main.op_type == GROUPED:
            heads = main.attributes.get_int("num_heads", 0)
            if heads < 1:
                return "its node does not tell its number of heads"
        return AttentionPlace(key, main.op_type, inputs, y, heads, self._access.graph.dtype(roles["query"]))


def _between(y: ir.Value, inputs: set[ir.Value]) -> tuple[set[ir.Node], set[str]]:
    """The nodes that compute `y` from the inputs, and the names of the model's inputs that they read besides."""
    nodes: set[ir.Node] = set()
    outside: set[str] = set()
    pending = [y]
    while pending:
        value = pending.pop()
        if value in inputs:
            continue
        node = value.producer()
        if node is None:
            if value.is_graph_input() and not value.is_initializer():
                outside.add(str(value.name))
        elif node not in nodes:
            nodes.add(node)
            pending.extend(read_by(node))
    return nodes, outside


def _json(text: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _arrays(place: AttentionPlace, feed: AttentionFeed) -> dict[str, Array]:
    """The inputs by role, in the dtype of the file."""
    dtype = numpy_dtype(place.dtype)
    given: dict[str, Array | None] = {"query": feed.query, "key": feed.key, "value": feed.value, "bias": feed.bias}
    if "past_key" in place.inputs:  # it joins the cache and the new keys itself
        past = feed.key.shape[2] - feed.query.shape[2]
        given |= {"past_key": feed.key[:, :, :past], "past_value": feed.value[:, :, :past]}
        given |= {"key": feed.key[:, :, past:], "value": feed.value[:, :, past:]}
    if place.heads is not None:
        rows = {role: array for role in _IN_ROWS if (array := given[role]) is not None}
        given |= {role: array.transpose(0, 2, 1, 3).reshape(*_ends(array), -1) for role, array in rows.items()}
    given = {role: given[role] for role in place.inputs}
    return {role: array.astype(dtype, copy=False) for role, array in given.items() if array is not None}


def _ends(array: Array) -> tuple[int, int]:
    """Batch and length of `[B, H, S, D]`."""
    return array.shape[0], array.shape[2]


def _heads_of(place: AttentionPlace, y: Array) -> Array:
    """The result as `[B, S, H, D]`."""
    return y if place.heads is None else y.reshape(*y.shape[:2], place.heads, -1)
