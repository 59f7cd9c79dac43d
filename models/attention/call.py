"""AttentionCall: one call of an attention function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# Arguments that carry no meaning of their own: the mask and the position embedding, which are applied, contain it.
_HARMLESS = frozenset({"position_ids", "cache_position", "dropout", "sliding_window", "token_type_ids", "labels"})
_READ = frozenset({"scaling", "softcap", "is_causal", "s_aux", "position_bias"})
# Masks are bool or absent for one, and floats that are added for the other.
IMPLEMENTATIONS = ("sdpa", "eager")
# The implementation of calls of torch's own function; its mask is bool, or floats that are added, or absent.
FUNCTIONAL = "functional"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of an attention function.

    Attributes:
        module: the attention module.
        implementation: transformers' name of the function, such as `sdpa`; `functional` for torch's own function.
        function: the function itself, as the module calls it.
        query, key, value: `[B, H, S, D]`, `[B, Hk, T, D]`, `[B, Hk, T, Dv]`.
        mask: bool, where True is attended to; or floats that are added; or None.
        options: the other arguments.
    """

    module: nn.Module
    implementation: str
    function: Callable[..., tuple[Tensor, Any]]
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def original(self) -> tuple[Tensor, Any]:
        """What the module's own function returns."""
        return self.function(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def option(self, name: str) -> Any:
        """An argument by its name, or None."""
        return self.options.get(name)

    def unread(self) -> list[str]:
        """The tensors among the arguments whose meaning is unknown, by name."""
        names = self.options.keys() - _HARMLESS - _READ
        return sorted(name for name in names if _has_tensor(self.options[name]))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)
