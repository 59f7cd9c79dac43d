"""Generate, run and judge the cases of a validation, with and without the KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...export.from_torch.example_inputs import vocabulary_size
from ...export.graph.metadata import PRESENT
from ...models.errors import RmsnormDeployError, UsageError
from ..accuracy.compare_output import OutputVerdict, judge
from ..accuracy.tolerances import Limits, limits_of
from ..inputs.cases import Case
from ..inputs.synthetic import DEFAULT_SHAPES, is_past, make_feeds, present_to_past
from ..runners.base import Array, Runner, TensorInfo

if TYPE_CHECKING:
    from torch import nn

# Suffix of the names of a decode step's outputs.
DECODE_SUFFIX = "@decode"

Outputs = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Run:
    """A case, and the candidate's outputs for it."""

    case: Case
    got: Outputs

    @property
    def torch_feeds(self) -> dict[str, Array]:
        """The feeds of PyTorch, which runs without a cache."""
        return {name: value for name, value in self.case.feeds.items() if not is_past(name)}

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
    cases: list[Case] = []
    for batch, length in shapes or DEFAULT_SHAPES:
        feeds = make_feeds(infos, batch, length + extra, seed, vocabulary)
        if not any(_same_shapes(feeds, other.feeds) for other in cases):
            name = f"{batch}x{length}" + (" then 1 more" if extra else "")
            cases.append(Case(name if _is_dynamic(infos) else "the file's own shape", feeds))
    return cases


def by_position(model: nn.Module, infos: Sequence[TensorInfo]) -> list[str] | None:
    """The candidate's input names if they are not PyTorch's parameter names and are matched by order, else None."""
    names = [info.name for info in infos if not is_past(info.name)]
    return None if set(names) <= set(inspect.signature(model.forward).parameters) else names


def run_guarded(runner: Runner, case: Case, name: str) -> Outputs:
    """The candidate's outputs.

    Raises:
        UsageError: it fails, or does not return the outputs that it declares.
    """
    try:
        outputs = _run_candidate(runner, case)
    except RmsnormDeployError:
        raise
    except Exception as error:  # a runner that the user wrote may raise any error
        raise UsageError(f"{name} failed on case {case.name}: {type(error).__name__}: {error}") from error
    returned = {output.removesuffix(DECODE_SUFFIX) for output in outputs}
    missing = [
        info.name for info in runner.outputs() if info.name not in returned and not info.name.startswith(PRESENT)
    ]
    if missing or not outputs:
        raise UsageError(
            f"{name}: case {case.name}: expected the outputs {', '.join(missing) or 'that it declares'}, "
            f"got {', '.join(outputs) or 'none'}."
        )
    return outputs


def _run_candidate(runner: Runner, case: Case) -> Outputs:
    cached = any(is_past(name) for name in case.feeds)
    if not cached or case.feeds["input_ids"].shape[1] == 1:
        return {n: v for n, v in runner.run(case.feeds).items() if not (cached and n.startswith(PRESENT))}
    return _run_with_cache(runner, case.feeds)


def _run_with_cache(runner: Runner, feeds: Mapping[str, Array]) -> Outputs:
    """Run all tokens but the last with an empty cache, then the last one with the returned cache."""
    length = feeds["input_ids"].shape[1]
    tokens = ("input_ids", "position_ids", "token_type_ids")
    first = {k: v[:, : length - 1] if k in (*tokens, "attention_mask") else v for k, v in feeds.items()}
    prefill = runner.run(first)
    step = {k: v[:, length - 1 :] if k in tokens else v for k, v in feeds.items()}
    step.update({k: v for k, v in present_to_past(prefill).items() if k in feeds})
    decode = runner.run(step)
    outputs = {name: value for name, value in prefill.items() if not name.startswith(PRESENT)}
    outputs.update({f"{k}{DECODE_SUFFIX}": v for k, v in decode.items() if not k.startswith(PRESENT)})
    return outputs


def judge_output(
    name: str,
    candidate: Array,
    reference: Mapping[str, Array],
    baseline: Mapping[str, Array],
    limits: Mapping[str, Limits],
) -> OutputVerdict:
    key = name.removesuffix(DECODE_SUFFIX)
    true, wanted = reference[key], baseline[key]
    if name.endswith(DECODE_SUFFIX):
        true, wanted = true[:, -1:], wanted[:, -1:]
    elif candidate.ndim == wanted.ndim and candidate.ndim > 1 and candidate.shape[1] == wanted.shape[1] - 1:
        true, wanted = true[:, :-1], wanted[:, :-1]  # the prompt, without the token of the decode step
    elif is_last_token(candidate, wanted):
        true, wanted = (last_token(value, candidate) for value in (true, wanted))
    found = limits_of(limits, key)
    verdict = judge(name, candidate, true, wanted, limits=found)
    if candidate.dtype != wanted.dtype and verdict.passed and found is None:
        reason = f"expected {wanted.dtype.name} as in PyTorch, got {candidate.dtype.name}; explicit limits allow that"
        return OutputVerdict(name, False, reason, verdict.figures, verdict.baseline_figures)
    return verdict


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
    found = dict.fromkeys(
        name
        for run, own in zip(runs, baseline, strict=True)
        for name, wanted in named(own, [n for n in run.got if not n.endswith(DECODE_SUFFIX)]).items()
        if is_last_token(run.got[name], wanted)
    )
    return [f"{name} has the last token only, so it was compared with the last token of PyTorch's" for name in found]


def named(returned: Outputs, names: Sequence[str]) -> Outputs:
    """PyTorch's outputs under the candidate's names: matched by name if all names exist, else by order."""
    wanted = [name for name in names if not name.startswith(PRESENT)]
    if set(wanted) <= set(returned):
        return {name: returned[name] for name in wanted}
    if len(wanted) != len(returned):
        raise UsageError(
            f"the candidate returns {len(wanted)} outputs ({', '.join(wanted)}), the PyTorch model {len(returned)} "
            f"({', '.join(returned)}). Make sure that it is the model that was exported."
        )
    return dict(zip(wanted, returned.values(), strict=True))


def wide(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value.astype(np.float64) if _is_float(value) else value for name, value in feeds.items()}


def _is_dynamic(infos: Sequence[TensorInfo]) -> bool:
    return any(not isinstance(dim, int) for info in infos for dim in info.shape or ())


def _same_shapes(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return all(a[name].shape == b[name].shape for name in a)


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
