"""Risk signals: what is seen of a norm's inputs, how far off each dtype and target is, and the verdicts."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.outliers import inject_outliers
from rmsnorm_deploy.models.recognition.intercept import NormCall
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.norms.norm_model import norm_model
from rmsnorm_deploy.runtime.risk.measure import NormRows, error_in_onnxruntime, error_in_torch, reference_of
from rmsnorm_deploy.runtime.risk.observe import NormSeen, NormWatch
from rmsnorm_deploy.runtime.risk.report import RiskReport, risk
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.models.families import VOCABULARY, build
from tests.helpers.norms.norm_zoo import CAST_FIRST, NO_UPCAST, ONE_PLUS, ZOO, NoUpcast, Weighted

WIDTH = 16


class Block(nn.Module):
    """One norm of a float input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def watched(
    spec: NormSpec, x: np.ndarray, gate: np.ndarray | None = None, weight: np.ndarray | None = None
) -> NormWatch:
    """A watch that has seen each `x[i]` in a call of its own."""
    watch = None
    tensors = [None if a is None else torch.from_numpy(a) for a in (weight, gate)]
    for index in range(len(x)):
        call = NormCall(
            spec, torch.from_numpy(x[index]), tensors[0], None, None if tensors[1] is None else tensors[1][index]
        )
        watch = watch or NormWatch("norm", call)
        watch.observe(call, eager(spec, call.x, call.weight, None, call.gate))
    assert watch is not None
    return watch


def seen_of(x: np.ndarray, spec: NormSpec = NormSpec(eps=1e-6, scale="none"), **options: Any) -> NormSeen:  # noqa: B008
    return watched(spec, x[None], **options).seen()


def of_one(norm: nn.Module, x: np.ndarray) -> RiskReport:
    return risk(Block(norm), [{"x": x}], targets=["ort"])


# ------------------------------------------------------------------------------------------------------ what is seen


def test_figures_of_what_goes_in() -> None:
    x = np.ones((2, 3, WIDTH), np.float32)
    x[0, 0] = 2.0
    x[1, 2, 5] = -256.0
    seen = watched(NormSpec(eps=1e-6, scale="none"), x).seen()
    assert (seen.calls, seen.rows, seen.nonfinite_rows, seen.width) == (2, 6, 0, (WIDTH,))
    assert (seen.largest, seen.smallest_rms) == (256.0, 1.0)
    margins = seen.margins["float16"]
    assert margins.x == 65504 / 256
    assert margins.square == 65504 / 65536
    assert margins.sum == 65504 / (65536 + 15)
    assert margins.result == pytest.approx(65504 / (256 / math.sqrt((65536 + 15) / 16)))
    assert seen.margins["float32"].square == pytest.approx(3.4028235e38 / 65536)


def test_eps_decides_where_it_exceeds_the_mean_square() -> None:
    x = np.ones((8, WIDTH), np.float32)
    x[0], x[1], x[2], x[3] = 1e-4, 0.0, 5e-3, 9e-3  # mean squares 1e-8, 0, 2.5e-5, 8.1e-5
    seen = seen_of(x)
    assert (seen.eps_decides, seen.eps_matters) == (2 / 8, 3 / 8)  # 2.5e-5 + 1e-6 shrinks the result by 1.9%
    assert seen.smallest_rms == pytest.approx(1e-4)
    assert seen_of(np.zeros((2, WIDTH), np.float32), NormSpec(eps=0.0, scale="none")).eps_matters == 0.0


def test_outlier_channels_are_named() -> None:
    x = np.ones((4, WIDTH), np.float32)
    x[:, 3], x[:, 9], x[:, 11] = 40.0, -7.0, 5.0
    seen = seen_of(x)
    assert seen.outliers == 2
    assert seen.outlier_channels == [(3, pytest.approx(40.0)), (9, pytest.approx(7.0))]
    many = np.ones((4, 32), np.float32)
    many[:, :12] = np.arange(10, 22)
    seen = seen_of(many)
    assert seen.outliers == 12
    assert [channel for channel, _ in seen.outlier_channels] == [11, 10, 9, 8, 7, 6, 5, 4]


def test_the_range_of_the_effective_weight() -> None:
    weight = np.array([0.5, -2.0, 0.0, 0.25], np.float32)
    plain = seen_of(normal(3, 4), CAST_FIRST, weight=weight).weight
    assert plain is not None
    assert (plain.largest, plain.smallest, plain.zeros, plain.ratio) == (2.0, 0.25, 1, 8.0)
    shifted = seen_of(normal(3, 4), ONE_PLUS, weight=np.array([-1.0, 1.0, 0.0, -0.5], np.float32)).weight
    assert shifted is not None
    assert (shifted.largest, shifted.smallest, shifted.zeros) == (2.0, 0.5, 1)
    assert seen_of(normal(3, 4)).weight is None


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    x = np.ones((5, WIDTH), np.float32)
    x[1, 0], x[4, 2] = np.nan, np.inf
    watch = watched(NormSpec(eps=1e-6, scale="none"), x[None])
    assert (watch.seen().rows, watch.seen().nonfinite_rows, watch.seen().largest) == (5, 2, 1.0)
    assert len(watch.sample().x) == 3


def test_groups_and_gates_count_as_they_are_computed() -> None:
    spec = NormSpec(eps=1e-6, scale="none", group_size=8, gate="before", activation="silu")
    x, gate = normal(3, 2, WIDTH), normal(3, 2, WIDTH, seed=1)
    entering = x.astype(np.float64) * gate / (1 + np.exp(-gate.astype(np.float64)))
    seen = watched(spec, x, gate).seen()
    sums = np.square(entering).reshape(-1, 8).sum(axis=-1)
    assert seen.largest == float(np.abs(x).max())
    assert seen.margins["float16"].sum == pytest.approx(65504 / sums.max())
    assert seen.margins["float16"].square == pytest.approx(65504 / np.abs(entering).max() ** 2)
    assert seen.smallest_rms == pytest.approx(math.sqrt(sums.min() / 8))
    rows = watched(spec, x, gate).sample()
    assert np.array_equal(rows.x, x.reshape(-1, WIDTH))
    assert rows.gate is not None
    assert np.array_equal(rows.gate, gate.reshape(-1, WIDTH))


def test_the_sample_is_bounded_and_contains_the_extremes() -> None:
    spec = NormSpec(eps=1e-6, scale="none")
    x = normal(40, 50, WIDTH) + 10.0
    x[3, 7, 2], x[39, 49] = 900.0, 1e-3
    rows = watched(spec, x).sample().x
    assert 200 < len(rows) <= 256
    assert np.abs(rows).max() == 900.0
    assert np.sqrt(np.square(rows).mean(axis=-1)).min() == pytest.approx(1e-3)
    assert np.array_equal(rows, watched(spec, x).sample().x)
    # long rows are kept in smaller number: 2^18 elements
    assert len(watched(spec, normal(2, 60, 8192)).sample().x) <= 32


# ------------------------------------------------------------------------------------------- dtypes and targets alone


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_norm_is_measured_in_every_dtype_and_target(name: str) -> None:
    norm = ZOO[name]
    weight, bias = norm.tensors(norm.build())
    x, gate = normal(24, *norm.tail), normal(24, *norm.tail, seed=1)
    arrays = (None if t is None else t.numpy() for t in (weight, bias))
    rows = NormRows(norm.spec, x, *arrays, gate if norm.gated else None)
    expected = reference_of(rows)
    assert 0.2 < error_in_torch(rows, "float32", expected).max_units < 4
    for target in TARGETS:
        assert error_in_onnxruntime(rows, "float32", target, expected).max_units < 8
        half = error_in_onnxruntime(rows, "float16", target, expected)
        assert half.nonfinite == 0
        assert 1e-6 < half.mean_relative < 2e-3


def test_errors_are_those_of_the_definition() -> None:
    spec = CAST_FIRST
    weight = normal(WIDTH, seed=2)
    rows = NormRows(spec, normal(30, WIDTH), weight)
    expected = reference(spec, rows.x, weight)
    result = eager(spec, torch.from_numpy(rows.x).half(), torch.from_numpy(weight).half()).double().numpy()
    size, rms = np.abs(result - expected), np.sqrt(np.square(expected).mean(axis=-1, keepdims=True))
    error = error_in_torch(rows, "float16", expected)
    assert error.max_relative == pytest.approx((size / rms).max())
    assert error.mean_relative == pytest.approx((size / rms).mean())
    assert error.max_units == pytest.approx((size / np.maximum(np.abs(expected), rms)).max() * 1024)
    assert error.max_ulp == pytest.approx(
        (size / np.spacing(np.abs(expected).astype(np.float16)).astype(float)).max(), rel=0.5
    )
    assert error.nonfinite == 0


def test_a_result_that_is_not_finite_is_infinitely_wrong() -> None:
    rows = NormRows(NO_UPCAST, normal(4, WIDTH) * 1e4, np.ones(WIDTH, np.float32))
    error = error_in_torch(rows, "float16", reference_of(rows))
    assert error.nonfinite == 0  # x^2 is infinite and 1 / inf is 0
    assert error.max_relative > 0.99
    large = NormRows(NO_UPCAST, np.full((1, WIDTH), 1e5, np.float32), np.ones(WIDTH, np.float32))
    error = error_in_torch(large, "float16", reference_of(large))
    assert (error.nonfinite, error.max_relative, error.max_units) == (WIDTH, math.inf, math.inf)


def test_the_model_of_one_norm() -> None:
    weight, x = normal(WIDTH), normal(5, WIDTH, seed=1)
    model, _ = norm_model(CAST_FIRST, (WIDTH,), "float32", "standard", weight)
    data = ir.to_proto(model).SerializeToString()
    assert [node.op_type for node in onnx.load_model_from_string(data).graph.node] == ["RMSNormalization"]
    with OrtRunner(data) as runner:
        assert [(info.name, info.shape) for info in runner.inputs()] == [("x", ("rows", WIDTH))]
        np.testing.assert_allclose(runner.run({"x": x})["y"], reference(CAST_FIRST, x, weight), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="float64"):
        norm_model(CAST_FIRST, (WIDTH,), "float64", "plugin", weight.astype(np.float64))
    with pytest.raises(UsageError, match="target: expected one of"):
        norm_model(CAST_FIRST, (WIDTH,), "float32", "onnx", weight)


# ----------------------------------------------------------------------------------------------------------- verdicts


def verdicts(report: RiskReport) -> dict[str, tuple[str, str]]:
    (norm,) = report.norms
    return {dtype: (row.verdict, "; ".join(row.reasons)) for dtype, row in norm.verdicts.items()}


def test_an_ordinary_norm_is_safe_everywhere() -> None:
    report = of_one(Weighted(WIDTH), 4 * normal(8, WIDTH))
    assert verdicts(report) == dict.fromkeys(("float32", "float16", "bfloat16"), ("safe", ""))
    assert report.norms[0].targets["ort"]["bfloat16"].error is None
    assert "no bfloat16 kernels" in str(report.norms[0].targets["ort"]["bfloat16"].reason)
    assert report.norms[0].least_margin("float16") == pytest.approx(65504 / report.norms[0].seen.largest)


@pytest.mark.parametrize(
    ("scale", "level", "reason"),
    [
        (1e4, "safe", ""),
        (2e4, "caution", "x is within a factor of 3.28 of overflow in float16"),
        (7e4, "unsafe", "x overflows float16: it is 1.07 times the largest value"),
    ],
)
def test_large_inputs_overflow_float16(scale: float, level: str, reason: str) -> None:
    found = verdicts(of_one(Weighted(WIDTH), np.full((4, WIDTH), scale, np.float32)))
    assert found["float16"][0] == level
    assert reason in found["float16"][1]
    assert found["float32"] == found["bfloat16"] == ("safe", "")


def test_squares_overflow_where_statistics_are_in_half() -> None:
    x = np.full((4, WIDTH), 300.0, np.float32)
    found = verdicts(of_one(NoUpcast(WIDTH), x))
    assert found["float16"][0] == "unsafe"
    assert "x^2 overflows float16: it is 1.37 times the largest value" in found["float16"][1]
    assert found["float32"] == found["bfloat16"] == ("safe", "")
    assert verdicts(of_one(Weighted(WIDTH), x))["float16"] == ("safe", "")
    assert of_one(NoUpcast(WIDTH), x).norms[0].least_margin("float16") == 65504 / 90000
    near = verdicts(of_one(NoUpcast(WIDTH), np.full((4, WIDTH), 100.0, np.float32)))["float16"]
    assert near[0] == "caution"
    assert "the sum of squares overflows float16, unless the runtime sums in a wider dtype" in near[1]


def test_squares_overflow_float32_in_every_dtype_that_x_fits() -> None:
    found = verdicts(of_one(Weighted(WIDTH), np.full((4, WIDTH), 1e20, np.float32)))
    assert [found[dtype][0] for dtype in ("float32", "float16", "bfloat16")] == ["unsafe"] * 3
    assert "x^2 overflows float32" in found["float32"][1]
    assert "x^2 overflows float32" in found["bfloat16"][1]


def test_small_rows_become_subnormal() -> None:
    found = verdicts(of_one(Weighted(WIDTH), normal(8, WIDTH) * 1e-6))
    assert found["float16"][0] == "caution"
    assert "become subnormal in float16" in found["float16"][1]
    assert found["float32"] == found["bfloat16"] == ("safe", "")
    found = verdicts(of_one(NoUpcast(WIDTH), normal(8, WIDTH) * 1e-3))
    assert "x^2 of rows of RMS" in found["float16"][1]
    assert "eps 1e-06 is subnormal in float16, and it changes the result in 100% of the rows" in found["float16"][1]


def test_weights_that_half_cannot_hold() -> None:
    norm = Weighted(WIDTH)
    with torch.no_grad():
        norm.weight[:4] = torch.tensor([1e-5, 1e-9, 0.0, 2.0])
    found = verdicts(of_one(norm, normal(8, WIDTH)))
    assert found["float16"] == ("caution", "2 of 16 weights are subnormal in float16, 1 of them become 0")
    assert found["bfloat16"] == ("safe", "")
    with torch.no_grad():
        norm.weight[0] = 1e5
    found = verdicts(of_one(norm, normal(8, WIDTH)))
    assert found["float16"][0] == "unsafe"
    assert "1 weights overflow float16" in found["float16"][1]


def test_one_plus_weight_cancels() -> None:
    norm = ZOO["gemma2"].build()
    with torch.no_grad():
        norm.weight.fill_(0.1)
        norm.weight[5] = -0.99999
    found = verdicts(of_one(norm, normal(8, 64)))
    assert "1 of 64 values of 1 + weight are inaccurate in float16 (cancellation)" in found["float16"][1]
    assert found["float16"][0] == "caution"
    assert found["float32"] == ("safe", "")


def test_inputs_that_are_not_finite_are_unsafe_everywhere() -> None:
    x = normal(4, WIDTH)
    x[2, 1] = np.nan
    found = verdicts(of_one(Weighted(WIDTH), x))
    assert {row[0] for row in found.values()} == {"unsafe"}
    assert "1 of 4 input rows contain NaN or infinity in the running model" in found["float32"][1]


# ---------------------------------------------------------------------------------------------------------- the whole


def tokens(rows: int, length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_a_model_with_outlier_channels() -> None:
    model = build("llama")
    injected = inject_outliers(model, 2, 1000.0, seed=0)
    report = risk(model, [tokens(2, 9), tokens(1, 5)], targets=["primitives"])
    assert [norm.seen.path for norm in report.norms] == list(injected.norms)
    first = report.norms[0].seen
    assert (first.calls, first.rows, first.outliers) == (2, 23, 2)
    assert sorted(channel for channel, _ in first.outlier_channels) == list(injected.indices)
    assert report.verdicts["float16"].verdict == "safe"


def test_the_worst_norm_gives_the_verdict() -> None:
    model = nn.Sequential(Weighted(WIDTH), Weighted(WIDTH), Weighted(WIDTH))
    with torch.no_grad():
        model[0].weight.fill_(1e5)
    report = risk(model, [{"input": normal(4, WIDTH)}], targets=[])
    verdict = report.verdicts["float16"]
    assert (verdict.verdict, verdict.norm) == ("unsafe", "0")
    assert verdict.reason.startswith("the result overflows float16")
    assert [norm.verdicts["float16"].verdict for norm in report.norms] == ["unsafe", "unsafe", "safe"]
    assert report.verdicts["float32"].verdict == "safe"


def test_the_report_is_json_and_the_same_every_time() -> None:
    model = build("mamba2")
    first, second = (risk(model, [tokens(2, 9)], targets=["ort"]).to_dict() for _ in range(2))
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    assert first["schema"] == "rmsnorm_deploy.risk/1"
    assert [norm["calls"] for norm in first["norms"]] == [1] * 5
    assert first["norms"][0]["margins"]["float32"] == {"x": None, "square": None, "sum": None, "result": None}
    zeros = of_one(Weighted(WIDTH), np.zeros((2, WIDTH), np.float32)).to_dict()["norms"][0]
    assert zeros["margins"]["float16"]["x"] == "inf"
    assert (zeros["eps_decides"], zeros["errors"]["float16"]["max_relative"]) == (1.0, 0.0)


def test_what_was_not_looked_at_is_noted() -> None:
    model = Block(Weighted(WIDTH))
    model.unused = Weighted(WIDTH)
    model.centered = nn.LayerNorm(WIDTH)
    report = risk(model, [{"x": normal(2, WIDTH)}], targets=[])
    assert report.notes == [
        "modules that were not recognized as RMSNorm were not checked: 1",
        "unused was not called by any case",
    ]
    nothing = risk(Block(nn.Linear(4, 4)), [{"x": normal(2, 4)}])
    assert (nothing.norms, nothing.verdicts) == ([], {})


def test_a_call_with_unsupported_arguments_is_noted() -> None:
    class Passing(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, mask=x)

    report = risk(Passing(ZOO["takes_more"].build()), [{"x": normal(2, 64)}] * 2, targets=[])
    assert (report.norms, report.notes) == ([], ["norm is called with the arguments mask, which are not supported"])


def test_the_model_is_put_back() -> None:
    model = Block(Weighted(WIDTH)).train()
    x = normal(2, WIDTH)
    wanted = model(torch.from_numpy(x))
    risk(model, [{"x": x}], targets=[])
    with pytest.raises(UsageError, match="missing: x"):
        risk(model, [{"y": x}], targets=[])
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.training
    assert torch.equal(model(torch.from_numpy(x)), wanted)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one case"):
        risk(Block(Weighted(WIDTH)), [])
    with pytest.raises(UsageError, match=r"target: expected one of .*, got 'onnx'"):
        risk(Block(Weighted(WIDTH)), [{"x": normal(2, WIDTH)}], targets=["onnx"])
