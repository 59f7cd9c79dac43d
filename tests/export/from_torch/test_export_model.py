"""export_model as a whole: what is written, what is restored, what is refused, and that nothing is left behind."""

from __future__ import annotations

import errno
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy.export.from_torch import save as saving
from rmsnorm_deploy.export.from_torch.export_model import export_model, prepare
from rmsnorm_deploy.export.from_torch.save import PreparedModel, save
from rmsnorm_deploy.export.graph.metadata import PATH_KEY, SPEC_KEY, TARGET_KEY
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.export.onnx_io.owned_files import sha256
from rmsnorm_deploy.models.errors import MismatchError, UnsupportedError, UsageError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.models.small_models import Residual, WithoutNorm, residual_inputs


@pytest.fixture(scope="module")
def model() -> Residual:
    return Residual().eval()


@pytest.fixture(scope="module")
def prepared(model: Residual) -> PreparedModel:
    return prepare(model, inputs=residual_inputs())


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_runs_and_agrees_for_other_shapes(
    prepared: PreparedModel, model: Residual, target: str, tmp_path: Path
) -> None:
    result = save(prepared, tmp_path / "out", target)
    rng = np.random.default_rng(0)
    with OrtRunner(result.folder / "model.onnx") as runner:
        for shape in ((1, 1, 16), (5, 9, 16)):
            x = rng.standard_normal(shape).astype(np.float32)
            (got,) = runner.run({"x": x}).values()
            with torch.no_grad():
                wanted = model(torch.from_numpy(x)).numpy()
            assert np.abs(got - wanted).max() <= 8 * np.finfo(np.float32).eps * np.abs(wanted).max()


def test_manifest_describes_the_folder(prepared: PreparedModel, tmp_path: Path) -> None:
    result = save(prepared, tmp_path / "out", "plugin")
    on_disk = json.loads((result.folder / "manifest.json").read_text())
    assert on_disk == result.manifest
    assert on_disk["target"] == "plugin"
    assert on_disk["dtype"] == "float32"
    assert {path.name for path in result.folder.iterdir()} == set(result.files)
    for name, entry in on_disk["files"].items():
        assert entry["sha256"] == sha256(result.folder / name)
        assert entry["bytes"] == (result.folder / name).stat().st_size
    assert [site["path"] for site in on_disk["sites"]] == ["norms.0", "norms.1"]
    assert [site["calls"][0]["form"] for site in on_disk["sites"]] == ["residual_add", "residual_add"]
    assert on_disk["versions"]["torch"] == importlib.metadata.version("torch")
    assert on_disk["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["x_dim_0", "x_dim_1", 16]}]


def test_nodes_name_the_module_and_the_spec_after_loading(prepared: PreparedModel, tmp_path: Path) -> None:
    result = save(prepared, tmp_path / "out", "standard")
    nodes = [n for n in ir.load(result.folder / "model.onnx").graph if SPEC_KEY in n.metadata_props]
    assert [n.metadata_props[PATH_KEY] for n in nodes] == ["norms.0", "norms.1"]
    assert {n.op_type for n in nodes} == {"RMSNormalization"}
    specs = [NormSpec.from_json(n.metadata_props[SPEC_KEY]) for n in nodes]
    assert specs == [site.spec for site in result.recognition.sites]
    assert {n.metadata_props[TARGET_KEY] for n in nodes} == {"standard"}


def test_no_source_path_of_the_exporting_machine_is_in_the_file(prepared: PreparedModel, tmp_path: Path) -> None:
    result = save(prepared, tmp_path / "out", "primitives")
    assert str(Path(torch.__file__).parent).encode() not in (result.folder / "model.onnx").read_bytes()
    assert str(Path(__file__).parent).encode() not in (result.folder / "model.onnx").read_bytes()


def test_one_capture_serves_every_target_and_is_not_changed(prepared: PreparedModel, tmp_path: Path) -> None:
    first = save(prepared, tmp_path / "a", "ort")
    save(prepared, tmp_path / "b", "plugin")
    again = save(prepared, tmp_path / "c", "ort")
    assert (first.folder / "model.onnx").read_bytes() == (again.folder / "model.onnx").read_bytes()


def test_several_targets_go_to_subfolders(model: Residual, tmp_path: Path) -> None:
    results = export_model(model, tmp_path / "out", inputs=residual_inputs(), target=["standard", "ort"])
    assert [result.folder for result in results] == [tmp_path / "out" / "standard", tmp_path / "out" / "ort"]
    imports = [onnx.load(result.folder / "model.onnx").opset_import for result in results]
    assert [next(o.version for o in opsets if o.domain == "") for opsets in imports] == [23, 20]


def test_the_model_is_put_back(model: Residual, tmp_path: Path) -> None:
    own = Residual().train()
    own.norms[0].eval()
    before = {name: parameter.clone() for name, parameter in own.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in own.named_modules()}
    export_model(own, tmp_path / "out", inputs=residual_inputs())
    assert own.training
    assert not own.norms[0].training
    assert {name: set(vars(module)) for name, module in own.named_modules()} == attributes
    assert all(torch.equal(parameter, before[name]) for name, parameter in own.named_parameters())


def test_the_model_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = Residual().train()
    monkeypatch.setattr(torch.onnx, "export", _raiser(RuntimeError("no such operator")))
    with pytest.raises(UnsupportedError, match=r"Residual could not be captured.*no such operator"):
        export_model(own, tmp_path / "out", inputs=residual_inputs())
    assert own.training
    assert all("forward" not in vars(module) for module in own.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("bug")]
)
def test_an_interrupted_write_leaves_nothing(
    prepared: PreparedModel, error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write_half(_: Any, folder: Path, *more: Any) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise error

    monkeypatch.setattr(saving, "_write_model", write_half)
    expected = UsageError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        save(prepared, tmp_path / "out", "ort")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_earlier_one(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(prepared, tmp_path / "out", "ort")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(saving, "_write_model", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UsageError, match="No space left"):
        save(prepared, tmp_path / "out", "plugin")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_replaces_an_earlier_one_whole(prepared: PreparedModel, tmp_path: Path) -> None:
    save(prepared, tmp_path / "out", "ort")
    result = save(prepared, tmp_path / "out", "standard")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(result.files)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_with_a_file_of_the_user_in_it_is_not_replaced(prepared: PreparedModel, tmp_path: Path) -> None:
    before = save(prepared, tmp_path / "out", "ort")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds files that no export wrote.*: notes\.txt"):
        save(prepared, tmp_path / "out", "standard")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*before.files, "notes.txt"}


def test_a_folder_with_other_files_is_not_touched(prepared: PreparedModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no export wrote"):
        save(prepared, tmp_path, "ort")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_without_norms_is_exported(tmp_path: Path) -> None:
    inputs = {"x": torch.ones(2, 3, 8)}
    result = export_model(WithoutNorm(), tmp_path / "out", inputs=inputs, target="plugin")
    assert result.manifest["sites"] == []
    with OrtRunner(result.folder / "model.onnx") as runner:
        (got,) = runner.run({"x": np.zeros((4, 1, 8), np.float32)}).values()
    assert got.shape == (4, 1, 8)


def test_refused_arguments(model: Residual, tmp_path: Path) -> None:
    inputs = residual_inputs()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"target": "tensorflow"}, UsageError, "target: expected one of primitives, .*, got 'tensorflow'"),
        ({"opset": 17}, UnsupportedError, "opset: expected 18 to 23, got 17"),
        ({"target": "standard", "opset": 20}, UnsupportedError, "requires opset 23"),
        ({"dtype": "int8"}, UsageError, "dtype: expected one of .*, got 'int8'"),
        ({"dtype": "float64", "target": "plugin"}, UnsupportedError, "does not support float64.*primitives"),
        ({"with_past": True}, UnsupportedError, "no KV cache"),
        ({"inputs": {"y": inputs["x"]}}, UsageError, "failed on the example inputs"),
        ({"inputs": None}, UsageError, "does not read input_ids"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            export_model(model, tmp_path / "out", **{"inputs": inputs, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_another_dtype_exports_a_copy(tmp_path: Path) -> None:
    own = Residual()
    result = export_model(own, tmp_path / "out", inputs=residual_inputs(), dtype="float16")
    assert result.manifest["dtype"] == "float16"
    assert all(parameter.dtype == torch.float32 for parameter in own.parameters())
    assert result.manifest["inputs"][0]["dtype"] == "float16"


def test_a_nondeterministic_model_is_refused() -> None:
    class Noisy(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(())

    with pytest.raises(MismatchError, match="deterministic"):
        prepare(Noisy(), inputs=residual_inputs())


def test_static_export_fixes_every_dim(model: Residual, tmp_path: Path) -> None:
    result = export_model(model, tmp_path / "out", inputs=residual_inputs(), dynamic=False)
    assert result.manifest["inputs"][0]["shape"] == [2, 3, 16]


def test_a_norm_called_several_times(tmp_path: Path) -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.RMSNorm(16)
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(self.norm(x)) + self.norm(x * 3))

    own = Shared().eval()
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    prepared = prepare(own, inputs={"x": torch.randn(3, 16)})
    for target in TARGETS:
        result = save(prepared, tmp_path / target, target)
        assert len(result.manifest["sites"][0]["calls"]) == 3
        assert result.manifest["inputs"][0]["shape"] == ["x_dim_0", 16]
        with OrtRunner(result.folder / "model.onnx") as runner, torch.no_grad():
            (got,) = runner.run({"x": x}).values()
            assert np.abs(got - own(torch.from_numpy(x)).numpy()).max() < 4e-6


def test_weights_go_to_external_data(tmp_path: Path) -> None:
    result = export_model(Residual(32), tmp_path / "out", inputs={"x": torch.randn(2, 3, 32)})
    model = onnx.load(result.folder / "model.onnx", load_external_data=False)
    external = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    assert {name for name, size in sizes.items() if size == 32 * 32} == external
    assert len(external) == 2


def _raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail
