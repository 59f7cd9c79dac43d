"""Named limits for files that are less accurate than PyTorch on purpose: `PROFILES`, and `limits_with` a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .tolerances import EVERY_OUTPUT, NORMS, PARTS, SEGMENTS, Limits, names_logits


@dataclass(frozen=True, slots=True)
class LossyProfile:
    """What a quantized or converted file of a wider model may lose, and why.

    Attributes:
        name: the name on the command line.
        outputs: limits on every output; those on logits apply to logits only.
        norms: limits on every norm alone.
        segments: limits on every segment between norms.
        reason: what was measured.
    """

    name: str
    outputs: Limits
    norms: Limits
    segments: Limits
    reason: str

    def by_name(self) -> dict[str, Limits]:
        """The limits, by the names that explicit limits have."""
        return {EVERY_OUTPUT: self.outputs, NORMS: self.norms, SEGMENTS: self.segments}


PROFILES: dict[str, LossyProfile] = {
    row.name: row
    for row in (
        LossyProfile(
            "int8",
            Limits(min_cosine=0.98, max_kl=0.03, max_rms=0.2),
            Limits(max_rms=1e-3),
            Limits(min_cosine=0.998, max_rms=0.045),
            "To be measured.",
        ),
        LossyProfile(
            "int4",
            Limits(min_cosine=0.85, max_kl=0.2, max_rms=0.6),
            Limits(max_rms=1e-3),
            Limits(min_cosine=0.985, max_rms=0.17),
            "To be measured.",
        ),
        LossyProfile(
            "fp16",
            Limits(min_cosine=0.9999, max_kl=1e-4, max_rms=0.01),
            Limits(max_rms=1e-3),
            Limits(min_cosine=0.99999, max_rms=2e-3),
            "To be measured.",
        ),
        LossyProfile(
            "bf16",
            Limits(min_cosine=0.995, max_kl=5e-3, max_rms=0.08),
            Limits(max_rms=1e-2),
            Limits(min_cosine=0.9997, max_rms=0.02),
            "To be measured.",
        ),
    )
}


def limits_with(profile: str | None, given: Mapping[str, Limits]) -> dict[str, Limits]:
    """The explicit limits, and those of a profile where there is none of that kind.

    Args:
        profile: a name in `PROFILES`, or None.
        given: explicit limits by output, see `parse_limits`.
    """
    if profile is None:
        return dict(given)
    base = PROFILES[profile].by_name()
    found = {}
    for name in dict.fromkeys([*base, *given]):
        own = base[name if name in PARTS else EVERY_OUTPUT]
        if name not in base and not names_logits(name):
            own = own.without_logits()
        found[name] = given.get(name, Limits()).over(own)
    return found
