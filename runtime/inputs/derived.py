"""Cases for a model whose factory returned inputs (`derived_cases`): these, and others with values like theirs.

What an input means is unknown, so its values stay in the range of the factory's, and only dims that are dynamic in the
file get other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...export.graph.sizes import SizeLimits, formula_value, size_problem
from ...models.errors import UsageError
from ..runners.base import Array, TensorInfo, check_feeds
from .cases import Case
from .plan import NO_LIMITS, Plan
from .synthetic import cast_feeds, with_empty_cache

FACTORY_CASE = "the factory's inputs"
# Other sizes of the dims that are a batch, and of the others: the name of the case, and a function of the size.
_VARIANTS = (
    ("batch 1", lambda size: 1, lambda size: size),
    ("larger", lambda size: size + 1, lambda size: size + 1),
    ("twice the size", lambda size: size, lambda size: 2 * size),
    ("half the size", lambda size: size, lambda size: max(1, size // 2)),
)
# Factors of the floats: squares of the first overflow float16, and for the second eps outweighs the mean square.
_FACTORS = ((1000.0, "floats 1000 times as large"), (1e-4, "floats 1e-4 times as large"))


def factory_case(infos: Sequence[TensorInfo], given: Mapping[str, Array]) -> Case | str:
    """The factory's inputs as a case, or why they are not inputs of this file.

    Args:
        infos: the file's inputs.
        given: the factory's arrays by the names of the file's inputs; it may have more.
    """
    names = {info.name for info in infos}
    own = {name: array for name, array in given.items() if name in names}
    feeds = with_empty_cache(cast_feeds(own, infos), infos)
    try:
        check_feeds(infos, feeds, FACTORY_CASE)
    except UsageError as error:
        return str(error)
    return Case(FACTORY_CASE, feeds)


def derived_cases(
    infos: Sequence[TensorInfo], first: Case, seed: int, limits: SizeLimits = NO_LIMITS, thorough: bool = False
) -> Plan:
    """Cases like the first: in its shapes with other values, and in other sizes of the dynamic dims.

    Floats are drawn with the mean, deviation and range of the first case's, and integers within their range. Truth
    values, scalars, ordered integers (positions, offsets), and floats that are not finite or of two values are kept,
    and repeated where a dim is longer.

    Args:
        infos: the file's inputs.
        first: the factory's inputs.
        seed: of the random numbers.
        limits: the sizes for which the file was exported.
        thorough: add two more seeds.
    """
    sizes = {
        dim: size
        for info in infos
        for dim, size in zip(info.shape or (), first.feeds[info.name].shape, strict=True)
        if isinstance(dim, str)
    }
    plan = Plan([first])
    seeds = (seed, seed + 1, seed + 2) if thorough else (seed,)
    for number in seeds:
        name = "the factory's shapes with other values" + (f", seed {number}" if thorough else "")
        plan.cases.append(Case(name, _drawn(infos, first, sizes, number), optional=True))
    for factor, what in _FACTORS:
        feeds = _drawn(infos, first, sizes, seed, factor)
        plan.cases.append(Case(f"the factory's shapes with {what}", feeds, optional=True))
    outside = 0
    for name, other in _other_sizes(infos, sizes):
        if size_problem(limits, other) is not None:
            outside += 1
            continue
        plan.cases.append(Case(_named(name, other), _drawn(infos, first, other, seed), optional=True))
    if outside:
        plan.untried.append(f"{outside} generated inputs of sizes for which the file was not exported")
    if not sizes:
        plan.untried.append("other shapes: all dims of the file are fixed")
    if not thorough:
        plan.untried.append("several seeds: add --thorough, or repeat with --seed N")
    return plan


def _other_sizes(infos: Sequence[TensorInfo], sizes: Mapping[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
    """The sizes of the dynamic dims in each variant, without those that are equal to earlier ones."""
    later = {dim for info in infos for dim in (info.shape or ())[1:]}
    leading = {(info.shape or ("",))[0] for info in infos} - later
    plain = {name: size for name, size in sizes.items() if name.isidentifier()}
    seen = [dict(plain)]
    for label, batch, other in _VARIANTS:
        found = {name: batch(size) if name in leading else other(size) for name, size in plain.items()}
        if found not in seen:
            seen.append(found)
            yield label, found


def _named(label: str, sizes: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {size}" for name, size in list(sizes.items())[:4])
    return f"{label} ({shown})"


def _drawn(
    infos: Sequence[TensorInfo], first: Case, sizes: Mapping[str, int], seed: int, factor: float = 1.0
) -> dict[str, Array]:
    rng = np.random.default_rng([seed, *sizes.values()])
    return {info.name: _like(_resized(first.feeds[info.name], info, sizes), rng, factor) for info in infos}


def _resized(array: Array, info: TensorInfo, sizes: Mapping[str, int]) -> Array:
    """The array cut, or repeated, to the sizes of its dynamic dims."""
    for axis, dim in enumerate(info.shape or ()):
        if not isinstance(dim, str) or not array.shape[axis]:
            continue
        try:
            size = sizes[dim] if dim in sizes else formula_value(dim, sizes)
        except ValueError:  # a formula of dims that are not in the inputs
            continue
        array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
    return array


def _like(array: Array, rng: np.random.Generator, factor: float) -> Array:
    """Values like those of an array, or the array itself where its values may have a meaning."""
    values = array.astype(np.float64) if array.dtype.kind not in "biu" else array
    if array.ndim == 0 or array.size == 0 or array.dtype.kind == "b":
        return array
    if array.dtype.kind in "iu":
        if np.all(np.diff(array, axis=-1) >= 0):
            return array
        return rng.integers(array.min(), array.max(), array.shape, dtype=array.dtype, endpoint=True)
    if array.dtype.kind == "c" or not np.isfinite(values).all() or len(np.unique(values)) <= 2:
        return array
    drawn = np.clip(rng.normal(values.mean(), values.std(), array.shape), values.min(), values.max())
    with np.errstate(over="ignore"):
        return (drawn * factor).astype(array.dtype)
