"""PyTorch's side of the norms that are not modules (`RecordedNorms`): the formula that the export recorded.

There is no module to run. The formula is in the metadata of the file, the weight in the PyTorch model; `eager` computes
what PyTorch computes with both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from ...models.dtypes import torch_dtype
from ...models.recognition.site import norm_name
from ...models.reference import reference
from ..runners.base import Array
from ..runners.torch import to_numpy, to_torch
from .access import CalledNorm, Formula, NormAccess, NormFeed, NormResult, RunNorms
from .activation_store import Key

if TYPE_CHECKING:
    from torch import Tensor, nn


class RecordedNorms:
    """The recorded norms of a file, with the weights of the PyTorch model.

    Args:
        model: the PyTorch model.
        access: the norms of the file.
        keys: the norms, of those in `access.recorded`.

    Attributes:
        problems: why a norm cannot be computed in PyTorch, by norm.
        notes: which norms have the weight of the file itself.
    """

    def __init__(self, model: nn.Module, access: NormAccess, keys: Iterable[Key]) -> None:
        self.problems: dict[Key, str] = {}
        self.notes: list[str] = []
        self._formulas: dict[Key, Formula] = {}
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for key in keys:
            found = _formula(key, access, tensors, self.notes)
            if isinstance(found, str):
                self.problems[key] = found
            else:
                self._formulas[key] = found

    @property
    def keys(self) -> list[Key]:
        """The norms that can be computed."""
        return list(self._formulas)

    def formula(self, key: Key) -> Formula:
        """What the norm computes in PyTorch."""
        return self._formulas[key]

    def exact(self, key: Key, feed: NormFeed) -> Array:
        """The float64 reference of one norm on these inputs."""
        formula = self._formulas[key]
        weight, bias = (None if a is None else a.astype(np.float64) for a in (formula.weight, formula.bias))
        gate = None if feed.gate is None else feed.gate.astype(np.float64)
        return reference(formula.spec, feed.x.astype(np.float64), weight, bias, gate)

    @contextmanager
    def alone(self, keys: Iterable[Key]) -> Iterator[RunNorms]:
        """See `NormAccess.alone`."""
        from ...models.eager import eager

        wanted = list(keys)

        def run(feeds: Mapping[Key, NormFeed]) -> dict[Key, NormResult]:
            results = {}
            for key in wanted:
                formula, feed = self._formulas[key], feeds[key]
                others = (formula.weight, formula.bias, feed.gate)
                y = eager(formula.spec, to_torch(feed.x), *(None if a is None else to_torch(a) for a in others))
                results[key] = NormResult(to_numpy(y))
            return results

        yield run


def recorded_call(key: Key, access: NormAccess, shape: tuple[int, ...]) -> CalledNorm:
    """The call of a recorded norm with an x of this shape, in the dtypes of the file."""
    dtypes = access.dtypes(key)
    return CalledNorm(key, access.recorded[key].spec, shape, dtypes.x, dtypes.y, dtypes.gate, forced=False)


def _formula(key: Key, access: NormAccess, tensors: Mapping[str, Tensor], notes: list[str]) -> Formula | str:
    """What the norm computes in PyTorch, or why that is not known."""
    recorded, dtypes = access.recorded[key], access.dtypes(key)
    spec = recorded.spec
    wanted = [role for role, present in (("weight", spec.has_weight), ("bias", spec.bias)) if present]
    if len(wanted) != len(recorded.parameters):
        return f"expected the names of {len(wanted)} parameters in its metadata, got {len(recorded.parameters)}"
    arrays: dict[str, Array] = {}
    for role, name in zip(wanted, recorded.parameters, strict=True):
        if name in tensors:
            # A file of a narrower dtype than the model's has narrower weights.
            narrow = spec.follows_weight and dtypes.y == dtypes.x
            tensor = tensors[name].detach()
            arrays[role] = to_numpy(tensor.to(torch_dtype(dtypes.x)) if narrow else tensor)
            continue
        own = access.formula(key)
        array = getattr(own, role) if isinstance(own, Formula) else None
        if array is None:
            return f"its {role} {name} is computed in the graph, and PyTorch's model has no tensor of this name"
        arrays[role] = array
        notes.append(
            f"{norm_name(*key)}: PyTorch's model has no tensor {name}, so the norm was checked with the file's {role}"
        )
    return Formula(spec, dtypes.x, arrays.get("weight"), arrays.get("bias"))
