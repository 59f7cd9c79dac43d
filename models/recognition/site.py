"""The result of recognition: the norms that were found, and the modules that were refused, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..spec import NormSpec


@dataclass(frozen=True, slots=True)
class Site:
    """One norm of a model.

    Attributes:
        path: the module's dotted path in the model, `""` for the model itself.
        class_name: the module's class, with its Python module.
        spec: what it computes.
        width: the normalized trailing dims, or None where any width is accepted (a norm without a weight).
        dtype: dtype of the weight, or the model's dtype where there is none, such as `float16`.
        weight: name of the attribute that holds the weight, or None.
        bias: name of the attribute that holds the bias, or None.
    """

    path: str
    class_name: str
    spec: NormSpec
    width: tuple[int, ...] | None
    dtype: str
    weight: str | None = None
    bias: str | None = None

    @property
    def parameters(self) -> list[str]:
        """Full names of the tensors that the norm reads."""
        prefix = f"{self.path}." if self.path else ""
        return [prefix + name for name in (self.weight, self.bias) if name is not None]

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON values."""
        width = self.width[0] if self.width is not None and len(self.width) == 1 else self.width
        return {
            "path": self.path,
            "class": self.class_name,
            "spec": self.spec.to_dict(),
            "width": list(width) if isinstance(width, tuple) else width,
            "dtype": self.dtype,
            "parameters": self.parameters,
        }


@dataclass(frozen=True, slots=True)
class Refusal:
    """A module that normalizes, or is named like a norm, and is left unchanged; `reason` says why."""

    path: str
    class_name: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The refusal as JSON values."""
        return {"path": self.path, "class": self.class_name, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Recognition:
    """Every norm of a model: `sites` have a spec, `refusals` do not."""

    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def site(self, path: str) -> Site:
        """The site at a module path.

        Raises:
            KeyError: there is no site at this path.
        """
        for site in self.sites:
            if site.path == path:
                return site
        raise KeyError(path)


def norm_name(path: str, call: int = 0) -> str:
    """A norm's name for people: its module path, and the number of the call, from 1, where it is not the first.

    Args:
        path: of the module; empty for the model itself.
        call: from 0.
    """
    name = path or "the model itself"
    return name if call == 0 else f"{name} (call {call + 1})"
