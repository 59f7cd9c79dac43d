"""The float64 truth of a model: every parameter widened, every norm replaced by the float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..models.recognise import recognise
from ..models.reference import reference
from ..models.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn


def truth_model(model: nn.Module) -> nn.Module:
    """A float64 copy of `model`.

    Widening alone is not enough: most norms cast to float32 whatever they are given. Each recognised norm of the copy
    computes `models.reference` instead, which shares no code with the eager form or with any lowering.

    Args:
        model: in the deployment dtype; it is not changed.
    """
    import torch

    recognition = recognise(model)
    truth = copy.deepcopy(model).to(torch.float64).eval()
    if getattr(truth, "_can_set_experts_implementation", lambda: False)():
        truth.set_experts_implementation("eager")  # type: ignore[operator]  # grouped products exist in float32 only
    for site in recognition.sites:
        module = truth.get_submodule(site.path)
        object.__setattr__(module, "forward", _forward(module, site))
    return truth


def _forward(module: nn.Module, site: Site) -> Callable[..., Tensor]:
    import inspect

    import torch

    original = module.forward
    signature = inspect.signature(original)
    names = list(signature.parameters)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        x = given.pop(names[0])
        gate = given.pop(names[1], None) if site.spec.gate != "none" else None
        if any(value is not None for value in given.values()):
            return original(*args, **kwargs)
        spec = site.spec if gate is not None else site.spec.replace(gate="none", activation="none")
        weight = getattr(module, site.weight).detach().cpu().numpy() if site.weight else None
        bias = getattr(module, site.bias).detach().cpu().numpy() if site.bias else None
        gate_array = gate.detach().cpu().numpy() if gate is not None else None
        result = reference(spec, x.detach().cpu().numpy(), weight, bias, gate_array)
        return torch.from_numpy(result).to(x.device)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
