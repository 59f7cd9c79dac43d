"""Optimization profiles (`make_profiles`): smallest, usual and largest shape of every input with dynamic dims.

Dims of one name have one size. Users give the shapes of an input (`input_ids:1x1,4x512,16x4096`) or the range of a dim
(`past_sequence:0,128,4095`); the shapes of other inputs, including the KV cache, follow from the names of their dims.
`past_sequence` plus `sequence` is `total_sequence`; other common names of these dims are supported too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ...models.errors import UsageError
from .network import InputDims

# An engine reserves memory for the longest shape, so a model with 131,072 positions gets a shorter default.
DEFAULT_LONGEST: Final = 4096
DEFAULT_BATCH: Final = 8
_USUAL_LENGTH: Final = 128
_INT = re.compile(r"-?\d+")
_PAST = re.compile(r"past.*(seq|len)|past$|(seq|len).*past|kv_cache_dim")
_TOTAL = re.compile(r"total.*(seq|len)|(seq|len).*total|past.*\+")
BATCH: Final = re.compile(r"batch")


@dataclass(frozen=True, slots=True)
class Range:
    """The smallest, the usual and the largest value of a dim."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.usual <= self.most:
            raise UsageError(f"expected smallest <= usual <= largest, none negative, got {self}.")

    def __str__(self) -> str:
        return f"{self.least},{self.usual},{self.most}"

    def plus(self, other: Range) -> Range:
        """The range of the sum."""
        return Range(self.least + other.least, self.usual + other.usual, self.most + other.most)


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimization profile: the smallest, the usual and the largest shape of each input with dynamic dims."""

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def to_dict(self) -> dict[str, list[list[int]]]:
        """The profile as JSON."""
        return {name: [list(shape) for shape in shapes] for name, shapes in self.shapes.items()}


def make_profiles(inputs: Sequence[InputDims], texts: Sequence[str] = (), longest: int | None = None) -> list[Profile]:
    """The profiles of an engine.

    Args:
        inputs: inputs of the graph.
        texts: one for each profile, in the format of the command line; without any, default ranges are used: one
            profile, or with a KV cache one for the prompt and one for the decode steps.
        longest: the longest sequence that the model supports, or None if unknown.

    Returns:
        The profiles; an empty list if every dim is fixed.

    Raises:
        UsageError: a text is invalid, names an unknown input or dim, or contradicts itself or the graph's fixed dims.
    """
    named = _dynamic_names(inputs)
    if not any(isinstance(dim, str) for given in inputs for dim in given.dims):
        if texts:
            raise UsageError("--profile: every dim of the model is fixed, so it has no profiles. Omit --profile.")
        return []
    limit = min(longest or DEFAULT_LONGEST, DEFAULT_LONGEST)
    if not texts:
        return [_profile(inputs, ranges) for ranges in _default_ranges(named, limit)]
    profiles = []
    for text in texts:
        try:
            ranges = _complete(named, _parse(text, inputs), limit)
            _check_longest(ranges, longest)
        except UsageError as error:
            raise UsageError(f"--profile {text!r}: {error}") from error
        profiles.append(_profile(inputs, ranges))
    return profiles


def _check_longest(ranges: Mapping[str, Range], longest: int | None) -> None:
    for name in roles(list(ranges)):
        if name is not None and longest is not None and ranges[name].most > longest:
            raise UsageError(f"{name}: expected at most the model's {longest} positions, got {ranges[name].most}.")


def _dynamic_names(inputs: Sequence[InputDims]) -> list[str]:
    for given in inputs:
        if None in given.dims:
            raise UsageError(
                f"input {given.name}: dim {given.dims.index(None)} has neither a size nor a name. Name it, for example "
                "with onnx.tools.update_model_dims, so that equal dims can be identified."
            )
    return list(dict.fromkeys(dim for given in inputs for dim in given.dims if isinstance(dim, str)))


def roles(names: Sequence[str]) -> tuple[str | None, str | None, str | None]:
    """Names of the dims of the past, of the total length, and of the new tokens; None if there is no such dim.

    Beside a decoder's own tokens, those of the encoder are not new ones.
    """
    total = next((name for name in names if _TOTAL.search(name.lower())), None)
    past = next((name for name in names if name != total and _PAST.search(name.lower())), None)
    lengths = [name for name in names if name not in (total, past) and re.search(r"seq|len", name.lower())]
    own = [name for name in lengths if "encoder" not in name.lower()]
    return past, total, next(iter(own or lengths), None)


def _default_ranges(names: Sequence[str], limit: int) -> list[dict[str, Range]]:
    past, total, new = roles(names)
    usual = min(_USUAL_LENGTH, limit)
    free = {
        name: Range(1, 1, DEFAULT_BATCH) if BATCH.search(name.lower()) else Range(1, usual, limit)
        for name in names
        if name not in (past, total)
    }
    if past is None or new is None:
        return [_complete(names, free, limit)]
    prompt = {**free, past: Range(0, 0, 0)}
    step = {**free, new: Range(1, 1, 1), past: Range(0, min(usual, limit - 1), limit - 1)}
    return [_complete(names, prompt, limit), _complete(names, step, limit)]


def _complete(names: Sequence[str], given: Mapping[str, Range], limit: int) -> dict[str, Range]:
    """Ranges of all dims, derived from the given ones."""
    ranges = dict(given)
    past, total, new = roles(names)
    for name in names:
        if name in ranges or name == total:
            continue
        if name == past:
            ranges[name] = Range(0, min(_USUAL_LENGTH, limit - 1), limit - 1)
        elif BATCH.search(name.lower()):
            ranges[name] = Range(1, 1, DEFAULT_BATCH)
        else:
            ranges[name] = Range(1, min(_USUAL_LENGTH, limit), limit)
    if total is None:
        return ranges
    if past is not None and new is not None:
        whole = ranges[past].plus(ranges[new])
    elif past is not None:
        whole = ranges[past].plus(Range(1, 1, 1))
    else:
        whole = ranges.get(total, Range(1, min(_USUAL_LENGTH, limit), limit))
    found = ranges.setdefault(total, whole)
    if found.usual != whole.usual or found.least > whole.least or found.most < whole.most:
        parts = " plus ".join(f"{name} ({ranges[name]})" for name in (past, new) if name is not None)
        raise UsageError(
            f"{total}: expected the usual value of {parts} = {whole}, and a range that covers it, got {found}."
        )
    return ranges


def _profile(inputs: Sequence[InputDims], ranges: Mapping[str, Range]) -> Profile:
    shapes = {}
    for given in inputs:
        if not any(isinstance(dim, str) for dim in given.dims):
            continue
        rows = [_range_of(dim, ranges) for dim in given.dims]
        shapes[given.name] = (
            tuple(row.least for row in rows), tuple(row.usual for row in rows), tuple(row.most for row in rows)
        )  # fmt: skip
    return Profile(shapes)


def _range_of(dim: int | str | None, ranges: Mapping[str, Range]) -> Range:
    if isinstance(dim, int):
        return Range(dim, dim, dim)
    return ranges[str(dim)]


def parse_profile(text: str) -> list[tuple[str, str, list[Shape]]]:
    """The parts of a profile's text: each part, the name in it, and its three shapes.

    Raises:
        UsageError: it does not have this form, or a shape is smaller than the one before.
    """
    parts = [part for part in re.split(r"[;\s]+", text.strip()) if part]
    if not parts:
        raise UsageError("expected NAME:SMALLEST,USUAL,LARGEST, got nothing.")
    found = []
    for part in parts:
        name, colon, values = part.rpartition(":")
        shapes = [_numbers(shape, part) for shape in values.split(",")]
        if not colon or len(shapes) != 3:
            raise UsageError(
                f"expected NAME:SMALLEST,USUAL,LARGEST, such as input_ids:1x1,4x512,16x4096, got {part!r}."
            )
        for sizes in zip(*shapes, strict=False):  # shapes of several lengths are named with the input's dims
            Range(*sizes)
        found.append((part, name, shapes))
    return found


def _parse(text: str, inputs: Sequence[InputDims]) -> dict[str, Range]:
    """Ranges by name, from parts that are separated by semicolons or spaces."""
    by_name = {given.name: given for given in inputs}
    names = {dim for given in inputs for dim in given.dims if isinstance(dim, str)}
    ranges: dict[str, Range] = {}
    for part, name, shapes in parse_profile(text):
        if name in by_name:
            found = _ranges_of_input(by_name[name], shapes, part)
        elif name in names:
            if any(len(shape) != 1 for shape in shapes):
                raise UsageError(f"{name} is one dim: expected three numbers, got {part!r}.")
            found = {name: Range(shapes[0][0], shapes[1][0], shapes[2][0])}
        else:
            raise UsageError(
                f"the model has no input or dim {name!r}; its inputs are {', '.join(by_name)}; its dynamic dims are "
                f"{', '.join(sorted(names))}."
            )
        for dim, wanted in found.items():
            if ranges.setdefault(dim, wanted) != wanted:
                raise UsageError(f"{dim} is both {ranges[dim]} and {wanted}; dims of one name have one range.")
    return ranges


def _ranges_of_input(given: InputDims, shapes: Sequence[Shape], part: str) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for shape in shapes:
        if len(shape) != len(given.dims):
            raise UsageError(f"{given.name} has {len(given.dims)} dims ({_text(given)}), got {len(shape)} in {part!r}.")
    for index, dim in enumerate(given.dims):
        values = [shape[index] for shape in shapes]
        if isinstance(dim, int):
            if set(values) != {dim}:
                raise UsageError(f"{given.name}: dim {index} is fixed at {dim}, got {values} in {part!r}.")
            continue
        wanted = Range(*values)
        if found.setdefault(str(dim), wanted) != wanted:
            raise UsageError(f"{dim} is both {found[str(dim)]} and {wanted}; dims of one name have one range.")
    return found


def _numbers(text: str, part: str) -> Shape:
    numbers = text.split("x")
    if not all(_INT.fullmatch(number) for number in numbers):
        raise UsageError(f"expected numbers separated by x, such as 4x512, got {text!r} in {part!r}.")
    return tuple(int(number) for number in numbers)


def _text(given: InputDims) -> str:
    return " x ".join(map(str, given.dims))
