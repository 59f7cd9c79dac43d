"""The inputs that a model is captured with when the user gave none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.calling.example_inputs import example_inputs, vocabulary_size
from rmsnorm_deploy.models.errors import UsageError


class Tokens(nn.Module):
    """Reads tokens; has an embedding of 11."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        if config:
            self.config = SimpleNamespace(**config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids)


class Masked(Tokens):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.embedding(input_ids)


class Floats(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Bare(nn.Module):
    """Has a forward for tokens, and no vocabulary."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_tokens_and_a_mask_where_the_forward_takes_one() -> None:
    assert set(example_inputs(Tokens())) == {"input_ids"}
    inputs = example_inputs(Masked())
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in inputs.items()} == {
        "input_ids": (torch.int64, (2, 9)), "attention_mask": (torch.int64, (2, 9)),
    }  # fmt: skip
    assert bool((inputs["attention_mask"] == 1).all())


def test_tokens_are_the_same_each_time_and_no_special_ones() -> None:
    """Ids from 3 on: the first three are usually padding, begin and end."""
    first, again = example_inputs(Tokens())["input_ids"], example_inputs(Tokens())["input_ids"]
    assert torch.equal(first, again)
    assert int(first.min()) >= 3
    assert int(first.max()) <= 10
    assert len(first.unique()) > 3


@pytest.mark.parametrize(("size", "ids"), [(1, {0}), (2, {1}), (3, {2}), (4, {3})])
def test_a_vocabulary_of_few_tokens(size: int, ids: set[int]) -> None:
    assert set(example_inputs(Tokens(vocab_size=size))["input_ids"].flatten().tolist()) == ids


def test_an_encoder_decoder_gets_unequal_lengths() -> None:
    inputs = example_inputs(Masked(vocab_size=11, is_encoder_decoder=True))
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert (tuple(inputs["input_ids"].shape), tuple(inputs["decoder_input_ids"].shape)) == ((2, 9), (2, 5))


def test_inputs_are_on_the_models_device() -> None:
    assert example_inputs(Masked().to("meta"))["input_ids"].device.type == "meta"


def test_a_model_that_reads_something_else_is_refused_with_what_it_takes() -> None:
    with pytest.raises(UsageError, match=r"Floats does not read input_ids \(it reads x, y\).*--inputs FILE\.npz"):
        example_inputs(Floats())


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Bare has no vocabulary to draw tokens from; give --inputs"):
        example_inputs(Bare())


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (Tokens(vocab_size=7), 7),
        (Tokens(text_config=SimpleNamespace(vocab_size=5)), 5),
        (Tokens(vocab_size=7, text_config=SimpleNamespace(vocab_size=5)), 7),
        (Tokens(vocab_size=None), 11),
        (Tokens(vocab_size=0), 11),
        (Tokens(vocab_size="many"), 11),
        (Tokens(), 11),
        (Bare(), None),
    ],
)
def test_vocabulary_size(model: nn.Module, size: int | None) -> None:
    assert vocabulary_size(model) == size
