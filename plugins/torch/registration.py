"""register: one operator of the library `rmsnorm_deploy` for every device, the compiler and a refused gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ...models.errors import RmsnormDeployError
from .. import contract
from .call import Call, eager_result, fake_result, fused_result

_LIBRARY: Final = torch.library.Library(contract.DOMAIN, "DEF")

Compute = Callable[[Call], tuple[Tensor, ...]]


def _no_gradient(name: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise RmsnormDeployError(
            f"rmsnorm_deploy::{name} is for inference and has no gradient, but an input requires one. Call the model "
            "under torch.no_grad() or torch.inference_mode()."
        )

    return refuse


def register(schema: str, by: Callable[[Compute], Callable[..., Any]]) -> None:
    """Define an operator of the library.

    Args:
        schema: its name and arguments.
        by: the operator as a function, for a function that computes the result of its call.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    qualified = f"{contract.DOMAIN}::{name}"
    _LIBRARY.impl(name, by(eager_result), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, by(fused_result), "CUDA")
    torch.library.register_fake(qualified, by(fake_result), lib=_LIBRARY)
    refuse = _no_gradient(name)
    # The dispatcher sets the context up, and so refuses, exactly where a gradient is required.
    torch.library.register_autograd(qualified, refuse, setup_context=refuse, lib=_LIBRARY)
