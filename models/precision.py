"""The dtypes of a model's parts: the model's own dtype, and its conversion to another without the parts that stay wide.

Many models mix dtypes: transformers keeps the `wo` of T5 in float32 when it loads a checkpoint in float16, and the
correction bias of a router in every half type. A plain `model.to(dtype)` would round these parts too.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .dtypes import HALF_DTYPES, torch_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

# The attributes in which a class of transformers names its float32 modules, and the dtypes for which each counts.
_KEPT: Mapping[str, tuple[str, ...]] = {
    "_keep_in_fp32_modules": ("float16",),
    "_keep_in_fp32_modules_strict": ("float16", "bfloat16"),
}


def model_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of the elements of a model's floating-point parameters; None without such parameters."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


def saved_elements(model: nn.Module) -> dict[str, int]:
    """The number of floating-point elements in the parameters and saved buffers of each dtype, by its name."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            if tensor.is_floating_point():
                counts[torch_name(tensor.dtype)] += tensor.numel()
    return dict(sorted(counts.items()))


def convert(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a model's floating-point tensors in place, as `model.to(dtype)`, except those that stay.

    With a half `dtype`, these stay as they are: the tensors that are wider than the model's own dtype, if that is a
    half type already. And a model of transformers gets the dtypes that `from_pretrained(dtype=...)` would give it: the
    modules that its class names (`_keep_in_fp32_modules`) and tensors whose dtype its code states are in float32.

    Returns:
        The model.
    """
    wanted = {id(tensor): to for tensor, to in _plan(model, dtype)}
    # `_apply` also calls the function for gradients.
    model._apply(lambda t: t.to(wanted.get(id(t), dtype)) if t.is_floating_point() else t)
    return model


def converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself, if `convert` would change no tensor, else a converted deep copy."""
    if all(tensor.dtype == to for tensor, to in _plan(model, dtype)):
        return model
    return convert(copy.deepcopy(model), dtype)


def _plan(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Each floating-point parameter and buffer, and the dtype that it is to have."""
    is_half = torch_name(dtype) in HALF_DTYPES
    own = model_dtype(model)
    keeps_wider = is_half and own is not None and own.itemsize == dtype.itemsize
    stated = _transformers_dtypes(model, dtype) if is_half else {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            stays = keeps_wider and tensor.dtype.itemsize > dtype.itemsize
            yield tensor, tensor.dtype if stays else stated.get(name, dtype)


def _transformers_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes, other than `dtype`, that transformers gives to tensors of its models inside of `model`."""
    import torch

    found: dict[str, torch.dtype] = {}
    inside: list[str] = []
    for path, module in model.named_modules():
        is_model = any(hasattr(module, attribute) for attribute in _KEPT)
        if not is_model or any(not outer or path.startswith(f"{outer}.") for outer in inside):
            continue
        inside.append(path)
        prefix = f"{path}." if path else ""
        found |= {prefix + name: stated for name, stated in _stated(module, dtype).items()}
        keys = [k for kept, when in _KEPT.items() if torch_name(dtype) in when for k in getattr(module, kept) or ()]
        if keys:
            pattern = re.compile("|".join(f"(?:{key.replace('*', '.*')})" for key in keys))
            saved = module.state_dict(keep_vars=True)
            found |= {prefix + name: torch.float32 for name in saved if pattern.search(name)}
    return found


def _stated(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes that the code of a transformers model states, such as float32 for the frequencies of its positions.

    They are those of the same model, made without weights while `dtype` is PyTorch's default.
    """
    import torch

    config, make = getattr(model, "config", None), getattr(type(model), "_from_config", None)
    if config is None or make is None:
        return {}
    try:
        with torch.device("meta"):
            made = make(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # the code of any model; its modules are converted without it
        log.info("%s cannot be made without weights: %s", type(model).__name__, error)
        return {}
    tensors = (*made.named_parameters(), *made.named_buffers())
    return {name: t.dtype for name, t in tensors if t.is_floating_point() and t.dtype != dtype}
