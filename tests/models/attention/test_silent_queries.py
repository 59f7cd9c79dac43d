"""Queries that attend to nothing: whether a model reads their results, and files of one that does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rmsnorm_deploy import export_model
from rmsnorm_deploy.models.attention.silent_queries import reads_silent_queries
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.models.families import build

IDS = torch.tensor([[5, 17, 40, 8, 33], [9, 12, 6, 7, 44]])


def run_of(model):
    return lambda feeds: model(**feeds)


def feeds(**more):
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **more}


def with_recurrence(name="llama"):
    """A decoder whose last layer is followed by a sum over all tokens before, padding among them."""
    model = build(name)

    class Sums(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x + 0.1 * x.cumsum(1))

    model.model.norm = Sums(model.model.norm)
    return model


def test_where_attention_alone_mixes_tokens_nothing_reads_them():
    assert not reads_silent_queries(build("llama"), run_of(build("llama")), feeds())


def test_a_sum_over_tokens_reads_them():
    model = with_recurrence()
    assert reads_silent_queries(model, run_of(model), feeds())


@pytest.mark.parametrize("given", [{"input_ids": IDS}, feeds(attention_mask=torch.ones(2, 3, dtype=torch.int64))])
def test_without_a_mask_of_several_tokens_there_is_no_padding(given):
    model = with_recurrence()
    assert not reads_silent_queries(model, lambda _: model(input_ids=IDS), given)


def test_a_file_of_a_model_that_reads_them_gives_its_results_for_padded_inputs(tmp_path):
    model = with_recurrence()
    export_model(model, tmp_path / "out", target="standard")
    assert all("reason" not in row for row in json.loads((tmp_path / "out" / "manifest.json").read_text())["attention"])
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": IDS, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        wanted = model(**given).logits.numpy()
    with OrtRunner(tmp_path / "out" / "model.onnx") as runner:
        names = {info.name for info in runner.inputs()}
        got = runner.run({name: tensor.numpy() for name, tensor in given.items() if name in names})["logits"]
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_zeros_are_what_torch_gives():
    query, shown = torch.randn(1, 2, 3, 4), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    shown[:, :, 0] = False
    assert not F.scaled_dot_product_attention(query, query, query, attn_mask=shown)[:, :, 0].any()
