"""The model inside of a wrapper (`look_through`): DataParallel, torch.compile, PEFT, hooks of accelerate.

A norm inside of a wrapper has another path, and often cannot be replaced. What a wrapper adds (devices, gradients,
compiled code) does not change what the model computes, so the module inside of it is exported and compared.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError, UsageError


@dataclass(frozen=True, slots=True)
class LookedThrough:
    """A model without its wrappers, and a note on each kind of wrapper for the user."""

    model: nn.Module
    notes: list[str] = field(default_factory=list)


def _attribute(name: str) -> Callable[[nn.Module], nn.Module | None]:
    return lambda wrapper: getattr(wrapper, name, None)


def _of_peft(wrapper: Any) -> nn.Module | None:
    """The model with its adapter layers; None for prompts, which the wrapper itself adds to the inputs."""
    if any(getattr(config, "is_prompt_learning", False) for config in wrapper.peft_config.values()):
        return None
    tuner = wrapper.base_model
    model = getattr(tuner, "model", None)
    return model if isinstance(model, nn.Module) else None


def _sharded(wrapper: nn.Module) -> nn.Module | None:
    raise UnsupportedError(
        f"{type(wrapper).__name__} holds parts of its parameters only. Save its full state dict, load that into the "
        "original module, and give that module."
    )


_COMPILE = "torch.compile"
# The classes that are looked through, by their full names: what a note calls them, and how the inside is found.
WRAPPERS: dict[str, tuple[str, Callable[[Any], nn.Module | None]]] = {
    "torch.nn.parallel.data_parallel.DataParallel": ("torch.nn.DataParallel", _attribute("module")),
    "torch.nn.parallel.distributed.DistributedDataParallel": ("DistributedDataParallel", _attribute("module")),
    "torch._dynamo.eval_frame.OptimizedModule": (_COMPILE, _attribute("_orig_mod")),
    "torch.optim.swa_utils.AveragedModel": ("torch.optim.swa_utils.AveragedModel", _attribute("module")),
    "deepspeed.runtime.engine.DeepSpeedEngine": ("the engine of DeepSpeed", _attribute("module")),
    "peft.peft_model.PeftModel": ("PeftModel, with its adapters as they are", _of_peft),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "FullyShardedDataParallel",
        _sharded,
    ),
}
# Hooks of accelerate that move tensors between devices and compute nothing.
_MOVING_HOOKS = ("AlignDevicesHook", "SequentialHook", "CpuOffload", "UserCpuOffloadHook")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def look_through(model: Any, other: str = "") -> LookedThrough:
    """The model without wrappers, at the top and below.

    The model that is given is not changed: modules that hold a wrapper are copied without their parameters, which both
    models share.

    Args:
        model: a module, or what torch makes of one.
        other: what else was expected in its place, for the message.

    Raises:
        UsageError: expected a module, or one without hooks on its wrapper.
        UnsupportedError: it holds parts of its parameters only.
    """
    if isinstance(model, torch.export.ExportedProgram):
        raise UsageError(
            "expected a PyTorch module, got an ExportedProgram, in which no module is left that could be recognized as "
            "a norm. Give the module that was passed to torch.export.export."
        )
    if not isinstance(model, nn.Module):
        expected = f"a PyTorch module, or {other}" if other else "a PyTorch module"
        raise UsageError(f"expected {expected}, got {type(model).__name__}.")
    seen: dict[nn.Module, nn.Module] = {}
    notes: dict[str, list[str]] = {}
    inner = _without_wrappers(model, "", seen, notes)
    return LookedThrough(inner, [_note(kind, paths) for kind, paths in notes.items()])


def _note(kind: str, paths: list[str]) -> str:
    if paths == [""]:
        return f"took the module inside {kind}"
    shown = ", ".join(path or "the model" for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    return f"took the modules inside {kind} ({len(paths)}: {shown})"


def _without_wrappers(
    module: nn.Module, path: str, seen: dict[nn.Module, nn.Module], notes: dict[str, list[str]]
) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if module in seen:
        return seen[module]
    seen[module] = module  # a module that holds itself
    kind, inner = _inside(module)
    if inner is not None:
        notes.setdefault(kind, []).append(path)
        seen[module] = _without_wrappers(inner, path, seen, notes)
        return seen[module]
    children = {
        name: None if child is None else _without_wrappers(child, f"{path}.{name}" if path else name, seen, notes)
        for name, child in module._modules.items()
    }
    forward, kind = _plain_forward(module)
    same = all(children[name] is child for name, child in module._modules.items())
    if kind:
        notes.setdefault(kind, []).append(path)
    if same and not kind:
        return module
    seen[module] = _copied(module, children, forward)
    return seen[module]


def _copied(module: nn.Module, children: dict[str, nn.Module | None], forward: Any) -> nn.Module:
    """The module with other children and another forward; its parameters and buffers are shared."""
    found = copy.copy(module)
    own = vars(found)
    own["_modules"] = children
    for name in ("_hf_hook", "_old_forward", "forward", "_compiled_call_impl"):
        own.pop(name, None)
    if forward is not None and forward is not type(module).forward:
        is_own = isinstance(forward, types.MethodType) and forward.__self__ is module
        if not is_own or forward.__func__ is not type(module).forward:
            own["forward"] = types.MethodType(forward.__func__, found) if is_own else forward
    return found


def _inside(module: nn.Module) -> tuple[str, nn.Module | None]:
    """What a wrapper is called, and the module inside of it; None if the module is not a wrapper."""
    for cls in type(module).__mro__:
        label, inside = WRAPPERS.get(f"{cls.__module__}.{cls.__qualname__}", ("", None))
        if inside is not None:
            inner = inside(module)
            if inner is not None and any(getattr(module, hooks, None) for hooks in _HOOKS):
                raise UsageError(
                    f"{type(module).__name__} has forward hooks, which the module inside of it would lose. Remove "
                    "these hooks, or register them on the module inside."
                )
            return label, inner
    return "", None


def _plain_forward(module: nn.Module) -> tuple[Any, str]:
    """The module's own forward, and what replaced it on the instance; an empty text if nothing did.

    Raises:
        UsageError: accelerate has moved the module's weights away.
    """
    own = vars(module)
    if "_hf_hook" in own and _only_moves(own["_hf_hook"]):
        if any(
            tensor.is_meta for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None
        ):
            raise UsageError(
                f"{type(module).__name__} holds parameters that accelerate offloaded (they are on the meta device). "
                'Load the model on one device, such as device_map="cpu", and give that.'
            )
        return own.get("_old_forward"), "the hooks of accelerate"
    forward = own.get("forward")
    compiled = getattr(forward, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        # torch wraps a method in a function of its own before it compiles it.
        made_by_torch = "_dynamo" in getattr(getattr(compiled, "__code__", None), "co_filename", "")
        return getattr(compiled, "__wrapped__", compiled) if made_by_torch else compiled, _COMPILE
    if own.get("_compiled_call_impl") is not None:
        return forward, _COMPILE
    return forward, ""


def _only_moves(hook: Any) -> bool:
    return type(hook).__name__ in _MOVING_HOOKS and all(map(_only_moves, getattr(hook, "hooks", ())))
