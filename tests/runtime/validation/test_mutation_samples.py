"""Faults of every family of the mutation suite that only some inputs show: `validate` catches them by default.

Every other one is planted; `RMSNORM_TESTS=all` plants all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.mutations import catalog, judging, subjects
from tests.helpers.extent import EVERY

# Faults of the families that these two models do not have; some of them only the widest inputs show.
SAMPLE = [
    ("attention mask", "mask ignored at batch 1", "past"),
    ("left padding", "left padding ignored at batch 1", "plain"),
    ("right padding", "right padding: only its last token is masked", "plain"),
    ("hole in the mask", "hole ignored in decode steps", "past"),
    ("sliding window", "window one longer in one layer", "plain"),
    ("position ids", "positions of the first row for all rows", "past"),
    ("position ids", "positions at most 100", "past"),
    ("rotary", "positions capped at 100", "plain"),
    ("KV cache", "returned cache wrong only after a call of several tokens", "past"),
    ("token embedding", "last row zero", "plain"),
    ("output head", "logits of the end token zero", "plain"),
    ("batch", "wrong at batch 5", "past"),
    ("length", "wrong at length 2", "plain"),
    ("encoder-decoder", "the last bucket of the decoder missing", "plain"),
    ("files", "weights of two layers exchanged", "plain"),
    ("randomness", "noise in long inputs only", "plain"),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models are slower on more
    yield subjects.Exports(tmp_path_factory.mktemp("mutations"))
    torch.set_num_threads(threads)


def _sampled(family: str, name: str, variant: str) -> Any:
    """The first fault of a name."""
    return next(f for f in catalog.FAMILIES[family] if f.name == name and f.variant == variant)


@pytest.mark.parametrize("sampled", SAMPLE if EVERY else SAMPLE[::2], ids=lambda sampled: sampled[1])
def test_a_fault_that_only_some_inputs_show_is_alive_and_caught(sampled: Any, exports: Any) -> None:
    result = judging.judge_fault(_sampled(*sampled), exports)
    assert result.alive == "outputs"
    assert result.verdict == "fail", result.summary
