"""Match the names of a candidate's inputs and outputs with PyTorch's (`match_inputs`, `match_outputs`, `Renamed`)."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ...export.graph.cache_names import is_past, is_present
from ...models.calling.calls import CallForm
from ...models.errors import UsageError
from ..runners.base import ANY_DTYPE, Array, DecoderSession, Runner, TensorInfo
from .run_cases import is_last_token

if TYPE_CHECKING:
    from torch import nn

# Parameters of transformers' models that hold whole numbers.
_WHOLE = ("input_ids", "position_ids", "token_type_ids", "decoder_input_ids")
# Names of inputs by which values are generated: one of them is never replaced by another name.
_PER_TOKEN = (*_WHOLE, "attention_mask", "decoder_attention_mask")
# Parts of names that say nothing, and the names that a runner gives to outputs that PyTorch does not name.
_EMPTY_PARTS = frozenset({"input", "inputs", "output", "outputs", "tensor"})
_MADE_UP = re.compile(r"output(_\d+)*")
_INDEX = re.compile(r"[._:]\d+$")

_Pair = Callable[[TensorInfo, TensorInfo], bool]


@dataclass(frozen=True, slots=True)
class Matched:
    """The names of a candidate that differ from PyTorch's.

    Attributes:
        names: PyTorch's name by the candidate's, of those that differ only.
        kept: the candidate's name by PyTorch's, of inputs for which the candidate's is the name that says more.
        extra: names of the candidate without a counterpart.
        notes: what was taken for what, and why, for the report.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def match_inputs(
    infos: Sequence[TensorInfo],
    model: nn.Module,
    exported: Sequence[Mapping[str, Any]],
    name: str,
    form: CallForm | None = None,
) -> Matched:
    """Which parameter of PyTorch's `forward` each input of the candidate stands for, except those of a KV cache.

    By name first; then by the words of the names, by dtype, rank and names of the dims where one pair fits only, and
    else by order.

    Args:
        infos: the candidate's inputs.
        model: the PyTorch model.
        exported: the inputs in the manifest of the export, which have the parameters' names; may be empty.
        name: the candidate's name in messages.
        form: how the model is called: which inputs are parts of nested arguments, and which arguments are constants.

    Raises:
        UsageError: an input fits no parameter, or a required parameter has no input.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    form = form or CallForm()
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    known = {row["name"]: TensorInfo(row["name"], row["dtype"], tuple(row["shape"])) for row in exported}
    free_form = len(plain) < len(parameters)  # the export knows what *args and **kwargs stand for
    own = [p for p in plain if p.name not in form.arguments]
    names = [*(p.name for p in own), *form.tensors]
    names += [n for n in known if free_form and n not in names and not is_past(n)]
    theirs = [known.get(n) or _of_parameter(n) for n in names]
    required = {p.name for p in own if p.default is p.empty} | set(form.required(model.forward))
    mine = [info for info in infos if not is_past(info.name)]
    pairs, how = _pairs(mine, theirs, _fits)
    left = [info for info in mine if info.name not in pairs]
    free = [info for info in theirs if info.name not in pairs.values()]
    needed = [info for info in free if info.name in required]
    in_order = needed if needed else free
    fitting = len(left) == len(needed) if needed else len(left) <= len(free)
    if not fitting or not all(_fits(a, b) for a, b in zip(left, in_order, strict=False)):
        raise UsageError(
            f"the inputs of {name} do not match the parameters of {type(model).__name__}.forward: {name} has "
            f"{_listed(mine)}; PyTorch has {_listed(theirs)}. Expected one input for each of "
            f"{', '.join(i.name for i in needed) or 'the parameters that it needs'}, got "
            f"{', '.join(i.name for i in left) or 'none'}. Rename the file's inputs, or name the model that was "
            "exported (--against)."
        )
    for a, b in zip(left, in_order, strict=False):
        pairs[a.name], how[a.name] = b.name, "by order"
    found = _result(pairs, how, "input")
    kept = {new: old for old, new in found.names.items() if old in _PER_TOKEN and new not in _PER_TOKEN}
    return dataclasses.replace(found, names={o: n for o, n in found.names.items() if n not in kept}, kept=kept)


def match_outputs(got: Mapping[str, Array], wanted: Mapping[str, Array], name: str, model: str) -> Matched:
    """Which output of PyTorch each output of the candidate is, except those of a KV cache.

    Args:
        got: the candidate's outputs of one call.
        wanted: PyTorch's outputs of the same case; it may have more.
        name: the candidate's name in messages.
        model: the name of PyTorch's model in messages.

    Raises:
        UsageError: no output has a counterpart, or what is left fits in no order.
    """
    arrays = {False: _without_cache(wanted), True: _without_cache(got)}
    theirs, mine = ([TensorInfo(n, a.dtype.name, a.shape) for n, a in arrays[side].items()] for side in (False, True))

    def fits(a: TensorInfo, b: TensorInfo) -> bool:
        value, other = arrays[True][a.name], arrays[False][b.name]
        if _kind(a.dtype) != _kind(b.dtype):
            return False
        if value.shape == other.shape or is_last_token(value, other):
            return True
        part = value.ndim == other.ndim > 1 and value.shape[1] < other.shape[1]  # a call of a part of the tokens
        return part and value.shape[:1] + value.shape[2:] == other.shape[:1] + other.shape[2:]

    pairs, how = _pairs(mine, theirs, fits)
    # Where nothing fits an output, its name decides: the verdict says that its shape or dtype is another.
    free_names = {info.name for info in theirs} - set(pairs.values())
    pairs.update({info.name: info.name for info in mine if info.name not in pairs and info.name in free_names})
    left = [info for info in mine if info.name not in pairs]
    free = [info for info in theirs if info.name not in pairs.values()]
    if left and len(left) == len(free) and all(fits(a, b) for a, b in zip(left, free, strict=True)):
        for a, b in zip(left, free, strict=True):
            pairs[a.name], how[a.name] = b.name, "by order"
        left = []
    if left and (free or not pairs):
        raise UsageError(
            f"{name} returns {_counted(mine)}, the PyTorch model {model} {_counted(theirs)}, and "
            f"{', '.join(info.name for info in left)} fits none of "
            f"{', '.join(info.name for info in free) or 'them'}. Rename the file's outputs, or name the model that was "
            "exported (--against)."
        )
    found = _result(pairs, how, "output")
    extra = tuple(info.name for info in left)
    notes = tuple(f"the file also returns {info}, which PyTorch does not: it was not compared" for info in extra)
    return dataclasses.replace(found, extra=extra, notes=(*found.notes, *notes))


def names_for_torch(matched: Matched, returned: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """The candidate's name of each output of PyTorch that is renamed.

    Args:
        matched: from `match_outputs`.
        returned: PyTorch's outputs.
        names: the candidate's outputs. An output of PyTorch that has one of these names and is not it is set apart.
    """
    found = {new: old for old, new in matched.names.items()}
    same = set(names) - set(matched.names) - set(matched.extra)
    taken = (set(names) & set(returned)) - same - set(found)
    return {**found, **{name: f"{name} of PyTorch" for name in taken}}


class Renamed:
    """A runner under other names of inputs and outputs; it is not closed.

    Args:
        runner: the runner.
        inputs: the new name of an input, by its own; the others keep theirs.
        outputs: the same for outputs.
    """

    def __init__(
        self, runner: Runner, inputs: Mapping[str, str] | None = None, outputs: Mapping[str, str] | None = None
    ) -> None:
        self._runner, self._inputs, self._outputs = runner, dict(inputs or {}), dict(outputs or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def inputs(self) -> list[TensorInfo]:
        """See `Runner.inputs`."""
        return renamed_infos(self._runner.inputs(), self._inputs)

    def outputs(self) -> list[TensorInfo]:
        """See `Runner.outputs`."""
        return renamed_infos(self._runner.outputs(), self._outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Runner.run`."""
        return renamed(self._runner.run(own_names(feeds, self._inputs)), self._outputs)

    def provenance(self) -> dict[str, Any]:
        """See `Runner.provenance`."""
        return self._runner.provenance()


class RenamedTorch(Renamed):
    """`Renamed`, of a runner that can run in calls."""

    def __init__(
        self, runner: DecoderSession, inputs: Mapping[str, str] | None = None, outputs: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(runner, inputs, outputs)
        self._calls = runner

    def run_calls(self, feeds: Mapping[str, Array], ends: Sequence[int]) -> dict[str, Array]:
        """See `DecoderSession.run_calls`."""
        return renamed(self._calls.run_calls(own_names(feeds, self._inputs), ends), self._outputs)


def renamed(arrays: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    """The arrays under the new names in `names`, by the old ones."""
    return {names.get(name, name): array for name, array in arrays.items()}


def own_names(arrays: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    """The arrays under the old names again; see `renamed`."""
    return renamed(arrays, {new: old for old, new in names.items()})


def renamed_infos(infos: Iterable[TensorInfo], names: Mapping[str, str]) -> list[TensorInfo]:
    """The inputs or outputs under their new names; see `renamed`."""
    return [dataclasses.replace(info, name=names.get(info.name, info.name)) for info in infos]


def _pairs(
    mine: Sequence[TensorInfo], theirs: Sequence[TensorInfo], fits: _Pair
) -> tuple[dict[str, str], dict[str, str]]:
    """The pairs of names that are certain, and how each was found."""
    pairs: dict[str, str] = {}
    how: dict[str, str] = {}
    rounds: list[tuple[str, _Pair]] = [
        ("", lambda a, b: a.name == b.name and (_MADE_UP.fullmatch(b.name) is None or fits(a, b))),
        ("by its name", lambda a, b: _INDEX.sub("", a.name) == _INDEX.sub("", b.name) and fits(a, b)),
        ("by its name", lambda a, b: bool(_parts(a.name)) and _parts(a.name) == _parts(b.name) and fits(a, b)),
        ("by its name", lambda a, b: _shares(_parts(a.name), _parts(b.name)) and fits(a, b)),
        ("by its dtype and dims", lambda a, b: _specified(b) and _same_dims(a, b) and fits(a, b)),
        ("by its dtype and dims", lambda a, b: _specified(b) and fits(a, b)),
    ]
    for reason, pair in rounds:
        while True:
            left = [info for info in mine if info.name not in pairs]
            free = [info for info in theirs if info.name not in pairs.values()]
            if reason == "by its dtype and dims" and not all(_specified(info) for info in free):
                break  # what is unknown may fit too
            single = [(a, b) for a in left for b in free if pair(a, b)]
            single = [(a, b) for a, b in single if sum(a in p for p in single) == sum(b in p for p in single) == 1]
            if not single:
                break
            pairs.update({a.name: b.name for a, b in single})
            how.update({a.name: reason for a, _ in single})
    return pairs, how


def _result(pairs: Mapping[str, str], how: Mapping[str, str], noun: str) -> Matched:
    names = {old: new for old, new in pairs.items() if old != new}
    # A runner made up the names of outputs that PyTorch does not name: they say nothing that was overridden.
    said = {old: new for old, new in names.items() if not (noun == "output" and _MADE_UP.fullmatch(new))}
    several = len(names) > 1
    notes = tuple(
        f"the file's {noun} {old} is taken for {new} ({how[old]})"
        for old, new in names.items()
        if old in said or (several and how[old] == "by order")
    )
    return Matched(names, notes=notes)


def _of_parameter(name: str) -> TensorInfo:
    return TensorInfo(name, "int64" if name in _WHOLE else ANY_DTYPE, None)


def _fits(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two inputs may be the same: the kind of dtype, the rank, and the dims that both fix agree."""
    if ANY_DTYPE not in (a.dtype, b.dtype) and _kind(a.dtype) != _kind(b.dtype):
        return False
    if a.shape is None or b.shape is None:
        return True
    fixed = ((x, y) for x, y in zip(a.shape, b.shape, strict=False) if isinstance(x, int) and isinstance(y, int))
    return len(a.shape) == len(b.shape) and all(x == y for x, y in fixed)


def _specified(info: TensorInfo) -> bool:
    return info.dtype != ANY_DTYPE and info.shape is not None


def _same_dims(a: TensorInfo, b: TensorInfo) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


def _kind(dtype: str) -> str:
    """The kind of a dtype by numpy's name: whole numbers, truth values or floats."""
    return "whole" if dtype.startswith(("int", "uint")) else "bool" if dtype == "bool" else "float"


def _parts(name: str) -> frozenset[str]:
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return frozenset(words) - _EMPTY_PARTS - {""}


def _shares(a: frozenset[str], b: frozenset[str]) -> bool:
    return bool(a and b) and (a < b or b < a)


def _without_cache(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in arrays.items() if not is_present(name)}


def _listed(infos: Sequence[TensorInfo]) -> str:
    return ", ".join(_shown(info) for info in infos) or "none"


def _counted(infos: Sequence[TensorInfo]) -> str:
    return f"{len(infos)} output{'s' * (len(infos) != 1)} ({_listed(infos)})"


def _shown(info: TensorInfo) -> str:
    dtype = "" if info.dtype == ANY_DTYPE else info.dtype
    shape = "" if info.shape is None else f"[{', '.join('?' if dim is None else str(dim) for dim in info.shape)}]"
    what = " ".join(part for part in (dtype, shape) if part)
    return f"{info.name} ({what})" if what else info.name
