"""AttentionSpec: what one scaled dot-product attention computes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one attention computes, for queries of H heads, and keys and values of Hk heads that divide H.

    With q `[B, H, S, D]`, k `[B, Hk, T, D]` and v `[B, Hk, T, Dv]`, each repeated for H / Hk heads in a row::

        s = softcap * tanh(scale * q k^T / softcap)    (without a softcap: scale * q k^T)
        s = s + bias                                   (what is not attended to has the dtype's lowest value)
        y = softmax(s) v                               (with a sink: one more column, whose value is zero)

    and y is `[B, S, H, Dv]`. Softmax is computed in float32 or wider.

    Attributes:
        scale: factor of the scores.
        softcap: bound of the scores, or None.
        causal: query i attends to keys 0 to i, whatever the bias is.
        sink: the heads have a sink each, `[H]`.
    """

    scale: float
    softcap: float | None = None
    causal: bool = False
    sink: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not the default, as in a manifest."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value not in (None, False)}

    def to_json(self) -> str:
        """The fields as JSON, with `from_json` as the way back."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AttentionSpec:
        """The spec that `to_json` wrote."""
        return cls(**json.loads(text))

    def describe(self) -> str:
        """A short text, such as `scale 0.125, softcap 50`."""
        parts = [f"scale {self.scale:.6g}"]
        parts += [f"softcap {self.softcap:g}"] if self.softcap is not None else []
        parts += ["causal"] if self.causal else []
        parts += ["sinks"] if self.sink else []
        return ", ".join(parts)
