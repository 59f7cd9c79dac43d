"""Dims that a model ties or fixes in ways that torch's symbols do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.capture.capture import capture
from rmsnorm_deploy.export.sizes.measured_dims import MeasuredDims, fixed_note, measured_dims
from rmsnorm_deploy.models.errors import UnsupportedError


class CrossAttention(nn.Module):
    """As diffusion models call theirs: the mask is viewed by the batch, and numbers state the length of x."""

    def forward(self, x: Tensor, context: Tensor, mask: Tensor, height: int | None = None, width: int = 4) -> Tensor:
        bias = mask.repeat_interleave(2, dim=0).view(x.shape[0], 2, -1, mask.shape[-1])
        scores = (x @ context.transpose(1, 2))[:, None] + bias
        out = scores.softmax(-1).mean(1) @ context
        return out if height is None else out + torch.arange(float(height * width))[None, :, None]


class Patches(nn.Module):
    """Takes even lengths only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 2).sum(-1)


def inputs(**more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(2, length, 8, generator=generator) for length in (12, 5))
    return {"x": x, "context": context, "mask": torch.zeros(2, 5), **more}


BATCH = [("x", 0), ("context", 0), ("mask", 0)]
TEXT = [("context", 1), ("mask", 1)]
WIDTH = [("x", 2), ("context", 2)]


def test_axes_that_vary_only_together_are_tied() -> None:
    found = measured_dims(CrossAttention(), inputs())
    assert (found.fixed, found.tied) == ([], [BATCH, WIDTH, TEXT])


def test_a_length_that_a_number_states_is_fixed() -> None:
    found = measured_dims(lambda **tensors: CrossAttention()(**tensors, height=3), inputs())
    assert (found.fixed, found.tied) == ([("x", 1)], [BATCH, WIDTH, TEXT])


def test_an_axis_that_takes_only_multiples_is_neither() -> None:
    found = measured_dims(Patches(), {"x": torch.zeros(3, 4)})
    assert (found.fixed, found.tied) == ([], [])


def test_the_example_inputs_are_not_changed() -> None:
    given = inputs()
    before = {name: tensor.clone() for name, tensor in given.items()}

    def call(**tensors: Tensor) -> Tensor:
        tensors["x"].zero_()
        return CrossAttention()(**tensors)

    measured_dims(call, given)
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


def test_tied_axes_are_checked_and_then_fixed() -> None:
    automatic = {"x": {0: "auto", 1: "auto", 2: "auto"}, "mask": {0: "auto"}}
    found = MeasuredDims([("x", 1)], [[("x", 0), ("mask", 0)]])
    first, second = found.attempts()
    assert first.dynamic_shapes(automatic) == {"x": {0: "auto", 1: None, 2: "auto"}, "mask": {0: "auto"}}
    assert second.dynamic_shapes(automatic) == {"x": {0: None, 1: None, 2: "auto"}, "mask": {0: None}}
    assert (second.fixed, second.tied) == ([("mask", 0), ("x", 0), ("x", 1)], [])
    assert list(MeasuredDims().attempts()) == []
    first.check({"x": torch.zeros(2, 3, 4), "mask": torch.zeros(2)})
    with pytest.raises(RuntimeError):
        first.check({"x": torch.zeros(2, 3, 4), "mask": torch.zeros(3)})


def test_a_model_that_divides_by_its_batch_is_captured_with_a_dynamic_batch() -> None:
    captured = capture(CrossAttention(), inputs(height=3))
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in captured.model.graph.inputs}
    assert shapes == {
        "x": ["x_dim_0", "12", "x_dim_2"], "context": ["x_dim_0", "context_dim_1", "x_dim_2"],
        "mask": ["x_dim_0", "context_dim_1"],
    }  # fmt: skip
    assert captured.notes == [fixed_note(inputs(), [("x", 1)])]
    assert captured.notes[0].endswith("because the model does not take others: x dim 1 (12)")


def test_the_first_error_is_explained_where_no_dims_help() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            sizes = mask.sum(1).tolist()  # lengths as numbers
            return torch.stack([x[row, :size].sum() for row, size in enumerate(sizes)]) + len(set(sizes))

    with pytest.raises(UnsupportedError, match="decides by the values of tensors"):
        capture(Loop(), {"x": torch.zeros(2, 5), "mask": torch.ones(2, 5, dtype=torch.int64)})


def test_an_output_that_has_the_name_of_an_input_gets_another() -> None:
    class Same(nn.Module):
        def forward(self, sample: Tensor) -> dict[str, Tensor]:
            return {"sample": sample * 2}

    graph = capture(Same(), {"sample": torch.zeros(2, 3)}).model.graph
    assert [value.name for value in (*graph.inputs, *graph.outputs)] == ["sample", "sample_output"]
