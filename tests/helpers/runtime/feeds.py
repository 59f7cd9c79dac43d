"""Inputs for an exported model, by the names that this package gives to inputs and dims."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
from rmsnorm_deploy.runtime.runners.base import Runner

SIZES = {"batch": 2, "sequence": 5, "past_sequence": 4, "total_sequence": 9}


def feeds_of(session: Any) -> dict[str, Any]:
    """Random values for each input of a session of ONNX Runtime; masks are ones, token ids are below 60."""
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [SIZES.get(dim, 3) if isinstance(dim, str) else dim for dim in value.shape]
        if "mask" in value.name:
            feeds[value.name] = np.ones(shape, np.int64)
        elif value.type == "tensor(int64)":
            feeds[value.name] = generator.integers(3, 60, shape)
        else:
            feeds[value.name] = generator.standard_normal(shape).astype(np.float32)
    return feeds


def step_feeds(runner: Runner, tokens: int, read: int, batch: int = 2) -> dict[str, Any]:
    """The inputs of a decoder's step that reads tokens, `read` with those before it; the cache is empty."""
    feeds = make_feeds(runner.inputs(), batch, tokens, read, vocabulary=97)
    feeds["attention_mask"] = np.ones((batch, read), np.int64)
    if "position_ids" in feeds:
        feeds["position_ids"] += read - tokens
    return feeds
