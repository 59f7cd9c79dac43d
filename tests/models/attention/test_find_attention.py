"""Attentions are recognized by what their functions compute, and refused with the reason."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from rmsnorm_deploy.models.attention.call import AttentionCall
from rmsnorm_deploy.models.attention.find_attention import bias_of, find_attention
from rmsnorm_deploy.models.attention.intercept import intercepted
from rmsnorm_deploy.models.attention.spec import AttentionSpec
from rmsnorm_deploy.models.calling.example_inputs import example_inputs
from tests.helpers.models.families import FAMILIES, build

HEAD = 8**-0.5
SPECS = {
    **dict.fromkeys(FAMILIES, (2, AttentionSpec(HEAD))),
    "gemma2": (2, AttentionSpec(HEAD, softcap=50.0)),
    "gpt_oss": (2, AttentionSpec(HEAD, sink=True)),
    "t5": (6, AttentionSpec(1.0)),
    "mamba2": (0, None),
}


def found_in(model):
    model.eval()
    feeds = example_inputs(model)
    return find_attention(model, lambda: model(**feeds))


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    found = found_in(build(name))
    count, spec = SPECS[name]
    assert found.refusals == []
    assert [site.spec for site in found.sites] == [spec] * count
    assert len({site.path for site in found.sites}) == count


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_implementations(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    found = found_in(model)
    assert [site.spec for site in found.sites] == [AttentionSpec(HEAD)] * 2


def eager_llama(function):
    """A Llama with this function in place of its own attention, and its attentions."""
    model = build("llama")
    model.set_attn_implementation("eager")
    with mock.patch.object(modeling_llama, "eager_attention_forward", function):
        return found_in(model)


ORIGINAL = modeling_llama.eager_attention_forward


def doubled(module, query, key, value, mask, **options):
    return ORIGINAL(module, query, key, value, mask, **{**options, "scaling": 2 * options["scaling"]})


def without_mask(module, query, key, value, mask, **options):
    return ORIGINAL(module, query, key, value, None, **options)


def other_for_one_query(module, query, key, value, mask, **options):
    result, weights = ORIGINAL(module, query, key, value, mask, **options)
    return (result * 1.01 if query.shape[2] == 1 else result), weights


def last_shape(module, query, key, value, mask, **options):
    result, weights = ORIGINAL(module, query, key, value, mask, **options)
    return result.flatten(2), weights


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (doubled, "as this model calls it, its result differs from that of scale 0.353553 by"),
        (without_mask, "its result differs"),
        (other_for_one_query, "with 1 query and 9 keys, its result differs"),
        (last_shape, "expected a result of shape (2, 9, 4, 8), got (2, 9, 32)"),
    ],
)
def test_a_function_that_computes_something_else_is_refused(function, reason):
    found = eager_llama(function)
    assert found.sites == []
    assert [refusal.class_name for refusal in found.refusals] == ["LlamaAttention"] * 2
    assert all(reason in refusal.reason for refusal in found.refusals)


def test_a_window_of_the_function_itself_is_tried_at_its_edge():
    model = build("mistral")
    from transformers.models.mistral import modeling_mistral

    def windowed(module, query, key, value, mask, **options):
        last = options["sliding_window"] + 1
        mask = None if mask is None else mask[..., -last:]
        return ORIGINAL(module, query, key[:, :, -last:], value[:, :, -last:], mask, **options)

    model.set_attn_implementation("eager")
    with mock.patch.object(modeling_mistral, "eager_attention_forward", windowed):
        found = found_in(model)
    assert found.sites == []
    assert all("with 19 keys, more than its window" in refusal.reason for refusal in found.refusals)


def test_another_implementation_is_refused_by_name():
    def own(module, query, key, value, mask, **options):
        return ORIGINAL(module, query, key, value, mask, **options)

    transformers.AttentionInterface.register("own", own)
    model = build("llama")
    model.set_attn_implementation("own")
    found = found_in(model)
    assert found.sites == []
    assert "its attention implementation is 'own'; expected sdpa or eager" in found.refusals[0].reason


def call_with(**options):
    module = torch.nn.Module()
    q = torch.randn(1, 2, 3, 4)
    return AttentionCall(module, "sdpa", lambda *_, **__: (q, None), q, q, q, options.pop("mask", None), options)


def test_a_tensor_of_unknown_meaning_is_named():
    call = call_with(indices=torch.zeros(1), scaling=0.5, position_ids=torch.zeros(1))
    assert call.unread() == ["indices"]
    assert call_with(nested={"a": [torch.zeros(1)]}, return_dict=True).unread() == ["nested"]


def test_the_bias_is_finite_in_every_dtype():
    lowest = torch.finfo(torch.float32).min
    mask = torch.tensor([[[[True, False, True]]]])
    position = torch.full((1, 1, 1, 3), -5.0)
    assert bias_of(call_with()) is None
    assert bias_of(call_with(mask=mask)).flatten().tolist() == [0.0, lowest, 0.0]
    assert bias_of(call_with(mask=mask, position_bias=position)).flatten().tolist() == [-5.0, lowest, -5.0]
    added = torch.tensor([[[[0.0, lowest, -torch.inf]]]])
    assert bias_of(call_with(mask=added, position_bias=position)).flatten().tolist() == [-5.0, lowest, lowest]


def test_the_registry_is_restored_after_an_error():
    before = ALL_ATTENTION_FUNCTIONS.get_interface

    def stopped():
        with intercepted(build("llama"), lambda call: call.original()):
            assert ALL_ATTENTION_FUNCTIONS.get_interface != before
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert ALL_ATTENTION_FUNCTIONS.get_interface == before
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
