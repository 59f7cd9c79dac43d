"""Rotary embeddings whose frequencies follow the length: without memory, and in a form that can be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rmsnorm_deploy.models.calling.rotary import dynamic_rotary, reset_rotary, rotated, traceable_rotary

X = torch.zeros(1, 1, 32)


def rotary(kind: str = "dynamic", factor: float = 4.0) -> Any:
    """The rotary embedding of a Llama with 16 positions."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=16)
    scaling: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    config.rope_parameters = scaling if kind == "default" else {**scaling, "factor": factor}
    return LlamaRotaryEmbedding(config)


def positions(length: int) -> Tensor:
    return torch.arange(length)[None]


def test_only_dynamic_ones_are_found() -> None:
    assert dynamic_rotary(torch.nn.ModuleList([rotary("default"), rotary("linear")])) == []
    module = rotary()
    assert dynamic_rotary(torch.nn.ModuleList([module])) == [module]


@pytest.mark.parametrize("length", [5, 16, 17, 40])
def test_the_traceable_form_is_the_modules(length: int) -> None:
    module = rotary()
    wanted = module(X, positions(length))
    with traceable_rotary(module):
        got = module(X, positions(length))
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-6, atol=1e-6)


def test_a_rotation_by_complex_numbers_is_that_of_transformers() -> None:
    from transformers.models.llama4 import modeling_llama4

    xq, xk = torch.randn(2, 5, 4, 8).half(), torch.randn(2, 5, 2, 8).half()
    turns = torch.polar(torch.ones(2, 5, 4), torch.randn(2, 5, 4))
    for got, wanted in zip(rotated(xq, xk, turns), modeling_llama4.apply_rotary_emb(xq, xk, turns), strict=True):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-3)


def test_the_frequencies_depend_on_a_length_past_the_window() -> None:
    first = rotary()(X, positions(16))[0]
    assert not torch.allclose(rotary()(X, positions(40))[0][:, :16], first)


def test_the_traceable_form_has_no_memory() -> None:
    module = rotary()
    with traceable_rotary(module):
        alone = module(X, positions(40))[0]
        module(X, positions(64))
        again = module(X, positions(40))[0]
    assert torch.equal(again, alone)


def test_the_module_is_as_before() -> None:
    module = rotary()
    before = module.inv_freq
    with traceable_rotary(module):
        assert "forward" in module.__dict__
        module(X, positions(40))
    assert "forward" not in module.__dict__
    assert torch.equal(module.inv_freq, before)


def test_reset_forgets_the_longest_sequence() -> None:
    module = rotary()
    alone = rotary()(X, positions(20))[0]
    module(X, positions(64))
    assert not torch.equal(module(X, positions(20))[0], alone)
    reset_rotary(module)
    assert torch.equal(module(X, positions(20))[0], alone)


def test_a_captured_graph_follows_the_length() -> None:
    module = rotary()
    with traceable_rotary(module):
        program = torch.export.export(
            module, (X, positions(24)), dynamic_shapes=(None, {1: torch.export.Dim.AUTO}), strict=False
        )
    for length in (9, 40):
        wanted = rotary()(X, positions(length))[0]
        torch.testing.assert_close(program.module()(X, positions(length))[0], wanted, rtol=1e-6, atol=1e-6)
