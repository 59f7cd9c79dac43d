"""Find every RMSNorm of a PyTorch model, and determine exactly what each one computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..dtypes import torch_name
from ..precision import model_dtype
from .caller import RefusedError, own_tensors
from .likeness import likeness
from .probe import Probed, probe
from .signature import NotANormError
from .site import Recognition, Refusal, Site
from .state import UnwatchableError

# These are known not to be RMS norms; probing them would only cost time.
_KNOWN_OTHER_NORMS: dict[type[nn.Module], str] = {
    nn.LayerNorm: "it subtracts the mean (LayerNorm): not an RMS norm",
    nn.GroupNorm: "it subtracts the mean of each group (GroupNorm): not an RMS norm",
    nn.LocalResponseNorm: "it normalizes over a window of channels (LocalResponseNorm): not an RMS norm",
    nn.CrossMapLRN2d: "it normalizes over a window of channels (LocalResponseNorm): not an RMS norm",
}
_KNOWN_BASES: dict[type[nn.Module], str] = {
    nn.modules.batchnorm._BatchNorm: "it uses statistics of the batch (BatchNorm): not an RMS norm",
    nn.modules.instancenorm._InstanceNorm: "it uses statistics of each channel (InstanceNorm): not an RMS norm",
}
# A norm's weight spans one hidden size; a larger tensor belongs to another kind of layer.
_LARGEST_WEIGHT = 1 << 20


def find_norms(model: nn.Module) -> Recognition:
    """Find the norms of `model` by what they compute, not by their names.

    A copy of every module that could be a norm is called with inputs chosen to reveal its formula, its eps, its
    statistics dtype and its order of casts. It becomes a site when one NormSpec reproduces its output bit for bit in
    float32, float16 and bfloat16 (and in its own dtype); of modules that differ in the values of their weights only,
    the first is examined so, and the others with their own weights. Otherwise it is refused with the reason, or
    skipped where it does not normalize at all.

    Args:
        model: any module, in any dtype, on one or several devices. It is not changed.

    Returns:
        Sites and refusals, in the order of `model.named_modules()`. A module reachable by several paths is listed
        once, under its first.
    """
    sites: list[Site] = []
    refusals: list[Refusal] = []
    inside: list[str] = []
    own_dtype = model_dtype(model) or torch.get_default_dtype()
    probed: dict[Any, Probed] = {}
    for path, module in model.named_modules():
        if any(p == "" or path.startswith(f"{p}.") for p in inside):
            continue
        found = _decide(path, module, own_dtype, probed)
        if isinstance(found, Site):
            sites.append(found)
            inside.append(path)
        elif isinstance(found, Refusal):
            refusals.append(found)
    return Recognition(sites, refusals)


def class_name(module: nn.Module) -> str:
    """`package.module.Class` of a module."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def _decide(path: str, module: nn.Module, own_dtype: torch.dtype, known: dict[Any, Probed]) -> Site | Refusal | None:
    name = class_name(module)
    reason = _known_reason(module)
    if reason is not None:
        return Refusal(path, name, reason)
    named_norm = "norm" in _own_name(module).lower()
    obstacle = _obstacle(module)
    if obstacle is not None:
        return Refusal(path, name, obstacle) if named_norm and obstacle else None
    try:
        alike = likeness(module)
        probed = probe(module, own_dtype, known.get(alike) if alike is not None else None)
        if alike is not None:
            known[alike] = probed
    except RefusedError as error:
        return Refusal(path, name, str(error))
    except NotANormError as error:
        if not named_norm or isinstance(module, nn.Identity):
            return None
        detail = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return Refusal(path, name, f"its name contains 'norm', but it does not normalize a single input{detail}")
    except UnwatchableError as error:
        return Refusal(path, name, str(error)) if named_norm else None
    except Exception as error:  # the module's own code failed on a probe, so it is not recognized
        return Refusal(path, name, f"it failed when probed: {type(error).__name__}: {error}") if named_norm else None
    weight = getattr(module, probed.weight) if probed.weight else None
    dtype = weight.dtype if weight is not None else own_dtype
    return Site(path, name, probed.spec, probed.width, torch_name(dtype), probed.weight, probed.bias)


def _own_name(module: nn.Module) -> str:
    """The class's name; a TorchScript module keeps the name of the class it was made from."""
    return str(getattr(module, "original_name", "")) or type(module).__name__


def _known_reason(module: nn.Module) -> str | None:
    if type(module) in _KNOWN_OTHER_NORMS:
        return _KNOWN_OTHER_NORMS[type(module)]
    for base, reason in _KNOWN_BASES.items():
        if isinstance(module, base):
            return reason
    return None


def _obstacle(module: nn.Module) -> str | None:
    """Why the module cannot be probed: the reason to report, or `""` for one that is not reported; None if it can."""
    cls = type(module)
    if cls.__module__.startswith("torch.nn.modules") and cls is not nn.RMSNorm:
        return ""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module, whose code cannot be replaced; export the original module"
    if nn.utils.parametrize.is_parametrized(module):
        return "its tensors are parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    tensors = own_tensors(module)
    if any(t.is_meta for t in tensors.values()):
        return "its parameters are on the meta device and hold no values; load the weights first"
    if any(True for child in module.children() for _ in child.parameters()):
        return "its child modules have parameters" if tensors else ""
    extra = _more_than_forward(module)
    if extra is not None:
        return extra
    if "forward" in vars(module):
        return "its forward was replaced on the instance (by a kernel or an offload hook); load the model without that"
    if any(t.numel() > _LARGEST_WEIGHT for t in tensors.values()) or len(tensors) > 2:
        return "it holds more or larger tensors than a weight and a bias"
    return None


def _more_than_forward(module: nn.Module) -> str | None:
    """Why a call of the module is not its forward alone, or its forward not what a copy without hooks computes.

    The module's own hooks run outside of its forward, so they stay when the forward is replaced.
    """
    for name in ("__call__", "_call_impl", "_wrapped_call_impl"):
        function = vars(module).get(name, getattr(type(module), name))
        if not str(getattr(function, "__module__", "")).startswith("torch."):
            return f"its class overrides {name}, so a call may do more than its forward; move that into the forward"
    for path, child in module.named_modules():
        if path and (child._forward_hooks or child._forward_pre_hooks):
            return f"its child module {path} has forward hooks, which run inside its forward; remove these hooks"
    return None
