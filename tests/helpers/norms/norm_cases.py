"""One norm of the zoo in one dtype, ready to be lowered and run, and how near the truth it must come."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.lowering.norm_writer import LoweredSite
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract

from ..graphs.capture_graph import DATA_TYPES, GraphMaker, norm_model, run
from ..norms.norm_zoo import CAST_FIRST, FLOAT64_EPS, ZOO

FLOAT32, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


class Case:
    """One norm of the zoo in one dtype: its inputs, what the module makes of them, and the truth."""

    def __init__(self, name: str, dtype: torch.dtype, rows: int = 27) -> None:
        norm = ZOO[name]
        self.norm, self.dtype = norm, dtype
        widened = dtype == torch.float64 and norm.float64 == "eps"
        self.spec = norm.spec.replace(eps=FLOAT64_EPS) if widened else norm.spec
        self.module = norm.build(dtype)
        generator = torch.Generator().manual_seed(3)
        x, gate = torch.randn(2, rows // 3, 3, *norm.tail, generator=generator, dtype=torch.float64) * 2
        self.x, self.gate = x.to(dtype), gate.to(dtype) if norm.gated else None
        self.weight, self.bias = norm.tensors(self.module)
        self.model = norm_model(norm, self.module, dtype, spec=self.spec)

    @property
    def feeds(self) -> dict[str, Tensor]:
        return {"x": self.x} if self.gate is None else {"x": self.x, "gate": self.gate}

    def own(self) -> NDArray[Any]:
        """The module's own result."""
        with torch.no_grad():
            return self.module(*self.feeds.values()).numpy()

    def of_order(self, order: str) -> NDArray[Any]:
        """The result of the same norm with another order of casts."""
        return eager(self.spec.replace(order=order), self.x, self.weight, self.bias, self.gate).numpy()

    def expected(self, spec: NormSpec | None = None) -> NDArray[np.float64]:
        tensors = (self.x, self.weight, self.bias, self.gate)
        return reference(spec or self.spec, *(None if t is None else t.double().numpy() for t in tensors))

    def run(self, target: str) -> tuple[NDArray[Any], LoweredSite]:
        lowered, (site,) = lower(self.model, target)
        (result,) = run(lowered, self.feeds)
        return result, site


@cache
def case(name: str, dtype: torch.dtype) -> Case:
    return Case(name, dtype)


CASES = [(name, target) for name in ZOO for target in TARGETS]


# ONNX Runtime adds the squares of a row in plain order, PyTorch in a cascade: for up to 1000 elements of one sign that
# is at most 2 ULP after the root; root, quotient and the product with the scale add half an ULP each, a bias another.
FLOAT32_ULP = 4.0
# Its sigmoid is a rational approximation, good to 1e-7 of 1 and not to the last bit of a small value: where a small
# group has large negative gates, that is 16 ULP of the row after the norm has blown the group up.
FLOAT32_GATED_ULP = 32.0


def float32_bound(spec: NormSpec) -> float:
    return FLOAT32_ULP if spec.gate == "none" else FLOAT32_GATED_ULP


def main_node(model: ir.Model, site: LoweredSite) -> ir.Node:
    (node,) = [node for node in model.graph if node.name == site.node]
    return node


def plugin_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == contract.DOMAIN]


def residual_model(
    dtype: ir.DataType, spec: NormSpec = CAST_FIRST, dims: tuple[Any, ...] = ("batch", "sequence", 64),
    residual_dims: tuple[Any, ...] | None = None, *, keep_sum: bool = True,
) -> ir.Model:  # fmt: skip
    """`sum = x + residual; y = norm(sum); z = -sum`."""
    maker = GraphMaker(dtype)
    x, residual = maker.input("x", dims), maker.input("residual", residual_dims or dims)
    total = maker.node("Add", [x, residual], "sum", dims)
    torch_dtype = next(key for key, value in DATA_TYPES.items() if value == dtype)
    weight = maker.initializer("weight", torch.linspace(0.5, 1.5, 64).to(torch_dtype))
    y = maker.norm(spec, [total, weight], "y", dims)
    z = maker.node("Neg", [total], "z", dims)
    return maker.model([y, total, z] if keep_sum else [y, z])


def residual_feeds(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(2, 5, 64, generator=generator).to(dtype) for name in ("x", "residual")}
