"""The sizes of generated inputs inside the limits of an exported model (`shapes_within`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...export.graph.cache_names import is_past
from ...export.graph.sizes import SizeLimits, size_problem
from ...models.errors import UsageError
from ..runners.base import TensorInfo
from .synthetic import DEFAULT_SHAPES, sizes_by_name

Shape = tuple[int, int]

# The largest size that is generated because a range ends there.
_MOST = 4096
# How far from a shape another one is looked for that meets the conditions.
_FAR = 64


def shapes_within(limits: SizeLimits, infos: Sequence[TensorInfo]) -> list[Shape]:
    """Batch and length of the default runs: the default shapes moved into the limits, and the ends of the ranges.

    Args:
        limits: the sizes for which the model was exported.
        infos: the model's inputs.

    Raises:
        UsageError: no shape is inside the limits.
    """
    if not limits:
        return list(DEFAULT_SHAPES)
    batch, length = (_common(limits.ranges, names) for names in _dims(infos))
    wanted = [(_clamped(b, batch), _clamped(n, length)) for b, n in DEFAULT_SHAPES]
    small = min(wanted, key=lambda shape: shape[0] * shape[1])
    wanted += [(small[0], max(1, length[0])), (max(1, batch[0]), small[1])]
    wanted += [(small[0], length[1])] if length[1] is not None and length[1] <= _MOST else []
    wanted += [(batch[1], small[1])] if batch[1] is not None and batch[1] <= _MOST else []
    found = [_nearest(shape, limits, infos) for shape in wanted]
    shapes = list(dict.fromkeys(shape for shape in found if shape is not None))
    if not shapes:
        raise UsageError(
            f"no generated inputs have sizes for which the model was exported ({limits.to_dict()}). Give --inputs."
        )
    return shapes


def _dims(infos: Sequence[TensorInfo]) -> tuple[set[str], set[str]]:
    """The names of the dims that get the batch, and of those that get the length."""
    names = {dim for info in infos if not is_past(info.name) for dim in info.shape or () if isinstance(dim, str)}
    sizes = {name: sizes_by_name(infos, 1, 2).get(name) for name in names}
    return {n for n in names if sizes[n] == 1}, {n for n in names if sizes[n] == 2}


def _common(ranges: Mapping[str, tuple[int, int | None]], names: set[str]) -> tuple[int, int | None]:
    found = [ranges[name] for name in names if name in ranges]
    highs = [high for _, high in found if high is not None]
    return max((low for low, _ in found), default=0), min(highs, default=None)


def _clamped(size: int, ends: tuple[int, int | None]) -> int:
    size = max(size, ends[0])
    return size if ends[1] is None else min(size, ends[1])


def _nearest(shape: Shape, limits: SizeLimits, infos: Sequence[TensorInfo]) -> Shape | None:
    """The shape, or the nearest one that meets every limit."""
    for candidate in _around(shape):
        if size_problem(limits, sizes_by_name(infos, *candidate)) is None:
            return candidate
    return None


def _around(shape: Shape) -> Iterator[Shape]:
    batch, length = shape
    yield shape
    for step in range(1, _FAR):
        yield batch, length + step
        if length > step:
            yield batch, length - step
        yield batch + step, length
