from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.calling.calls import CallForm, call_form, named_arguments, named_tensors, split_arguments
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError

A, B = torch.ones(2), torch.zeros(3)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Result:
    sample: Any
    extra: Any = None


def test_a_call_is_flattened_and_nested_again() -> None:
    given = {"x": A, "batch": {"ids": B, "more": [A, (B, "text")]}, "flag": True, "none": None}
    form = call_form(given)
    assert form.tensors == ("x", "batch_ids", "batch_more_0", "batch_more_1_0")
    assert form.constants == {"batch_more_1_1": "text", "flag": True, "none": None}
    flat = form.flat(given)
    assert form.nested(flat) == given
    recorded = CallForm.from_json(form.to_json())
    assert recorded is not None
    assert recorded.nested(flat) == given


def test_names_that_are_taken_get_another() -> None:
    assert call_form({"b": {"x": A}, "b_x": B}).tensors == ("b_x_", "b_x")


def test_a_call_of_tensors_alone_records_nothing() -> None:
    assert call_form({"x": A, "y": np.ones(2)}).to_json() == {}
    assert call_form({"x": A, "n": 3}).to_json() == {"constants": {"n": 3}}


def test_values_that_only_python_has_are_not_read_from_a_manifest() -> None:
    record = call_form({"x": A, "dtype": torch.float16}).to_json()
    assert record == {"constants": {"dtype": {"python": "torch.float16"}}}
    assert CallForm.from_json(record) is None
    broken = {"arguments": {"x": {"leaves": ["x_0"], "structure": "none"}}}
    assert CallForm.from_json(broken) is None


def test_other_objects_are_refused() -> None:
    with pytest.raises(UsageError, match=r"argument x: expected tensors, plain values .*, got Result\. Register a dat"):
        call_form({"x": Result(A)})


def test_a_part_of_an_argument_is_refused_and_a_whole_one_may_be_missing() -> None:
    form = call_form({"x": A, "pair": [A, B]})
    assert form.nested({"x": A, "other": B}) == {"x": A, "other": B}
    with pytest.raises(
        UsageError, match=r"argument pair: expected all of its tensors \(pair_0, pair_1\), got no pair_1"
    ):
        form.nested({"x": A, "pair_0": A})


def forward(x: Tensor, /, y: Tensor, *rest: Tensor, scale: float = 1.0, **more: Any) -> None:
    raise NotImplementedError


def test_positional_inputs_are_named_after_the_parameters() -> None:
    named = named_arguments(forward, (A, B, A, B), "here")
    assert list(named) == ["x", "y", "rest_0", "rest_1"]
    positional, keyword = split_arguments(forward, {**named, "scale": 2.0, "z": B})
    assert [id(t) for t in positional] == [id(t) for t in (A, B, A, B)]
    assert keyword == {"scale": 2.0, "z": B}
    assert named_arguments(forward, A, "here") == {"x": A}
    positional, keyword = split_arguments(forward, {"x": A, "y": B})
    assert (len(positional), list(keyword)) == (1, ["y"])
    with pytest.raises(UsageError, match=r"here: expected inputs as a dict .*, got int"):
        named_arguments(forward, 3, "here")
    with pytest.raises(UsageError, match=r"here: expected at most 1 positional inputs \(x\), got 2"):
        named_arguments(lambda x: x, [A, B], "here")


def test_which_tensors_must_be_given() -> None:
    form = call_form({"x": A, "mask": B, "batch": [A]})
    assert form.required(lambda x, batch, mask=None: None) == ["x", "batch_0"]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (A, ["output"]),
        ((A, None, [B, 3]), ["output_0", "output_2_0"]),
        ({"a": A, "b": {"c": B}}, ["a", "b_c"]),
        (Result(A), ["sample"]),
        (Result((A, B), extra=Pair(A, B)), ["sample_0", "sample_1", "extra_left", "extra_right"]),
    ],
)
def test_names_of_outputs(value: Any, wanted: list[str]) -> None:
    assert list(named_tensors(value, "Model")) == wanted


def test_other_outputs_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Model: output a: expected a tensor, .* of them, got object"):
        named_tensors({"a": object()}, "Model")
