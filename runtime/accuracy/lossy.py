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


# Measured by benchmarks/lossy_profiles.py on models of two layers and 128 channels with random weights, and on the
# trained addition decoder. Losses are RMS errors relative to a row's RMS, for which the cosine is 1 - loss^2 / 2.
# Outputs are limited loosely, because their loss grows with the depth. Top-1 agreement is not limited: of a case with
# one row it is 0 or 1, and an honest int4 file had 0.
PROFILES: dict[str, LossyProfile] = {
    row.name: row
    for row in (
        LossyProfile(
            "int8",
            Limits(min_cosine=0.98, max_kl=0.03, max_rms=0.2),
            Limits(max_rms=1e-3),
            Limits(min_cosine=0.998, max_rms=0.045),
            "Dynamic int8 of a Llama, a T5 and the trained addition decoder: segments lost 2.0 to 2.6% of a row's RMS, "
            "outputs at most 5.3% (KL 0.0044), norms in float32 1e-7. A scale that is 1.5 times too large, the weights "
            "of another layer, or a skipped norm lost 6% or more in a segment. The limit for norms is float16's.",
        ),
        LossyProfile(
            "int4",
            Limits(min_cosine=0.85, max_kl=0.2, max_rms=0.6),
            Limits(max_rms=1e-3),
            Limits(min_cosine=0.985, max_rms=0.17),
            "MatMulNBits in blocks of 32 of a Llama, a Qwen3, a T5 and the addition decoder: segments lost 9 to 12.4%, "
            "outputs at most 26% (KL 0.048). A scale that is 3 times too large, or the weights of another layer, lost "
            "32% or more, a skipped norm 23% or more, except for one in T5 that lost 14.4% and passes. A scale of one "
            "query projection that is 1.5 times too large lost 8.9 to 16%, which cannot be told from int4 itself.",
        ),
        LossyProfile(
            "fp16",
            Limits(min_cosine=0.9999, max_kl=1e-4, max_rms=0.01),
            Limits(max_rms=1e-3),
            Limits(min_cosine=0.99999, max_rms=2e-3),
            "Exports in float16 of a Llama, a T5 and the addition decoder: segments lost 0.05 to 0.09%, outputs "
            "at most 0.15% (KL 8e-6), norms 0.04%. The faults of int8 lost 5.9% or more in a segment.",
        ),
        LossyProfile(
            "bf16",
            Limits(min_cosine=0.995, max_kl=5e-3, max_rms=0.08),
            Limits(max_rms=1e-2),
            Limits(min_cosine=0.9997, max_rms=0.02),
            "The same models in bfloat16 in PyTorch: segments lost 0.4 to 0.9%, outputs at most 3%, norms 0.44%. A "
            "wrong scale or the weights of another layer lost 5.9% or more in a segment.",
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
