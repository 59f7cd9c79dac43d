"""Feeds that fit and feeds that do not."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.export.graph.sizes import SizeLimits
from rmsnorm_deploy.models.dtypes import numpy_dtype
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.runners.base import (
    ANY_DTYPE,
    TensorInfo,
    check_feeds,
    describe_feeds,
    token_input,
    tokens_between,
)

INFOS = [
    TensorInfo("ids", "int64", ("batch", "tokens")),
    TensorInfo("mask", "bool", ("batch", "tokens")),
    TensorInfo("bias", "bfloat16", (1, None, 4)),
]


def feeds(**changes: Any) -> dict[str, Any]:
    given = {
        "ids": np.zeros((2, 3), np.int64),
        "mask": np.ones((2, 3), bool),
        "bias": np.zeros((1, 9, 4), ml_dtypes.bfloat16),
    }
    return {**given, **changes}


def test_feeds_that_fit() -> None:
    check_feeds(INFOS, feeds(), "m.onnx")
    check_feeds(INFOS, feeds(ids=np.zeros((0, 3), np.int64), mask=np.ones((0, 3), bool)), "m.onnx")
    check_feeds([TensorInfo("x", ANY_DTYPE, None)], {"x": np.zeros((1, 2, 3), np.float16)}, "m.onnx")
    check_feeds([], {}, "m.onnx")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"extra": np.zeros(1)}, "m.onnx: inputs unexpected: extra. The inputs are: ids, mask, bias."),
        ({"ids": np.zeros((2, 3), np.int32)}, "m.onnx: input ids: expected dtype int64, got int32. Convert the array."),
        ({"ids": np.zeros((2, 3), ">i8")}, "m.onnx: input ids: expected dtype int64, got >i8. Convert the array."),
        (
            {"bias": np.zeros((1, 9, 4), np.uint16)},
            "m.onnx: input bias: expected dtype bfloat16, got uint16. Convert the array.",
        ),
        ({"ids": [[1, 2]]}, "m.onnx: input ids: expected a numpy array, got list."),
        (
            {"ids": np.zeros(3, np.int64)},
            "m.onnx: input ids: expected shape [batch, tokens] of rank 2, got [3] of rank 1.",
        ),
        (
            {"bias": np.zeros((1, 9, 5), ml_dtypes.bfloat16)},
            "m.onnx: input bias: expected shape [1, ?, 4], got [1, 9, 5] (dim 2 must be 4).",
        ),
        (
            {"mask": np.ones((2, 4), bool)},
            "m.onnx: input mask: expected shape [batch, tokens], got [2, 4], but tokens is 3 in input ids.",
        ),
    ],
)
def test_feeds_that_do_not_fit(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_feeds(INFOS, feeds(**changes), "m.onnx")
    assert str(caught.value) == text
    assert caught.value.exit_code == 2


def test_a_missing_input_is_named() -> None:
    given = feeds()
    del given["mask"]
    with pytest.raises(UsageError, match="inputs missing: mask"):
        check_feeds(INFOS, given, "m.onnx")


def test_symbols_must_agree_inside_one_input_too() -> None:
    with pytest.raises(UsageError, match="n is 2 in input x"):
        check_feeds([TensorInfo("x", "float32", ("n", "n"))], {"x": np.zeros((2, 3), np.float32)}, "m.onnx")


def test_names_of_dtypes_and_feeds() -> None:
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16
    assert numpy_dtype("float16") == np.float16
    assert describe_feeds(feeds()) == "ids int64[2, 3], mask bool[2, 3], bias bfloat16[1, 9, 4]"


def test_a_size_outside_of_the_exported_range_is_a_usage_error() -> None:
    infos = [TensorInfo("input_ids", "int64", ("batch", "sequence"))]
    limits = SizeLimits({"sequence": (17, 4096)}, ("sequence % 2 == 0",))
    check_feeds(infos, {"input_ids": np.zeros((1, 18), np.int64)}, "model.onnx", limits)
    wanted = (
        "model.onnx: input input_ids: dim sequence: expected 17 to 4096, as the model was exported for this range; "
        "got 5. Give inputs of these sizes"
    )
    with pytest.raises(UsageError, match=re.escape(wanted)):
        check_feeds(infos, {"input_ids": np.zeros((1, 5), np.int64)}, "model.onnx", limits)
    with pytest.raises(UsageError, match=r"expected sequence % 2 == 0, .* got sequence 19"):
        check_feeds(infos, {"input_ids": np.zeros((1, 19), np.int64)}, "model.onnx", limits)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["input_ids", "attention_mask"], "input_ids"),
        (["input_ids", "decoder_input_ids"], "input_ids"),
        (["decoder_input_ids", "attention_mask"], "decoder_input_ids"),
        (["x"], "input_ids"),
    ],
)
def test_which_input_has_the_tokens(names: list[str], wanted: str) -> None:
    assert token_input(names) == wanted


def cut(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in tokens_between(given, 2, 4).items()}


def test_tokens_of_a_call_of_a_decoder_and_a_mask_up_to_their_end() -> None:
    row = np.arange(5)[None]
    given = {
        "input_ids": row, "position_ids": row[None] + 10, "token_type_ids": row, "attention_mask": row, "other": row,
    }  # fmt: skip
    assert cut(given) == {
        "input_ids": [[2, 3]], "position_ids": [[[12, 13]]], "token_type_ids": [[2, 3]],
        "attention_mask": [[0, 1, 2, 3]], "other": [[0, 1, 2, 3, 4]],
    }  # fmt: skip


def test_the_decoder_of_an_encoder_decoder_keeps_the_encoders_mask() -> None:
    row = np.arange(5)[None]
    assert cut({"decoder_input_ids": row, "attention_mask": row}) == {
        "decoder_input_ids": [[2, 3]], "attention_mask": [[0, 1, 2, 3, 4]],
    }  # fmt: skip
