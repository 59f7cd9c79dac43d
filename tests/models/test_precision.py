"""Models that mix dtypes: their own dtype, and conversions that keep what the model keeps in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from rmsnorm_deploy.models.loading import load_model
from rmsnorm_deploy.models.precision import convert, converted, model_dtype, saved_elements
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from tests.helpers.models.families import build

HALF, FLOAT, BRAIN = torch.float16, torch.float32, torch.bfloat16


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}


def deepseek() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.DeepseekV3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, n_group=2,
            topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        )  # fmt: skip
        return transformers.DeepseekV3ForCausalLM(config).eval()


class FloatNorms(nn.Module):
    """A half model whose first parameter is a float32 norm."""

    def __init__(self, dtype: torch.dtype = BRAIN) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.linear = nn.Linear(8, 8, dtype=dtype)
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("table", torch.ones(8, dtype=torch.complex64), persistent=False)


def test_the_dtype_of_a_model_is_that_of_most_elements() -> None:
    model = FloatNorms()
    assert next(model.parameters()).dtype == FLOAT
    assert model_dtype(model) == BRAIN
    assert saved_elements(model) == {"bfloat16": 72, "float32": 16}
    assert model_dtype(nn.Sequential(nn.ReLU())) is None
    assert find_norms(nn.Sequential(FloatNorms(), NoWeight())).sites[1].dtype == "bfloat16"


class NoWeight(nn.Module):
    """A norm without a weight has the dtype of the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert saved_elements(nn.Sequential(first, second)) == {"float32": 16}
    tied = converted(nn.Sequential(first, second), HALF)
    assert tied[0].weight is tied[1].weight
    assert (tied[0].weight.dtype, first.weight.dtype) == (HALF, FLOAT)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_the_wider_parts_of_a_half_model_stay(dtype: torch.dtype) -> None:
    found = dtypes(converted(FloatNorms(), dtype))
    assert found.pop("table") == torch.complex64
    assert found == {"norm.weight": FLOAT, "linear.weight": dtype, "linear.bias": dtype, "scale": FLOAT}


def test_a_conversion_that_changes_nothing_makes_no_copy() -> None:
    model = FloatNorms()
    assert converted(model, BRAIN) is model
    wide = converted(model, torch.float64)
    assert {t.dtype for t in wide.parameters()} == {torch.float64}
    assert model_dtype(model) == BRAIN


def test_every_part_of_a_float32_model_is_converted() -> None:
    found = dtypes(convert(FloatNorms(FLOAT), HALF))
    assert found.pop("table") == torch.complex64
    assert set(found.values()) == {HALF}


MODELS = {"t5": lambda: build("t5"), "llama": lambda: build("llama"), "deepseek_v3": deepseek}
# The parameters and saved buffers in float32.
WIDE = {
    ("t5", HALF): 4, ("t5", BRAIN): 0, ("llama", HALF): 0, ("llama", BRAIN): 0,
    ("deepseek_v3", HALF): 1, ("deepseek_v3", BRAIN): 1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), WIDE)
def test_a_conversion_in_memory_is_that_of_from_pretrained(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=str(dtype).removeprefix("torch.")).model
    found = converted(model, dtype)
    assert dtypes(found) == dtypes(loaded)
    for (path, a), (_, b) in zip(found.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), path
    assert sum(t.dtype == FLOAT for t in found.state_dict().values()) == WIDE[name, dtype]
    assert model_dtype(found) == dtype
    inside = converted(nn.ModuleDict({"inside": model}), dtype)
    assert dtypes(inside["inside"]) == dtypes(loaded)


def test_a_model_that_cannot_be_made_again_keeps_the_modules_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise ValueError("the config is incomplete")

    model = build("t5")
    monkeypatch.setattr(type(model), "_from_config", failing)
    found = converted(model, HALF)
    wide = {name for name, t in found.named_parameters() if t.dtype == FLOAT}
    assert wide == {name for name, _ in model.named_parameters() if ".wo." in name}
