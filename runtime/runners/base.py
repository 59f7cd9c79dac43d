"""The interface of every runner (`Runner`): named arrays in, named arrays out, and the provenance of the results."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ...models.calling.modalities import DEEP_EMBEDS, TOKEN_TYPES
from ...models.dtypes import numpy_dtype
from ...models.errors import UsageError

if TYPE_CHECKING:
    from ...export.graph.sizes import SizeLimits

Array = NDArray[Any]

ANY_DTYPE = "any"


# Inputs of a decoder with one element per token; of the decoder of an encoder-decoder, these are its own.
_TOKEN_INPUTS = ("input_ids", "position_ids", "token_type_ids")
# Inputs with one element for each token in the cache and each new one; a decoder of embeddings reads these types so.
_OF_ALL_TOKENS = ("attention_mask", *TOKEN_TYPES)
# The input with one embedding per token; the features of inner layers are of the same shape.
_EMBEDDED = "inputs_embeds"
_DECODER_TOKENS = "decoder_input_ids"
_PER_TOKEN = {
    "input_ids": _TOKEN_INPUTS,
    _DECODER_TOKENS: (_DECODER_TOKENS,),
    _EMBEDDED: ("position_ids",),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of a model.

    Attributes:
        name: the name in feeds and results.
        dtype: numpy's name, such as `float16`, `bfloat16` or `int64`; `any` if the model does not specify it.
        shape: for each dim a number (fixed), a name (symbolic) or None (unknown); None instead of the tuple if the rank
            is unknown too.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@runtime_checkable
class Runner(Protocol):
    """Runs one model. The session or engine is released when the context exits."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def inputs(self) -> list[TensorInfo]:
        """The inputs that must be fed, in the model's order."""
        ...

    def outputs(self) -> list[TensorInfo]:
        """The outputs, in the model's order."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one inference.

        Args:
            feeds: an array for every input; bfloat16 is the dtype of ml_dtypes.

        Returns:
            Every output by name, owned by the caller.

        Raises:
            UsageError: the feeds do not match the inputs, or the model fails on them.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """Versions, devices, options and file hashes behind the results, as JSON values."""
        ...


class ClosesOnExit:
    """The context of a runner: leaving it calls `close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release what the runner holds."""
        raise NotImplementedError


class DecoderSession(Runner, Protocol):
    """A `Runner` of a decoder that keeps its own cache between the calls of one run."""

    def run_calls(self, feeds: Mapping[str, Array], ends: Sequence[int]) -> dict[str, Array]:
        """One run in several calls; the outputs of the calls are joined along the length.

        Args:
            feeds: the inputs of all tokens, `[batch, length]`.
            ends: the number of tokens after each call, in ascending order.
        """
        ...


class OnnxSession(Runner, Protocol):
    """A `Runner` of an ONNX model, which can return a selection of the outputs."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """One inference; see `Runner.run`.

        Args:
            feeds: an array for every input.
            outputs: names of the outputs to return; None for all.
        """
        ...


def describe_feeds(feeds: Mapping[str, Array]) -> str:
    """Names, dtypes and shapes on one line, for messages."""
    return ", ".join(f"{name} {array.dtype.name}{list(array.shape)}" for name, array in feeds.items())


def check_feeds(
    infos: Iterable[TensorInfo], feeds: Mapping[str, Array], where: str, limits: SizeLimits | None = None
) -> None:
    """Check that feeds match the inputs of a model.

    Args:
        infos: the inputs that must be fed.
        feeds: the arrays by input name.
        where: the model's name in the message (a file name, a class name).
        limits: the sizes for which the model was exported, or None.

    Raises:
        UsageError: an input is missing or unknown, is not an array, or has the wrong dtype, rank or size, two dims
            of one symbolic name differ, or a size is outside the limits. The message names
            the input, and the expected and the given value.
    """
    wanted = {info.name: info for info in infos}
    missing, unexpected = [n for n in wanted if n not in feeds], [n for n in feeds if n not in wanted]
    if missing or unexpected:
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        problems += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
        raise UsageError(f"{where}: inputs {'; '.join(problems)}. The inputs are: {', '.join(wanted) or 'none'}.")
    symbols: dict[str, tuple[int, str]] = {}
    for info in wanted.values():
        _check_array(info, feeds[info.name], where)
        _check_shape(info, feeds[info.name].shape, where, symbols)
    if limits:
        _check_limits(limits, symbols, where)


def _check_limits(limits: SizeLimits, symbols: Mapping[str, tuple[int, str]], where: str) -> None:
    from ...export.graph.sizes import size_problem

    problem = size_problem(limits, {name: size for name, (size, _) in symbols.items()})
    if problem is not None:
        owners = [owner for name, (_, owner) in symbols.items() if name in problem.replace(":", " ").split()]
        raise UsageError(
            f"{where}: {'input ' + owners[0] + ': ' if owners else ''}{problem}. Give inputs of these sizes, or export "
            "again with example inputs of the sizes that you need."
        )


def _check_array(info: TensorInfo, array: Array, where: str) -> None:
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{where}: input {info.name}: expected a numpy array, got {type(array).__name__}.")
    if info.dtype != ANY_DTYPE and array.dtype != numpy_dtype(info.dtype):
        # The name of a dtype does not show a foreign byte order.
        given = array.dtype.name if array.dtype.isnative else array.dtype.str
        raise UsageError(f"{where}: input {info.name}: expected dtype {info.dtype}, got {given}. Convert the array.")


def _check_shape(info: TensorInfo, shape: tuple[int, ...], where: str, symbols: dict[str, tuple[int, str]]) -> None:
    if info.shape is None:
        return
    if len(shape) != len(info.shape):
        raise UsageError(
            f"{_expected_shape(info, where)} of rank {len(info.shape)}, got {list(shape)} of rank {len(shape)}."
        )
    for axis, (size, dim) in enumerate(zip(shape, info.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise UsageError(f"{_expected_shape(info, where)}, got {list(shape)} (dim {axis} must be {dim}).")
        if isinstance(dim, str):
            known, owner = symbols.setdefault(dim, (size, info.name))
            if known != size:
                raise UsageError(
                    f"{_expected_shape(info, where)}, got {list(shape)}, but {dim} is {known} in input {owner}."
                )


def _expected_shape(info: TensorInfo, where: str) -> str:
    shape = ", ".join("?" if dim is None else str(dim) for dim in info.shape or ())
    return f"{where}: input {info.name}: expected shape [{shape}]"


def token_input(names: Container[str]) -> str:
    """The input that has the tokens of a decoder, or their embeddings."""
    return next((name for name in ("input_ids", _DECODER_TOKENS, _EMBEDDED) if name in names), "input_ids")


def tokens_between(feeds: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
    """The inputs of a decoder's call that reads the tokens from `start` to `end`; its mask is up to `end`.

    Args:
        feeds: the inputs of all tokens; `input_ids`, `position_ids` and `token_type_ids` have them in the last dim, and
            `inputs_embeds` and `deepstack_embeds_N` in the one before. Of the decoder of an encoder-decoder,
            `decoder_input_ids` has them, and `attention_mask` is the encoder's.
        start: the number of tokens in the cache.
        end: the number of tokens after the call.
    """
    own = _PER_TOKEN[token_input(feeds)]
    part = {name: value[..., start:end] if name in own else value for name, value in feeds.items()}
    embedded = [name for name in feeds if name.startswith((_EMBEDDED, DEEP_EMBEDS))]
    part.update({name: feeds[name][:, start:end] for name in embedded})
    if _DECODER_TOKENS not in own:
        part.update({name: feeds[name][:, :end] for name in _OF_ALL_TOKENS if name in feeds and name not in own})
    return part
