"""Models that mix dtypes, exported as PyTorch runs them: their norms, the dtypes in the file, and the numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model, prepare
from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.from_torch.save import ExportResult, save
from rmsnorm_deploy.models.dtypes import onnx_name
from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.recognition.candidates import ORDERS
from rmsnorm_deploy.models.spec import NormSpec, Order, Scale
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.graphs.capture_graph import DATA_TYPES, GraphMaker, run
from tests.helpers.models.families import build

T5_TARGETS = ["ort", "standard", "primitives"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ExportResult]]:
    """A checkpoint of a small T5 in float32, and its exports in float16."""
    folder = tmp_path_factory.mktemp("t5")
    build("t5", num_layers=1).save_pretrained(folder / "model")
    results = export_model(folder / "model", folder / "out", target=T5_TARGETS, dtype="fp16")
    return folder / "model", {result.target: result for result in results}


def products(path: Path) -> Counter[str]:
    """The dtypes of the matrix products of a file by their weights."""
    graph = ir.load(path).graph
    nodes = [node for node in graph.all_nodes() if node.op_type in ("MatMul", "Gemm")]
    assert all(node.inputs[0].dtype == node.inputs[1].dtype for node in nodes if node.inputs[0].dtype is not None)
    return Counter(onnx_name(node.inputs[1].dtype) for node in nodes if node.inputs[1].dtype is not None)


@pytest.mark.parametrize("target", T5_TARGETS)
def test_t5_in_float16_keeps_wo_in_float32_and_agrees_with_pytorch(
    target: str, t5: tuple[Path, dict[str, ExportResult]]
) -> None:
    result = t5[1][target]
    manifest = result.manifest
    assert manifest["dtype"] == "float16"
    assert manifest["elements"]["float32"] == 2 * 32 * 48  # wo of the encoder and of the decoder
    # From the first float32 wo on, the norms get a float32 x, and cast it to the dtype of their weight: no spec of a
    # module covers that, so that they are found in the graph.
    assert [len(manifest["sites"]), manifest["refusals"]] == [7, []]
    assert [row["path"].split(".")[0] for row in manifest["sites"] if row.get("found") == "graph"] == [
        "encoder", "decoder",
    ]  # fmt: skip
    assert products(result.folder / "model.onnx")["float32"] == 2
    report = validate(result.folder, shapes=[(2, 5)])
    assert (report.verdict, report.culprits) == ("pass", [])
    assert len(report.norms) == 7


def test_a_baseline_without_the_float32_parts_is_refused(t5: tuple[Path, dict[str, ExportResult]]) -> None:
    with pytest.raises(UsageError) as error:
        validate(t5[1]["ort"].folder, build("t5", torch.float16, num_layers=1), shapes=[(2, 5)])
    assert "was exported from a model with parts in float16 (" in str(error.value)
    assert "and float32 (3072 elements), but those of the PyTorch model are in float16 (" in str(error.value)


class FloatHead(nn.Module):
    """A half body between float32 parts: norms with float32 weights, and a float32 head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.up = nn.Linear(16, 32).to(dtype)
        self.down = nn.Linear(32, 16).to(dtype)
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(self.up.weight.dtype)
        h = h + self.down(self.up(self.norm(h.float()).to(h.dtype)))
        return self.head(self.norm(h.float()))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_the_casts_at_the_borders_of_float32_parts_are_those_of_the_model(
    dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = FloatHead(dtype).eval()
    prepared = prepare(model, inputs={"x": torch.randn(3, 5, 16)})
    assert (prepared.dtype, prepared.details["elements"]) == (name, {name: 1072, "float32": 152})
    result = save(prepared, tmp_path / "out", "standard")
    graph = ir.load(result.folder / "model.onnx").graph
    casts = Counter(onnx_name(ir.DataType(n.attributes["to"].as_int())) for n in graph if n.op_type == "Cast")
    assert casts == {name: 2, "float32": 2}
    norms = [node for node in graph if node.op_type == "RMSNormalization"]
    assert [onnx_name(node.inputs[0].dtype) for node in norms if node.inputs[0].dtype] == ["float32"] * 2
    assert result.manifest["outputs"][0]["dtype"] == "float32"
    if dtype == torch.float16:  # ONNX Runtime has no bfloat16 MatMul for the CPU
        assert validate(result.folder, model, cases=[{"x": torch.randn(2, 7, 16).numpy()}]).verdict == "pass"


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_a_norm_of_two_dtypes_has_the_result_of_the_module_in_the_file(
    order: Order, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """x in one dtype, weight and bias in the other; a captured result of another dtype would be refused."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 16, generator=generator).to(dtypes[0])
    w, b = (torch.randn(16, generator=generator).to(dtypes[1]) for _ in range(2))
    scales: list[Scale] = ["weight", "one_plus_weight"]
    for scale, offset, has_bias in itertools.product(scales, (True, False), (False, True)):
        spec = NormSpec(
            1e-6, order=order, statistics=ORDERS[order], scale=scale, offset_in_float32=offset, bias=has_bias
        )
        wanted = eager(spec, x, w, b if has_bias else None)
        for target in ("primitives", "ort"):
            maker = GraphMaker(DATA_TYPES[dtypes[0]])
            inputs = [maker.input("x", x.shape), maker.initializer("w", w)]
            inputs += [maker.initializer("b", b)] if has_bias else []
            lowered, _ = lower(maker.model([maker.norm(spec, inputs, "y", x.shape)]), target)
            (got,) = run(lowered, {"x": x})
            assert got.dtype.name == str(wanted.dtype).removeprefix("torch.")
            # Two roundings in float16 at most, at values below 8.
            assert torch.allclose(torch.from_numpy(got).double(), wanted.double(), rtol=2e-3, atol=2e-3)
