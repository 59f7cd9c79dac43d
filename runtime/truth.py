"""The float64 truth of a model: every parameter widened, every norm replaced by the float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..models.calls import NormCall, replace_forward
from ..models.recognise import recognise
from ..models.reference import reference

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
        replace_forward(truth.get_submodule(site.path), site, _exact, _ignore)
    return truth


def _exact(call: NormCall, original: Callable[[], Tensor]) -> Tensor:
    import torch

    del original
    arrays = [None if t is None else t.detach().cpu().numpy() for t in (call.weight, call.bias, call.gate)]
    return torch.from_numpy(reference(call.spec, call.x.detach().cpu().numpy(), *arrays)).to(call.x.device)


def _ignore(names: str) -> None:
    """A call that no spec covers runs the widened module itself."""
