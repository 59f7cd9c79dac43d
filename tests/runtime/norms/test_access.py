"""What PyTorch's norms are in the dtypes of another side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmsnorm_deploy.runtime.norms.access import NormDtypes, as_deployed
from rmsnorm_deploy.runtime.norms.activation_store import Key
from tests.helpers.runtime.stand_ins import called

A, B, C = ("a", 0), ("b", 0), ("c", 0)


class Side:
    """Has norms in some dtypes."""

    def __init__(self, dtypes: Mapping[Key, NormDtypes]) -> None:
        self._dtypes = dtypes

    @property
    def keys(self) -> list[Key]:
        return list(self._dtypes)

    def dtypes(self, key: Key) -> NormDtypes:
        return self._dtypes[key]


def test_norms_take_the_dtypes_of_the_side_that_has_them() -> None:
    norms = {A: called("a"), B: called("b")}
    side: Any = Side({A: NormDtypes("float16", "float32", "float16"), C: NormDtypes("float16", "float16", None)})
    found = as_deployed(norms, side)
    assert list(found) == [A, B]
    # Without a gate in PyTorch there is none to feed.
    assert (found[A].x_dtype, found[A].y_dtype, found[A].gate_dtype) == ("float16", "float32", None)
    assert found[B] == norms[B]
