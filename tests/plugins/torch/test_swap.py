"""A model whose norms call the operators is the same model: keys, parameters, bits; and it can be restored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmsnorm_deploy
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.plugins.torch.operators import rms_norm
from rmsnorm_deploy.plugins.torch.swap import use_kernel
from tests.helpers.norms.norm_zoo import ZOO

IDS = torch.arange(14).reshape(2, 7)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def qwen3(request: pytest.FixtureRequest) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'rmsnorm-deploy[hf]'")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval().to(request.param)
    with torch.no_grad():
        for site in find_norms(model).sites:
            model.get_parameter(site.parameters[0]).uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def test_qwen3_stays_the_same_model(qwen3: nn.Module) -> None:
    before, parameters, keys = qwen3(IDS).logits, dict(qwen3.named_parameters()), list(qwen3.state_dict())
    classes = [type(module) for module in qwen3.modules()]
    called: list[str] = []
    with use_kernel(qwen3) as swap:
        assert [len(swap.swapped), len(swap.kept)] == [5, 0]
        assert list(qwen3.state_dict()) == keys
        assert all(parameters[name] is tensor for name, tensor in qwen3.named_parameters())
        assert all(isinstance(module, own) for module, own in zip(qwen3.modules(), classes, strict=True))
        with torch.profiler.profile() as profile:
            assert torch.equal(qwen3(IDS).logits, before)
        called += [event.key for event in profile.key_averages() if event.key == "rmsnorm_deploy::rms_norm"]
        assert torch.equal(copy.deepcopy(qwen3)(IDS).logits, before)
    assert called == ["rmsnorm_deploy::rms_norm"]
    assert [type(module) for module in qwen3.modules()] == classes
    assert torch.equal(qwen3(IDS).logits, before)


@torch.no_grad()
def test_qwen3_compiles_to_one_graph(qwen3: nn.Module) -> None:
    before = qwen3(IDS).logits
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    swap = use_kernel(qwen3)
    torch.compiler.reset()
    assert torch.equal(torch.compile(qwen3, fullgraph=True, backend=keep)(IDS).logits, before)
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if "rmsnorm_deploy.rms_norm" in str(node.target)]
    assert len(nodes) == len(swap.swapped) == 5
    torch.compiler.reset()


def test_a_swapped_model_is_recognized_as_before(qwen3: nn.Module) -> None:
    swap = use_kernel(qwen3)
    assert [site.spec for site in find_norms(qwen3).sites] == [site.spec for site in swap.swapped]
    again = use_kernel(qwen3)
    assert {refusal.reason for refusal in again.kept} == {"it calls the kernel already"}
    assert again.swapped == []
    swap.undo()
    swap.undo()
    assert len(use_kernel(qwen3).swapped) == 5


def test_a_swapped_model_can_be_exported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.RMSNorm(8, 1e-6), nn.Linear(8, 8)).eval()
    use_kernel(model)
    exported = rmsnorm_deploy.export_model(
        model, tmp_path / "out", target="standard", inputs={"input": torch.ones(2, 8)}
    )
    assert [site.path for site in exported.recognition.sites] == ["0"]


def test_what_the_kernel_does_not_have_stays() -> None:
    model = nn.ModuleDict({
        "bias": ZOO["biased"].build(), "dims": nn.RMSNorm((4, 8), 1e-6), "layer": nn.LayerNorm(8),
        "plain": nn.RMSNorm(8, 1e-6),
    })  # fmt: skip
    swap = use_kernel(model)
    assert [site.path for site in swap.swapped] == ["plain"]
    reasons = {refusal.path: refusal.reason for refusal in swap.kept}
    assert list(reasons) == ["layer", "bias", "dims"]
    for path, part in {"bias": "it has a bias", "dims": "last 2 dims", "layer": "LayerNorm"}.items():
        assert part in reasons[path]
    assert str(swap).splitlines()[0] == "norms that call the kernel: 1; left as they are: 3"
    assert [row["path"] for row in swap.to_dict()["swapped"]] == ["plain"]
    assert type(model["bias"]) is type(ZOO["biased"].build())


class Optional(nn.RMSNorm):
    def forward(self, x: Tensor, *, factor: float | None = None) -> Tensor:
        y = super().forward(x)
        return y if factor is None else y * factor


@torch.no_grad()
def test_calls_with_more_arguments_run_the_own_forward() -> None:
    norm, x = Optional(8, 1e-6), torch.randn(3, 8)
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, given, result: seen.append(result))
    wanted = [norm(x), norm(x=x), norm(x, factor=3.0)]
    assert [site.path for site in rmsnorm_deploy.use_kernel(norm).swapped] == [""]
    found = [norm(x), norm(x=x), norm(x, factor=3.0)]
    assert all(map(torch.equal, found, wanted))
    assert len(seen) == 6


# A gate after the norm, and one before a norm in groups.
GATED: dict[str, dict[str, Any]] = {
    "Qwen3Next": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "linear_key_head_dim": 8,
        "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 2,
        "num_experts_per_tok": 1, "shared_expert_intermediate_size": 16,
    },
    "Mamba2": {
        "num_hidden_layers": 1, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "count", "gated"), [
    ("Qwen3Next", 8, {"model.layers.0.linear_attn.norm": ("after", None)}),
    ("Mamba2", 3, {"backbone.layers.0.mixer.norm": ("before", 32)}),
])  # fmt: skip
@torch.no_grad()
def test_gated_norms_call_the_operator(name: str, count: int, gated: dict[str, tuple[str, int | None]]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'rmsnorm-deploy[hf]'")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=64, hidden_size=32, use_cache=False, **GATED[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for path, parameter in model.named_parameters():
        if "norm" in path:
            parameter.uniform_(0.5, 1.5)
    before = [copy.deepcopy(model).to(dtype)(IDS).logits for dtype in (torch.float32, torch.bfloat16)]
    swap = use_kernel(model)
    with torch.profiler.profile() as profile:
        found = model(IDS).logits
    assert all(map(torch.equal, before, (found, model.bfloat16()(IDS).logits)))
    assert [len(swap.swapped), len(swap.kept)] == [count, 0]
    assert {site.path: (site.spec.gate, site.spec.group_size) for site in swap.swapped if site.spec.has_gate} == gated
    assert [event.count for event in profile.key_averages() if event.key == "rmsnorm_deploy::rms_norm"] == [count]


@torch.no_grad()
def test_a_gate_may_be_given_by_name_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, z = ZOO["mamba2"].build(), torch.randn(3, 64), torch.randn(3, 64)
    calls: list[dict[str, Any]] = [
        {"gate": z}, {"gate": None}, {}, {"gate": z[:1]},  # one gate for all rows
    ]  # fmt: skip

    def results() -> list[Tensor]:
        return [norm(x, z), norm(x, None), norm(gate=z, hidden_states=x), *(norm(x, **given) for given in calls)]

    wanted, gates = results(), []

    def counted(*arguments: Any, **form: Any) -> Tensor:
        gates.append(arguments[3])
        return rms_norm(*arguments, **form)

    monkeypatch.setattr("rmsnorm_deploy.plugins.torch.swap.rms_norm", counted)
    assert [site.spec.gate for site in use_kernel(norm).swapped] == ["before"]
    assert all(map(torch.equal, results(), wanted))
    assert [gate is z for gate in gates] == [True] * 3
