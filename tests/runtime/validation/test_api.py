"""validate and bisect: pass what is right, name what is wrong, and say what does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.save import save
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
from rmsnorm_deploy.runtime.inputs.cases import Case
from rmsnorm_deploy.runtime.norms.graph_norms import GraphNorms
from rmsnorm_deploy.runtime.runners.base import Array, TensorInfo
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.runners.torch import TorchRunner
from rmsnorm_deploy.runtime.validation.api import bisect, validate
from rmsnorm_deploy.runtime.validation.options import ValidationOptions
from tests.helpers.models.families import FAMILIES
from tests.helpers.models.small_models import Residual, residual_inputs
from tests.helpers.norms.norm_zoo import ZOO

CASE = Case("rows", {"x": np.random.default_rng(2).standard_normal((3, 9, 16)).astype(np.float32)})
SEGMENTS = ["the inputs ... norms.0", "norms.0 ... norms.1", "norms.1 ... output"]


@pytest.fixture(scope="module")
def model() -> Residual:
    return Residual().eval()


@pytest.fixture(scope="module")
def exports(model: Residual, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    prepared = prepare(model, inputs=residual_inputs())
    return {target: save(prepared, folder / target, target).folder for target in TARGETS}


@pytest.fixture(scope="module")
def folder(exports: dict[str, Path]) -> Path:
    return exports["primitives"]


@pytest.fixture
def changed(exports: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a target's file in which one initializer went through `change`."""

    def write(name: str, change: Callable[[Array], Array], target: str = "primitives") -> Path:
        graph = onnx.load(exports[target] / "model.onnx")
        (tensor,) = [tensor for tensor in graph.graph.initializer if tensor.name == name]
        values = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(values.copy()).astype(values.dtype), name))
        onnx.save(graph, tmp_path / "changed.onnx")
        return tmp_path / "changed.onnx"

    return write


def one_up(values: Array) -> Array:
    values[..., 3] *= 1.01
    return values


# ---------------------------------------------------------------------------------------------------- what is right


def test_an_honest_export_passes_and_reports(folder: Path, model: Residual) -> None:
    report = validate(folder, model)
    rows = report.to_dict()
    assert rows["schema"] == "rmsnorm_deploy.validate/7"
    assert (rows["verdict"], rows["culprits"], rows["notes"]) == ("pass", [], [])
    assert rows["summary"] == "6 of 6 outputs, 2 of 2 norms, 3 of 3 segments as accurate as PyTorch."
    assert [row["case"] for row in rows["outputs"]] == ["1x1", "1x7", "2x33", "1x2", "1x2 of other values", "5x7"]
    assert all(0 < row["figures"]["cosine"] <= 1 + 1e-12 for row in rows["outputs"])
    assert [row["path"] for row in rows["norms"]] == ["norms.0", "norms.1"]
    assert [row["name"] for row in rows["segments"]] == SEGMENTS
    assert rows["depth"] == []
    assert rows["provenance"]["candidate"]["providers_used"] == ["CPUExecutionProvider"]
    assert rows["provenance"]["baseline"]["parameter_dtypes"] == ["float32"]
    assert rows["settings"] == {"candidate": None, "against": None, **ValidationOptions().to_dict()}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_passes_with_all_its_parts(exports: dict[str, Path], model: Residual, target: str) -> None:
    report = bisect(exports[target], model)
    assert report.schema == "rmsnorm_deploy.bisect/6"
    assert (report.verdict, report.culprits) == ("pass", [])
    assert [segment.name for segment in report.segments] == SEGMENTS
    assert [norm.form for norm in report.norms] == ["residual_add" if target == "plugin" else "plain"] * 2
    assert (len(report.norms), len(report.depth)) == (2, 4)


def test_a_single_file_is_validated_too(folder: Path, model: Residual) -> None:
    report = validate(folder / "model.onnx", model)
    assert (report.verdict, len(report.norms), len(report.segments)) == ("pass", 2, 3)


def test_norms_that_a_file_does_not_name_are_recognized(folder: Path, model: Residual, tmp_path: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    for node in graph.graph.node:
        del node.metadata_props[:]
    onnx.save(graph, tmp_path / "plain.onnx")
    report = bisect(tmp_path / "plain.onnx", model)
    assert (report.verdict, len(report.norms), len(report.segments)) == ("pass", 2, 3)
    assert len(report.rows) == 6


def test_a_file_in_which_no_norm_is_found_has_its_outputs_compared(
    folder: Path, model: Residual, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx.load(folder / "model.onnx")
    for node in graph.graph.node:
        del node.metadata_props[:]
    onnx.save(graph, tmp_path / "plain.onnx")
    monkeypatch.setattr("rmsnorm_deploy.runtime.norms.graph_norms.annotate", lambda model: None)
    report = bisect(tmp_path / "plain.onnx", model)
    assert (report.verdict, report.norms, report.segments, report.depth) == ("pass", [], [], [])
    assert len(report.rows) == 6
    (note,) = report.notes
    assert "so only its outputs were compared" in note


def test_outputs_only_looks_at_outputs_only(folder: Path, model: Residual) -> None:
    report = validate(folder, model, outputs_only=True, depth=True)
    assert (report.verdict, report.norms, report.segments, report.depth) == ("pass", [], [], [])
    assert report.summary == "6 of 6 outputs as accurate as PyTorch."


def test_a_decoder_with_a_cache_runs_twice(tmp_path: Path) -> None:
    options = {**FAMILIES["llama"].options, "num_hidden_layers": 1}
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    save(prepare(decoder, with_past=True), tmp_path / "out", "ort")
    report = bisect(tmp_path / "out", decoder, shapes=[(1, 3), (2, 5)])
    assert [(case, row.name.partition(" ")[0].partition(".")[0]) for case, row in report.rows] == [
        (f"{shape} then 1 more", name) for shape in ("1x3", "2x5") for name in ("logits", "logits@decode", "present")
    ]
    counts = [row.figures.count for _, row in report.rows if row.figures and row.name.startswith("logits")]
    assert counts == [3 * 97, 97, 2 * 5 * 97, 2 * 97]
    assert (report.verdict, report.notes[:-1]) == ("pass", [])
    assert (len(report.norms), len(report.segments), len(report.depth)) == (3, 4, 6)


# ---------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("norm", ["norms.0", "norms.1"])
def test_a_fault_in_a_norm_is_found_in_that_norm_only(
    changed: Callable[..., Path], model: Residual, target: str, norm: str
) -> None:
    path = changed(f"{norm}.weight", one_up, target)
    assert validate(path, model).verdict == "fail"
    report = bisect(path, model)
    (culprit,) = report.culprits
    assert (report.verdict, culprit.kind, culprit.name) == ("fail", "norm", norm)
    assert report.summary.endswith(f"error is introduced in {norm}.")
    assert [check.passed for check in report.norms] == [check.norm.key[0] != norm for check in report.norms]
    assert all(segment.verdict.passed for segment in report.segments)


@pytest.mark.parametrize(("change", "kinds"), [("eps", {"tiny"}), ("dropped", {"zeros", "tiny"})])
def test_an_epsilon_that_the_outputs_hardly_show_is_found(
    folder: Path, model: Residual, change: str, kinds: set[str], tmp_path: Path
) -> None:
    graph = onnx.load(folder / "model.onnx")
    tensors = [
        tensor for tensor in graph.graph.initializer
        if not tensor.dims and abs(float(onnx.numpy_helper.to_array(tensor)) - 1e-5) < 1e-9
    ]  # fmt: skip
    (tensor,) = tensors
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(2e-5 if change == "eps" else 0.0, np.float32), tensor.name))
    onnx.save(graph, tmp_path / "changed.onnx")
    report = validate(tmp_path / "changed.onnx", model)
    (culprit,) = report.culprits
    assert (culprit.kind, culprit.name) == ("norm", "norms.1")
    assert kinds <= {kind.name for kind in report.norms[1].kinds if not kind.passed}
    assert report.norms[0].passed


@pytest.mark.parametrize(("linear", "segment"), [("first", SEGMENTS[0]), ("second", SEGMENTS[1])])
def test_a_fault_between_norms_is_a_segment(
    changed: Callable[..., Path], model: Residual, linear: str, segment: str
) -> None:
    report = bisect(changed(f"{linear}.bias", lambda bias: bias + 0.01), model)
    (culprit,) = report.culprits
    assert (report.verdict, culprit.kind, culprit.name) == ("fail", "segment", segment)
    assert all(check.passed for check in report.norms)
    assert [part.verdict.passed for part in report.segments] == [part.name != segment for part in report.segments]


def test_two_faults_are_two_culprits(folder: Path, model: Residual, tmp_path: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name in ("norms.1.weight", "first.bias"):
            values = one_up(onnx.numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, tmp_path / "changed.onnx")
    report = bisect(tmp_path / "changed.onnx", model)
    assert [(c.kind, c.name) for c in report.culprits] == [("norm", "norms.1"), ("segment", SEGMENTS[0])]
    assert "error is introduced in norms.1 and 1 more" in report.summary


def test_a_norm_that_is_bypassed_is_wrong_though_it_computes_rightly(
    folder: Path, model: Residual, tmp_path: Path
) -> None:
    norm = GraphNorms(folder / "model.onnx").norms["norms.1", 0]
    graph = onnx.load(folder / "model.onnx")
    (reader,) = [node for node in graph.graph.node if norm.y in node.input]
    reader.input[list(reader.input).index(norm.y)] = norm.x
    onnx.save(graph, tmp_path / "changed.onnx")
    report = validate(tmp_path / "changed.onnx", model)
    assert report.verdict == "fail"
    assert ("norm", "norms.1", "its result is not read in the file") in {
        (c.kind, c.name, c.reason) for c in report.culprits
    }


def test_with_a_wrong_reference_nothing_can_be_judged(
    folder: Path, model: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(spec: Any, *rest: Any) -> Any:
        return reference(spec.replace(eps=10 * spec.eps), *rest)

    monkeypatch.setattr("rmsnorm_deploy.runtime.norms.float64_model.reference", wrong)
    monkeypatch.setattr("rmsnorm_deploy.runtime.norms.torch_norms.reference", wrong)
    report = validate(folder, model)
    assert report.verdict == "cannot be judged"
    assert [check.passed for check in report.norms] == [None, None]
    assert all("there is no valid reference" in check.reason for check in report.norms)


def test_a_wrong_reference_is_seen_without_the_norms_of_the_file_too(
    folder: Path, model: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(spec: Any, *rest: Any) -> Any:
        return reference(spec.replace(eps=0.5), *rest)

    monkeypatch.setattr("rmsnorm_deploy.runtime.norms.float64_model.reference", wrong)
    report = validate(folder, model, outputs_only=True)
    assert (report.verdict, report.culprits) == ("cannot be judged", [])
    parts = [part for _, parts in report.unjudged for part in parts]
    assert [part for part in parts if part.startswith("norm")] == ["norm norms.0", "norm norms.1"]
    assert all("there is no valid reference" in check.reason for check in report.norms)


def test_a_large_file_is_opened_without_repacking_its_weights_again(
    exports: dict[str, Path], model: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = validate(exports["ort"], model)
    monkeypatch.setattr("rmsnorm_deploy.runtime.runners.ort_graph._LARGE_FILES", -1)
    opened: list[Any] = []
    original = OrtRunner.__init__

    def spied(self: OrtRunner, *args: Any, **kwargs: Any) -> None:
        opened.append(kwargs.get("session_options"))
        original(self, *args, **kwargs)

    monkeypatch.setattr(OrtRunner, "__init__", spied)
    report = validate(exports["ort"], model)
    assert (plain.verdict, report.verdict) == ("pass", "pass")
    assert not [note for note in plain.notes if "without repacking" in note]
    assert [note for note in report.notes if "without repacking" in note]
    # The whole file as it is deployed; its norms and its segments without.
    assert opened == [None, {"repack_weights": False}, {"repack_weights": False}]


def test_an_output_that_only_pytorch_has_is_noted(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(16, eps=1e-5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"first": self.norm(x), "second": x * 2}

    two = Two().eval()
    file = save(prepare(two, inputs=residual_inputs()), tmp_path / "out", "ort").folder / "model.onnx"
    graph = onnx.load(file)
    del graph.graph.output[1]
    onnx.save(graph, tmp_path / "one.onnx")
    report = validate(tmp_path / "one.onnx", two)
    assert report.verdict == "pass"
    assert [note for note in report.notes if "also returns second" in note]


# --------------------------------------------------------------------------------------------- a norm by other means


class WithRefused(nn.Module):
    """A LayerNorm, which is refused, between two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = ZOO["llama"].build(), ZOO["olmo2"].build()
        self.centered = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.centered(self.before(x))) + x


def test_refused_norms_are_in_the_report(tmp_path: Path) -> None:
    model = WithRefused().eval()
    save(prepare(model, inputs={"x": torch.ones(2, 3, 64)}), tmp_path / "out", "ort")
    report = validate(tmp_path / "out", model).to_dict()
    assert (report["verdict"], [row["path"] for row in report["norms"]]) == ("pass", ["before", "after"])
    (refusal,) = report["refusals"]
    assert (refusal["path"], refusal["class"]) == ("centered", "torch.nn.modules.normalization.LayerNorm")


class Returned(nn.Module):
    """The last norm's result is the output, and its input another, as in decoders without a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.linear(x)
        return self.norm(h), h


@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_that_is_an_output_is_checked(target: str, tmp_path: Path) -> None:
    model = Returned(16).eval()
    save(prepare(model, inputs=residual_inputs()), tmp_path / "out", target)
    report = bisect(tmp_path / "out", model)
    assert (report.verdict, len(report.rows), len(report.norms), len(report.segments)) == ("pass", 12, 1, 3)


def test_a_norm_that_the_file_lost_is_noted(folder: Path, model: Residual, tmp_path: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    for node in graph.graph.node:
        if any(entry.value == "norms.0" for entry in node.metadata_props):
            del node.metadata_props[:]
    onnx.save(graph, tmp_path / "half.onnx")
    report = bisect(tmp_path / "half.onnx", model)
    assert (report.verdict, [check.norm.key for check in report.norms]) == ("pass", [("norms.1", 0)])
    assert (
        "norms.0 could not be checked alone: no node of the candidate names this norm in its metadata" in report.notes
    )
    assert [(part.name, part.contains) for part in report.segments] == [
        ("the inputs ... norms.1", ["norms.0"]), ("norms.1 ... output", []),
    ]  # fmt: skip


def test_a_fault_inside_a_norm_that_could_not_be_checked_is_its_segment(
    changed: Callable[..., Path], model: Residual
) -> None:
    path = changed("norms.0.weight", one_up)
    graph = onnx.load(path)
    for node in graph.graph.node:
        if any(entry.value == "norms.0" for entry in node.metadata_props):
            del node.metadata_props[:]
    onnx.save(graph, path)
    report = bisect(path, model)
    (culprit,) = report.culprits
    assert (culprit.kind, culprit.name) == ("norm", "norms.0")
    assert culprit.reason.startswith("inside the inputs ... norms.1: ")


# ----------------------------------------------------------------------------------------------------------- windows


def parts(path: Path, model: nn.Module, window: int | None) -> dict[str, Any]:
    report = bisect(path, model, window=window).to_dict()
    return {name: report[name] for name in ("outputs", "norms", "segments", "depth", "notes", "verdict")}


@pytest.mark.parametrize("target", ["primitives", "plugin"])
def test_windows_change_nothing_but_the_memory(exports: dict[str, Path], model: Residual, target: str) -> None:
    whole = parts(exports[target], model, None)
    assert parts(exports[target], model, 1) == whole
    assert parts(exports[target], model, 2) == whole
    assert parts(exports[target], model, 99) == whole


def test_a_window_of_nothing_is_refused(folder: Path, model: Residual) -> None:
    with pytest.raises(UsageError, match="window: expected at least 1 norm, or None for all, got 0"):
        validate(folder, model, window=0)


# ------------------------------------------------------------------------------------------------------------- depth


def test_depth_shows_errors_as_they_grow(folder: Path, model: Residual) -> None:
    report = bisect(folder, model)
    assert [(p.key[0], p.side) for p in report.depth] == [
        ("norms.0", "input"), ("norms.0", "output"), ("norms.1", "input"), ("norms.1", "output"),
    ]  # fmt: skip
    for point in report.depth:
        assert 0 < point.error < 5e-6
        assert 0 < point.baseline_error < 5e-6
        assert point.introduced is not None
        assert 0 <= point.introduced < 5e-6
    # What arrives at the first norm came from the first segment alone.
    assert report.depth[0].introduced == pytest.approx(report.depth[0].error, rel=0.5)
    assert report.notes == ["exposing the values at the norms did not change the outputs"]
    assert all(math.isfinite(row["error"]) for row in report.to_dict()["depth"])


def test_depth_jumps_where_the_fault_is(changed: Callable[..., Path], model: Residual) -> None:
    report = bisect(changed("second.bias", lambda bias: bias + 0.01), model)
    errors = [point.error for point in report.depth]
    assert max(errors[:2]) < 5e-6
    assert min(errors[2:]) > 1e-4
    assert [point.introduced > 1e-4 for point in report.depth if point.introduced is not None] == [
        False, False, True, False,
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ PyTorch candidates


def test_the_same_model_passes_as_a_candidate(model: Residual) -> None:
    report = bisect(Residual().eval(), model, cases=[CASE])
    assert (report.verdict, len(report.norms), len(report.segments), len(report.depth)) == ("pass", 2, 3, 4)
    assert [row.figures.differing for _, row in report.rows if row.figures] == [0]
    assert report.model == "Residual"


def test_another_weight_in_a_pytorch_candidate_names_the_norm(model: Residual) -> None:
    other = Residual().eval()
    with torch.no_grad():
        other.norms[1].weight[3] *= 1.01
    report = bisect(other, model, cases=[CASE])
    assert [(c.kind, c.name) for c in report.culprits] == [("norm", "norms.1")]


def test_the_model_may_be_its_own_candidate(model: Residual) -> None:
    assert bisect(model, model, cases=[CASE]).verdict == "pass"


# ----------------------------------------------------------------------------------------------------------- runners


class Stand:
    """A runner that hands PyTorch's outputs on after `change`."""

    def __init__(
        self, model: nn.Module, change: Callable[[dict[str, Array]], Mapping[str, Array]], *names: str
    ) -> None:
        self._runner, self._change, self._names = TorchRunner(model), change, names or ("output",)
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def inputs(self) -> list[TensorInfo]:
        return [TensorInfo("x", "float32", ("batch", "sequence", 16))]

    def outputs(self) -> list[TensorInfo]:
        return [TensorInfo(name, "float32", ("batch", "sequence", 16)) for name in self._names]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return dict(self._change(self._runner.run(feeds)))

    def provenance(self) -> dict[str, Any]:
        return {"runner": "stand-in"}


def on_output(change: Callable[[Array], Array]) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda outputs: {"output": change(outputs["output"])}


def test_an_open_runner_has_its_outputs_compared_and_stays_open(model: Residual) -> None:
    runner = Stand(model, dict)
    report = validate(runner, model)
    assert (report.verdict, report.model, report.norms) == ("pass", "Stand", [])
    assert report.to_dict()["provenance"]["candidate"] == {"runner": "stand-in"}
    assert (report.settings["candidate"], report.settings["against"]) == (None, None)
    assert not runner.closed


def test_an_onnxruntime_session_is_a_runner_too(folder: Path, model: Residual) -> None:
    with OrtRunner(folder / "model.onnx") as runner:
        assert validate(runner, model).verdict == "pass"
        assert runner.run(CASE.feeds)["output"].shape == (3, 9, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: np.full_like(y, np.nan), "NaN or infinity out of place"),
        (lambda y: np.where(np.arange(16) == 5, np.float32(np.inf), y), "NaN or infinity out of place"),
        (lambda y: y[:, :1], "allowed"),  # one token is taken for the last, and this is the first
        (lambda y: y[:, :2], "shape mismatch"),
        (lambda y: y[..., None], "shape mismatch"),
        (lambda y: y.astype(np.int32), "dtype mismatch"),
        (lambda y: y * np.float32(1.0001), "allowed"),
        (np.zeros_like, "allowed"),
        (lambda y: y.astype(np.float16), "the candidate is float16, the baseline float32"),
    ],
)
def test_outputs_that_are_wrong_fail(model: Residual, change: Callable[[Array], Array], reason: str) -> None:
    with np.errstate(invalid="ignore"):
        report = validate(Stand(model, on_output(change)), model, shapes=[(2, 5)])
    assert report.verdict == "fail"
    (culprit,) = report.culprits
    assert (culprit.kind, culprit.name) == ("output", "output of 2x5")
    assert reason in culprit.reason
    assert json.loads(json.dumps(report.to_dict()))["verdict"] == "fail"


def test_an_output_that_pytorch_does_not_have_is_noted(model: Residual) -> None:
    report = validate(Stand(model, lambda outputs: {**outputs, "more": outputs["output"]}), model)
    assert (report.verdict, {row.name for _, row in report.rows}) == ("pass", {"output"})
    assert "the file also returns more, which PyTorch does not: it was not compared" in report.notes


def test_outputs_that_fit_none_are_a_usage_error(model: Residual) -> None:
    message = r"Stand returns 1 output \(other \(int64 .*\)\), the PyTorch model Residual 1 output \(output \(float32 "
    with pytest.raises(UsageError, match=message):
        validate(Stand(model, lambda outputs: {"other": outputs["output"].astype(np.int64)}, "other"), model)


def test_a_runner_that_returns_nothing_is_a_usage_error(model: Residual) -> None:
    with pytest.raises(UsageError, match="Stand: case 1x1: expected the outputs output, got none"):
        validate(Stand(model, lambda outputs: {}), model)


@pytest.mark.parametrize("lost", ["output_0", "output_1"])
def test_an_output_that_is_announced_and_missing_is_a_usage_error(lost: str) -> None:
    model = Returned(16).eval()
    (kept,) = {"output_0", "output_1"} - {lost}
    runner = Stand(model, lambda outputs: {kept: outputs[kept]}, "output_0", "output_1")
    with pytest.raises(UsageError, match=f"Stand: case 1x1: expected the outputs {lost}, got {kept}"):
        validate(runner, model)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UsageError("stand-in: no such input"), "^stand-in: no such input$"),
        (RuntimeError("no luck"), "^Stand failed on case 1x1: RuntimeError: no luck$"),
    ],
)
def test_a_runner_that_crashes_is_not_hidden(model: Residual, error: Exception, message: str) -> None:
    def crashes(outputs: dict[str, Array]) -> dict[str, Array]:
        raise error

    with pytest.raises(UsageError, match=message):
        validate(Stand(model, crashes), model)


# --------------------------------------------------------------------------------------------------- limits and cases


def test_explicit_limits_replace_the_baseline_for_the_output_named(folder: Path, model: Residual) -> None:
    assert validate(folder, model, limits={"*": Limits(atol=1.0)}).verdict == "pass"
    report = validate(folder, model, limits={"output": Limits(atol=0.0)})
    assert {c.kind for c in report.culprits} == {"output"}
    assert all("violate |error| <= 0 + 0 x |reference|" in row.reason for _, row in report.rows if not row.passed)
    assert "no failed norm or segment explains" in report.summary
    assert validate(folder, model, limits={"*": Limits(atol=0.0), "output": Limits(ulp=1e6)}).verdict == "pass"
    with pytest.raises(UsageError, match=r"limits are given for logits.*The outputs are: output\."):
        validate(folder, model, limits={"logits": Limits(atol=1.0)})


def test_limits_do_not_excuse_a_norm(changed: Callable[..., Path], model: Residual) -> None:
    report = validate(changed("norms.1.weight", one_up), model, limits={"*": Limits(atol=10.0)})
    assert all(row.passed for _, row in report.rows)
    assert [(c.kind, c.name) for c in report.culprits] == [("norm", "norms.1")]


def test_given_cases_replace_generated_ones(folder: Path, model: Residual) -> None:
    report = validate(folder, model, cases=[CASE, Case("ones", {"x": np.ones((1, 2, 16), np.float32)})])
    assert [case for case, _ in report.rows] == ["rows", "ones"]
    seen: list[str] = []

    def cases(infos: Any) -> list[Case]:
        seen.extend(info.name for info in infos)
        return [CASE]

    assert len(validate(folder, model, cases=cases).rows) == 1
    assert seen == ["x"]


def test_cases_are_mappings_of_arrays_and_tensors(folder: Path, model: Residual) -> None:
    given = [{"x": CASE.feeds["x"]}, {"x": torch.from_numpy(CASE.feeds["x"])}]
    report = validate(folder, model, cases=given, outputs_only=True)
    assert [case for case, _ in report.rows] == ["case 1", "case 2"]
    assert report.rows[0][1].figures == report.rows[1][1].figures
    for wrong, message in (
        ({"x": CASE.feeds["x"]}, "cases: expected a list of mappings of input name to array, got dict"),
        ([], "cases is empty"),
        ([CASE.feeds["x"]], "case 1: expected a mapping of input name to array, got ndarray"),
        ([{"x": [1.0]}], "case 1: x: expected a numpy array or a torch tensor, got list"),
    ):
        with pytest.raises(UsageError, match=message):
            validate(folder, model, cases=wrong)  # type: ignore[arg-type]


def test_equal_seeds_give_equal_reports(folder: Path, model: Residual) -> None:
    first, second, other = (bisect(folder, model, seed=seed).to_dict() for seed in (1, 1, 2))
    for report in (first, second):
        assert report.pop("created").endswith("+00:00")
    assert first == second
    assert first["outputs"] != other["outputs"]
    assert first["norms"] != other["norms"]
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_is_unchanged(dtype: torch.dtype) -> None:
    model = Residual().to(dtype)
    model.second.eval()
    model.norms[0].weight.requires_grad_(False)
    case = Case("rows", {"x": CASE.feeds["x"].astype(str(dtype).removeprefix("torch."))})

    def state() -> Any:
        return (
            {name: (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.detach().clone().numpy().tobytes())
             for name, t in (*model.named_parameters(), *model.named_buffers())},
            {name: module.training for name, module in model.named_modules()},
            [name for name, module in model.named_modules() if "forward" in vars(module)],
            [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks],
        )  # fmt: skip

    before = state()
    fed = case.feeds["x"].copy()
    assert bisect(Residual().to(dtype).eval(), model, cases=[case]).verdict == "pass"
    assert state() == before
    np.testing.assert_array_equal(case.feeds["x"], fed)
    broken = Residual().to(dtype).eval()
    with pytest.raises(UsageError):
        bisect(broken, model, cases=[Case("wrong", {"y": fed})])
    assert state() == before


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_arguments_that_do_not_match_are_errors(folder: Path, model: Residual, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"exported in float32, but the PyTorch model is in float16"):
        validate(folder, Residual().half())
    with pytest.raises(UsageError, match="nothing does not exist"):
        validate(tmp_path / "nothing", model)
    with pytest.raises(UsageError, match=r"manifest\.json"):
        validate(tmp_path, model)
    with pytest.raises(UsageError, match="shape 0x4: expected a batch and a length of at least 1"):
        validate(folder, model, shapes=[(0, 4)])
    with pytest.raises(EnvironmentMissingError, match="CUDA"):
        validate(folder, model, provider="cuda")
    with pytest.raises(UsageError, match=r"y.*x|x.*y"):
        validate(folder, model, cases=[Case("wrong", {"y": np.ones((2, 2, 16), np.float32)})])
    with pytest.raises(UsageError, match="dim 2 must be 16"):
        validate(folder, model, cases=[Case("wide", {"x": np.ones((2, 2, 8), np.float32)})])
    with pytest.raises(UsageError, match="expected a path, a PyTorch module or a runner to validate, got int"):
        validate(3, model)  # type: ignore[arg-type]
