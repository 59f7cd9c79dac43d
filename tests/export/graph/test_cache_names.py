"""The names of a cache's tensors in exported files."""

from __future__ import annotations

import pytest

from rmsnorm_deploy.export.graph.cache_names import cache_name, is_past, is_present, past_name, present_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("past_key_values.layers.0.keys", "0.key"),
        ("past_key_values.layers.12.values", "12.value"),
        ("cache.layers.0.keys", "0.key"),
        ("cache_params.layers.3.conv_states", "3.conv_state"),
        ("past_key_values.layers.3.conv_states.0", "3.conv_state"),
        ("past_key_values.layers.3.conv_states.1", "3.conv_state.1"),
        ("past_key_values.layers.3.recurrent_states.2", "3.recurrent_state.2"),
        ("past_key_values.self_attention_cache.layers.1.keys", "1.decoder.key"),
        ("past_key_values.cross_attention_cache.layers.1.values", "1.encoder.value"),
        ("past_key_values.layers.2.indexer_keys", "2.indexer_keys"),
        ("past_key_values.layers.2.others.0", "2.others.0"),
        ("past_key_values.seen_tokens", "seen_tokens"),
    ],
)
def test_tensors_of_a_cache(path: str, name: str) -> None:
    assert cache_name(path) == name
    assert past_name(path) == f"past_key_values.{name}"
    assert present_name(path) == f"present.{name}"


@pytest.mark.parametrize("path", ["input_ids", "logits", "past_key_values", "encoder_outputs.cache.layers.0.keys"])
def test_other_values(path: str) -> None:
    assert (cache_name(path), past_name(path), present_name(path)) == (None, None, None)


@pytest.mark.parametrize(("rest", "changes"), [("0.key", True), ("0.decoder.value", True), ("0.encoder.key", False)])
def test_a_cross_attention_cache_does_not_change_in_a_step(rest: str, changes: bool) -> None:
    assert is_past(f"past_key_values.{rest}") is changes
    assert is_present(f"present.{rest}") is changes
    assert not is_past(f"present.{rest}")
    assert not is_present(f"past_key_values.{rest}")
