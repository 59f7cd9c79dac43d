"""Run a captured graph and its model at other sizes than those of the capture, and compare (`check_second_sizes`).

The capture sees one set of sizes. A size that the model's Python code keeps as a number is a constant in the graph,
which is right for that size only; torch's ranges do not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...models.errors import MismatchError, UnsupportedError
from ..graph.sizes import SizeLimits, size_problem
from .captured_program import GraphRun, has_inner_norms, user_inputs
from .ranges import SPECIALIZED, symbols_of

# Steps from the captured sizes to other ones, in the order in which they are tried.
_STEPS = (3, -1, 1, 2, -2, -3, 4, 5, 6, 7, 8, 12, 16, 32, 64)
_MOST_TRIED = 3
_CHUNK = 1 << 20  # elements that are compared at a time
# Dims of a KV cache and of its mask, whose sizes depend on each other.
_TOKENS, _PAST, _TOTAL = "sequence", "past_sequence", "total_sequence"
# Longer than the pieces into which models cut a sequence (64, 128 and 256 are common), and the most work for one run.
_LONG, _MOST_WORK = 259, 1e12


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of the check: the limits, with ends that were measured, and notes for the manifest."""

    limits: SizeLimits
    notes: list[str] = field(default_factory=list)


def check_second_sizes(
    model: Callable[..., Any],
    program: torch.export.ExportedProgram,
    names: Mapping[str, str],
    limits: SizeLimits,
    outputs: list[str],
) -> Checked:
    """Compare a captured graph with its model at sizes inside the limits, other than the captured ones.

    Args:
        model: what was captured; called with the program's arguments.
        program: the captured program, whose example inputs are resized.
        names: the name of each symbol's dim in the exported graph.
        limits: the sizes for which the graph is valid.
        outputs: names of the graph's outputs, for messages.

    Raises:
        UnsupportedError: an output has another shape than the model's, so a dim was fixed.
        MismatchError: an output has other values than the model's.
    """
    example = example_sizes(program, names)
    if not example:
        return Checked(limits)
    run = _Comparison(model, program, names, outputs)
    if has_inner_norms(program):
        return Checked(limits, ["the graph was not run at other sizes: it has norms inside control flow"])
    notes = []
    for tried, sizes in enumerate(_others(example, limits)):
        reason = run.compare(sizes)
        if reason is None:
            break
        if tried + 1 == _MOST_TRIED:
            notes.append(f"the graph could not be compared with the model at other sizes: {reason}")
            break
    return Checked(_with_high_end(run, example, _with_low_end(run, example, limits)), notes)


def _with_high_end(run: _Comparison, example: Mapping[str, int], limits: SizeLimits) -> SizeLimits:
    """The limits, with the largest number of new tokens, and of tokens in the cache, for which the graph is right.

    A loop over pieces of a fixed length is unrolled as often as at the captured length; a selection of the best of many
    tokens is left out of the graph where there were fewer.
    """
    if run.weights * _LONG > _MOST_WORK:
        return limits
    ranges = dict(limits.ranges)
    for name in (_TOKENS, _PAST):
        end = _largest(run, name, example, limits) if name in example else None
        if end is not None:
            ranges[name] = (ranges.get(name, (0 if name == _PAST else 1, None))[0], end)
            if name == _PAST and _TOTAL in example:
                ranges[_TOTAL] = (0, end + example.get(_TOKENS, 0))
    return replace(limits, ranges=ranges)


def _largest(run: _Comparison, name: str, example: Mapping[str, int], limits: SizeLimits) -> int | None:
    """The largest size of a dim at which the graph is right, the others as captured; None if there is no end."""

    def wrong(length: int) -> bool:
        sizes = _with_total({**example, name: length}, example)
        if "batch" in sizes and size_problem(limits, {**sizes, "batch": 1}) is None:
            sizes["batch"] = 1  # less work
        if size_problem(limits, sizes) is not None:
            return False
        try:
            run.compare(sizes)
        except (MismatchError, UnsupportedError):
            return True
        return False

    low, high = example[name], _LONG
    if low >= high or not wrong(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(middle) else (middle, high)
    return low


def _with_low_end(run: _Comparison, example: Mapping[str, int], limits: SizeLimits) -> SizeLimits:
    """The limits, without the lower ends at which torch only assumes that they are limits.

    Raises:
        MismatchError, UnsupportedError: the graph is not valid at the lower ends that torch says it has.
    """
    assumed = {name for name, ends in limits.ranges.items() if ends[0] == SPECIALIZED}
    kept = {name: (1 if name in assumed else ends[0], ends[1]) for name, ends in limits.ranges.items()}
    wider = replace(limits, ranges={name: ends for name, ends in kept.items() if ends != (1, None)})
    if any(name.startswith("past") or name == _TOTAL for name in example):
        return wider
    sizes = {name: max(1, wider.ranges.get(name, (1, None))[0]) for name in example}
    if sizes == example or size_problem(wider, sizes) is not None:
        return wider
    try:
        run.compare(sizes)
    except (MismatchError, UnsupportedError):
        if not assumed:
            raise
        return limits
    return wider


def example_sizes(program: torch.export.ExportedProgram, names: Mapping[str, str]) -> dict[str, int]:
    """The size of each dynamic dim at which a program was captured."""
    leaves = pytree.tree_leaves(program.example_inputs)
    return {names[s]: leaves[number].shape[axis] for number, axis, s in symbols_of(program) if s in names}


def _others(example: Mapping[str, int], limits: SizeLimits) -> Iterator[dict[str, int]]:
    """Sizes inside the limits, other than the example's."""
    seen = [dict(example)]
    for step in _STEPS:
        for batch in (1, -1, 0):
            sizes = {name: max(1, size + (batch if name == "batch" else step)) for name, size in example.items()}
            sizes = _with_total(sizes, example)
            for name, (low, high) in limits.ranges.items():
                if name in sizes:
                    sizes[name] = max(low, sizes[name] if high is None else min(high, sizes[name]))
            if sizes not in seen and size_problem(limits, sizes) is None:
                seen.append(sizes)
                yield sizes


def _with_total(sizes: Mapping[str, int], example: Mapping[str, int]) -> dict[str, int]:
    """The sizes, with the length of the mask that belongs to the new tokens and those in the cache."""
    if _TOTAL not in sizes:
        return dict(sizes)
    added = sum(sizes[name] - example[name] for name in (_TOKENS, _PAST) if name in example)
    return {**sizes, _TOTAL: example[_TOTAL] + added}


class _Comparison:
    def __init__(
        self,
        model: Callable[..., Any],
        program: torch.export.ExportedProgram,
        names: Mapping[str, str],
        outputs: list[str],
    ) -> None:
        self._model, self._program, self._names, self._outputs = model, program, names, outputs
        self._graph = GraphRun(program)
        self.weights = sum(tensor.numel() for tensor in program.state_dict.values())
        self._leaves, self._spec = pytree.tree_flatten(program.example_inputs)

    def compare(self, sizes: Mapping[str, int]) -> str | None:
        """None if the graph computes what the model does at these sizes, or the reason why that is unknown.

        Raises:
            UnsupportedError: an output has another shape.
            MismatchError: an output has other values, or the graph fails.
        """
        try:
            wanted = self._of_model(sizes)
        except Exception as error:  # the model's own limits: they are not the graph's
            return f"at {_text(sizes)} the model fails: {_first(error)}"
        try:
            got = self._of_graph(sizes)
        except Exception as error:
            try:
                self._of_graph({})
            except Exception as also:
                return f"the captured graph does not run in PyTorch: {_first(also)}"
            raise MismatchError(
                f"at {_text(sizes)} the captured graph fails ({_first(error)}), though the model runs. {_REMEDY}"
            ) from error
        if len(got) != len(wanted):
            return f"the graph has {len(got)} outputs, the model {len(wanted)}"
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            name = self._outputs[index] if len(self._outputs) == len(got) else f"output {index}"
            if a.shape != b.shape:
                raise UnsupportedError(
                    f"{name}: at {_text(sizes)} the model returns shape {list(b.shape)}, but the captured graph "
                    f"{list(a.shape)}: a dim of the graph is fixed. {_REMEDY}"
                )
            off = _difference(a, b)
            if off is not None:
                raise MismatchError(
                    f"{name}: at {_text(sizes)} the captured graph differs from the model{off}. {_REMEDY}"
                )
        return None

    def _of_model(self, sizes: Mapping[str, int]) -> list[Tensor]:
        arguments, keywords = pytree.tree_unflatten(self._resized(sizes), self._spec)
        with torch.no_grad():
            return _tensors(pytree.tree_leaves(self._model(*arguments, **keywords)))

    def _of_graph(self, sizes: Mapping[str, int]) -> list[Tensor]:
        return _tensors(self._graph(self._resized(sizes)))

    def _resized(self, sizes: Mapping[str, int]) -> list[Any]:
        """The example inputs in other sizes: cut, or repeated; a mask is all ones."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        for number, axis, symbol in symbols_of(self._program):
            size = sizes.get(self._names.get(symbol, ""))
            if size is not None:
                old = leaves[number].shape[axis]
                index = torch.arange(size, device=leaves[number].device) % old
                leaves[number] = leaves[number].index_select(axis, index)
        for number, (name, _) in enumerate(user_inputs(self._program)):
            if "attention_mask" in name and isinstance(leaves[number], Tensor) and leaves[number].ndim == 2:
                leaves[number] = torch.ones_like(leaves[number])
        return leaves


_REMEDY = (
    "The model's code uses a size as a number. Export it with fixed sizes (--static), or with example inputs of the "
    "sizes that are deployed (--inputs)."
)


def _difference(got: Tensor, wanted: Tensor) -> str | None:
    """How far values differ, if by more than sqrt(eps) of the largest; integers must be equal."""
    if got.dtype != wanted.dtype:
        return f": dtype {got.dtype} instead of {wanted.dtype}"
    if not got.is_floating_point():
        return None if torch.equal(got, wanted) else ": integers are not equal"
    if not torch.equal(got.isfinite(), wanted.isfinite()):
        return ": other elements are infinite or NaN"
    largest = off = 0.0
    for a, b in zip(got.reshape(-1).split(_CHUNK), wanted.reshape(-1).split(_CHUNK), strict=True):
        a, b = (value.double().nan_to_num(0.0, 0.0, 0.0) for value in (a, b))
        if len(b):
            largest, off = max(largest, float(b.abs().max())), max(off, float((a - b).abs().max()))
    limit = torch.finfo(got.dtype).eps ** 0.5 * largest
    return None if off <= limit else f" by {off:.3g} (expected at most {limit:.3g})"


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[0].split())[:200]}" if lines else type(error).__name__
