"""The default shapes inside the limits of an exported model, and the ends of its ranges."""

from __future__ import annotations

import pytest

from rmsnorm_deploy.export.graph.sizes import SizeLimits
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.inputs.ranges import shapes_within
from rmsnorm_deploy.runtime.inputs.synthetic import DEFAULT_SHAPES
from rmsnorm_deploy.runtime.runners.base import TensorInfo

IDS = [TensorInfo("input_ids", "int64", ("batch", "sequence"))]


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        (SizeLimits(), list(DEFAULT_SHAPES)),
        (SizeLimits({"sequence": (0, 16)}), [(1, 1), (1, 7), (2, 16), (1, 16)]),
        (SizeLimits({"sequence": (17, 4096)}), [(1, 17), (2, 33), (1, 4096)]),
        (SizeLimits({"sequence": (17, 4097)}), [(1, 17), (2, 33)]),
        (SizeLimits({"sequence": (17, None)}), [(1, 17), (2, 33)]),
        (SizeLimits({"batch": (0, 2)}), [(1, 1), (1, 7), (2, 33), (2, 1)]),
        (SizeLimits({"batch": (4, None)}), [(4, 1), (4, 7), (4, 33)]),
        (SizeLimits({}, ("sequence % 5 == 0",)), [(1, 5), (2, 35)]),
        (SizeLimits({}, ("16 < batch * sequence",)), [(1, 17), (3, 7), (2, 33)]),
    ],
)
def test_default_shapes_are_moved_into_the_limits(limits: SizeLimits, wanted: list[tuple[int, int]]) -> None:
    assert set(shapes_within(limits, IDS)) == set(wanted)


def test_limits_that_no_shape_meets_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"no generated inputs have sizes .* Give --inputs"):
        shapes_within(SizeLimits({}, ("batch == sequence + 1000",)), IDS)
