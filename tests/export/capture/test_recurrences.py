"""Recurrences as one scan, against the functions of transformers that they replace."""

from __future__ import annotations

import torch
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

from rmsnorm_deploy.export.capture.recurrences import _States, gated_delta_rule, state_space_duality, without_padding


def test_the_gated_delta_rule_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    for length, with_state in ((7, False), (70, True)):
        query, key = (torch.randn(2, length, 2, 8) for _ in range(2))
        value = torch.randn(2, length, 4, 6)
        g, beta = -torch.rand(2, length, 4), torch.rand(2, length, 4)
        state = torch.randn(2, 4, 8, 6) if with_state else None
        given = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        got = gated_delta_rule(query, key, value, g, beta, **given)
        wanted = modeling_qwen3_next.torch_recurrent_gated_delta_rule(query, key, value, g, beta, **given)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert gated_delta_rule(query, key, value, g, beta)[1] is None


def test_a_decay_for_each_channel_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 21, 3, 8) for _ in range(3))
    g, beta = -torch.rand(2, 21, 3, 8), torch.rand(2, 21, 3)
    given = {"initial_state": torch.randn(2, 3, 8, 8), "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    got = gated_delta_rule(query, key, value, g, beta, **given)
    wanted = modeling_kimi_linear.chunk_kimi_delta_attention(query, key, value, g, beta, **given)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_recurrence_of_mamba2_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    for length, groups, with_state in ((7, 2, False), (21, 4, True)):
        x, dt = torch.randn(2, length, 4, 6), torch.randn(2, length, 4)
        b, c = (torch.randn(2, length, groups, 8) for _ in range(2))
        a, d, bias = -torch.rand(4), torch.randn(4), torch.ones(4)
        options = {
            "D": d, "dt_bias": bias, "dt_softplus": True, "dt_limit": (0.2, 1.5), "return_final_states": True,
            "initial_states": torch.randn(2, 4, 6, 8) if with_state else None,
        }  # fmt: skip
        got = state_space_duality(x, dt, a, b, c, 8, **options)
        wanted = modeling_mamba2.mamba2_chunk_scan(x, dt, a, b, c, 8, **options)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert isinstance(state_space_duality(x, dt, a, b, c), torch.Tensor)


def test_the_selective_scan_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    length = 9
    x, dt, z = (torch.randn(2, 6, length) for _ in range(3))
    a, b, c, d, bias = (
        -torch.rand(6, 4),
        torch.randn(2, 4, length),
        torch.randn(2, 4, length),
        torch.randn(6),
        torch.ones(6),
    )
    options = {"D": d, "z": z, "delta_bias": bias, "delta_softplus": True, "return_last_state": True}
    got = _States().selective_scan(x, dt, a, b, c, **options)
    wanted = modeling_mamba.mamba_selective_scan(x, dt, a, b, c, **options)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_padding_is_that_of_the_new_tokens() -> None:
    x, mask = torch.randn(2, 3, 4).half(), torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 0, 1]])
    wanted = modeling_mamba.apply_mask_to_padding_states(x, mask[:, -3:])
    for given in (mask, mask[:, -3:]):
        assert torch.equal(without_padding(x, given), wanted)
    assert without_padding(x, None) is x


def test_the_selective_scan_goes_on_from_the_state_of_its_layer() -> None:
    torch.manual_seed(0)
    x, dt = (torch.randn(2, 6, 9) for _ in range(2))
    a, b, c = -torch.rand(6, 4), torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    states = _States()
    whole, _ = states.selective_scan(x, dt, a, b, c, return_last_state=True)
    first, state = states.selective_scan(x[..., :4], dt[..., :4], a, b[..., :4], c[..., :4], return_last_state=True)
    states._state = state
    second = states.selective_scan(x[..., 4:], dt[..., 4:], a, b[..., 4:], c[..., 4:])
    torch.testing.assert_close(torch.cat([first, second], dim=-1), whole)
    torch.testing.assert_close(states.selective_scan(x, dt, a, b, c), whole)
