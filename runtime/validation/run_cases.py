"""Generate, run and judge the cases of a validation, with and without the KV cache."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...export.graph.cache_names import is_past, is_present, present_name, present_to_past
from ...models.calling.example_inputs import vocabulary_size
from ...models.dtypes import numpy_dtype
from ...models.errors import RmsnormDeployError, UsageError
from ..accuracy.baseline import unless_wrong
from ..accuracy.compare_output import OutputVerdict, judge
from ..accuracy.tolerances import Limits, limits_of
from ..inputs.cache_sizes import cache_sizes
from ..inputs.cases import Case
from ..inputs.synthetic import DEFAULT_SHAPES, make_feeds
from ..runners.base import Array, Runner, TensorInfo, token_input, tokens_between

if TYPE_CHECKING:
    from torch import nn

# Suffixes of the names of the outputs of a decode step of one token, and of a later call with several tokens.
DECODE_SUFFIX, CHUNK_SUFFIX = "@decode", "@chunk"

Outputs = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Call:
    """The outputs of one call of the candidate, or of several of one kind.

    Attributes:
        outputs: by name, without the suffix.
        positions: the places, in the length of the case, of the tokens that the call reads, in order.
        suffix: `DECODE_SUFFIX` or `CHUNK_SUFFIX`; empty for the first call.
    """

    outputs: Outputs
    positions: tuple[int, ...] = ()
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """A case, and the candidate's outputs for it.

    Attributes:
        case: the case.
        calls: the outputs by call; one without a KV cache.
        present: the KV cache after the last call, by name.
        error: why the candidate does not run the case, which PyTorch does; else empty.
        repeated: whether a second run gave the same bits; None if there was none.
        torch_dtype: numpy's name of the dtype in which PyTorch gets floating-point inputs; that of the case if None.
    """

    case: Case
    calls: tuple[Call, ...]
    present: Outputs = field(default_factory=dict)
    error: str = ""
    repeated: bool | None = None
    torch_dtype: str | None = None

    @property
    def got(self) -> Outputs:
        """All outputs, with the suffixes of their calls."""
        return {f"{name}{call.suffix}": value for call in self.calls for name, value in call.outputs.items()}

    @property
    def own_feeds(self) -> dict[str, Array]:
        """The candidate's feeds without a cache."""
        return {name: value for name, value in self.case.feeds.items() if not is_past(name)}

    @property
    def torch_feeds(self) -> dict[str, Array]:
        """The feeds of PyTorch, which runs without a cache."""
        feeds = self.own_feeds
        if self.torch_dtype is None:
            return feeds
        dtype = numpy_dtype(self.torch_dtype)
        return {name: value.astype(dtype) if _is_float(value) else value for name, value in feeds.items()}

    @property
    def size(self) -> int:
        """Number of elements of all inputs."""
        return sum(value.size for value in self.torch_feeds.values())


def made_up_cases(
    infos: Sequence[TensorInfo], model: nn.Module, shapes: Sequence[tuple[int, int]] | None, seed: int
) -> list[Case]:
    """Generated inputs in several shapes; a decoder with a cache gets one more token.

    Raises:
        UsageError: a shape is not positive, or no values can be generated for an input.
    """
    vocabulary = vocabulary_size(model)
    extra = 1 if any(is_past(info.name) for info in infos) else 0
    sizes = cache_sizes(infos, model)
    cases: list[Case] = []
    for batch, length in shapes or DEFAULT_SHAPES:
        feeds = make_feeds(infos, batch, length + extra, seed, vocabulary, sizes=sizes)
        if not any(_same_shapes(feeds, other.feeds) for other in cases):
            name = f"{batch}x{length}" + (" then 1 more" if extra else "")
            cases.append(Case(name if _is_dynamic(infos) else "the file's own shape", feeds))
    return cases


def run_guarded(runner: Runner, case: Case, name: str) -> Run:
    """The candidate's outputs.

    Raises:
        UsageError: it fails, or does not return the outputs that it declares.
    """
    try:
        run = _run_candidate(runner, case)
    except RmsnormDeployError:
        raise
    except Exception as error:  # a runner that the user wrote may raise any error
        raise UsageError(f"{name} failed on case {case.name}: {type(error).__name__}: {error}") from error
    returned = {output for call in run.calls for output in call.outputs}
    missing = [info.name for info in runner.outputs() if info.name not in returned and not is_present(info.name)]
    if missing or not returned:
        raise UsageError(
            f"{name}: case {case.name}: expected the outputs {', '.join(missing) or 'that it declares'}, "
            f"got {', '.join(returned) or 'none'}."
        )
    return run


def repeats(runner: Runner, run: Run) -> Run:
    """The run, after a second one of the same inputs, which must give the same bits."""
    again = run_guarded(runner, run.case, "a second run")
    first, second = {**run.got, **run.present}, {**again.got, **again.present}
    same = list(first) == list(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in ((value, second[name]) for name, value in first.items())
    )
    return dataclasses.replace(run, repeated=same)


def _run_candidate(runner: Runner, case: Case) -> Run:
    cached = any(is_past(name) for name in case.feeds)
    if not cached or case.feeds[token_input(case.feeds)].shape[1] == 1:
        outputs = runner.run(case.feeds)
        present = {n: v for n, v in outputs.items() if cached and is_present(n)}
        return Run(case, (Call({n: v for n, v in outputs.items() if n not in present}),), present)
    return _run_with_cache(runner, case)


def _run_with_cache(runner: Runner, case: Case) -> Run:
    """Run the first tokens with an empty cache, then each further call with the cache that the last one returned."""
    feeds = case.feeds
    ends = call_ends(case)
    given, start, found = dict(feeds), 0, []
    for end in ends:
        outputs = runner.run(tokens_between(given, start, end))
        suffix = "" if start == 0 else DECODE_SUFFIX if end - start == 1 else CHUNK_SUFFIX
        present = {name: value for name, value in outputs.items() if is_present(name)}
        own = {name: value for name, value in outputs.items() if name not in present}
        found.append(Call(own, tuple(range(start, end)), suffix))
        given.update({k: v for k, v in present_to_past(present).items() if k in feeds})
        start = end
    return Run(case, tuple(_joined(found)), present)


def call_ends(case: Case) -> list[int]:
    """The number of tokens after each call of a model with a KV cache."""
    length = case.feeds[token_input(case.feeds)].shape[1]
    calls = case.calls if sum(case.calls) < length and case.calls else (1,)
    return list(itertools.accumulate(calls, initial=length - sum(calls)))


def _joined(calls: Sequence[Call]) -> Iterator[Call]:
    """The calls, with those of one kind joined along the length."""
    for suffix, same in itertools.groupby(calls, key=lambda call: call.suffix):
        group = list(same)
        names = group[0].outputs
        if len(group) == 1 or any(call.outputs[name].ndim < 2 for call in group for name in names):
            yield from group[-1:]
            continue
        outputs = {name: np.concatenate([call.outputs[name] for call in group], axis=1) for name in names}
        yield Call(outputs, tuple(place for call in group for place in call.positions), suffix)


def judge_run(
    run: Run, reference: Outputs, baseline: Outputs, limits: Mapping[str, Limits], names: Sequence[str]
) -> list[OutputVerdict]:
    """The verdicts on the outputs of one case, of every kind of call, and on the KV cache that it leaves.

    Args:
        run: the candidate's run.
        reference: PyTorch's outputs in float64, the KV cache among them if there is one.
        baseline: PyTorch's outputs in the deployed dtype.
        limits: explicit limits by output.
        names: the candidate's outputs.
    """
    if run.error:
        return [OutputVerdict("the run", False, run.error, None, None)]
    true, wanted = named(reference, names), named(baseline, names)
    rows = []
    for call in run.calls:
        for name, got in call.outputs.items():
            ours, theirs = _at(true[name], call, got), _at(wanted[name], call, got)
            mask = _judged_places(run.case, call, got)
            if mask is not None and ours.shape == theirs.shape == got.shape:
                got, ours, theirs = got[mask], ours[mask], theirs[mask]
            rows.append(judge_output(name + call.suffix, got, ours, theirs, limits_of(limits, name)))
    rows += judge_cache(run, reference, baseline, limits)
    if run.repeated is False:
        reason = "a second run of the same inputs gives other bits, so the file reads something besides its inputs"
        rows.append(OutputVerdict("a second run", False, reason, None, None))
    return rows


def judge_output(
    name: str, candidate: Array, reference: Array, baseline: Array, limits: Limits | None
) -> OutputVerdict:
    """The verdict on one output of one call; see `judge` and `unless_wrong`."""
    verdict = judge(name, candidate, reference, baseline, limits=limits)
    if limits is None:
        verdict = unless_wrong(verdict, baseline.dtype.name)
    if candidate.dtype != baseline.dtype and verdict.passed and limits is None:
        reason = f"expected {baseline.dtype.name} as in PyTorch, got {candidate.dtype.name}; explicit limits allow that"
        return dataclasses.replace(verdict, passed=False, reason=reason)
    return verdict


def judge_cache(
    run: Run, reference: Outputs, baseline: Outputs, limits: Mapping[str, Limits] | None = None
) -> list[OutputVerdict]:
    """The verdicts on the KV cache after the last call: on each tensor that did not pass, and on the worst other one.

    A sliding layer of PyTorch keeps only the last tokens, and padded tokens have no meaning: only the tensors' common
    part, without padding, is judged. Explicit limits for every output, or for a tensor by name, apply here too.
    """
    mask = run.case.feeds.get("attention_mask")
    rows = []
    for name, got in run.present.items():
        true, wanted = reference.get(name), baseline.get(name)
        if true is None or wanted is None:
            continue
        if not name.endswith((".key", ".value")) or got.ndim != 4 or wanted.ndim != 4:
            if got.shape == wanted.shape:  # a state, which has no dim of tokens
                rows.append(judge_output(name, got, true, wanted, limits_of(limits or {}, name)))
            continue
        count = min(got.shape[2], wanted.shape[2])
        mine, ours, theirs = (side[:, :, side.shape[2] - count :].swapaxes(1, 2) for side in (got, true, wanted))
        if mask is not None and mask.ndim == 2 and mask.shape[1] >= count and len(mask) == len(got) == len(wanted):
            kept = mask[:, mask.shape[1] - count :] != 0
            mine, ours, theirs = mine[kept], ours[kept], theirs[kept]
        rows.append(judge_output(name, mine, ours, theirs, limits_of(limits or {}, name)))
    worst = max((r for r in rows if r.passed), key=lambda r: r.figures.max_rel_row if r.figures else 0.0, default=None)
    kept_row = [] if worst is None else [dataclasses.replace(worst, name=f"{worst.name} (worst of {len(rows)})")]
    return [*(row for row in rows if not row.passed), *kept_row]


def _at(side: Array, call: Call, got: Array) -> Array:
    """PyTorch's output at the places of a call's tokens, or at the last of them."""
    side = _read(side, call)
    return last_token(side, got) if is_last_token(got, side) else side


def _read(side: Array, call: Call) -> Array:
    """The part of PyTorch's output that belongs to the tokens of a call."""
    places = list(call.positions)
    return side[:, places] if places and side.ndim > 1 and side.shape[1] > places[-1] else side


def _judged_places(case: Case, call: Call, got: Array) -> Array | None:
    """Which tokens of an output are judged: not those before which, and at which, everything is padding.

    Their attention has nothing to attend to, so their values have no meaning and differ between implementations.
    """
    mask = case.feeds.get("attention_mask")
    if mask is None or mask.ndim != 2 or got.ndim < 2 or mask.all():
        return None
    seen = behind_padding(mask)
    if call.positions:
        seen = seen[:, list(call.positions)] if seen.shape[1] > call.positions[-1] else seen
    return seen if seen.shape == got.shape[:2] and not seen.all() else None


def behind_padding(mask: Array) -> Array:
    """Which tokens of a mask `[B, S]` are not padding on the left, bool."""
    seen: Array = np.cumsum(mask != 0, axis=1) > 0
    return seen


def is_last_token(candidate: Array, wanted: Array) -> bool:
    """Whether an output has one token, or no dim of tokens, where PyTorch's has several: `[batch, length, width]`.

    Files for generation often compute the logits of the last token only.
    """
    if wanted.ndim != 3 or wanted.shape[1] < 2:
        return False
    return candidate.shape in ((wanted.shape[0], 1, wanted.shape[2]), (wanted.shape[0], wanted.shape[2]))


def last_token(value: Array, candidate: Array) -> Array:
    """The last token of PyTorch's output, in the candidate's rank."""
    return value[:, -1] if candidate.ndim == 2 else value[:, -1:]


def last_token_notes(runs: Sequence[Run], baseline: Sequence[Outputs]) -> list[str]:
    """Notes on the outputs that were compared with the last token of PyTorch's."""
    found: dict[str, None] = {}
    for run, own in zip(runs, baseline, strict=True):
        for call in run.calls:
            wanted = named(own, list(call.outputs))
            found.update((n, None) for n, got in call.outputs.items() if is_last_token(got, _read(wanted[n], call)))
    return [f"{name} has the last token only, so it was compared with the last token of PyTorch's" for name in found]


def named(returned: Outputs, names: Sequence[str]) -> Outputs:
    """PyTorch's outputs under the candidate's names: matched by name if all names exist, else by order."""
    wanted = [name for name in names if not is_present(name)]
    returned = {name: value for name, value in returned.items() if not is_present(name)}
    if set(wanted) <= set(returned):
        return {name: returned[name] for name in wanted}
    if len(wanted) != len(returned):
        raise UsageError(
            f"the candidate returns {len(wanted)} outputs ({', '.join(wanted)}), the PyTorch model {len(returned)} "
            f"({', '.join(returned)}). Make sure that it is the model that was exported."
        )
    return dict(zip(wanted, returned.values(), strict=True))


def with_cache_names(outputs: Outputs) -> Outputs:
    """PyTorch's outputs, with the tensors of its KV cache under the names that exported files have."""
    return {present_name(name) or name: value for name, value in outputs.items()}


def wide(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value.astype(np.float64) if _is_float(value) else value for name, value in feeds.items()}


def _is_dynamic(infos: Sequence[TensorInfo]) -> bool:
    return any(not isinstance(dim, int) for info in infos for dim in info.shape or ())


def _same_shapes(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return all(a[name].shape == b[name].shape for name in a)


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
