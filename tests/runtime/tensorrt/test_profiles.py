"""Optimization profiles: ranges that follow from names, and what is refused."""

from __future__ import annotations

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.tensorrt.network import InputDims
from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions
from rmsnorm_deploy.runtime.tensorrt.profiles import DEFAULT_BATCH, DEFAULT_LONGEST, make_profiles

TOKENS = [InputDims("input_ids", ("batch", "sequence")), InputDims("attention_mask", ("batch", "sequence"))]
DECODER = [
    InputDims("input_ids", ("batch", "sequence")),
    InputDims("attention_mask", ("batch", "total_sequence")),
    InputDims("past_key_values.0.key", ("batch", 2, "past_sequence", 8)),
    InputDims("past_key_values.0.value", ("batch", 2, "past_sequence", 8)),
]


def test_the_shape_of_one_input_gives_those_of_all() -> None:
    (profile,) = make_profiles(TOKENS, ["input_ids:1x1,4x512,16x4096"])
    assert dict(profile.shapes) == dict.fromkeys(("input_ids", "attention_mask"), ((1, 1), (4, 512), (16, 4096)))


def test_the_cache_follows_from_the_tokens() -> None:
    (profile,) = make_profiles(DECODER, ["input_ids:1x1,2x4,4x16 past_sequence:0,128,1000"])
    assert profile.shapes["past_key_values.0.key"] == ((1, 2, 0, 8), (2, 2, 128, 8), (4, 2, 1000, 8))
    assert profile.shapes["attention_mask"] == ((1, 1), (2, 132), (4, 1016))


def test_a_cache_that_nobody_gives_reaches_the_models_end() -> None:
    (profile,) = make_profiles(DECODER, ["input_ids:1x1,1x1,1x1"], longest=256)
    assert profile.shapes["past_key_values.0.key"][2] == (1, 2, 255, 8)
    assert profile.shapes["attention_mask"][2] == (1, 256)


@pytest.mark.parametrize(("longest", "most"), [(None, DEFAULT_LONGEST), (128, 128), (131072, DEFAULT_LONGEST)])
def test_without_a_profile_the_models_limit_counts(longest: int | None, most: int) -> None:
    (profile,) = make_profiles(TOKENS, longest=longest)
    assert profile.shapes["input_ids"] == ((1, 1), (1, 128), (DEFAULT_BATCH, most))


def test_a_decoder_gets_a_profile_for_the_prompt_and_one_for_steps() -> None:
    prompt, step = make_profiles(DECODER, longest=64)
    assert prompt.shapes["past_key_values.0.key"] == ((1, 2, 0, 8), (1, 2, 0, 8), (DEFAULT_BATCH, 2, 0, 8))
    assert prompt.shapes["attention_mask"] == prompt.shapes["input_ids"] == ((1, 1), (1, 64), (DEFAULT_BATCH, 64))
    assert step.shapes["input_ids"] == ((1, 1), (1, 1), (DEFAULT_BATCH, 1))
    assert step.shapes["past_key_values.0.key"] == ((1, 2, 0, 8), (1, 2, 63, 8), (DEFAULT_BATCH, 2, 63, 8))
    assert step.shapes["attention_mask"] == ((1, 1), (1, 64), (DEFAULT_BATCH, 64))


def test_the_decoder_of_an_encoder_decoder_decodes() -> None:
    """The encoder's tokens are not the new ones of a step."""
    inputs = [
        InputDims("attention_mask", ("batch", "encoder_sequence")),
        InputDims("decoder_input_ids", ("batch", "decoder_sequence")),
        InputDims("past_key_values.0.decoder.key", ("batch", 4, "past_sequence", 8)),
        InputDims("past_key_values.0.encoder.key", ("batch", 4, "encoder_sequence", 8)),
    ]
    prompt, step = (profile.shapes for profile in make_profiles(inputs, longest=512))
    assert prompt["decoder_input_ids"] == ((1, 1), (1, 128), (8, 512))
    assert prompt["past_key_values.0.decoder.key"] == ((1, 4, 0, 8), (1, 4, 0, 8), (8, 4, 0, 8))
    assert step["decoder_input_ids"] == ((1, 1), (1, 1), (8, 1))
    assert step["past_key_values.0.decoder.key"] == ((1, 4, 0, 8), (1, 4, 128, 8), (8, 4, 511, 8))
    for shapes in (prompt, step):
        assert shapes["attention_mask"] == ((1, 1), (1, 128), (8, 512))
        assert shapes["past_key_values.0.encoder.key"] == ((1, 4, 1, 8), (1, 4, 128, 8), (8, 4, 512, 8))


def test_several_texts_are_several_profiles() -> None:
    found = make_profiles(TOKENS, ["batch:1,1,1 sequence:1,2,3", "input_ids:4x5,4x6,4x7"])
    assert [profile.shapes["input_ids"] for profile in found] == [((1, 1), (1, 2), (1, 3)), ((4, 5), (4, 6), (4, 7))]


def test_names_of_other_exporters() -> None:
    inputs = [
        InputDims("ids", ("batch_size", "sequence_length")),
        InputDims("mask", ("batch_size", "past_sequence_length + sequence_length")),
        InputDims("past", ("batch_size", 4, "past_sequence_length", 16)),
    ]
    (profile,) = make_profiles(inputs, ["ids:1x1,1x2,1x3;past_sequence_length:0,10,20"])
    assert profile.shapes["mask"] == ((1, 1), (1, 12), (1, 23))


def test_fixed_dims_have_no_profile() -> None:
    assert make_profiles([InputDims("x", (2, 3))]) == []
    with pytest.raises(UsageError, match="every dim of the model is fixed"):
        make_profiles([InputDims("x", (2, 3))], ["x:2x3,2x3,2x3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input_idz:1x1,1x2,1x3", "no input or dim 'input_idz'; its inputs are input_ids, attention_mask"),
        ("input_ids:1,2,3", "input_ids has 2 dims .batch x sequence., got 1"),
        ("input_ids:1x1,1x2", "expected NAME:SMALLEST,USUAL,LARGEST"),
        ("input_ids:1x1,1x2,1xn", "expected numbers separated by x"),
        ("input_ids:1x4,1x2,1x8", "expected smallest <= usual <= largest"),
        ("input_ids:1x1,1x2,1x4 attention_mask:1x1,1x2,1x8", "sequence is both 1,2,4 and 1,2,8"),
        ("", "got nothing"),
        ("sequence:1x1,2x2,3x3", "sequence is one dim"),
    ],
)
def test_wrong_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_profiles(TOKENS, [text])


def test_a_whole_length_below_past_and_new_is_refused() -> None:
    text = "input_ids:1x1,1x1,1x16 past_sequence:0,10,100 total_sequence:1,11,100"
    with pytest.raises(UsageError, match=r"total_sequence: .* of past_sequence .* = 1,11,116, .*, got 1,11,100"):
        make_profiles(DECODER, [text])


def test_fixed_dims_hold_in_a_text() -> None:
    with pytest.raises(UsageError, match="dim 1 is fixed at 2"):
        make_profiles(DECODER, ["past_key_values.0.key:1x3x0x8,1x3x1x8,1x3x2x8"])


def test_positions_end_where_the_model_says() -> None:
    with pytest.raises(UsageError, match="expected at most the model's 512 positions, got 4096"):
        make_profiles(TOKENS, ["input_ids:1x1,1x1,1x4096"], longest=512)


def test_a_dim_without_a_name_is_refused() -> None:
    with pytest.raises(UsageError, match="input x: dim 0 has neither a size nor a name"):
        make_profiles([InputDims("x", (None, 4))])


def test_options_take_one_or_several_and_architectures_in_any_spelling() -> None:
    options = BuildOptions(profiles="x:1,2,3", architectures=["sm_86", 89, "8.0"])  # type: ignore[arg-type]
    assert (options.profiles, options.architectures) == (("x:1,2,3",), (86, 89, 80))
    assert BuildOptions(architectures=89).architectures == (89,)  # type: ignore[arg-type]
    assert BuildOptions(profiles=["a", "b"]).profiles == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="architecture: expected a text such as sm_86, got 'hopper'"):
        BuildOptions(architectures=("hopper",))  # type: ignore[arg-type]
