"""Hold an exported model against PyTorch: error against a float64 truth, with PyTorch's own error as the yardstick."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.inputs import vocabulary_size
from ..export.manifest import deviation_rows
from ..models.errors import UsageError
from .exported import Exported, open_exported
from .feeds import DEFAULT_SHAPES, PRESENT, is_past, make_feeds, present_to_past
from .metrics import OutputVerdict, judge
from .ort_runner import OrtRunner
from .runner import Array, TensorInfo
from .torch_runner import TorchRunner
from .truth import truth_model

if TYPE_CHECKING:
    from torch import nn

SCHEMA = "rmsnorm_deploy.validate/1"
_DECODE_SUFFIX = "@decode"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One run: what it is called, and what goes in."""

    name: str
    feeds: dict[str, Array]


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """The verdict and what it rests on.

    Attributes:
        model: the file that was run.
        rows: one verdict for each case and output.
        deviations: where the target says it is not exact, from the manifest.
        provenance: versions, files and options of both sides.
    """

    model: Path
    rows: list[tuple[str, OutputVerdict]]
    deviations: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`pass` when every output of every case passed, else `fail`."""
        return "pass" if self.rows and all(row.passed for _, row in self.rows) else "fail"

    def to_dict(self) -> dict[str, Any]:
        """The report as the JSON interface shows it."""
        return {
            "schema": SCHEMA,
            "model": str(self.model),
            "verdict": self.verdict,
            "outputs": [{"case": case, **row.to_dict()} for case, row in self.rows],
            "deviations": self.deviations,
            "provenance": self.provenance,
        }


def validate(
    path: str | Path,
    model: nn.Module,
    *,
    provider: str = "cpu",
    shapes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    inputs: Mapping[str, Array] | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Run an exported model and PyTorch on the same inputs and judge every output.

    A decoder exported with its KV cache runs twice for each case: over the prompt with an empty cache, and over one
    more token with the cache that came out; both are held against PyTorch without a cache.

    Args:
        path: an exported folder or an .onnx file.
        model: the PyTorch model, in the dtype that was exported. It is not changed.
        provider: ONNX Runtime's execution provider: `cpu`, `cuda` or `tensorrt`.
        shapes: batch and length of each case; `(1, 1), (1, 7), (3, 33)` when None.
        seed: of the made-up inputs.
        atol: with `rtol`, replaces the rule that PyTorch's own error is the yardstick.
        rtol: see `atol`.
        inputs: arrays by input name, a single case in place of the made-up ones.
        progress: called with a line of text for each case.

    Raises:
        UsageError: the file, its inputs and the model do not fit together.
        EnvironmentMissingError: ONNX Runtime or the provider is not there.
    """
    exported = open_exported(path)
    say = progress or (lambda _: None)
    _check_dtype(exported, model)
    say("loading the exported model")
    with OrtRunner(exported.model, providers=[provider]) as runner:
        cases = _cases(runner.inputs(), model, shapes, seed, inputs)
        say("building the float64 truth")
        with TorchRunner(model) as yardstick, TorchRunner(truth_model(model)) as truth:
            rows = []
            for case in cases:
                say(f"comparing {case.name}")
                for verdict in _judge_case(case, runner, yardstick, truth, atol, rtol):
                    rows.append((case.name, verdict))
            provenance = {"candidate": runner.provenance(), "yardstick": yardstick.provenance(), "seed": seed}
    return ValidationReport(exported.model, rows, deviation_rows(exported.manifest, "onnxruntime"), provenance)


def _judge_case(
    case: Case, runner: OrtRunner, yardstick: TorchRunner, truth: TorchRunner, atol: float | None, rtol: float | None
) -> list[OutputVerdict]:
    feeds = {name: value for name, value in case.feeds.items() if not is_past(name)}
    names = [info.name for info in runner.outputs() if not info.name.startswith(PRESENT)]
    wanted = _named(yardstick.run(feeds), names)
    wide = {name: value.astype(np.float64) if _is_float(value) else value for name, value in feeds.items()}
    true = _named(truth.run(wide), names)
    got = _run_with_cache(runner, case.feeds) if len(feeds) != len(case.feeds) else runner.run(case.feeds)
    return [_judge_output(name, value, true, wanted, atol, rtol) for name, value in got.items()]


def _judge_output(
    name: str,
    candidate: Array,
    truth: Mapping[str, Array],
    yardstick: Mapping[str, Array],
    atol: float | None,
    rtol: float | None,
) -> OutputVerdict:
    key = name.removesuffix(_DECODE_SUFFIX)
    true, wanted = truth[key], yardstick[key]
    if name.endswith(_DECODE_SUFFIX):
        true, wanted = true[:, -1:], wanted[:, -1:]
    elif candidate.ndim == wanted.ndim and candidate.ndim > 1 and candidate.shape[1] == wanted.shape[1] - 1:
        true, wanted = true[:, :-1], wanted[:, :-1]  # the prompt's part of a case that goes on with one more token
    return judge(name, candidate, true.astype(np.float64) if _is_float(true) else true, wanted, atol=atol, rtol=rtol)


def _run_with_cache(runner: OrtRunner, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All tokens but the last with an empty cache, then the last one with the cache that came out."""
    length = feeds["input_ids"].shape[1]
    tokens = ("input_ids", "position_ids", "token_type_ids")
    first = {k: v[:, : length - 1] if k in (*tokens, "attention_mask") else v for k, v in feeds.items()}
    prefill = runner.run(first)
    step = {k: v[:, length - 1 :] if k in tokens else v for k, v in feeds.items()}
    step.update({k: v for k, v in present_to_past(prefill).items() if k in feeds})
    decode = runner.run(step)
    outputs = {name: value for name, value in prefill.items() if not name.startswith(PRESENT)}
    outputs.update({f"{k}{_DECODE_SUFFIX}": v for k, v in decode.items() if not k.startswith(PRESENT)})
    return outputs


def _cases(
    infos: Sequence[TensorInfo],
    model: nn.Module,
    shapes: Sequence[tuple[int, int]] | None,
    seed: int,
    inputs: Mapping[str, Array] | None,
) -> list[Case]:
    if inputs is not None:
        return [Case("given inputs", dict(inputs))]
    vocabulary = vocabulary_size(model)
    extra = 1 if any(is_past(info.name) for info in infos) else 0
    cases: list[Case] = []
    for batch, length in shapes or DEFAULT_SHAPES:
        if batch < 1 or length < 1:
            raise UsageError(f"shape {batch}x{length} is no batch and length; both must be at least 1.")
        feeds = make_feeds(infos, batch, length + extra, seed, vocabulary)
        if not any(_same_shapes(feeds, other.feeds) for other in cases):
            name = f"{batch}x{length}" + (" then 1 more" if extra else "")
            cases.append(Case(name if _is_dynamic(infos) else "the file's own shape", feeds))
    return cases


def _is_dynamic(infos: Sequence[TensorInfo]) -> bool:
    return any(not isinstance(dim, int) for info in infos for dim in info.shape or ())


def _same_shapes(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return all(a[name].shape == b[name].shape for name in a)


def _named(returned: dict[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """PyTorch's outputs under the graph's names: the same name where it has one, else in order."""
    if set(names) <= set(returned):
        return returned
    if len(names) != len(returned):
        raise UsageError(
            f"the exported model returns {len(names)} outputs ({', '.join(names)}), the PyTorch model {len(returned)} "
            f"({', '.join(returned)}). Is it the model that was exported?"
        )
    return dict(zip(names, returned.values(), strict=True))


def _check_dtype(exported: Exported, model: nn.Module) -> None:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    name = str(dtype).removeprefix("torch.")
    if exported.dtype is not None and dtype is not None and name != exported.dtype:
        raise UsageError(
            f"{exported.model} was exported in {exported.dtype}, but the PyTorch model is in {name}. Load it in "
            f"{exported.dtype} (--dtype {exported.dtype}): the yardstick must have the dtype that is deployed."
        )


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
