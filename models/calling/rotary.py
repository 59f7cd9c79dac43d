"""Rotary embeddings of transformers in a form that can be captured (`traceable_rotary`).

One whose frequencies follow the length (`rope_type` "dynamic") keeps, between calls, the frequencies of the longest
sequence that it has seen, and it decides by the values of the positions, which a captured graph cannot.
`traceable_rotary` computes the frequencies from the positions of each call instead. The two agree in a generation,
where the sequence grows from call to call.

One that rotates by a product of complex numbers (Llama 4) is computed with their real and imaginary parts, as ONNX has
no complex numbers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# Modules of transformers whose `apply_rotary_emb` multiplies complex numbers in a way that the exporter cannot convert.
_COMPLEX = {"transformers.models.llama4.modeling_llama4"}
# The config's length up to which the frequencies are those of short texts, and the manifest's field with it.
_SWITCH = "original_max_position_embeddings"
RESTART_FIELD = "restart_cache_above"


def dynamic_rotary(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model whose frequencies follow the length."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and "dynamic" in kind for kind in kinds) and hasattr(module, "config"):
            found.append(module)
    return found


def reset_rotary(model: nn.Module) -> None:
    """Forget the lengths of earlier calls, so that a result does not depend on them."""
    for module in dynamic_rotary(model):
        for prefix in _prefixes(module):
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if isinstance(original, Tensor) and hasattr(module, f"{prefix}max_seq_len_cached"):
                setattr(module, f"{prefix}max_seq_len_cached", getattr(module, "original_max_seq_len", None))
                module.register_buffer(f"{prefix}inv_freq", original, persistent=False)


@contextmanager
def traceable_rotary(model: nn.Module) -> Iterator[None]:
    """Replace the forward of `dynamic_rotary` modules, and complex rotations, by what can be captured."""
    modules = dynamic_rotary(model)
    reset_rotary(model)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "forward", functools.partial(_forward, module)))
        for source in {type(module).__module__ for module in model.modules()} & _COMPLEX:
            stack.enter_context(mock.patch.object(sys.modules[source], "apply_rotary_emb", rotated))
        yield


def rotated(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys times complex numbers of length 1, with the arguments of transformers' `apply_rotary_emb`.

    Args:
        xq: queries, `[batch, length, heads, width]`, adjacent elements are real and imaginary part.
        xk: keys, as the queries.
        freqs_cis: complex, `[batch, length, width / 2]`.

    Returns:
        Queries and keys, rotated in float32, in their own dtypes.
    """
    cos, sin = torch.view_as_real(freqs_cis).unsqueeze(2).unbind(-1)

    def product(x: Tensor) -> Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)

    return product(xq), product(xk)


def _forward(module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """The module's result, with the frequencies of the largest position of this call."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = "" if layer_type is None else f"{layer_type}_"
    arguments = {} if layer_type is None else {"layer_type": layer_type}
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    inner = inspect.unwrap(type(module).forward)
    if "dynamic" not in kind:
        return inner(module, x, position_ids, **arguments)
    length = position_ids.max() + 1
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, x.device, seq_len=length, **arguments)
    with torch.no_grad(), _buffer(module, f"{prefix}inv_freq", frequencies):
        return inner(module, x, position_ids, **arguments)


def _prefixes(module: nn.Module) -> list[str]:
    kinds = getattr(module, "rope_type", None)
    return [f"{name}_" for name in kinds] if isinstance(kinds, dict) else [""]


@contextmanager
def _buffer(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Replace a buffer without a trace in the graph that is captured."""
    before = module._buffers[name]
    module._buffers[name] = value
    try:
        yield
    finally:
        module._buffers[name] = before


def restart_length(model: nn.Module) -> int | None:
    """The number of tokens above which `generate` of transformers computes the cache again from all tokens, or None.

    Models of the Phi-3 family do so, because their rotary embedding has other frequencies for longer texts (LongRoPE,
    https://arxiv.org/abs/2402.13753), and the keys in the cache have the old ones.
    """
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    length = getattr(getattr(model, "config", None), _SWITCH, None)
    if prepare is None or not isinstance(length, int):
        return None
    return length if _SWITCH in inspect.getsource(prepare) else None
