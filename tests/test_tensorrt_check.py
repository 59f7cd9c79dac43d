"""`python -m benchmarks.tensorrt_check` with the stand-in for TensorRT's runtime; engines are built by TensorRT-RTX."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from benchmarks.tensorrt_check import archive, run, stages
from benchmarks.tensorrt_check.products import usable
from benchmarks.tensorrt_check.quick import network_flags
from benchmarks.tensorrt_check.rows import DTYPES, FAMILIES, NORMS, Row, all_rows, passed
from benchmarks.tensorrt_check.table import row_line, steps_table
from benchmarks.tensorrt_check.worker import OUTPUT, Worker
from rmsnorm_deploy import __version__
from rmsnorm_deploy.models.errors import EnvironmentMissingError
from rmsnorm_deploy.models.tensors import to_numpy
from rmsnorm_deploy.runtime.engines import api, device
from tests.helpers.models.families import build
from tests.helpers.tensorrt.stand_in import StandIn

ROW = "rtx/qwen3/float32/native"
Check = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that exports leaves what it exported."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def check(stand_in: StandIn, tmp_path: Path, exports: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Runs the row in this process, where the stand-in is; returns the exit code and the rows."""
    export_model = stages.export_model

    def once(model: Any, place: Path, **options: Any) -> None:
        if not (exports / "qwen3").is_dir():
            export_model(model, exports / "qwen3", **options)
        shutil.copytree(exports / "qwen3", place)

    monkeypatch.setattr(stages, "export_model", once)

    def checked(*more: str) -> tuple[int, list[dict[str, Any]]]:
        place = tmp_path / "rows.json"
        given = ["--in-process", "--only", f"^{ROW}$", "--out", str(tmp_path / "out"), "--json", str(place)]
        code = run.main([*given, *more])
        return code, json.loads(place.read_text(encoding="utf-8"))["rows"]

    return checked


def states(row: dict[str, Any]) -> dict[str, str]:
    return {name: result["state"] for name, result in row["stages"].items()}


def test_a_row_passes(stand_in: StandIn, check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (row,) = check("--markdown", str(tmp_path / "table.md"))
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert states(row) == dict.fromkeys(stages.STAGES, "pass")
    lines = printed.splitlines()
    assert lines[: len(run.NEVER_RUN)] == [
        f"never run before on a GPU as of version {__version__}: {what}" for what in run.NEVER_RUN
    ]
    assert "NVIDIA L4 (sm_89), driver " in lines[len(run.NEVER_RUN) + 1]
    found = {name: result["figures"] for name, result in row["stages"].items()}
    assert {name: found["build"][name] for name in ("norms", "in_plugin", "plugin_layers", "precision")} == {
        "norms": 9, "in_plugin": 0, "plugin_layers": 0, "precision": ["float32/float32"],
    }  # fmt: skip
    assert 0 < found["validate"]["max_abs"] < 1e-4
    assert 0 < found["validate"]["of_allowed"] < 1
    assert found["validate"]["outputs"] > 10
    assert found["tokens"]["got"] == found["tokens"]["expected"]
    assert len(found["tokens"]["got"]) == 16
    assert found["run"]["provenance"]["gpu"] == {"name": "NVIDIA L4", "architecture": "sm_89"}
    assert found["step"]["microseconds"] > 0
    assert stand_in.behavior.most_at_once > 1
    assert [graph.name for graph in stand_in.behavior.graphs if graph is not None] == ["WHOLE_GRAPH_CAPTURE"]
    (line,) = [line for line in printed.splitlines() if line.startswith(f"| {ROW} ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == [ROW, "pass"]
    assert cells[3:5] == ["0", "float32/float32 (builder log)"]
    assert cells[7:12] == ["pass"] * 5
    assert line in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "None of 1 rows." in printed
    assert list((tmp_path / "out").iterdir()) == []


def test_a_stage_that_fails_leaves_an_archive_without_weights(
    stand_in: StandIn,
    check: Check,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stages after it still run; only some of them here, for the time."""
    some = {name: stages.STAGES[name] for name in ("export", "build", "run", "step")}
    monkeypatch.setattr(stages, "STAGES", some)
    stand_in.behavior.fail_at = 1
    log = tmp_path / "tests.log"
    log.write_text("1 failed\n", encoding="utf-8")
    code, (row,) = check("--attach", str(log))
    assert code == 1
    assert states(row) == {"export": "pass", "build": "pass", "run": "fail", "step": "pass"}
    printed = capsys.readouterr().out
    assert f"| {ROW} | **fail** |" in printed
    assert f"- {ROW}, run: RmsnormDeployError: " in printed
    with tarfile.open(tmp_path / "out" / archive.NAME) as packed:
        files = {member.name: packed.extractfile(member).read() for member in packed.getmembers()}  # type: ignore[union-attr]
    folder = f"failures/{ROW.replace('/', '-')}"
    assert set(files) == {
        "failures/README.txt", "failures/machine.json", "failures/attached/tests.log", f"{folder}/row.json",
        f"{folder}/model.engine.json", f"{folder}/build.log", f"{folder}/manifest.json", f"{folder}/model.onnx",
    }  # fmt: skip
    assert files["failures/attached/tests.log"] == b"1 failed\n"
    stage = json.loads(files[f"{folder}/row.json"])["stages"]["run"]
    assert "Cask convolution execution" in stage["text"]
    assert "Traceback" in stage["traceback"]
    assert json.loads(files["failures/machine.json"])["gpu"]["architecture"] == "sm_89"
    assert json.loads(files[f"{folder}/model.engine.json"])["profiles"]
    check_no_weights(b"".join(files.values()), files[f"{folder}/model.onnx"])


def check_no_weights(content: bytes, model: bytes) -> None:
    """No weight of Qwen3 is in the archive, and the graph still has its nodes and its weights' names and shapes."""
    weights = {name: to_numpy(value) for name, value in build("qwen3").named_parameters()}
    assert len(weights) > 20
    for name, value in weights.items():
        for array in (value, value.T):  # linear layers may be transposed
            assert np.ascontiguousarray(array).tobytes()[:64] not in content, name
    proto = onnx.load_from_string(model)
    assert archive.weight_bytes(proto) == 0
    assert len(model) < 200_000
    assert sum(node.op_type == "RMSNormalization" for node in proto.graph.node) == 9
    shapes = [tuple(tensor.dims) for tensor in proto.graph.initializer]
    assert (97, 32) in shapes or (32, 97) in shapes


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "cuda_device", lambda: None)
    assert run.main(["--out", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json")]) == 4
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "expected an NVIDIA GPU and its driver, got none. Nothing was written." in caught.err
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_no_installed_product_supports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "cuda_device", lambda: ("NVIDIA H100", 90))
    monkeypatch.setattr(api, "is_installed", lambda name: name == "rtx")
    monkeypatch.setattr(device, "open_device", lambda _index=0: None)
    assert run.main(["--out", str(tmp_path / "out")]) == 4
    message = capsys.readouterr().err
    assert "TensorRT is not installed" in message
    assert "TensorRT-RTX supports sm_75, sm_80, sm_86, sm_89, sm_120, sm_121; NVIDIA H100 is sm_90" in message

    def missing(_index: int = 0) -> None:
        raise EnvironmentMissingError("PyTorch was built without CUDA")

    monkeypatch.setattr(device, "open_device", missing)
    assert run.main(["--out", str(tmp_path / "out")]) == 4
    assert "PyTorch was built without CUDA" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rows_that_the_time_does_not_reach_are_listed(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = check("--seconds", "0", "--only", "^rtx/llama/float16")
    assert (code, rows) == (1, [])
    printed = capsys.readouterr().out
    assert printed.endswith("## Not run\n\n- rtx/llama/float16/native\n- rtx/llama/float16/plugin\n")
    assert "0 of 2 rows in 0 s" in printed
    assert json.loads((tmp_path / "rows.json").read_text("utf-8"))["left"] == [
        "rtx/llama/float16/native", "rtx/llama/float16/plugin",
    ]  # fmt: skip


def test_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = all_rows(["tensorrt", "rtx"])
    names = {row.name for row in rows}
    combined = {f"{runtime}/{f}/{d}/{n}" for runtime in api.RUNTIMES for f in FAMILIES for d in DTYPES for n in NORMS}
    assert names == combined | {"tensorrt/llama/float16/quick"}
    assert len(names) == len(rows)
    assert run.main(["--list", "--runtime", "tensorrt", "--only", "quick"]) == 0
    assert capsys.readouterr().out == "tensorrt/llama/float16/quick\n"
    given = run.parser().parse_args(["--deep", "qwen3/float16/plugin"])
    assert [row.name for row in run.selected(given, ["rtx"]) if row.deep] == ["rtx/qwen3/float16/plugin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "nothing"], "no row of rtx matches"), (["--attach", "missing.log"], "missing.log does not exist")],
)
def test_usage(stand_in: StandIn, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--runtime", "rtx", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.01, "took more than 0.01 s"), (100, "the process ended with exit code 1")]
)
def test_a_process_that_ends_or_hangs_fails_the_row(
    worker: Worker, tmp_path: Path, limit: float, expected: str
) -> None:
    """The row's folder is missing, so that the process ends by itself; before, it has to import much."""
    found: dict[str, Any] = {}
    row = Row("rtx", "llama", "float32", "native")
    worker.run(row, tmp_path / "missing", limit, lambda name, result: found.update({name: result}))
    assert {name: (result["state"], result["text"]) for name, result in found.items()} == {"start": ("fail", expected)}
    assert not passed(found, row)
    assert f"| {row.name} | **fail** | - | - | - |" in row_line(row, found)


@pytest.mark.skipif(api.is_installed("tensorrt"), reason="needs a machine without the full TensorRT")
def test_a_row_in_its_process_ends_with_what_failed(worker: Worker, tmp_path: Path) -> None:
    """An unknown family, and quick plugins without TensorRT; what the process prints is in the row's folder."""
    found: dict[str, Any] = {}
    row = Row("tensorrt", "unknown", "float16", "quick")
    worker.run(row, tmp_path, 100, lambda name, result: found.update({name: result}))
    texts = {name: (result["state"], result["text"]) for name, result in found.items()}
    assert texts.pop("export") == ("fail", "KeyError: 'unknown'")
    state, text = texts.pop("build")
    assert state == "fail"
    assert text.startswith("RmsnormDeployError: building with quick plugins ended with exit code 1: ")
    assert "TensorRT for Python is not installed" in text
    assert texts == dict.fromkeys(("run", "validate", "graphs", "contexts"), ("not run", "there is no engine"))
    assert "TensorRT for Python is not installed" in (tmp_path / "model.engine.log").read_text(encoding="utf-8")
    assert (tmp_path / OUTPUT).is_file()


def test_what_differs_is_said() -> None:
    one = {"logits": np.array([1.0, 2.0], np.float32)}
    assert stages.difference(one, {"logits": one["logits"].copy()}) is None
    assert stages.difference(one, {"logits": np.array([1.0, 2.5], np.float32)}) == (
        "logits: 1 of 2 elements differ, by at most 0.5"
    )
    assert stages.difference(one, {"logits": np.zeros((1,), np.float32)}) == "logits: expected shape [2], got [1]"
    half = np.array([1, 2], ml_dtypes.bfloat16)
    assert stages.difference({"y": half}, {"y": half + half}) == "y: 2 of 2 elements differ, by at most 2"


def test_steps_of_native_norms_and_of_the_plugin_are_compared() -> None:
    found = [
        (Row("rtx", "llama", "float16", norms), {"step": {"state": "pass", "figures": {"microseconds": time}}})
        for norms, time in (("native", 200.0), ("plugin", 150.0))
    ]
    assert steps_table(found).splitlines()[-1] == "| rtx/llama/float16 | 200 | 150 | 0.75 |"
    assert steps_table(found[:1]) == ""


def test_weights_are_stripped_wherever_they_are(tmp_path: Path) -> None:
    """Initializers, sparse ones, constants of nodes and of local functions; shapes and single floats stay."""
    text = """
        <ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        agraph (float[3] x, bool c) => (float[3] y)
        <float[3] w = {1.5, 2.5, 3.5}, int64[1] axes = {0}, float one = {7.25}>
        {
            k = Constant <value = float[3] {4.5, 5.5, 6.5}> ()
            e = Constant <value = float {0.125}> ()
            a = If (c) <
                then_branch = t () => (float[3] b) { b = Constant <value = float[3] {8.5, 9.5, 10.5}> () },
                else_branch = f () => (float[3] d) <float[3] v = {11.5, 12.5, 13.5}> { d = Identity (v) }
            >
            s = own.F (x)
            y = Sum (x, w, one, k, e, a, s)
        }
        <domain: "own", opset_import: ["" : 21]>
        F (x) => (z) { g = Constant <value = float[3] {14.5, 15.5, 16.5}> () z = Add (x, g) }
    """
    model = onnx.parser.parse_model(text)
    values = onnx.numpy_helper.from_array(np.array([17.5, 18.5], np.float32), "sparse")
    places = onnx.numpy_helper.from_array(np.array([0, 2], np.int64), "places")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, places, [3]))
    onnx.save(model, tmp_path / "model.onnx")
    assert archive.weight_bytes(model) > 0
    content = archive.without_weights(tmp_path / "model.onnx")
    for value in [n + 0.5 for n in (1, 2, 3, 4, 5, 6, *range(8, 19))] + [7.25]:
        assert np.float32(value).tobytes() not in content, value
    assert np.float32(0.125).tobytes() in content
    again = onnx.load_from_string(content)
    assert [(tensor.name, list(tensor.dims)) for tensor in again.graph.initializer] == [
        ("w", [3]), ("axes", [1]), ("one", []),
    ]  # fmt: skip
    assert onnx.numpy_helper.to_array(again.graph.initializer[1]).tolist() == [0]
    assert [node.op_type for node in again.graph.node] == [node.op_type for node in model.graph.node]


def test_a_model_that_cannot_be_read_is_said_in_the_archive(tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.onnx").write_bytes(b"not a model")
    archive.pack(tmp_path / archive.NAME, {}, {"row": (tmp_path, {})})
    with tarfile.open(fileobj=io.BytesIO((tmp_path / archive.NAME).read_bytes())) as packed:
        assert packed.extractfile("failures/row/model.onnx.txt").read().startswith(b"left out: ")  # type: ignore[union-attr]


def test_networks_of_quick_plugins_are_strongly_typed() -> None:
    class Flags:
        EXPLICIT_BATCH, STRONGLY_TYPED, PREFER_AOT_PYTHON_PLUGINS = 0, 1, 3

    class Newest:
        EXPLICIT_BATCH, PREFER_AOT_PYTHON_PLUGINS = 0, 3

    for kinds, expected in ((Flags, 0b1010), (Newest, 0b1000)):
        assert network_flags(type("trt", (), {"NetworkDefinitionCreationFlag": kinds})) == expected


def test_tokens_may_differ_by_a_tie_in_half_precision_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logits = torch.zeros(4)
    logits[:2] = 1.0
    monkeypatch.setattr(stages, "torch_tokens", lambda *_: ([0, 3], [logits, logits], 0, set()))
    monkeypatch.setattr(stages, "generate", lambda *_, **__: type("Generation", (), {"ids": [1, 3]}))
    for dtype, allowed in (("float16", True), ("bfloat16", True), ("float32", False)):
        state = stages.State("rtx", "llama", dtype, "native", "auto", False, tmp_path)
        outcome = stages.generated(state)
        assert outcome.passed is allowed
        assert "token 1 differs" in outcome.text


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_a_row_on_this_gpu(tmp_path: Path) -> None:
    """One row in its process, with the TensorRT of this machine."""
    runtimes, reasons = usable(api.RUNTIMES)
    if not runtimes:
        pytest.skip(f"needs a GPU that an installed TensorRT supports: {'; '.join(reasons)}")
    place = tmp_path / "rows.json"
    only = f"^{runtimes[0]}/llama/float16/native$"
    assert run.main(["--only", only, "--out", str(tmp_path), "--json", str(place)]) == 0
    (row,) = json.loads(place.read_text(encoding="utf-8"))["rows"]
    assert states(row) == dict.fromkeys(stages.STAGES, "pass")
    assert row["stages"]["build"]["figures"]["layer_source"] == "inspector"
