"""The sizes that a graph is valid for: their form in files, the check of sizes, and damaged entries."""

from __future__ import annotations

import json

import pytest

from rmsnorm_deploy.export.graph.metadata import SIZES_KEY
from rmsnorm_deploy.export.graph.sizes import (
    SizeLimits,
    holds,
    limits_in,
    metadata_of,
    names_in,
    range_ends,
    range_text,
    size_limits_of,
    size_problem,
)
from rmsnorm_deploy.models.errors import UsageError

LIMITS = SizeLimits({"sequence": (17, 4096), "batch": (0, 3)}, ("sequence % 8 == 0", "16 < batch * sequence"))


def test_limits_return_from_a_files_metadata() -> None:
    assert limits_in(metadata_of(LIMITS), "model.onnx") == LIMITS
    assert metadata_of(SizeLimits()) == {}
    assert limits_in({}, "model.onnx") == SizeLimits()
    assert not SizeLimits()


def test_limits_return_from_a_manifest() -> None:
    rows = [{"name": "a", "ranges": {"sequence": [17, 4096]}}, {"name": "b"}, {"name": "c", "ranges": {"n": [2, None]}}]
    manifest = {"inputs": rows, "conditions": ["sequence % 8 == 0"]}
    assert range_ends(manifest) == {"sequence": (17, 4096), "n": (2, None)}
    assert size_limits_of(manifest).conditions == ("sequence % 8 == 0",)
    assert not size_limits_of({})


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"sequence": 24, "batch": 1}, None),
        (
            {"sequence": 5, "batch": 1},
            "dim sequence: expected 17 to 4096, as the model was exported for this range; got 5",
        ),
        ({"batch": 4}, "dim batch: expected at most 3, as the model was exported for this range; got 4"),
        (
            {"sequence": 25},
            "dims: expected sequence % 8 == 0, as the model was exported for sizes with this property; got sequence 25",
        ),
        (
            {"sequence": 24, "batch": 0},
            "dims: expected 16 < batch * sequence, as the model was exported for sizes with this property; "
            "got batch 0, sequence 24",
        ),
    ],
)
def test_a_size_outside_of_the_limits_is_named(sizes: dict[str, int], problem: str | None) -> None:
    assert size_problem(LIMITS, sizes) == problem


def test_ranges_in_words() -> None:
    assert [range_text(ends) for ends in ((2, None), (0, 16), (17, 64), (5, 5))] == [
        "2 or more",
        "at most 16",
        "17 to 64",
        "5",
    ]


def test_conditions_are_computed_as_integers() -> None:
    assert holds("min(8, n) + max(n, 3) * 2 == -n // 2 + 31", {"n": 9})
    assert not holds("8 % n == 0", {"n": 0})
    assert names_in("min(8, n) == m") == {"n", "m"}


@pytest.mark.parametrize(
    "row",
    [
        [],
        {"ranges": {"n": [1]}},
        {"ranges": {"n": ["1", None]}},
        {"ranges": {"n": [True, 2]}},
        {"conditions": [3]},
        {"conditions": ["__import__('os')"]},
        {"conditions": ["9 ** 9 == n"]},
        {"conditions": ["n.real == 1"]},
        {"conditions": ["1 < n < 3"]},
        {"conditions": ["n == " + "1 + " * 400 + "1"]},
    ],
)
def test_damaged_metadata_is_refused(row: object) -> None:
    with pytest.raises(UsageError, match=r"model.onnx: .*Export again"):
        limits_in({SIZES_KEY: json.dumps(row)}, "model.onnx")


def test_metadata_that_is_no_json_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model.onnx: its metadata .* cannot be read"):
        limits_in({SIZES_KEY: "{"}, "model.onnx")
