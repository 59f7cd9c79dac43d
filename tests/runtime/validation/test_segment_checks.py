"""The segments between norms: what each is held to, and how it is called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
from rmsnorm_deploy.runtime.norms.access import CalledNorm, Sources
from rmsnorm_deploy.runtime.norms.activation_store import ActivationStore, Key
from rmsnorm_deploy.runtime.validation.segment_checks import (
    SegmentCheck,
    SegmentOutputs,
    check_segments,
    segment_names,
)
from tests.helpers.runtime.stand_ins import called, segment

A, B, C, D = ("a", 0), ("b", 0), ("c", 0), ("d", 0)
TRUE = np.random.default_rng(0).standard_normal((4, 64))
RIGHT = TRUE.astype(np.float32)
WRONG = RIGHT * np.float32(1.01)


class Side:
    """Gives values at norms, and outputs."""

    def __init__(self, values: Mapping[tuple[Key, str], np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        self._values, self._outputs = values, outputs
        self.asked: list[tuple[Any, ...]] = []

    def between(self, feeds: Any, keys: list[Key], store: ActivationStore, sink: Any) -> dict[str, np.ndarray]:
        self.asked.append((feeds, list(keys), store))
        for (key, role), value in self._values.items():
            sink(key, role, value)
        return self._outputs

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        return Sources(keys, attentions=frozenset({"attention"} if end == B else ()))


def checked(
    mine: Mapping[tuple[Key, str], np.ndarray],
    outputs: dict[str, np.ndarray] | None = None,
    limits: Limits | None = None,
) -> list[SegmentCheck]:
    """PyTorch is right everywhere; the norm `b` has a gate too."""
    places = [(A, "x"), (B, "x"), (B, "gate")]
    own = Side(dict.fromkeys(places, RIGHT), {"output": RIGHT})
    candidate = Side(mine, {"y": RIGHT} if outputs is None else outputs)
    feeds: Any = ({"mine": RIGHT}, {"own": RIGHT})
    with ActivationStore() as store:
        for key, role in places:
            store.put(key, role, TRUE)
        found = check_segments(
            candidate, own, feeds, [A, B], store,  # type: ignore[arg-type]
            lambda end: (f"to {end if isinstance(end, str) else end[0]}", ["inside"] if end == B else []),
            SegmentOutputs({"y": TRUE}, lambda found: {"y": found["output"]}), limits,
        )  # fmt: skip
        assert candidate.asked == [(feeds[0], [A, B], store)]
        assert own.asked == [(feeds[1], [A, B], store)]
    return found


def test_every_segment_is_held_to_what_pytorch_has_at_its_end() -> None:
    found = checked({(B, "gate"): RIGHT, (B, "x"): RIGHT, (A, "x"): RIGHT})
    assert [(check.name, check.end, check.contains) for check in found] == [
        ("to a", A, []),
        ("to b", B, ["inside"]),
        ("to b (its gate)", None, ["inside"]),
        ("to y", None, []),
    ]
    assert all(check.verdict.passed for check in found)


@pytest.mark.parametrize(("place", "name"), [((A, "x"), "to a"), ((B, "x"), "to b"), ((B, "gate"), "to b (its gate)")])
def test_what_is_wrong_at_one_place_fails_there_only(place: tuple[Key, str], name: str) -> None:
    values = {(A, "x"): RIGHT, (B, "x"): RIGHT, (B, "gate"): RIGHT, place: WRONG}
    assert [check.name for check in checked(values) if not check.verdict.passed] == [name]


def test_a_wrong_output_fails_its_own_segment() -> None:
    found = checked({(A, "x"): RIGHT}, {"y": WRONG})
    assert [(check.name, check.verdict.passed) for check in found] == [("to a", True), ("to y", False)]


def test_what_does_not_come_out_is_not_checked() -> None:
    """Norms and outputs that the candidate does not give, and outputs that PyTorch does not have."""
    found = checked({(B, "x"): RIGHT}, {"more": RIGHT})
    assert [check.name for check in found] == ["to b"]


def test_a_segment_as_json() -> None:
    good = segment("a ... b", contains=["c"], end=("b", 0)).to_dict(3)
    assert json.loads(json.dumps(good)) == good
    assert (good["name"], good["index"], good["contains"], good["passed"]) == ("a ... b", 3, ["c"], True)
    assert (good["figures"]["histogram"], good["figures"]["worst"]) == (None, [])
    bad = segment("a ... b", False).to_dict(0)
    assert bad["figures"]["histogram"] is not None
    assert bad["figures"]["worst"] != []


# -------------------------------------------------------------------------------------------------- segment_names


class Graph:
    """Says what goes into a segment, from a table."""

    def __init__(self, sources: Mapping[Key | str, Sources]) -> None:
        self._sources = sources

    def sources(self, keys: list[Key], end: Key | str) -> Sources:
        return self._sources[end]


NORMS: dict[Key, CalledNorm] = {key: called(*key) for key in (A, B, C, D)}


def names(sources: Sources, end: Key | str, keys: list[Key], lost: tuple[Key, ...] = ()) -> tuple[str, list[str]]:
    return segment_names(Graph({end: sources}), NORMS, keys, frozenset(lost), keys)(end)  # type: ignore[arg-type]


def test_a_segment_is_called_after_the_last_norm_before_it() -> None:
    everything = [A, B, C, D]
    assert names(Sources([], reads_inputs=True), A, everything) == ("the inputs ... a", [])
    assert names(Sources([B, A], reads_inputs=False), C, everything) == ("b ... c", [])
    assert names(Sources([D], reads_inputs=False), "logits", everything) == ("d ... logits", [])


def test_a_later_call_is_told_from_the_first() -> None:
    again = ("a", 1)
    order = {A: called("a"), again: called("a", 1)}
    graph = Graph({again: Sources([A], reads_inputs=False), "y": Sources([again], reads_inputs=False)})
    describe = segment_names(graph, order, [A, again], frozenset(), [A, again])  # type: ignore[arg-type]
    assert describe(again) == ("a ... a (call 2)", [])
    assert describe("y") == ("a (call 2) ... y", [])


def test_a_norm_that_is_not_cut_is_inside_where_its_nodes_are() -> None:
    found = names(Sources([A], frozenset({"b", "c"}), reads_inputs=False), D, [A, C, D])
    assert found == ("a ... d", ["b"])  # c is cut, though its path is there


def test_a_norm_without_nodes_may_be_anywhere_between() -> None:
    lost = (B, C)
    assert names(Sources([A], reads_inputs=False), D, [A, D], lost) == ("a ... d", ["b", "c"])
    assert names(Sources([A], reads_inputs=False), D, [A, D]) == ("a ... d", [])
    assert names(Sources([B], reads_inputs=False), D, [B, D], (A, C)) == ("b ... d", ["c"])


def test_where_the_inputs_go_in_too_it_may_be_before_the_norms() -> None:
    found = names(Sources([B], reads_inputs=True), D, [B, D], (A, C))
    assert found == ("b ... d", ["a", "c"])
    assert names(Sources([B], reads_inputs=True), "y", [B], (A, C, D)) == ("b ... y", ["a", "c", "d"])


def test_from_several_norms_the_earliest_counts() -> None:
    found = names(Sources([C, A], reads_inputs=False), D, [A, C, D], (B,))
    assert found == ("c ... d", ["b"])


def test_limits_replace_the_comparison_with_pytorch() -> None:
    values = {(A, "x"): RIGHT, (B, "x"): WRONG, (B, "gate"): WRONG}
    found = checked(values, {"y": WRONG}, Limits(max_rms=0.011))
    assert all(check.verdict.passed for check in found)
    failed = [check.name for check in checked(values, {"y": WRONG}, Limits(max_rms=0.009)) if not check.verdict.passed]
    assert failed == ["to b", "to b (its gate)", "to y"]
