"""Recurrences of hybrid models in a form that a graph of any length holds (`traceable_recurrences`).

transformers computes them with Python loops over tokens or chunks, which a capture unrolls for the captured length.
Here they are one `scan` over the tokens, which becomes the ONNX operator Scan.
"""

# ruff: noqa: N803 (the argument names of transformers)

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def traceable_recurrences(model: nn.Module) -> Iterator[None]:
    """Replace the loops in the modules of transformers that define the parts of a model."""
    states = _States()
    replacements: dict[str, Callable[..., Any]] = {
        "torch_chunk_gated_delta_rule": gated_delta_rule,
        "chunk_kimi_delta_attention": gated_delta_rule,
        "mamba2_chunk_scan": state_space_duality,
        "mamba_selective_scan": states.selective_scan,
        "apply_mask_to_padding_states": without_padding,
    }
    sources = {type(module).__module__ for module in model.modules()}
    with ExitStack() as stack:
        for source in sorted(source for source in sources if source.startswith("transformers.")):
            for name, replacement in replacements.items():
                if hasattr(sys.modules[source], name):
                    stack.enter_context(mock.patch.object(sys.modules[source], name, replacement))
                    stack.enter_context(states.recorded())
        yield


def without_padding(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Zero the padded tokens, with the arguments of transformers' function.

    Args:
        hidden_states: `[batch, length, width]`.
        attention_mask: `[batch, past + length]`, of which some models of transformers give the last columns only; or
            None.
    """
    if attention_mask is None:
        return hidden_states
    mask = attention_mask[:, -hidden_states.shape[1] :, None]
    return (hidden_states * mask).to(hidden_states.dtype)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, token by token in float32, with the arguments of transformers' function.

    S = exp(g) S;  S = S + k (beta (v - k S));  y = q S / sqrt(width), as in "Gated Delta Networks: Improving Mamba2
    with Delta Rule" (https://arxiv.org/abs/2412.06464); with a decay for each channel of the key, as in "Kimi Linear"
    (https://arxiv.org/abs/2510.26692).

    Args:
        query: `[batch, length, key heads, width]`.
        key: as the query.
        value: `[batch, length, value heads, value width]`.
        g: the logarithm of the decay, `[batch, length, value heads]`, or with a last dim of `width`.
        beta: how much of a new value is written, `[batch, length, value heads]`.
        chunk_size: not used.
        initial_state: `[batch, value heads, width, value width]`; zeros if None.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: normalize queries and keys to length 1.

    Returns:
        The result, `[batch, length, value heads, value width]` in the query's dtype, and the state or None.
    """
    dtype, groups = query.dtype, value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (query, key))
    q, k, v, decay, write = (x.float() for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    decay = decay if g.dim() == query.dim() else decay.unsqueeze(-1)
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    if initial_state is not None:
        state = initial_state.to(state)

    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q_t, k_t, v_t, decay_t, write_t = token
        state = state * decay_t.exp().unsqueeze(-1)
        known = (state * k_t.unsqueeze(-1)).sum(dim=-2)
        state = state + k_t.unsqueeze(-1) * ((v_t - known) * write_t.unsqueeze(-1)).unsqueeze(-2)
        return state, (state * q_t.unsqueeze(-1)).sum(dim=-2)

    last, result = _scan(step, state, (q, k, v, decay, write))
    return result.to(dtype), last if output_final_state else None


def state_space_duality(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """The recurrence of Mamba2, token by token in float32, with the arguments of transformers' function.

    h = exp(A dt) h + dt x B;  y = h C + D x, as in "Transformers are SSMs" (https://arxiv.org/abs/2405.21060).

    Args:
        hidden_states: x, `[batch, length, heads, width]`.
        dt: time steps, `[batch, length, heads]`.
        A: `[heads]`.
        B: `[batch, length, groups, states]`.
        C: as B.
        chunk_size: not used.
        D: `[heads]`, or `[heads, width]`.
        dt_bias: added to dt, `[heads]`.
        initial_states: `[batch, heads, width, states]`; zeros if None.
        dt_softplus: apply softplus to dt.
        dt_limit: limits of dt.
        return_final_states: return the state after the last token too.

    Returns:
        The result, as x in float32; or a pair of it and the state.
    """
    heads, groups = hidden_states.shape[2], B.shape[2]
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    dt = functional.softplus(dt) if dt_softplus else dt
    dt = torch.clamp(dt, dt_limit[0], dt_limit[1]).float()
    x = hidden_states.float()
    b, c = (t.float().repeat_interleave(heads // groups, dim=2) if groups != heads else t.float() for t in (B, C))
    state = x.new_zeros(x.shape[0], heads, x.shape[-1], b.shape[-1])
    if initial_states is not None:
        state = initial_states.to(state)

    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x_t, decay_t, b_t, c_t = token
        state = state * decay_t[..., None, None] + x_t.unsqueeze(-1) * b_t.unsqueeze(-2)
        return state, (state * c_t.unsqueeze(-2)).sum(dim=-1)

    last, result = _scan(step, state, (x * dt.unsqueeze(-1), torch.exp(A.float() * dt), b, c))
    if D is not None:
        result = result + D.reshape(heads, -1) * x
    return (result, last) if return_final_states else result


class _States:
    """The recurrent state that a layer read last, which `mamba_selective_scan` of transformers does not get."""

    def __init__(self) -> None:
        self._state: Tensor | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        from transformers.cache_utils import Cache

        original = Cache.get_recurrent_state

        def get(cache: Any, *arguments: Any, **keywords: Any) -> Any:
            self._state = original(cache, *arguments, **keywords)
            return self._state

        with mock.patch.object(Cache, "get_recurrent_state", get):
            yield

    def selective_scan(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> Any:
        """Mamba's selective scan from the state that the layer read, with the arguments of transformers' function.

        h = exp(A dt) h + dt B x;  y = h C + D x (https://arxiv.org/abs/2312.00752).

        Args:
            hidden_states: x, `[batch, width, length]`.
            dt: time steps, as x.
            A: `[width, states]`.
            B: `[batch, states, length]`.
            C: as B.
            D: `[width]`.
            z: a gate of the result, as x.
            delta_bias: added to dt, `[width]`.
            delta_softplus: apply softplus to dt.
            return_last_state: return the state after the last token too, `[batch, width, states]`.
        """
        dtype = hidden_states.dtype
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        dt = functional.softplus(dt) if delta_softplus else dt
        x, steps = hidden_states.transpose(1, 2), dt.transpose(1, 2)
        decay = torch.exp(A * steps.unsqueeze(-1))
        added = steps.unsqueeze(-1) * B.transpose(1, 2).float().unsqueeze(2) * x.float().unsqueeze(-1)
        state, self._state = self._state, None
        if state is None:
            state = added.new_zeros(x.shape[0], x.shape[2], A.shape[-1])

        def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            decay_t, added_t, c_t = token
            state = decay_t * state + added_t
            return state, (state.to(dtype) @ c_t.unsqueeze(-1)).squeeze(-1)

        last, result = _scan(step, state.to(added), (decay, added, C.transpose(1, 2)))
        y = result.transpose(1, 2)
        if D is not None:
            y = y + hidden_states * D[None, :, None]
        if z is not None:
            y = y * functional.silu(z)
        return (y, last) if return_last_state else y


def _scan(
    step: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]], state: Tensor, tokens: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The last state, and the results `[batch, length, ...]`, of a recurrence over dim 1 of each of the tokens."""
    if not torch.compiler.is_exporting():  # torch would compile a scan for each shape
        results = []
        for token in zip(*(x.unbind(1) for x in tokens), strict=True):
            state, result = step(state, token)
            results.append(result)
        return state, torch.stack(results, dim=1)
    from torch._higher_order_ops.scan import scan

    def copied(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        state, result = step(state, token)
        return state.clone(), result.clone()  # torch refuses results that are the same tensor as an input

    last, results = scan(copied, state, tuple(x.movedim(1, 0) for x in tokens), dim=0)
    return last, results.movedim(0, 1)
