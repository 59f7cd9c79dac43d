"""Outlier channels in weights: what is changed, by how much, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.outliers import apply_recorded, inject_outliers, parse_outliers
from tests.helpers.models.families import build
from tests.helpers.models.small_models import Residual, WithoutNorm


class Tiny(nn.Module):
    """An embedding and a norm of its width; another embedding and another norm are narrower."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.embed = nn.Embedding(11, 16)
        self.kinds = nn.Embedding(3, 8)
        self.norms = nn.ModuleList([nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(8, eps=1e-6)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)]


@pytest.mark.parametrize(
    ("text", "wanted"), [("4x50", (4, 50.0)), ("1x2.5", (1, 2.5)), (" 16X1e3 ", (16, 1000.0)), ("2x10.", (2, 10.0))]
)
def test_the_text_is_channels_by_factor(text: str, wanted: tuple[int, float]) -> None:
    assert parse_outliers(text) == wanted


@pytest.mark.parametrize("text", ["", "4", "x50", "0x50", "4x", "4by50", "4x-50", "-4x50", "4x50x2", "4xinf", "4.5x50"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="such as 4x50"):
        parse_outliers(text)


def test_only_the_chosen_channels_of_the_hidden_size_change() -> None:
    model = Tiny()
    before = state(model)
    report = inject_outliers(model, 3, 64.0, seed=5)
    assert changed(before, model) == ["embed.weight", "norms.0.weight", "norms.1.weight"]
    chosen = list(report.indices)
    assert len(set(chosen)) == 3
    assert chosen == sorted(chosen)
    others = [index for index in range(16) if index not in chosen]
    # 64 and sqrt(64) are powers of two: nothing is rounded
    assert torch.equal(model.embed.weight[:, chosen], before["embed.weight"][:, chosen] * 64)
    assert torch.equal(model.embed.weight[:, others], before["embed.weight"][:, others])
    for index in (0, 1):
        assert torch.equal(model.norms[index].weight[chosen], before[f"norms.{index}.weight"][chosen] / 8)
        assert torch.equal(model.norms[index].weight[others], before[f"norms.{index}.weight"][others])
    assert report.to_dict() == {
        "channels": 3, "factor": 64.0, "seed": 5, "width": 16, "indices": chosen,
        "embeddings": ["embed"], "norms": ["norms.0", "norms.1"],
    }  # fmt: skip


def test_the_seed_chooses_the_channels() -> None:
    first, again, other = (inject_outliers(Tiny(), 4, 50.0, seed).indices for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_one_plus_weight_is_divided_as_a_whole() -> None:
    model = build("gemma2")
    before = state(model)
    report = inject_outliers(model, 2, 100.0, seed=0)
    assert len(report.norms) == 9
    for path in report.norms:
        old, new = (
            before[f"{path}.weight"][list(report.indices)],
            model.get_submodule(path).weight[list(report.indices)],
        )
        torch.testing.assert_close(1 + new, (1 + old) / 10, rtol=1e-5, atol=1e-7)
    # Gemma's embedding is a subclass that scales; its output head is tied to it
    assert report.embeddings == ("model.embed_tokens",)


def test_norms_of_heads_are_left_alone() -> None:
    model = build("qwen3")
    report = inject_outliers(model, 2, 50.0, seed=0)
    assert report.width == 32
    assert len(report.norms) == 5
    assert not any("q_norm" in path or "k_norm" in path for path in report.norms)


def test_a_shared_tensor_is_changed_once() -> None:
    model = build("t5")
    before = state(model)
    report = inject_outliers(model, 1, 16.0, seed=0)
    (channel,) = report.indices
    shared = model.get_submodule("shared").weight
    assert torch.equal(shared[:, channel], before["shared.weight"][:, channel] * 16)
    assert shared is model.get_submodule("encoder.embed_tokens").weight
    double = Tiny()
    double.norms[1].weight = double.norms[0].weight
    old = double.norms[0].weight.detach().clone()
    (channel,) = inject_outliers(double, 1, 16.0, seed=0).indices
    assert double.norms[0].weight[channel] == old[channel] / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model = Tiny().to(dtype)
    inject_outliers(model, 2, 50.0, seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_an_overflow_is_refused_before_anything_changes() -> None:
    model = Tiny().half()
    before = state(model)
    with pytest.raises(UsageError, match=r"embed\.weight: a factor of 100000 takes 1\.5 beyond .* float16"):
        inject_outliers(model, 16, 1e5, seed=0)
    assert changed(before, model) == []


@pytest.mark.parametrize(
    ("channels", "factor", "message"),
    [
        (0, 50.0, "expected 1 to 16, the hidden size, got 0"),
        (17, 50.0, "expected 1 to 16, the hidden size, got 17"),
        (2, 1.0, "above 1"),
        (2, float("nan"), "above 1"),
        (2, float("inf"), "above 1"),
    ],
)
def test_arguments_out_of_range_are_refused(channels: int, factor: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inject_outliers(Tiny(), channels, factor, seed=0)


def test_models_without_a_residual_stream_are_refused() -> None:
    with pytest.raises(UsageError, match="no recognized norm with a weight"):
        inject_outliers(WithoutNorm(), 2, 50.0, seed=0)
    with pytest.raises(UsageError, match="no embedding of its hidden size 16"):
        inject_outliers(Residual(), 2, 50.0, seed=0)
    meta = Tiny()
    meta.embed = meta.embed.to("meta")
    with pytest.raises(UsageError, match=r"embed\.weight is on the meta device"):
        inject_outliers(meta, 2, 50.0, seed=0)


def test_what_was_recorded_is_applied_alike() -> None:
    model = Tiny()
    original, other = copy.deepcopy(model), copy.deepcopy(model)
    record = inject_outliers(model, 4, 50.0, seed=3).record()
    assert record == {"outliers": {"channels": 4, "factor": 50.0, "seed": 3}}
    assert apply_recorded(other, {"target": "ort", **record}) is True
    assert changed(state(model), other) == []
    assert apply_recorded(original, {"target": "ort"}) is False
    assert changed(state(Tiny()), original) == []


@pytest.mark.parametrize("record", [7, "4x50", {"channels": 4}, {"channels": "few", "factor": 50, "seed": 0}])
def test_a_damaged_record_is_refused(record: Any) -> None:
    with pytest.raises(UsageError, match="expected channels, factor and seed"):
        apply_recorded(Tiny(), {"outliers": record})
