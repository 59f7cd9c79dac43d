"""Named limits for quantized and converted files: the table, and explicit limits over a profile."""

from __future__ import annotations

import pytest

from rmsnorm_deploy.runtime.accuracy.lossy import PROFILES, LossyProfile, limits_with
from rmsnorm_deploy.runtime.accuracy.tolerances import EVERY_OUTPUT, NORMS, SEGMENTS, Limits, limits_of


def test_the_profiles() -> None:
    assert list(PROFILES) == ["int8", "int4", "fp16", "bf16"]
    assert all(name == row.name for name, row in PROFILES.items())


@pytest.mark.parametrize("row", PROFILES.values(), ids=PROFILES.keys())
def test_a_profile_limits_outputs_norms_and_segments_and_says_why(row: LossyProfile) -> None:
    assert row.outputs.min_cosine is not None
    for limits in (row.outputs, row.norms, row.segments):
        assert limits.max_rms is not None
        assert 0.0 < limits.max_rms < 1.0
    # A norm runs in a float dtype in every file, so it loses less than a segment of quantized weights.
    assert row.norms.max_rms < row.segments.max_rms  # type: ignore[operator]
    assert row.norms.on_logits == row.segments.on_logits == []
    assert row.reason.endswith(".")


def test_int4_may_lose_more_than_int8_and_bf16_more_than_fp16() -> None:
    for narrow, wide in (("int4", "int8"), ("bf16", "fp16")):
        assert PROFILES[narrow].segments.max_rms > PROFILES[wide].segments.max_rms  # type: ignore[operator]


def test_without_a_profile_explicit_limits_are_all() -> None:
    assert limits_with(None, {"y": Limits(atol=1.0)}) == {"y": Limits(atol=1.0)}
    assert limits_with(None, {}) == {}


def test_explicit_limits_replace_single_entries() -> None:
    row = PROFILES["int8"]
    found = limits_with("int8", {EVERY_OUTPUT: Limits(min_cosine=0.5), SEGMENTS: Limits(max_rms=0.9)})
    assert found[EVERY_OUTPUT] == Limits(min_cosine=0.5).over(row.outputs)
    assert (found[EVERY_OUTPUT].min_cosine, found[EVERY_OUTPUT].max_kl) == (0.5, row.outputs.max_kl)
    assert found[SEGMENTS].max_rms == 0.9
    assert found[NORMS] == row.norms


def test_an_output_with_limits_of_its_own_keeps_the_profiles_others() -> None:
    row = PROFILES["int8"]
    found = limits_with("int8", {"logits": Limits(atol=1.0), "hidden": Limits(atol=2.0)})
    assert found["logits"] == Limits(atol=1.0).over(row.outputs)
    assert found["hidden"] == Limits(atol=2.0).over(row.outputs.without_logits())
    assert limits_of(found, "present.0.key") == row.outputs.without_logits()
    assert limits_of(found, "lm_logits") == row.outputs
