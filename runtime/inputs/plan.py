"""The generated inputs of a validation (`plan_cases`): which kinds there are, and which of them were not tried.

Values are drawn as in `make_feeds`. What is varied are the shapes (batches 1, 2 and 5, lengths 1, 2 and odd ones), the
padding, the positions, the token ids, and the calls of a model with a KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...export.graph.cache_names import is_past
from ...export.graph.sizes import SizeLimits, size_problem
from ...models.calling.example_inputs import vocabulary_size
from ...models.errors import UsageError
from ..runners.base import Array, TensorInfo
from .boundaries import last_position, lengths_named, longest_length, special_ids
from .cache_sizes import cache_sizes
from .cases import Case
from .ranges import shapes_within
from .synthetic import DEFAULT_SHAPES, make_feeds

if TYPE_CHECKING:
    from torch import nn

# Batch and length of more cases than `DEFAULT_SHAPES`.
_SHORT, _PADDED = (1, 2), (5, 7)
# Calls of a model with a KV cache after the first, in some cases: three decode steps, and several tokens on a filled
# cache. The other cases have one step, which costs less.
CALLS, _STEP = (1, 1, 1, 3), (1,)
# First positions of the rows of the case with other positions; the last one where the config names no largest one.
_STARTS = (0, 3, 29)
# A case of more tokens than this is tried by default if the model is small: parameters x tokens.
_CHEAP_TOKENS, _CHEAP_WORK = 160, 4e9
# The largest lengths and numbers of token ids that are tried at all, by default and thoroughly.
_LONGEST, _LONGEST_THOROUGH = 1024, 32768
_ALL_IDS, _ALL_IDS_THOROUGH = 2048, 1 << 20
_ROW = 64
DECODER_IDS = "decoder_input_ids"
_IDS = ("input_ids", DECODER_IDS)
_SEEDS = 3
NO_LIMITS = SizeLimits()


@dataclass(slots=True)
class Plan:
    """Generated cases, and the kinds of inputs that are not among them, each with what to do about it."""

    cases: list[Case] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)


def plan_cases(
    infos: Sequence[TensorInfo], model: nn.Module, seed: int, limits: SizeLimits = NO_LIMITS, thorough: bool = False
) -> Plan:
    """Plan the default inputs of a validation.

    Args:
        infos: the inputs of the candidate.
        model: the PyTorch model, whose config names lengths and special tokens.
        seed: of the random numbers.
        limits: the sizes for which the file was exported.
        thorough: add what takes long: lengths past every window, all token ids, and more seeds.

    Raises:
        UsageError: no values can be generated for an input; the user has to give it.
    """
    return _Planner(infos, model, seed, limits, thorough).run()


class _Planner:
    def __init__(
        self, infos: Sequence[TensorInfo], model: nn.Module, seed: int, limits: SizeLimits, thorough: bool
    ) -> None:
        self._infos, self._model, self._seed, self._thorough = infos, model, seed, thorough
        self._limits, self._outside = limits, 0
        self._names = {info.name for info in infos}
        self._vocabulary = vocabulary_size(model)
        self._work = sum(p.numel() for p in model.parameters())
        self._cached = any(is_past(info.name) for info in infos)
        self._cache_sizes = cache_sizes(infos, model)
        self._plan = Plan()

    def run(self) -> Plan:
        dims = [dim for info in self._infos for dim in info.shape or () if not isinstance(dim, int)]
        if not dims:
            self._add("the file's own shape", self._feeds(1, 1))
            self._plan.untried.append("other shapes: all dims of the file are fixed")
            self._add_ids(fixed=True)
            return self._plan
        for batch, length in shapes_within(self._limits, self._infos):
            calls = CALLS if (batch, length) == DEFAULT_SHAPES[1] else _STEP
            self._add(f"{batch}x{length}", self._feeds(batch, length, calls), calls, required=not self._plan.cases)
        self._add(f"{_SHORT[0]}x{_SHORT[1]}", self._feeds(*_SHORT))
        # A run that follows one of the same shapes shows outputs that are kept from it.
        self._add(f"{_SHORT[0]}x{_SHORT[1]} of other values", self._feeds(*_SHORT, seed=self._seed + 1), anew=True)
        self._add_padded()
        self._add_positions()
        self._add_ids(fixed=False)
        self._add_long()
        if self._thorough:
            for seed in range(self._seed + 1, self._seed + _SEEDS):
                for batch, length in (*DEFAULT_SHAPES, (3, 65)):
                    feeds = self._feeds(batch, length, CALLS, seed=seed)
                    self._add(f"{batch}x{length}, seed {seed}", feeds, CALLS, anew=True)
        else:
            self._plan.untried.append("several seeds: add --thorough, or repeat with --seed N")
        if self._outside:
            self._plan.untried.append(f"{self._outside} generated inputs of sizes for which the file was not exported")
        if not self._plan.cases:
            raise UsageError(
                f"no generated inputs have sizes for which the file was exported ({self._limits.to_dict()}). "
                "Give --inputs."
            )
        if not self._cached and "input_ids" in self._names and hasattr(self._model, "generate"):
            self._plan.untried.append("decoding with a KV cache: the file has none; export it with --with-past")
        return self._plan

    def _feeds(
        self,
        batch: int,
        length: int,
        calls: tuple[int, ...] = _STEP,
        *,
        seed: int | None = None,
        decoder: int | None = None,
    ) -> dict[str, Array]:
        extra = sum(calls) if self._cached else 0
        seed = self._seed if seed is None else seed
        sizes = {**self._other_lengths((length // 2 + 2 if decoder is None else decoder) + extra), **self._cache_sizes}
        return make_feeds(self._infos, batch, length + extra, seed, self._vocabulary, sizes=sizes)

    def _other_lengths(self, length: int) -> dict[str, int]:
        """The lengths of a decoder's own inputs, which differ from the encoder's."""
        dims = {dim for info in self._infos for dim in info.shape or () if isinstance(dim, str)}
        return {dim: length for dim in dims if "decoder" in dim and "batch" not in dim}

    def _add(
        self,
        name: str,
        feeds: Mapping[str, Array],
        calls: tuple[int, ...] = _STEP,
        *,
        required: bool = False,
        long: bool = False,
        anew: bool = False,
    ) -> None:
        if self._is_outside(feeds):
            self._outside += 1
            return
        if not anew and any(_same(feeds, case.feeds) for case in self._plan.cases):
            return
        if self._cached:
            name = f"{name} then {'+'.join(map(str, calls))} more"
        self._plan.cases.append(
            Case(name, dict(feeds), calls if self._cached else (), optional=not required, long=long)
        )

    def _is_outside(self, feeds: Mapping[str, Array]) -> bool:
        sizes = {
            dim: size
            for info in self._infos
            for dim, size in zip(info.shape or (), feeds[info.name].shape, strict=True)
            if isinstance(dim, str)
        }
        return bool(self._limits) and size_problem(self._limits, sizes) is not None

    def _add_padded(self) -> None:
        """Rows without padding, with padding left, right and on both sides, and with a hole; and one such row alone."""
        batch, length = _PADDED
        feeds = self._feeds(batch, length)
        mask = feeds.get("attention_mask")
        if mask is None or mask.ndim != 2 or mask.shape[0] < 2 or mask.shape[1] < length:
            self._add(f"{batch}x{length}", feeds)
            return
        padded = np.ones_like(mask)
        for row, holes in enumerate(((), (slice(0, 2),), (slice(-2, None),), (slice(0, 1), slice(-1, None)))):
            for hole in holes:
                padded[row % len(mask), hole] = 0
        self._add(f"{batch}x{length}, padded left and right", {**feeds, "attention_mask": padded})
        feeds = self._feeds(1, length, CALLS)
        alone = np.ones_like(feeds["attention_mask"])
        alone[:, [0, alone.shape[1] // 2, -1]] = 0
        name = f"1x{length}, padded left and right, with a hole in the mask"
        self._add(name, {**feeds, "attention_mask": alone}, CALLS)

    def _add_positions(self) -> None:
        """Rows of different positions: from 0, from 3 with a gap, and up to the last one that the config allows."""
        feeds = self._feeds(len(_STARTS), 7)
        positions = feeds.get("position_ids")
        if positions is None or positions.ndim != 2 or positions.shape[0] not in (1, len(_STARTS)):
            return
        last = last_position(self._model)
        starts = list(_STARTS)
        if last is not None and last >= positions.shape[1]:
            starts[-1] = last - positions.shape[1] + 1
        shifted = positions + np.array(starts, positions.dtype)[: len(positions), None]
        shifted[1:2, positions.shape[1] // 2 :] += 2
        name = f"{len(_STARTS)}x7 at other positions, up to {shifted.max()}"
        self._add(name, {**feeds, "position_ids": shifted})

    def _add_ids(self, *, fixed: bool) -> None:
        """Special, first and last token ids, and all of them where that is cheap."""
        size = self._vocabulary
        if size is None or "input_ids" not in self._names:
            return
        telling = [*range(min(size, 3)), *range(max(size - 3, 0), size), *special_ids(self._model, size)]
        ids = np.array(list(dict.fromkeys(telling)))
        most = _ALL_IDS_THOROUGH if self._thorough else _ALL_IDS
        rows = -(-size // _ROW)
        if fixed:
            feeds = self._feeds(1, 1)
            given = {name: np.resize(ids, feeds[name].shape) for name in _IDS if name in feeds}
            self._add("special token ids", {**feeds, **given})
        elif size <= most and (self._thorough or self._cheap(rows * _ROW)):
            for first in range(0, rows, _ROW):
                part = np.arange(first * _ROW, min(first + _ROW, rows) * _ROW) % size
                name = "all token ids" if rows <= _ROW else f"token ids from {part[0]}"
                self._add_tokens(name, part.reshape(-1, _ROW))
            return
        else:
            self._add_tokens(f"{len(ids)} special, first and last token ids", ids[None])
        self._plan.untried.append(f"all {size} token ids: add --thorough")

    def _add_tokens(self, name: str, ids: Array) -> None:
        extra = sum(_STEP) if self._cached else 0
        feeds = self._feeds(len(ids), max(ids.shape[1] - extra, 1))
        given = feeds["input_ids"]
        if given.shape[0] != len(ids) or given.shape[1] < ids.shape[1]:
            given = np.resize(ids, given.shape)
        else:
            given = np.concatenate([ids, given[:, ids.shape[1] :]], axis=1)
        tokens = {"input_ids": given.astype(feeds["input_ids"].dtype)}
        if DECODER_IDS in feeds and feeds[DECODER_IDS].ndim == 2:
            tokens[DECODER_IDS] = self._ids_of_decoder(feeds, ids)
        self._add(name, {**feeds, **tokens}, long=True)

    def _ids_of_decoder(self, feeds: dict[str, Array], ids: Array) -> Array:
        """The same token ids for a decoder, whose rows become as long as that takes if its length is dynamic."""
        dtype, (rows, length) = feeds[DECODER_IDS].dtype, feeds[DECODER_IDS].shape
        shape = next(info.shape for info in self._infos if info.name == DECODER_IDS) or ()
        alone = all(info.name == DECODER_IDS or shape[1] not in (info.shape or ()) for info in self._infos)
        if isinstance(shape[1], str) and alone:
            length = max(length, -(-ids.size // rows))
        return np.resize(ids, (rows, length)).astype(dtype)

    def _add_long(self) -> None:
        """A case longer than the lengths that the config names, up to its last position, as far as affordable."""
        if "input_ids" not in self._names:
            return
        cap = longest_length(self._model)
        reached, missed = 0, []
        for length, what in lengths_named(self._model).items():
            wanted = length + 3
            if cap is not None and wanted + sum(CALLS) > cap > length:
                wanted = max(length + 1, cap - sum(CALLS))
            if wanted > (_LONGEST_THOROUGH if self._thorough else _LONGEST) or not (
                self._thorough or self._cheap(wanted)
            ):
                missed.append(f"lengths past {length} ({what}): add --thorough, or --shape 1x{length + 1}")
            else:
                reached = max(reached, wanted)
        last = last_position(self._model)
        if last is not None:
            most = last + 1 - (sum(CALLS) if self._cached else 0)
            if most <= _LONGEST and (self._thorough or self._cheap(most)):
                reached = max(reached, most)
        if reached > max(length for _, length in DEFAULT_SHAPES):
            self._add(f"1x{reached}", self._feeds(1, reached, CALLS, decoder=reached - 1), CALLS, long=True)
        self._plan.untried += missed

    def _cheap(self, tokens: int) -> bool:
        return tokens <= _CHEAP_TOKENS or self._work * tokens <= _CHEAP_WORK


def _same(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """Whether two cases have equal shapes and, except for floats, equal values."""
    return all(
        a[name].shape == b[name].shape and (a[name].dtype.kind not in "iub" or np.array_equal(a[name], b[name]))
        for name in a
    )
