"""Inputs on which a fault may show (`Witnesses`): wider than those that `validate` generates, and independent of them.

A fault is alive if the faulty file gives other bits than the fault-free one on some of these inputs, or if it fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rmsnorm_deploy.export.graph.cache_names import is_past
from rmsnorm_deploy.models.calling.example_inputs import vocabulary_size
from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.runtime.inputs.cases import Case
from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
from rmsnorm_deploy.runtime.runners.base import Array, Runner, TensorInfo
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.validation.run_cases import run_guarded

_SHAPES = ((2, 9), (1, 7), (5, 12), (1, 1), (1, 2), (3, 33), (1, 64), (1, 110), (8, 5), (1, 8), (4, 16))
_CALLS = (1, 1, 1, 3)


class Witnesses:
    """The inputs, and what the fault-free file returns for them.

    Args:
        folder: the fault-free folder.
        model: its PyTorch model.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._runner = OrtRunner(folder / "model.onnx")
        self._cases = list(_cases(self._runner.inputs(), model))
        self._honest: list[dict[str, Array]] = []

    def differ(self, runner: Runner) -> str:
        """`outputs` if a runner gives other bits for some inputs, `error` if it fails, or else an empty string."""
        for number, case in enumerate(self._cases):
            if number == len(self._honest):
                self._honest.append(_run(self._runner, case))
            honest = self._honest[number]
            try:
                got = _run(runner, case)
            except RmsnormDeployError:
                return "error"
            if list(got) != list(honest) or any(_other(got[name], honest[name]) for name in got):
                return "outputs"
        return ""


def _other(a: Array, b: Array) -> bool:
    return a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes()


def _run(runner: Runner, case: Case) -> dict[str, Array]:
    run = run_guarded(runner, case, "a file")
    return {**run.got, **run.present}


def _cases(infos: list[TensorInfo], model: nn.Module) -> Iterator[Case]:
    """Every shape with three kinds of floats; for tokens, with each kind of mask, of positions, and all token ids."""
    vocabulary = vocabulary_size(model)
    cached = any(is_past(info.name) for info in infos)
    rng = np.random.default_rng(12345)
    calls = _CALLS if cached else ()
    dims = {dim for info in infos for dim in info.shape or () if isinstance(dim, str)}
    for seed in range(3 if vocabulary is None else 1):
        for number, (batch, length) in enumerate(_SHAPES):
            length += sum(calls)
            if cached:
                length = min(length, 120)
            sizes = {dim: {0: 40, 7: 130}.get(number, length // 3 + 2) for dim in dims if dim.startswith("decoder")}
            feeds = make_feeds(infos, batch, length, 77 + seed, vocabulary, sizes)
            yield Case(f"{batch}x{length}", feeds, calls)
            yield from (Case("varied", {**feeds, **more}, calls) for more in _varied(feeds, rng))
    if vocabulary is not None and any(info.name == "input_ids" for info in infos):
        for first in range(0, vocabulary, 32):
            feeds = make_feeds(infos, 1, 32 + sum(calls), 0, vocabulary)
            for name in ("input_ids", "decoder_input_ids"):
                if name in feeds:
                    feeds[name] = (first + np.arange(feeds[name].size).reshape(feeds[name].shape)) % vocabulary
            yield Case(f"token ids from {first}", feeds, calls)


def _varied(feeds: dict[str, Array], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Other masks and positions of the same shapes."""
    mask, positions = feeds.get("attention_mask"), feeds.get("position_ids")
    if mask is not None and mask.shape[1] > 4:
        count = mask.shape[1]
        for kind in ("left", "right", "hole"):
            changed = np.ones_like(mask)
            for row in changed:
                size = int(rng.integers(1, count // 2))
                start = {"left": 0, "right": count - size, "hole": 1 + int(rng.integers(count - size - 1))}[kind]
                row[start : start + size] = 0
            yield {"attention_mask": changed}
    if positions is not None and positions.shape[1] > 2:
        gaps = rng.integers(1, 4, positions.shape, dtype=positions.dtype)
        yield {"position_ids": np.minimum(np.cumsum(gaps, axis=1), 127).astype(positions.dtype)}
