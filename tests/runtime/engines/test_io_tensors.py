"""Which optimization profile runs given shapes, and what is said where none does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.engines.io_tensors import TORCH_NAMES, IOTensor, choose_profile, read_tensors, text_of
from tests.helpers.tensorrt.stand_in import DataType, TensorIOMode, TensorLocation

IDS = IOTensor("ids", True, torch.int64, (-1, -1), profiles=(((1, 1), (1, 8), (2, 64)), ((1, 1), (4, 1), (8, 4))))
PAST = IOTensor(
    "past", True, torch.float32, (-1, 2, -1, 8),
    profiles=(((1, 2, 0, 8), (1, 2, 0, 8), (2, 2, 0, 8)), ((1, 2, 0, 8), (4, 2, 16, 8), (8, 2, 100, 8))),
)  # fmt: skip
FIXED = IOTensor("scale", True, torch.float32, (8,))


@pytest.mark.parametrize(
    ("ids", "past", "expected"),
    [
        ((1, 1), 0, 0),  # both cover it: the usual shapes of the first are nearer
        ((1, 64), 0, 0),
        ((1, 1), 1, 1),
        ((8, 4), 100, 1),
        ((2, 4), 0, 0),
        ((2, 2), 0, 0),
    ],
)
def test_the_profile_that_covers_the_shapes(ids: tuple[int, int], past: int, expected: int) -> None:
    shapes = {"ids": ids, "past": (ids[0], 2, past, 8), "scale": (8,)}
    assert choose_profile([IDS, PAST, FIXED], shapes, "m.engine") == expected


def test_without_dynamic_inputs_there_is_one_profile() -> None:
    assert choose_profile([FIXED], {"scale": (8,)}, "m.engine") == 0


@pytest.mark.parametrize(
    ("ids", "past", "message"),
    [
        ((1, 65), 0, "none of its 2 profiles covers them; the nearest, profile 0, takes ids from 1x1 to 2x64, "
                     "and got 1x65"),
        ((9, 1), 50, "the nearest, profile 1, takes ids from 1x1 to 8x4, and got 9x1; past from 1x2x0x8 to 8x2x100x8, "
                     "and got 9x2x50x8"),
        ((8, 1), 101, "the nearest, profile 1, takes past from 1x2x0x8 to 8x2x100x8, and got 8x2x101x8"),
        ((3, 60), 0, "the nearest, profile 1, takes ids from 1x1 to 8x4, and got 3x60"),
    ],
)  # fmt: skip
def test_shapes_outside_of_every_profile(ids: tuple[int, int], past: int, message: str) -> None:
    shapes = {"ids": ids, "past": (ids[0], 2, past, 8)}
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        choose_profile([IDS, PAST], shapes, "m.engine")
    assert str(error.value).startswith("m.engine: these shapes are outside of what the engine was built for")
    assert str(error.value).endswith("rmsnorm build --profile ids:SMALLEST,USUAL,LARGEST.")


def test_one_profile_is_not_called_the_nearest() -> None:
    one = IOTensor("x", True, torch.float32, (-1,), profiles=(((1,), (2,), (4,)),))
    with pytest.raises(UsageError, match=r"built for: it takes x from 1 to 4, and got 5\. "):
        choose_profile([one], {"x": (5,)}, "m.engine")
    with pytest.raises(UsageError, match=r"it takes x from 1 to 4, and got 2x2"):
        choose_profile([one], {"x": (2, 2)}, "m.engine")


class Engine:
    """What an engine says of its tensors."""

    num_io_tensors, num_optimization_profiles = 2, 1

    def __init__(self, kind: Any = DataType.HALF) -> None:
        self.kind = kind

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.kind

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1, 4]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return [[1, 4], [2, 4], [3, 4]]


class Trt:
    """The module's names."""

    TensorIOMode, TensorLocation = TensorIOMode, TensorLocation


@pytest.mark.parametrize("kind", [kind for kind in DataType if kind.name in TORCH_NAMES])
def test_tensors_have_the_dtypes_of_pytorch(kind: DataType) -> None:
    """TensorRT 10 has no tensors that share memory, and so no function that tells."""
    x, y = read_tensors(Trt, Engine(kind))
    assert x.dtype == y.dtype == getattr(torch, TORCH_NAMES[kind.name])
    assert (x.profiles, y.profiles, x.alias, y.alias) == ((((1, 4), (2, 4), (3, 4)),), (), None, None)
    assert (x.is_input, y.is_input, x.is_dynamic, FIXED.is_dynamic) == (True, False, True, False)


def test_a_dtype_that_pytorch_lacks_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"x: expected an engine whose inputs and outputs have dtypes of PyTorch"
    ):
        read_tensors(Trt, Engine(DataType.INT4))


def test_shapes_as_text() -> None:
    assert [text_of(shape) for shape in ((4, 512), (0,), ())] == ["4x512", "0", "scalar"]
