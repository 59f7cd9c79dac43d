"""Let the norms of a PyTorch model call the operators, and restore the model afterwards."""

from __future__ import annotations

import functools
import inspect
from types import TracebackType
from typing import Any, Final

from torch import Tensor, nn

from ...models.recognition.find_norms import find_norms
from ...models.recognition.site import Refusal, Site
from ...models.spec import NormSpec
from .kernel_choice import spec_problem
from .operators import form_of, rms_norm

# The attribute of classes whose forward calls the operator.
_MARK: Final = "_calls_rmsnorm_deploy"


class KernelSwap:
    """A model whose norms call `rms_norm`, until `undo` or the end of a `with` block.

    Attributes:
        swapped: the norms that call the operator.
        kept: the modules that were left as they are, with the reason.
    """

    def __init__(self, model: nn.Module, swapped: list[Site], kept: list[Refusal]) -> None:
        self.swapped = swapped
        self.kept = kept
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        for site in swapped:
            module = model.get_submodule(site.path)
            self._classes.append((module, type(module)))
            own: Any = type(module)
            module.__class__ = _calling(own, site.spec, site.weight)

    def undo(self) -> None:
        """Give every norm its own class back; a second time does nothing."""
        while self._classes:
            module, own = self._classes.pop()
            module.__class__ = own

    def __enter__(self) -> KernelSwap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"norms that call the kernel: {len(self.swapped)}; left as they are: {len(self.kept)}"]
        return "\n".join([*lines, *(f"  {kept.path or 'the model itself'}: {kept.reason}" for kept in self.kept)])

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "swapped": [site.to_dict() for site in self.swapped],
            "kept": [refusal.to_dict() for refusal in self.kept],
        }


def use_kernel(model: nn.Module) -> KernelSwap:
    """Let every norm of a model that the kernel supports call `rms_norm`, in place.

    A norm keeps its parameters, hooks, attributes and keys in the state dict; only its class changes, to a subclass of
    its own with another forward. On CUDA its forward runs the fused kernel; on the CPU it returns the bits that it
    returned before. The result of a norm is contiguous, whatever strides its input has. The model is for inference:
    call it under `torch.no_grad()`. It can be copied, compiled and exported, and its state dict saved; `torch.save` of
    the module itself requires `undo` first.

    Args:
        model: any module, in any dtype, on any device.

    Returns:
        Which norms were swapped, and which modules were not, with the reason; `undo` restores the model, as does the
        end of a `with use_kernel(model):` block.
    """
    found = find_norms(model)
    kept = list(found.refusals)
    swapped = []
    for site in found.sites:
        module = model.get_submodule(site.path)
        reason = spec_problem(site.spec) or _module_problem(module, site)
        if reason is None:
            swapped.append(site)
        else:
            kept.append(Refusal(site.path, site.class_name, reason))
    return KernelSwap(model, swapped, kept)


def _module_problem(module: nn.Module, site: Site) -> str | None:
    if hasattr(module, _MARK):
        return "it calls the kernel already"
    weight = getattr(module, site.weight) if site.weight else None
    if weight is not None and weight.ndim != 1:
        return f"its weight has the shape {list(weight.shape)}: the kernel has weights of one dim"
    return None


@functools.lru_cache(maxsize=1024)
def _calling(own: type[nn.Module], spec: NormSpec, weight: str | None) -> type[nn.Module]:
    """A subclass whose forward calls the operator; calls with other than its inputs run the class's own forward."""
    signature = inspect.signature(own.forward)
    inputs = list(signature.parameters)[1 : 3 if spec.has_gate else 2]
    eps, form = spec.eps, form_of(spec)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *(kwargs[name] for name in inputs[len(args) :] if name in kwargs)]
        fits = len(args) + len(kwargs) == len(given) == len(inputs) and all(isinstance(x, Tensor) for x in given)
        if not fits or given[-1].shape != given[0].shape:
            return own.forward(self, *args, **kwargs)
        gate = given[1] if spec.has_gate else None
        return rms_norm(given[0], None if weight is None else getattr(self, weight), eps, gate, **form)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    names = {_MARK: True, "forward": forward, "__module__": __name__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), names)
