"""The stages of a row: each takes the `State` that the earlier ones left, and returns an `Outcome` or raises."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.runtime.engines import api
from rmsnorm_deploy.runtime.generation.api import generate
from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
from rmsnorm_deploy.runtime.runners.base import Array, TensorInfo
from rmsnorm_deploy.runtime.runners.tensorrt import TensorRTRunner
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from rmsnorm_deploy.runtime.validation.api import validate
from rmsnorm_deploy.runtime.validation.components import tie, torch_tokens
from tests.helpers.models.families import FAMILIES, VOCABULARY, build

from .quick import QUICK_PROFILE, build_in_process

# A prompt, and steps of up to 3 tokens as `validate` runs them, up to the 128 positions of the models.
PROFILES: Final = (
    "batch:1,1,8;sequence:1,8,128;past_sequence:0,0,0",
    "batch:1,1,8;sequence:1,1,3;past_sequence:0,16,125",
)
PROMPT: Final = [5, 6, 7, 8, 9, 10]
TOKENS, STEPS = 16, 50
CONTEXTS, REQUESTS = 4, 32
# Batch and length of runs with CUDA graphs, and how many runs of each: from the third one on a graph is replayed.
_SHAPES: Final = ((1, 8), (2, 5), (1, 8))
_RUNS: Final = 5


@dataclass(frozen=True)
class Outcome:
    """The result of a stage.

    Attributes:
        passed: whether it is as expected.
        text: what was found, in one line.
        figures: the numbers, as JSON values.
    """

    passed: bool
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class State:
    """A row while it runs; the first fields are those of `Row`.

    Attributes:
        folder: the row's own folder.
        runner: the engine, open from its first run on.
    """

    runtime: str
    family: str
    dtype: str
    norms: str
    plugin: str
    deep: bool
    folder: Path
    runner: TensorRTRunner | None = None

    @functools.cached_property
    def model(self) -> nn.Module:
        """The PyTorch model, with the same random weights each time."""
        return build(self.family, getattr(torch, self.dtype))

    @property
    def exported(self) -> Path:
        """The exported folder."""
        return self.folder / "exported"

    @property
    def engine(self) -> Path:
        """The engine's file."""
        return self.folder / "model.engine"

    @property
    def opened(self) -> TensorRTRunner:
        """The engine with one context."""
        if self.runner is None:
            self.runner = TensorRTRunner(self.engine, runtime=self.runtime)
        return self.runner

    def close(self) -> None:
        """Release the engine."""
        if self.runner is not None:
            self.runner.close()
            self.runner = None


Stage = Callable[[State], Outcome]


def exported(state: State) -> Outcome:
    """Export the model, with a cache except for quick plugins, whose engine has no record with the names of dims."""
    target = "standard" if state.norms == "native" else "plugin"
    export_model(state.model, state.exported, target=target, with_past=state.norms != "quick")
    return Outcome(True, f"target {target}", {"target": target})


def built(state: State) -> Outcome:
    """Build the engine, and compare the layers that run norms with what was asked for."""
    gpu = api.cuda_device()
    fixed = api.flavor_of(state.runtime).architectures and gpu is not None
    engine = build_engine(
        state.exported, state.engine, runtime=state.runtime, norm=state.norms, plugin=state.plugin, profiles=PROFILES,
        architectures=(gpu[1],) if fixed and gpu is not None else (),
    )  # fmt: skip
    record = engine.record
    norms = record["norms"]
    count, in_plugin = len(norms), sum(row["plugin"] for row in norms)
    expected = sum(FAMILIES[state.family].norms.values())
    wanted = expected if state.norms == "plugin" else 0
    kinds = sorted({f"{row['precision']}/{row['statistics']}" for row in norms})
    figures = {
        "seconds": record["seconds"], "plugin_layers": record["plugin_layers"], "norms": count, "in_plugin": in_plugin,
        "precision": kinds, "layer_source": record["layer_source"], "plugin": record["plugin"]["kind"],
        "warnings": record["warnings"], "bytes": record["bytes"],
    }  # fmt: skip
    right = count == expected and in_plugin == wanted and record["plugin_layers"] == wanted
    text = f"{record['plugin_layers']} plugin layers, {in_plugin} of {count} norms in the plugin, {', '.join(kinds)}"
    if not right:
        text = f"expected {expected} norms, {wanted} of them in the plugin; got {text}"
    return Outcome(right, text, figures)


def quick_built(state: State) -> Outcome:
    """Build an engine whose norms are quick deployable plugins, in a process of its own."""
    figures = build_in_process(state.exported / "model.onnx", state.engine)
    expected = sum(FAMILIES[state.family].norms.values())
    found = figures["plugin_layers"]
    text = f"{found} plugin layers" if found == expected else f"expected {expected} plugin layers, got {found}"
    return Outcome(found == expected, text, {**figures, "profile": QUICK_PROFILE})


def ran(state: State) -> Outcome:
    """Run once: are all outputs finite?"""
    runner = state.opened
    given = feeds(runner.inputs(), 1, 8, 0)
    outputs = runner.run(given)
    bad = [name for name, array in outputs.items() if not np.isfinite(array.astype(np.float64)).all()]
    provenance = {name: value for name, value in runner.provenance().items() if name != "norms"}
    shapes = {name: list(array.shape) for name, array in {**given, **outputs}.items()}
    text = f"not finite: {', '.join(bad)}" if bad else f"{len(outputs)} outputs are finite"
    return Outcome(not bad, text, {"shapes": shapes, "provenance": provenance})


def validated(state: State) -> Outcome:
    """Compare with PyTorch: `rmsnorm validate`."""
    shapes = ((1, 1), (1, 7), (2, 20)) if state.norms == "quick" else None
    options: dict[str, Any] = {"deep": True} if state.deep else {"outputs_only": True}
    report = validate(state.engine, state.model, shapes=shapes, runners=(state.runtime,), **options)
    rows = [row for _, row in report.rows]
    margins = [row.margin for row in rows if row.margin is not None and row.margin.allowed_worst]
    figures = {
        "verdict": report.verdict,
        "max_abs": max((row.figures.max_abs for row in rows if row.figures is not None), default=None),
        "of_allowed": max((margin.worst / margin.allowed_worst for margin in margins), default=None),
        "outputs": len(rows),
        "norms": len(report.norms),
        "segments": len(report.segments),
        "culprits": [culprit.to_dict() for culprit in report.culprits],
        "notes": report.notes,
        "warnings": report.warnings,
    }
    wanted_norms = sum(FAMILIES[state.family].norms.values()) if state.deep else 0
    if state.deep and len(report.norms) < wanted_norms:
        return Outcome(False, f"expected {wanted_norms} norms to be checked, got {len(report.norms)}", figures)
    why = f" {report.culprits[0].reason}" if report.culprits else ""
    return Outcome(report.verdict == "pass", f"{report.verdict}: {report.summary}{why}", figures)


def generated(state: State) -> Outcome:
    """Are the greedy tokens PyTorch's? In half precision a tie of the two best logits may fall either way."""
    wanted, logits, *_ = torch_tokens(state.model, list(PROMPT))
    wanted = wanted[:TOKENS]
    got = generate(state.engine, PROMPT, max_new_tokens=TOKENS).ids
    figures: dict[str, Any] = {"prompt": PROMPT, "expected": wanted, "got": got}
    step = next((n for n, (a, b) in enumerate(itertools.zip_longest(wanted, got)) if a != b), None)
    if step is None:
        return Outcome(True, f"{len(got)} tokens are equal", figures)
    margin, limit = tie(logits[min(step, len(logits) - 1)])
    figures |= {"step": step, "margin": margin, "tie": limit}
    allowed = state.dtype != "float32" and margin <= limit
    what = f"token {step + 1} differs; PyTorch's two best logits differ by {margin:.3g}, a tie is at most {limit:.3g}"
    return Outcome(allowed, f"a tie: {what}" if allowed else what, figures)


def same_with_graphs(state: State) -> Outcome:
    """Are the bits of runs with CUDA graphs those of runs without?"""
    plain = state.opened
    with TensorRTRunner(state.engine, runtime=state.runtime, cuda_graphs=True) as graphed:
        for place, (batch, length) in enumerate(_SHAPES):
            for number in range(_RUNS):
                given = feeds(plain.inputs(), batch, length, 10 * place + number)
                wanted, got = plain.run(given), graphed.run(given)
                problem = difference(wanted, got)
                if problem is not None:
                    where = f"run {number + 1} of shape {batch}x{length}: {problem}"
                    return Outcome(False, f"{where}{_unstable(plain, given, wanted)}")
    return Outcome(True, f"{len(_SHAPES) * _RUNS} runs are equal", {"shapes": [list(shape) for shape in _SHAPES]})


def same_at_once(state: State) -> Outcome:
    """Are the bits of concurrent requests those of the same requests one by one?"""
    with TensorRTRunner(state.engine, runtime=state.runtime, contexts=CONTEXTS) as runner:
        requests = [feeds(runner.inputs(), 1 + n % 3, (3, 8, 13, 5)[n % 4], n) for n in range(REQUESTS)]
        began = time.perf_counter()
        wanted = [runner.run(given) for given in requests]
        alone = time.perf_counter()
        with ThreadPoolExecutor(2 * CONTEXTS) as pool:
            got = list(pool.map(runner.run, requests))
        ended = time.perf_counter()
        figures = {"one_by_one_seconds": alone - began, "at_once_seconds": ended - alone}
        problems = [difference(*pair) for pair in zip(wanted, got, strict=True)]
        different = [number for number, problem in enumerate(problems) if problem is not None]
        if not different:
            return Outcome(True, f"{REQUESTS} requests in {CONTEXTS} contexts are equal", figures)
        first = different[0]
        why = _unstable(runner, requests[first], wanted[first])
        text = f"{len(different)} of {REQUESTS} requests differ; the first: {problems[first]}{why}"
        return Outcome(False, text, {**figures, "different": different})


def step_time(state: State) -> Outcome:
    """The median time of a decode step, in microseconds, from the arrays of a step to its logits as an array."""
    infos = state.opened.inputs()
    decoding = state.opened.decoding()
    decoding.step(step_feeds(infos, PROMPT, 0))
    length, times = len(PROMPT), []
    for number in range(STEPS + TOKENS):  # the first ones warm up
        given = step_feeds(infos, [11 + number % 50], length)
        began = time.perf_counter()
        logits = decoding.step(given)
        times.append((time.perf_counter() - began) * 1e6)
        length += 1
        if not np.isfinite(logits).all():
            return Outcome(False, f"the logits of step {number + 1} are not finite")
    median = statistics.median(times[-STEPS:])
    figures = {"microseconds": round(median, 1), "least": round(min(times[-STEPS:]), 1), "steps": STEPS}
    return Outcome(True, f"{median:.0f} us", figures)


# The exported folder and the engine come of these; all others need the engine.
FIRST: Final = ("export", "build")
STAGES: Final[dict[str, Stage]] = {
    "export": exported, "build": built, "run": ran, "validate": validated, "tokens": generated,
    "graphs": same_with_graphs, "contexts": same_at_once, "step": step_time,
}  # fmt: skip
QUICK_STAGES: Final[dict[str, Stage]] = {
    "export": exported, "build": quick_built, "run": ran, "validate": validated, "graphs": same_with_graphs,
    "contexts": same_at_once,
}  # fmt: skip


def feeds(infos: Sequence[TensorInfo], batch: int, length: int, seed: int) -> dict[str, Array]:
    """Inputs of a prompt, with an empty cache."""
    return make_feeds(infos, batch, length, seed, VOCABULARY)


def step_feeds(infos: Sequence[TensorInfo], tokens: Sequence[int], past: int) -> dict[str, Array]:
    """Inputs of a decoder that has read `past` tokens; its cache is that of the `Decoding`."""
    given = make_feeds(infos, 1, len(tokens), 0, VOCABULARY)
    given["input_ids"] = np.array([tokens], given["input_ids"].dtype)
    if "position_ids" in given:
        given["position_ids"] += past
    if "attention_mask" in given:
        given["attention_mask"] = np.ones((1, past + len(tokens)), given["attention_mask"].dtype)
    return given


def difference(wanted: Mapping[str, Array], got: Mapping[str, Array]) -> str | None:
    """The first output whose bits differ, and by how much; None if there is none."""
    for name, array in wanted.items():
        other = got[name]
        if array.shape != other.shape:
            return f"{name}: expected shape {list(array.shape)}, got {list(other.shape)}"
        if array.tobytes() != other.tobytes():
            apart = np.abs(array.astype(np.float64) - other.astype(np.float64))
            return f"{name}: {np.count_nonzero(apart)} of {array.size} elements differ, by at most {apart.max():.3g}"
    return None


def _unstable(runner: TensorRTRunner, given: Mapping[str, Array], earlier: Mapping[str, Array]) -> str:
    """Whether equal runs without graphs and without others beside them differ too."""
    again = difference(earlier, runner.run(given))
    return "; repeated alone it is equal" if again is None else f"; repeated alone it differs too: {again}"
