"""The options of a validation: what they refuse, what they make of lists, and their way through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy.lossy import PROFILES
from rmsnorm_deploy.runtime.accuracy.tolerances import KINDS_OF_LIMITS, Limits
from rmsnorm_deploy.runtime.validation.options import ValidationOptions

FULL = ValidationOptions(
    dtype="float16", provider="cuda", seed=3, shapes=((2, 5), (1, 1)), prompts=("a", "b"), tokenizer="folder",
    limits={"*": Limits(atol=1e-3), "logits": Limits(rtol=0.5, ulp=2.0)}, depth=True, window=4, bisect=True,
    lossy="int8",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"prompts": "one text"}, "one text"),
        ({"shapes": [(0, 3)]}, "0x3"),
        ({"shapes": [(1, 1), (3, 0)]}, "3x0"),
        ({"window": 0}, "window"),
        ({"window": -1}, "-1"),
        ({"seed": -1}, "seed"),
        ({"inputs": "a.npz", "prompts": ["text"]}, "prompts"),
        ({"bisect": True, "outputs_only": True}, "outputs_only"),
        ({"lossy": "int7"}, "lossy: expected one of int8, int4, fp16, bf16, or none, got 'int7'"),
        ({"outputs_only": True, "limits": {"@norms": Limits(atol=1.0)}}, "@norms, but outputs_only skips"),
    ],
)
def test_refusals(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        ValidationOptions(**changes)


def test_the_edges_are_allowed() -> None:
    options = ValidationOptions(shapes=[(1, 1)], window=1, seed=0, inputs="a.npz", prompts=[])  # type: ignore[arg-type]
    assert (options.window, options.inputs) == (1, "a.npz")


def test_lists_become_tuples_so_that_options_are_equal() -> None:
    written: dict[str, Any] = {"shapes": [[2, 5]], "prompts": ["a"]}
    options = ValidationOptions(**written)
    assert options == ValidationOptions(shapes=((2, 5),), prompts=("a",))
    assert options.shapes == ((2, 5),)


@pytest.mark.parametrize(
    ("depth", "bisect", "expected"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_bisect_needs_the_depth(depth: bool, bisect: bool, expected: bool) -> None:
    assert ValidationOptions(depth=depth, bisect=bisect).with_depth is expected


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.seed = 4  # type: ignore[misc]


def test_every_field_is_in_the_dictionary_as_json() -> None:
    values = FULL.to_dict()
    assert set(values) == {field.name for field in dataclasses.fields(ValidationOptions)}
    assert json.loads(json.dumps(values)) == values
    assert values["shapes"] == [[2, 5], [1, 1]]
    assert values["limits"]["logits"] == dict.fromkeys(KINDS_OF_LIMITS) | {"rtol": 0.5, "ulp": 2.0}


@pytest.mark.parametrize("options", [ValidationOptions(), FULL, ValidationOptions(inputs="x.npz", outputs_only=True)])
def test_the_way_through_json_and_back(options: ValidationOptions) -> None:
    again = TypeAdapter(ValidationOptions).validate_json(json.dumps(options.to_dict()))
    assert again == options


@pytest.mark.parametrize(
    "wrong", [{"seed": "1"}, {"depth": 1}, {"unknown": None}, {"limits": {"y": {"atol": "1"}}}, {"prompts": [1]}]
)
def test_read_from_json_types_must_match_and_nothing_be_unknown(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TypeAdapter(ValidationOptions).validate_json(json.dumps({**ValidationOptions().to_dict(), **wrong}))


def test_a_profile_adds_its_limits_to_the_explicit_ones() -> None:
    given = {"@segments": Limits(max_rms=0.5)}
    assert ValidationOptions(limits=given).all_limits == given
    found = ValidationOptions(limits=given, lossy="fp16").all_limits
    assert found["@segments"].max_rms == 0.5
    assert found["@norms"] == PROFILES["fp16"].norms
    assert found["*"] == PROFILES["fp16"].outputs
