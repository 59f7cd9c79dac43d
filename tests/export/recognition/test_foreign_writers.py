"""Norms as other tools write them: torch's two exporters, onnxslim, onnxsim, ONNX Runtime's own dumps, onnxscript."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_onnx.rewrite import rewrite
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.compare_output import judge
from rmsnorm_deploy.runtime.rewriting.verify_norms import prove_norms
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner

WIDTH = 32


class Norm(nn.Module):
    """A norm with a weight that no dtype here holds by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))


class Llama(Norm):
    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Gemma(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.weight.data -= 1

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1.0 + self.weight.float())).type_as(x)


class Olmo(Norm):
    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (self.weight * h).to(x.dtype)


class T5(Norm):
    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class Torch(nn.RMSNorm):
    def __init__(self) -> None:
        super().__init__(WIDTH, eps=1e-5)
        self.weight.data = Norm().weight.data


class Power(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)).type_as(x)


class Gated(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = self.weight * h.to(x.dtype)
        return (h * nn.functional.silu(gate.to(torch.float32))).to(x.dtype)


class Grouped(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = x.to(torch.float32) * nn.functional.silu(gate.to(torch.float32))
        groups = h.view(*h.shape[:-1], 4, WIDTH // 4)
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * groups.view(h.shape).to(x.dtype)


class Block(nn.Module):
    """Two residual blocks with norms in front, and one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Llama() for _ in range(3)])
        self.linears = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        generator = torch.Generator().manual_seed(2)
        for parameter in self.linears.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=False):
            x = x + linear(norm(x))
        return self.norms[-1](x)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "llama": Llama, "gemma": Gemma, "olmo": Olmo, "t5": T5, "power": Power, "gated": Gated, "grouped": Grouped,
    "torch": Torch, "block": Block,
}  # fmt: skip
COUNTS = {"block": 3}


def export(name: str, dtype: torch.dtype, path: Path, **options: Any) -> nn.Module:
    module = MODULES[name]().to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    names = ["x", "gate"] if name in ("gated", "grouped") else ["x"]
    inputs = tuple(torch.randn(2, 5, WIDTH, generator=generator).to(dtype) for _ in names)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        if options.get("dynamo"):
            sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
            options |= {"dynamic_shapes": tuple(sizes for _ in names), "verbose": False}
        else:
            options["dynamic_axes"] = {key: {0: "batch", 1: "length"} for key in names}
        torch.onnx.export(module, inputs, path, input_names=names, output_names=["y"], **options)
    return module


def meaning(spec: NormSpec, dtype: torch.dtype) -> tuple[Any, ...]:
    """What a graph can show of a spec; 1 + weight may have been folded in float32."""
    scale = "weight" if spec.scale == "one_plus_weight" and dtype == torch.float32 else spec.scale
    order = spec.order if dtype == torch.float16 and spec.scale != "none" else "any"
    return (round(spec.eps, 12), spec.trailing_dims, scale, order, spec.group_size, spec.gate, spec.activation)


def check(proto: onnx.ModelProto, path: Path, count: int, loads: bool = True) -> list[NormSpec]:
    """Every norm is found, written for every target, proven, and gives the file's own numbers."""
    rng = np.random.default_rng(0)
    if not loads:
        with pytest.raises(UsageError, match=r"bound to different types"):
            OrtRunner(proto.SerializeToString())
        proto = ir.to_proto(rewrite(ir.from_proto(proto), "standard").model)
    with OrtRunner(proto.SerializeToString()) as runner:
        types = {"float16": np.float16, "float32": np.float32}
        feeds = {i.name: rng.standard_normal((3, 4, WIDTH)).astype(types[i.dtype]) for i in runner.inputs()}
        (before,) = runner.run(feeds).values()
    specs: list[NormSpec] = []
    for target in TARGETS:
        result = rewrite(ir.from_proto(proto), target)
        specs = [site.before.spec for site in result.sites]
        assert len(specs) == count, target
        assert result.refusals == []
        proof = prove_norms(result, path.parent, seed=0, progress=lambda text: None)
        assert [row.reason for row in proof.sites if row.verdict != "pass"] == []
        with OrtRunner(ir.to_proto(result.model).SerializeToString()) as runner:
            (after,) = runner.run(feeds).values()
        # Several norms in a row pass each other's roundings on: the last one is measured by what one rounding makes.
        reference = before.astype(np.float64)
        own = before * (1 + np.finfo(before.dtype).eps * rng.choice([-1, 1], before.shape)).astype(before.dtype)
        verdict = judge("y", after, reference, own)
        assert verdict.passed, f"{target}: {verdict.reason}"
    return specs


DYNAMO = [(name, opset) for name in MODULES for opset in (18, 23)] + [("llama", 24), ("block", 20)]
TORCHSCRIPT = [(name, 17) for name in MODULES if name != "torch"] + [
    (name, opset) for name in ("llama", "block", "olmo") for opset in (11, 13, 14, 16, 18)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("name", "opset", "dynamo"), [(*row, True) for row in DYNAMO] + [(*row, False) for row in TORCHSCRIPT]
)
def test_torch(name: str, opset: int, dynamo: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if dynamo:
        module = export(name, dtype, path, dynamo=True, opset_version=opset, external_data=False)
    else:
        module = export(name, dtype, path, dynamo=False, opset_version=opset)
    # At opset 23 torch drops the casts around a norm that is scaled in float32, and ONNX Runtime rejects what is left.
    loads = not (dtype == torch.float16 and opset == 23 and name in ("gemma", "olmo"))
    specs = check(onnx.load(path), path, COUNTS.get(name, 1), loads)
    mixed = dtype == torch.float16 and not dynamo  # TorchScript keeps sums of float16 in float32, and drops some casts
    if not mixed:
        own = [site.spec for site in find_norms(module).sites]
        if (name, opset, dtype) == ("torch", 23, torch.float16):  # one operator, which casts first by its definition
            own = [spec.replace(order="cast_then_scale") for spec in own]
        known = [meaning(spec, dtype) for spec in own]
        assert [meaning(spec, dtype) for spec in specs] == known


def slim(path: Path) -> onnx.ModelProto:
    import onnxslim

    with contextlib.redirect_stdout(io.StringIO()):
        return onnxslim.slim(str(path))


def simplified(path: Path) -> onnx.ModelProto:
    import onnxsim

    with contextlib.redirect_stdout(io.StringIO()):
        return onnxsim.simplify(onnx.load(path))[0]


def dumped(level: str) -> Callable[[Path], onnx.ModelProto]:
    def dump(path: Path) -> onnx.ModelProto:
        out = path.with_name(f"{level}.onnx")
        options = {"graph_optimization_level": level, "optimized_model_path": str(out)}
        with OrtRunner(path, session_options=options):
            return onnx.load(out)

    return dump


def for_ort(path: Path) -> onnx.ModelProto:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    return ir.to_proto(optimize_for_ort(ir.load(str(path)))[0])


def by_transformers(path: Path) -> onnx.ModelProto:
    from onnxruntime.transformers.optimizer import optimize_model

    return optimize_model(str(path), model_type="gpt2", num_heads=4, hidden_size=WIDTH).model


TOOLS: dict[str, Callable[[Path], onnx.ModelProto]] = {
    "onnxslim": slim, "onnxsim": simplified, "basic": dumped("basic"), "extended": dumped("extended"),
    "all": dumped("all"), "optimize_for_ort": for_ort, "onnxruntime.transformers": by_transformers,
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", ["llama", "gemma", "olmo", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_optimizers(tool: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export(name, dtype, path, dynamo=False, opset_version=18)
    optimized = TOOLS[tool](path)
    check(optimized, path, COUNTS.get(name, 1))
