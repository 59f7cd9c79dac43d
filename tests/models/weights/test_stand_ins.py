"""A model runs without reading its large weights, and what is compared then is the same twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rmsnorm_deploy.models.weights import stand_ins
from rmsnorm_deploy.models.weights.checkpoint import stored_tensors
from rmsnorm_deploy.models.weights.side_file import SideFile
from rmsnorm_deploy.models.weights.stand_ins import unread_bytes, unread_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 200)
        self.down = nn.Linear(200, 64, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 64, 64))
        self.small = nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        each = torch.bmm(x.expand(3, *x.shape[1:]), self.experts)
        return self.small(each.sum(0))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    torch.manual_seed(0)
    made = Model().eval()
    save_file(made.state_dict(), tmp_path / "m.safetensors")
    made.load_state_dict(stored_tensors([tmp_path / "m.safetensors"]), assign=True)
    monkeypatch.setattr(stand_ins, "_SMALL", 3000)
    monkeypatch.setattr(stand_ins, "_READ", 10_000)
    return made


IDS = torch.tensor([[1, 5, 7, 2]])


def run(model: nn.Module) -> Tensor:
    with torch.no_grad(), unread_weights(model):
        result: Tensor = model(IDS)
    return result


def test_large_products_have_other_values_and_the_same_twice(model: Model) -> None:
    with torch.no_grad():
        own = model(IDS)
    one, other = run(model), run(model)
    assert torch.equal(one, other)
    assert one.shape == own.shape
    assert not torch.allclose(one, own)
    assert one.isfinite().all()


@pytest.mark.parametrize("name", ["up", "down", "experts"])
def test_large_weights_are_not_read(model: Model, name: str) -> None:
    before = run(model)
    parameter = getattr(model, name) if name == "experts" else getattr(model, name).weight
    with torch.no_grad():
        parameter.fill_(torch.nan)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("name", ["table.weight", "up.bias", "small.weight", "small.bias"])
def test_other_weights_are_read(model: Model, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).fill_(torch.nan)
    assert run(model).isnan().any()


def test_computed_weights_in_a_side_file_are_not_read_either(model: Model, tmp_path: Path) -> None:
    side = SideFile(tmp_path)
    for layer in (model.up, model.down):
        layer.weight = nn.Parameter(side.add(layer.weight.detach() + 1))
    before = run(model)
    with torch.no_grad():
        model.up.weight.fill_(torch.nan)
    assert torch.equal(run(model), before)


def test_each_element_of_the_input_counts(model: Model) -> None:
    mode = unread_weights(model)
    x = torch.randn(2, 64)
    with torch.no_grad(), mode:
        before = model.up(x)
        for place in range(64):
            changed = x.clone()
            changed[1, place] += 1.0
            after = model.up(changed)
            assert torch.equal(after[0], before[0])
            assert (after[1] != before[1]).float().mean() > 0.9


def test_two_weights_of_one_shape_differ(model: Model) -> None:
    x = torch.randn(1, 64).expand(3, 1, 64)
    with torch.no_grad(), unread_weights(model):
        each = torch.bmm(x, model.experts)
    assert not torch.allclose(each[0], each[1])
    assert not torch.allclose(each[1], each[2])


def test_a_product_in_another_layout_is_the_same(model: Model) -> None:
    """A graph may have the transposition as a node of its own."""
    x, weight = torch.randn(5, 64), model.up.weight
    with torch.no_grad(), unread_weights(model):
        assert torch.equal(torch.mm(x, weight.t()), nn.functional.linear(x, weight))
        assert torch.equal(torch.addmm(model.up.bias, x, weight.t()), model.up(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_values_stay_in_range_through_many_layers(tmp_path: Path, dtype: torch.dtype, model: Model) -> None:
    save_file({str(number): torch.zeros(64, 64, dtype=dtype) for number in range(80)}, tmp_path / "deep.safetensors")
    weights = stored_tensors([tmp_path / "deep.safetensors"])
    x = torch.randn(3, 64).to(dtype)
    with unread_weights(model):
        for weight in weights.values():
            x = x + nn.functional.rms_norm(x, (64,)) @ weight
    assert 1.0 < float(x.float().square().mean().sqrt()) < 500.0


def test_a_model_whose_weights_are_small_or_in_memory_is_run_as_it_is(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unread_bytes(model) == 4 * (200 * 64 * 2 + 3 * 64 * 64 + 50 * 64)
    assert unread_bytes(Model()) == 0
    monkeypatch.setattr(stand_ins, "_READ", 10 << 20)
    assert unread_bytes(model) == 0
    with torch.no_grad():
        assert torch.equal(run(model), model(IDS))
