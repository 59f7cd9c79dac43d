"""The conditions under which a norm is called to prove its spec: shapes, strides, values and modes of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .isolate import thread_count
from .probe_rows import outlier_rows, same_bits

# Pairs of batch and length, so that each of a few sizes occurs, alone and beside others.
_SIZES = ((1, 1), (2, 7), (3, 2), (5, 33), (3, 1), (1, 129))
_RANKS: tuple[tuple[int, ...], ...] = ((), (4,), (2, 3), (2, 1, 3), (1, 2, 1, 2))
_MAGNITUDES = (1e-30, 1e-15, 1e-9, 1e-6, 1e-3, 30.0, 4e3, 3e5, 1e7, 1e12)


@dataclass(frozen=True, slots=True)
class Condition:
    """One call of a norm.

    Attributes:
        name: for the reason, such as `with a batch of 5`.
        x: the input, in the strides that the norm gets.
        around: makes the context in which the norm is called.
    """

    name: str
    x: Tensor
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def probe_conditions(
    x: Callable[..., Tensor], dtype: torch.dtype, width: tuple[int, ...], threads: int, generator: torch.Generator
) -> Iterator[Condition]:
    """Every condition in which a norm must follow its spec.

    Args:
        x: makes normally distributed values of `dtype` with the leading dims that it is given, `[*leading, *width]`.
        dtype: of the inputs.
        width: the trailing dims.
        threads: the number of threads of the caller.
        generator: draws the positions of outliers.
    """
    for leading in _RANKS:
        yield Condition(f"with an x of {len(leading) + len(width)} dims", x(*leading))
    for batch, length in _SIZES:
        yield Condition(f"with a batch of {batch} and a length of {length}", x(batch, length))
    yield from _strides(x)
    rows = x(2, 3)
    yield from mode_conditions(rows, threads)
    largest = torch.finfo(dtype).max
    for size in _MAGNITUDES:
        if torch.finfo(dtype).tiny < size < largest / 8:
            yield Condition(f"with values of about {size:g} alone", (rows.double() * size).to(dtype))
    yield Condition("with positive values alone", rows.abs() + torch.finfo(dtype).tiny)
    yield Condition("with negative values alone", -rows.abs() - torch.finfo(dtype).tiny)
    yield Condition("with zeros alone", rows * 0)
    yield Condition("with rows that are equal to earlier rows", x(1, 2).repeat(2, 3, *[1] * len(width)))
    yield Condition("with outliers", outlier_rows(dtype, width, generator).to(rows.device))


def mode_conditions(x: Tensor, threads: int) -> Iterator[Condition]:
    """The modes of torch that a forward can read."""
    yield Condition("with grad enabled", x, torch.enable_grad)
    leaf = x.detach().clone().requires_grad_()
    yield Condition("with grad enabled and an x that requires grad", leaf, torch.enable_grad)
    yield Condition("without grad and with an x that requires grad", leaf)
    yield Condition("in inference mode", x, torch.inference_mode)
    for count in sorted({2, threads}):
        yield Condition(f"with {count} threads", x, lambda count=count: thread_count(count))  # type: ignore[misc]
    if x.device.type == "cpu":  # on a GPU, autocast changes the operators of an honest norm too
        yield Condition("under autocast", x, lambda: torch.autocast("cpu", dtype=torch.bfloat16))


def call_conditions(x: Tensor, trailing: int) -> Iterator[Condition]:
    """Variations of an input with which a model calls a norm: its values in other shapes, strides and grad modes.

    Args:
        x: the input, `[*leading, *width]`.
        trailing: the number of dims of the width.
    """
    x = x.detach()
    leading = x.ndim - trailing
    yield Condition("with grad enabled", x, torch.enable_grad)
    yield Condition("with grad enabled and an x that requires grad", x.clone().requires_grad_(), torch.enable_grad)
    if not leading or not x.numel():
        return
    for batch in (1, 2, 3, 5):
        if batch != x.shape[0]:
            yield Condition(f"with a batch of {batch}", _resized(x, 0, batch))
    if leading > 1:
        for length in (1, 2, 7, 33):
            if length != x.shape[leading - 1]:
                yield Condition(f"with a length of {length}", _resized(x, leading - 1, length))
        yield Condition("with a transposed x", x.transpose(0, leading - 1).contiguous().transpose(0, leading - 1))
    yield Condition("with an expanded x", x[:1].expand(3, *x.shape[1:]))
    yield Condition("with a sliced x", torch.stack((x, x), -1)[..., 0])
    rank = x.unsqueeze(0)
    yield Condition(f"with an x of {rank.ndim} dims", rank)


def differs(
    condition: Condition,
    call: Callable[[Tensor], object],
    expected: Callable[[Tensor], Tensor],
) -> str | None:
    """What differs from the spec under a condition, or None.

    An error of the module means that it is not called in this way, so there is nothing to compare.
    """
    before = condition.x.detach().clone()
    try:
        with condition.around():
            result = call(condition.x)
    except Exception:  # the module's own code decides what it raises
        return None
    if changed_in_place(before, condition.x):
        return "it changes its input in place"
    wanted = expected(condition.x.detach())
    if not isinstance(result, Tensor) or not same_bits(result.detach(), wanted):
        return f"{condition.name}, it differs from its spec ({before.dtype})"
    return None


def changed_in_place(before: Tensor, x: Tensor) -> bool:
    """Whether an input is not, bit for bit, what it was before the call."""
    return not same_bits(before.detach(), x.detach(), any_nan=False)


def _strides(x: Callable[..., Tensor]) -> Iterator[Condition]:
    yield Condition("with a transposed x", x(3, 2).transpose(0, 1))
    yield Condition("with an expanded x", x(1, 3).expand(3, *x(1, 3).shape[1:]))
    yield Condition("with a sliced x", x(2, 6)[:, ::2])
    yield Condition("with an x whose last dim is not contiguous", torch.stack((x(2, 3), x(2, 3)), -1)[..., 0])


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` repeated and cut along one dim to a size."""
    return torch.cat([x] * math.ceil(size / x.shape[dim]), dim).narrow(dim, 0, size).contiguous()
