"""Engines built with TensorRT-RTX: the files beside them, files that are never replaced, and every error message."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from rmsnorm_deploy.models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from rmsnorm_deploy.plugins.tensorrt.images import MAGIC, unpack
from rmsnorm_deploy.runtime.engines import api
from rmsnorm_deploy.runtime.engines.engine_file import SCHEMA, read_record
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions
from rmsnorm_deploy.runtime.tensorrt.plan import plan_build, request_of
from rmsnorm_deploy.runtime.tensorrt.process import LOG_HEADER, Progress, run_worker

pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")

WIDTH = 32
FAST: dict[str, Any] = {"architectures": (89,), "plugin": "python"}


def requested(
    source: Path, folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None, **choices: Any
) -> dict[str, Any]:
    """What the worker answers to a request that was changed by hand."""
    options = BuildOptions(**{**FAST, **choices})
    folder.mkdir(exist_ok=True)
    with plan_build(source, options) as plan:
        request = request_of(plan)
        change(request)
        return run_worker(request, folder, options, lambda _: None)


def refused(kind: type[RmsnormDeployError], source: Path, tmp_path: Path, **choices: Any) -> str:
    """The message of a build that fails; no engine, record or partial folder is left."""
    with pytest.raises(kind) as caught:
        build_engine(source, tmp_path / "out" / "x.engine", **{**FAST, **choices})
    assert type(caught.value) is kind
    left = {file.name for file in (tmp_path / "out").glob("*")} if (tmp_path / "out").exists() else set()
    assert left <= {"x.engine.log"}
    return str(caught.value)


# Files beside an engine ----------------------------------------------------------------------------------------


def test_an_engine_its_record_and_its_log(files: Any, tmp_path: Path) -> None:
    source, place = files.plugin(dtype=TensorProto.FLOAT16), tmp_path / "sub" / "model.engine"
    seen: list[Progress] = []
    engine = build_engine(source, place, progress=seen.append, **FAST)
    record = json.loads((tmp_path / "sub" / "model.engine.json").read_text())
    assert record == engine.record == read_record(place)
    assert record["schema"] == SCHEMA == "rmsnorm_deploy.engine/1"
    assert record["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest()
    assert record["bytes"] == place.stat().st_size
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["model"] == {"path": str(source), "sha256": digest, "folder": None, "manifest": {}, "end_tokens": []}
    assert (record["runtime"]["name"], record["runtime"]["title"]) == ("rtx", "TensorRT-RTX")
    assert re.fullmatch(r"\d+(\.\d+)+", record["runtime"]["version"])
    assert record["architectures"] == ["sm_89"]
    assert (record["plugin"]["kind"], record["plugin_layers"], record["warnings"]) == ("python", 1, [])
    (norm,) = record["norms"]
    assert (norm["path"], norm["form"], norm["plugin"]) == ("norm", "plain", True)
    assert (norm["precision"], norm["statistics"], norm["others"]) == ("float16", "float32", 0)
    assert norm["layer"].startswith("norm")
    (kernel,) = record["kernels"]
    assert (kernel["operator"], kernel["width"], kernel["dtype"]) == ("RMSNorm", WIDTH, "float16")
    assert kernel["architectures"] == [89]
    assert kernel["bytes"] > 10_000
    assert record["inputs"] == [{"name": "x", "dims": ["batch", "sequence", WIDTH]}]
    assert record["profiles"] == [{"x": [[1, 1, WIDTH], [1, 128, WIDTH], [8, 4096, WIDTH]]}]
    assert record["options"] == BuildOptions(**FAST).to_dict()
    log = (tmp_path / "sub" / record["log"]).read_text()
    assert log.startswith(f"{LOG_HEADER} {source}\n")
    assert "LayerType: custom_layer" in log
    assert sorted(file.name for file in place.parent.iterdir()) == [
        "model.engine", "model.engine.json", "model.engine.log"
    ]  # fmt: skip
    phases = [progress.phase for progress in seen]
    assert phases[:2] == ["reading the model", "parsing"]
    assert any(progress.steps and progress.step == progress.steps for progress in seen)


def test_the_engine_carries_its_kernels(files: Any, tmp_path: Path) -> None:
    content = build_engine(files.plugin(), tmp_path / "m.engine", **FAST).path.read_bytes()
    images = unpack(content[content.index(MAGIC) :])
    assert (images.width, images.dtype, images.architectures) == (WIDTH, "float32", [89])
    assert [image.kind for image in images.images] == ["cubin", "cubin", "ptx", "ptx"]
    assert images.pack() in content


def test_the_command_line_prints_the_same(
    files: Any, tmp_path: Path, rmsnorm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RMSNORM_PROGRESS", "1")
    place = tmp_path / "m.engine"
    found = rmsnorm(
        "build", files.plugin(), "-o", place, "--arch", "sm_89", "--plugin", "python",
        "--profile", "x:1x1x32,2x4x32,4x8x32", "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    content, record = found.json, json.loads(Path(f"{place}.json").read_text())
    assert content["engine"] == str(place)
    assert (content["record"], content["log"]) == (f"{place}.json", f"{place}.log")
    for key in ("bytes", "runtime", "architectures", "plugin", "plugin_layers", "norms", "profiles", "warnings"):
        assert content[key] == record[key], key
    assert content["plugin_layers"] == 1
    assert [(row["path"], row["precision"], row["plugin"]) for row in content["norms"]] == [("norm", "float32", True)]
    assert content["norms"][0]["layer"].startswith("norm")
    assert content["profiles"] == [{"x": [[1, 1, 32], [2, 4, 32], [4, 8, 32]]}]
    assert "... parsing" in found.err


def test_the_command_line_shows_a_table(files: Any, tmp_path: Path, rmsnorm: Any) -> None:
    place = tmp_path / "m.engine"
    found = rmsnorm("build", files.plugin(), "-o", place, "--arch", "8.9", "--plugin", "python")
    assert found.code == 0, found.err
    assert re.search(r"^norm +plain +plugin +float32 +float32 +norm", found.out, re.M)
    assert "plugin layers: 1 of 1 norms (plugin: python)" in found.out
    assert "profile 0: x 1x1x32, 1x128x32, 8x4096x32" in found.out


def test_native_runs_the_local_function(files: Any, tmp_path: Path) -> None:
    record = build_engine(files.plugin(), tmp_path / "m.engine", norm="native", **FAST).record
    assert (record["plugin_layers"], record["plugin"]["kind"], record["kernels"]) == (0, "none", [])
    assert record["plugin"]["reason"] == "--norm native"
    (norm,) = record["norms"]
    assert (norm["plugin"], norm["precision"]) == (False, "float32")
    assert MAGIC not in (tmp_path / "m.engine").read_bytes()


def test_native_needs_the_local_function(files: Any, tmp_path: Path) -> None:
    message = refused(UnsupportedError, files.plugin(functions=[]), tmp_path, norm="native")
    assert "has no local functions, so --norm native cannot build it" in message


def test_every_norm_of_a_plain_file_can_go_to_the_plugin(files: Any, tmp_path: Path) -> None:
    record = build_engine(files.primitives(), tmp_path / "m.engine", norm="plugin", **FAST).record
    assert record["plugin_layers"] == 1
    assert [row["plugin"] for row in record["norms"]] == [True]
    assert record["model"]["path"].endswith("model.onnx")  # the file that was asked for, not the rewritten one


def test_a_file_without_norms_has_none_for_the_plugin(files: Any, tmp_path: Path) -> None:
    source = files.matmul()
    assert "contains no norm that the plugin supports" in refused(UnsupportedError, source, tmp_path, norm="plugin")
    record = build_engine(source, tmp_path / "m.engine", **FAST).record
    assert (record["norms"], record["plugin_layers"]) == ([], 0)
    assert record["plugin"]["reason"] == "no norm of the file is a plugin node"


def test_a_residual_add_in_the_plugin(files: Any, tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.ones(WIDTH, np.float32), "scale")]
    nodes = [files.norm("AddRMSNorm"), helper.make_node("Add", ["n", "sum"], ["y"], "last")]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", WIDTH]) for name in ("x", "r")]
    source = files.save(nodes, weights, inputs=inputs, functions=[files.function("AddRMSNorm")])
    record = build_engine(source, tmp_path / "m.engine", **FAST).record
    assert (record["plugin_layers"], record["norms"][0]["form"]) == (1, "residual_add")
    assert record["kernels"][0]["operator"] == "AddRMSNorm"


# What is never replaced -----------------------------------------------------------------------------------------


def test_an_earlier_engine_of_ours_is_replaced(files: Any, tmp_path: Path) -> None:
    place = tmp_path / "m.engine"
    build_engine(files.matmul(name="first.onnx"), place, **FAST)
    source = files.primitives(name="second.onnx")
    record = build_engine(source, place, **FAST).record
    assert read_record(place) == record
    assert record["model"]["path"] == str(source)
    assert record["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest()
    assert str(source) in (tmp_path / "m.engine.log").read_text()


@pytest.mark.parametrize("name", ["m.engine", "m.engine.json", "m.engine.log"])
@pytest.mark.parametrize("how", ["file", "folder", "link"])
def test_a_foreign_file_stays(name: str, how: str, files: Any, tmp_path: Path) -> None:
    foreign = tmp_path / name
    if how == "file":
        foreign.write_text('{"schema": "somebody else\'s"}')
    elif how == "folder":
        foreign.mkdir()
    else:
        foreign.symlink_to(tmp_path / "elsewhere")
    before = sorted((file.name, file.is_symlink()) for file in tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"name another|got the directory") as caught:
        build_engine(files.matmul(), tmp_path / "m.engine", **FAST)
    assert str(foreign) in str(caught.value)
    assert sorted((file.name, file.is_symlink()) for file in tmp_path.iterdir()) == before
    if how == "file":
        assert foreign.read_text() == '{"schema": "somebody else\'s"}'


def test_a_link_to_an_engine_of_ours_stays(files: Any, tmp_path: Path) -> None:
    place = tmp_path / "m.engine"
    build_engine(files.matmul(), place, **FAST)
    place.rename(tmp_path / "real")
    place.symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="exists and is not an engine that rmsnorm built"):
        build_engine(files.matmul(), place, **FAST)
    assert place.is_symlink()


def test_the_models_own_files_stay(files: Any, tmp_path: Path) -> None:
    source = files.matmul(external=True)
    before = source.read_bytes()
    for place in (source, Path(f"{source}.data")):
        with pytest.raises(UsageError, match="name another"):
            build_engine(source, place, **FAST)
    # the model's file would be the engine's record
    named = files.matmul(name="net.json")
    with pytest.raises(UsageError, match="name another file"):
        build_engine(named, files.folder / "net", **FAST)
    assert source.read_bytes() == before


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "-o: expected the engine's file"), (("-o", ""), "-o: expected the engine's file"),
    (("-o", " "), "-o: expected the engine's file"), (("-o", "."), "got the directory"),
    (("-o", "/"), "got the directory"),
])  # fmt: skip
def test_no_place_for_the_engine(arguments: tuple[str, ...], message: str, files: Any, rmsnorm: Any) -> None:
    found = rmsnorm("build", files.matmul(), *arguments)
    assert (found.code, found.out) == (2, "")
    assert message in found.err


def test_a_parent_that_cannot_be_written(files: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=rf"cannot write to {tmp_path}/file: "):
        build_engine(files.matmul(), tmp_path / "file" / "m.engine", **FAST)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UsageError, match=r"cannot write to .*closed: Permission denied"):
            build_engine(files.matmul(), tmp_path / "closed" / "m.engine", **FAST)


# Values that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choices", "message"), [
    ({"runtime": "openvino"}, "runtime: expected tensorrt or rtx, got 'openvino'."),
    ({"norm": "fused"}, "norm: expected one of auto, plugin, native, got 'fused'."),
    ({"plugin": "rust"}, "plugin: expected one of auto, library, python, got 'rust'."),
    ({"workspace": 0}, "workspace: expected at least 1 MiB, got 0."),
    ({"memory_limit": -5}, "memory_limit: expected at least 1 MiB, got -5."),
])  # fmt: skip
def test_wrong_options(choices: dict[str, Any], message: str, files: Any, tmp_path: Path) -> None:
    assert refused(UsageError, files.matmul(), tmp_path, **choices) == message


@pytest.mark.parametrize(("option", "value"), [("--runtime", "openvino"), ("--norm", "fused"), ("--plugin", "rust")])
def test_wrong_options_on_the_command_line(option: str, value: str, files: Any, tmp_path: Path, rmsnorm: Any) -> None:
    found = rmsnorm("build", files.matmul(), "-o", tmp_path / "m.engine", option, value, "--json")
    assert (found.code, found.json["error"]["kind"]) == (2, "UsageError")
    assert value in found.json["error"]["message"]


@pytest.mark.parametrize("architecture", [90, 100, 61])
def test_architectures_that_rtx_does_not_know(architecture: int, files: Any, tmp_path: Path) -> None:
    message = refused(UnsupportedError, files.matmul(), tmp_path, architectures=(architecture,))
    known = "sm_75, sm_80, sm_86, sm_89, sm_120, sm_121"
    assert message == f"TensorRT-RTX builds for {known}, not for sm_{architecture}."


@pytest.mark.parametrize("text", ["sm_x", "ampere", "", "sm_8"])
def test_architectures_that_are_none(text: str, files: Any, tmp_path: Path, rmsnorm: Any) -> None:
    found = rmsnorm("build", files.matmul(), "-o", tmp_path / "m.engine", "--arch", text)
    assert found.code == 2
    assert f"architecture: expected a text such as sm_86, got {text!r}" in found.err


def test_a_product_that_is_not_installed(
    files: Any, tmp_path: Path, rmsnorm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "is_installed", lambda runtime: runtime == "rtx")
    found = rmsnorm("build", files.matmul(), "-o", tmp_path / "m.engine", "--runtime", "tensorrt")
    assert found.code == EnvironmentMissingError.exit_code == 4
    assert 'install: pip install "rmsnorm-deploy[tensorrt]"' in found.err
    assert "(installed here: TensorRT-RTX, --runtime rtx)" in found.err
    assert not list(tmp_path.glob("m.engine*"))


def test_a_plugin_library_that_is_not_there(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMSNORM_DEPLOY_PLUGIN", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    message = refused(EnvironmentMissingError, files.plugin(), tmp_path, plugin="library")
    assert f"expected {tmp_path}/data/rmsnorm-deploy/plugin/librmsnorm_deploy.so" in message
    assert message.endswith("Build it with: rmsnorm plugin build")
    named = {"plugin": "library", "plugin_library": str(tmp_path / "no.so")}
    assert f"{tmp_path}/no.so does not exist" in refused(UsageError, files.plugin(), tmp_path, **named)


def test_a_plugin_library_that_is_none(files: Any, tmp_path: Path) -> None:
    library = tmp_path / "text.so"
    library.write_text("no library")
    message = refused(UsageError, files.plugin(), tmp_path, plugin="library", plugin_library=str(library))
    assert str(library) in message
    assert "TensorRT cannot load it" in message or "got none" in message


def test_a_limit_of_memory(files: Any, tmp_path: Path) -> None:
    message = refused(RmsnormDeployError, files.matmul(), tmp_path, memory_limit=50)
    assert re.match(
        r"TensorRT-RTX's builder used \d+ MiB of memory, more than --memory-limit 50, and was terminated.", message
    )
    assert int(re.findall(r"\d+", message)[0]) > 50


def test_flags_that_fail_without_a_gpu_say_so(files: Any, tmp_path: Path) -> None:
    message = refused(RmsnormDeployError, files.matmul(), tmp_path, version_compatible=True)
    assert message.startswith("the builder returned no engine: ")
    assert (tmp_path / "out" / "x.engine.log").read_text().startswith(LOG_HEADER)
    assert message.endswith(f"(log: {tmp_path}/out/x.engine.log)")


# Traps: files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not an ONNX model"), (b"just a text\n", "not an ONNX model"), (b"\x00" * 64, "not an ONNX model"),
])  # fmt: skip
def test_files_that_are_not_models(content: bytes, message: str, tmp_path: Path) -> None:
    source = tmp_path / "x.onnx"
    source.write_bytes(content)
    found = refused(UsageError, source, tmp_path)
    assert message in found
    assert str(source) in found


def test_a_graph_without_nodes(files: Any, tmp_path: Path) -> None:
    source = files.save([], [], output="x")
    assert "the graph has no nodes, so there is nothing to build" in refused(UsageError, source, tmp_path)


def test_no_file(tmp_path: Path) -> None:
    assert f"{tmp_path}/no.onnx does not exist" in refused(UsageError, tmp_path / "no.onnx", tmp_path)


def test_float64_is_refused_or_accepted(files: Any, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], "widen", to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["wide", "factor"], ["product"], "times"),
        helper.make_node("Cast", ["product"], ["y"], "narrow", to=TensorProto.FLOAT),
    ]
    source = files.save(nodes, [numpy_helper.from_array(np.array(2.0), "factor")])
    message = refused(UnsupportedError, source, tmp_path)
    assert "float64 values, which TensorRT silently computes in float32: factor, Cast 'widen'." in message
    assert "--float64-as-float32" in message
    assert build_engine(source, tmp_path / "m.engine", float64_as_float32=True, **FAST).record["bytes"] > 0


@pytest.mark.parametrize("where", ["input", "constant", "eye", "branch"])
def test_float64_is_found_wherever_it_hides(where: str, files: Any, tmp_path: Path) -> None:
    double = numpy_helper.from_array(np.ones(1), "one")
    nodes = {
        "input": [helper.make_node("Identity", ["x"], ["d"], "d")],
        "constant": [helper.make_node("Constant", [], ["d"], "d", value=double)],
        "eye": [helper.make_node("EyeLike", ["square"], ["d"], "d", dtype=TensorProto.DOUBLE)],
        "branch": [
            helper.make_node(
                "If", ["flag"], ["d"], "choice",
                then_branch=helper.make_graph([helper.make_node("Constant", [], ["a"], "d", value=double)], "t", [],
                                              [helper.make_tensor_value_info("a", TensorProto.DOUBLE, [1])]),
                else_branch=helper.make_graph([helper.make_node("Constant", [], ["b"], "e", value=double)], "e", [],
                                              [helper.make_tensor_value_info("b", TensorProto.DOUBLE, [1])]),
            )
        ],
    }[where]  # fmt: skip
    nodes.append(helper.make_node("Cast", ["d"], ["y"], "narrow", to=TensorProto.FLOAT))
    weights = [
        numpy_helper.from_array(np.array(True), "flag"),
        numpy_helper.from_array(np.ones((2, 2), "f4"), "square"),
    ]
    dtype = TensorProto.DOUBLE if where == "input" else TensorProto.FLOAT
    source = files.save(nodes, weights, dtype=dtype, out_dtype=TensorProto.FLOAT, dims=("b", 4))
    assert "float64 values, which TensorRT silently computes in float32" in refused(UnsupportedError, source, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_external_data_that_is_not_all_there(damage: str, files: Any, tmp_path: Path) -> None:
    source = files.matmul(external=True)
    data = Path(f"{source}.data")
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-1])
    message = refused(UsageError, source, tmp_path)
    assert str(data) in message
    assert {"missing": "is missing", "short": "is truncated"}[damage] in message


def test_external_data_builds(files: Any, tmp_path: Path) -> None:
    record = build_engine(files.primitives(external=True), tmp_path / "m.engine", **FAST).record
    assert [row["precision"] for row in record["norms"]] == ["float32"]


def test_external_data_that_vanishes_before_the_parser_reads_it(files: Any, tmp_path: Path) -> None:
    source = files.matmul(external=True)
    with pytest.raises(UnsupportedError, match=r"model.onnx: TensorRT's parser rejects it: .*w"):
        requested(source, tmp_path / "work", lambda _: Path(f"{source}.data").unlink())
    assert "model.onnx.data" in (tmp_path / "work" / "build.log").read_text()


def test_an_operator_that_nobody_knows(files: Any, tmp_path: Path) -> None:
    source = files.save([helper.make_node("Frobnicate", ["x"], ["y"], "odd one", domain="mystery")], [])
    message = refused(UnsupportedError, source, tmp_path)
    assert "TensorRT's parser rejects it: " in message
    assert "node odd one (Frobnicate): " in message


def test_a_text_that_vanishes_into_an_empty_network(files: Any, tmp_path: Path) -> None:
    def change(request: dict[str, Any]) -> None:
        (tmp_path / "text.onnx").write_text("no model")
        request["model"] = str(tmp_path / "text.onnx")

    with pytest.raises(RmsnormDeployError, match=r"found no layers; expected an ONNX model|parser rejects it"):
        requested(files.matmul(), tmp_path / "work", change)


def test_fp8_needs_an_architecture_that_has_it(files: Any, tmp_path: Path) -> None:
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    weights = [
        numpy_helper.from_array(np.float32(0.1), "s"),
        zero,
        numpy_helper.from_array(np.ones((32, 32), "f4"), "w"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["d"], "d"),
        helper.make_node("QuantizeLinear", ["w", "s", "zero"], ["qw"], "qw"),
        helper.make_node("DequantizeLinear", ["qw", "s", "zero"], ["dw"], "dw"),
        helper.make_node("MatMul", ["d", "dw"], ["y"], "y"),
    ]
    source = files.save(nodes, weights)
    message = refused(RmsnormDeployError, source, tmp_path, architectures=(80,))
    assert message.startswith("the builder returned no engine: ")
    assert "Cannot compile for target(s)" in message
    assert build_engine(source, tmp_path / "m.engine", **FAST).record["architectures"] == ["sm_89"]


# Traps: profiles ------------------------------------------------------------------------------------------------


def cached(files: Any) -> Path:
    """A model with a past, new tokens and a mask over both."""
    shapes = {
        "x": ("batch", "sequence", 8), "past": ("batch", "past_sequence", 8), "mask": ("batch", "total_sequence", 1),
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in shapes.items()]
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["all"], "concat", axis=1),
        helper.make_node("Mul", ["all", "mask"], ["y"], "mul"),
    ]
    return files.save(nodes, [], inputs=inputs)


@pytest.mark.parametrize(("text", "message"), [
    ("nobody:1x1x8,1x1x8,1x1x8", "the model has no input or dim 'nobody'; its inputs are x, past, mask"),
    ("x:1x1,1x1,1x1", "x has 3 dims (batch x sequence x 8), got 2"),
    ("x:1x1x9,1x1x9,1x1x9", "x: dim 2 is fixed at 8"),
    (
        "x:1x1x8,1x1x8,1x16x8 past_sequence:0,10,100 total_sequence:1,11,100",
        "usual value of past_sequence (0,10,100) plus sequence (1,1,16) = 1,11,116",
    ),
])  # fmt: skip
def test_profiles_that_are_wrong(text: str, message: str, files: Any, tmp_path: Path) -> None:
    found = refused(UsageError, cached(files), tmp_path, profiles=(text,))
    assert found.startswith(f"--profile {text!r}: ")
    assert message in found


def test_a_prompt_and_a_step_are_two_profiles(files: Any, tmp_path: Path) -> None:
    prompt, step = build_engine(cached(files), tmp_path / "m.engine", **FAST).record["profiles"]
    assert prompt["past"] == [[1, 0, 8], [1, 0, 8], [8, 0, 8]]
    assert step["past"] == [[1, 0, 8], [1, 128, 8], [8, 4095, 8]]
    assert step["x"] == [[1, 1, 8], [1, 1, 8], [8, 1, 8]]


@pytest.mark.parametrize(("shapes", "message"), [
    ({"x": [[4, 1, 32], [2, 1, 32], [1, 1, 32]]}, r'profile 0: TensorRT rejects the shapes \{"x"'),
    ({"x": [[1, 1], [1, 1], [1, 1]]}, "tensor x has 3 dimensions but profile 0 has 2 dimensions"),
    ({"x": [[1, 1, 31], [1, 1, 31], [1, 1, 31]]}, r"TensorRT rejects the shapes|the builder returned no engine"),
    ({}, "profile 0: no shapes for input x, whose dims are dynamic"),
    ({"other": [[1], [1], [1]]}, "profile 0: the network has no input 'other'; it has x"),
])  # fmt: skip
def test_shapes_that_tensorrt_takes_without_a_word(
    shapes: dict[str, Any], message: str, files: Any, tmp_path: Path
) -> None:
    with pytest.raises(RmsnormDeployError, match=message):
        requested(files.matmul(), tmp_path / "work", lambda request: request.update(profiles=[shapes]))


# Traps: the plugin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"plugin_namespace": "else"}, "plugin_namespace: expected 'rmsnorm_deploy', got 'else'"),
    ({"plugin_namespace": None}, "plugin_namespace: expected 'rmsnorm_deploy', got None"),
    ({"plugin_version": "2"}, "plugin_version: expected '1', got '2'"),
    ({"scale_offset": 0.5}, "scale_offset: expected 0 or 1, got 0.5"),
    ({"scale_offset": 1}, "scale_offset: expected an attribute of type FLOAT, got INT"),
    ({"epsilon": -1.0}, "epsilon: expected a finite number of at least 0, got -1.0"),
    ({"epsilon": float("nan")}, "epsilon: expected a finite number of at least 0, got nan"),
    ({"epsilon": None}, "attribute epsilon is missing"),
    ({"scale_type": None}, "attribute scale_type is missing"),
    ({"scale_type": 11}, "scale_type: expected one of 1 (float32), 10 (float16), 16 (bfloat16), got 11"),
])  # fmt: skip
def test_plugin_nodes_that_are_wrong(changes: dict[str, Any], message: str, files: Any, tmp_path: Path) -> None:
    found = refused(UnsupportedError, files.plugin(**changes), tmp_path)
    assert message in found
    assert "RMSNorm 'norm'" in found


def test_a_plugin_node_without_its_version_builds(files: Any, tmp_path: Path) -> None:
    assert build_engine(files.plugin(plugin_version=None), tmp_path / "m.engine", **FAST).record["plugin_layers"] == 1


@pytest.mark.parametrize("inputs", [["x"], ["x", ""]])
def test_a_plugin_node_without_its_scale(inputs: list[str], files: Any, tmp_path: Path) -> None:
    message = refused(UnsupportedError, files.plugin(inputs=inputs, functions=[]), tmp_path)
    assert "RMSNorm 'norm': expected 2 inputs, got 1" in message


def test_a_plugin_node_in_a_branch(files: Any, tmp_path: Path) -> None:
    out = [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)]
    branches = {
        "then_branch": helper.make_graph([files.norm()], "then", [], out),
        "else_branch": helper.make_graph([helper.make_node("Identity", ["x"], ["n"], "same")], "else", [], out),
    }
    weights = [numpy_helper.from_array(np.ones(32, "f4"), "scale"), numpy_helper.from_array(np.array(True), "flag")]
    node = helper.make_node("If", ["flag"], ["y"], "choice", **branches)
    message = refused(UnsupportedError, files.save([node], weights, functions=[files.function()]), tmp_path)
    assert "RMSNorm 'norm' is in the body of a control-flow node" in message
    assert "rmsnorm rewrite --target primitives" in message


def test_a_plugin_node_in_a_local_function(files: Any, tmp_path: Path) -> None:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("rmsnorm_deploy", 1)]
    function = helper.make_function("blocks", "Block", ["x", "scale"], ["n"], [files.norm()], imports)
    node = helper.make_node("Block", ["x", "scale"], ["y"], "block", domain="blocks")
    weights = [numpy_helper.from_array(np.ones(32, "f4"), "scale")]
    source = files.save([node], weights, functions=[function, files.function()])
    message = refused(UnsupportedError, source, tmp_path)
    assert "RMSNorm 'norm' is in the local function Block" in message


def test_a_function_of_the_plugins_name_in_another_domain(files: Any, tmp_path: Path) -> None:
    imports = [helper.make_opsetid("", 20)]
    other = helper.make_function(
        "theirs", "RMSNorm", ["x", "scale"], ["n"], [helper.make_node("Mul", ["x", "scale"], ["n"])], imports
    )
    message = refused(UnsupportedError, files.plugin(functions=[files.function(), other]), tmp_path)
    assert "the local function RMSNorm of domain 'rmsnorm_deploy'" in message or "of domain 'theirs'" in message
    assert "identifies functions by name only" in message


def test_a_node_that_the_network_lacks(files: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        requested(files.plugin(), tmp_path / "work", lambda request: request["plugin_nodes"].append("gone"))
    message = str(caught.value)
    assert "the plugin runs 1 of 2 norms, and TensorRT would use the local function for the others: gone." in message
    assert "Its registry has RMSNorm version 1 of namespace 'rmsnorm_deploy'" in message


def test_a_plugin_that_the_parser_does_not_find(files: Any, tmp_path: Path) -> None:
    """A namespace that nobody registered: the parser takes the local function without a word."""
    other = files.plugin(plugin_namespace="else", name_of_file="other.onnx")
    with pytest.raises(UnsupportedError) as caught:
        requested(files.plugin(), tmp_path / "work", lambda request: request.update(model=str(other)))
    assert "the plugin runs 0 of 1 norms" in str(caught.value)
    assert "expected namespace 'rmsnorm_deploy', version '1', and TensorRT 10.7 or later" in str(caught.value)


def test_nobody_is_registered(files: Any, tmp_path: Path) -> None:
    def change(request: dict[str, Any]) -> None:
        request["plugin"] = {"kind": "none", "library": None}

    result = requested(files.plugin(), tmp_path / "work", change)
    assert (result["plugin_layers"], [row["plugin"] for row in result["norms"]]) == (0, [False])


def test_a_library_that_brings_other_plugins(files: Any, tmp_path: Path) -> None:
    import _ctypes

    def change(request: dict[str, Any]) -> None:
        request["plugin"] = {"kind": "library", "library": _ctypes.__file__}

    with pytest.raises(UsageError, match=r"TensorRT cannot load it|expected creators RMSNorm, AddRMSNorm"):
        requested(files.plugin(), tmp_path / "work", change)


def test_a_worker_that_raises_reports_the_error(files: Any, tmp_path: Path) -> None:
    with pytest.raises(RmsnormDeployError, match="KeyError: 'plugin_nodes'"):
        requested(files.matmul(), tmp_path / "work", lambda request: request.pop("plugin_nodes"))
    assert "Traceback" in (tmp_path / "work" / "build.log").read_text()


@pytest.mark.parametrize(("scale", "message"), [
    (numpy_helper.from_array(np.ones(16, "f4"), "scale"), "scale: expected shape (32,), got (16,)"),
    (numpy_helper.from_array(np.ones((1, 32), "f4"), "scale"), "scale: expected shape (32,), got (1, 32)"),
    (numpy_helper.from_array(np.ones(32, "f2"), "scale"), "expected inputs of one dtype, got another for scale"),
])  # fmt: skip
def test_scales_that_the_kernel_cannot_read(scale: Any, message: str, files: Any, tmp_path: Path) -> None:
    found = refused(UnsupportedError, files.plugin(scale=scale), tmp_path)
    assert message in found
    assert "norm: " in found


def test_a_width_that_is_not_known(files: Any, tmp_path: Path) -> None:
    nodes = [files.norm(), helper.make_node("Relu", ["n"], ["y"], "relu")]
    weights = [numpy_helper.from_array(np.ones(32, "f4"), "scale")]
    source = files.save(nodes, weights, dims=("batch", "sequence", "width"), functions=[files.function()])
    message = refused(UnsupportedError, source, tmp_path)
    assert "norm: x: expected a last dim that is known when the engine is built, got shape (-1, -1, -1)" in message


def test_a_scale_type_that_x_does_not_have(files: Any, tmp_path: Path) -> None:
    message = refused(UnsupportedError, files.plugin(scale_type=10), tmp_path)
    assert "scale_type: expected 1 for X of float32, got 10" in message


def test_plugin_nodes_without_names_are_counted(files: Any, tmp_path: Path) -> None:
    record = build_engine(files.plugin(name=""), tmp_path / "m.engine", **FAST).record
    assert (record["plugin_layers"], [row["plugin"] for row in record["norms"]]) == (1, [True])


def test_a_residual_of_another_shape(files: Any, tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.ones(WIDTH, np.float32), "scale")]
    nodes = [files.norm("AddRMSNorm"), helper.make_node("Relu", ["n"], ["y"], "last")]
    shapes = {"x": [4, WIDTH], "r": [1, WIDTH]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in shapes.items()]
    source = files.save(nodes, weights, inputs=inputs, functions=[files.function("AddRMSNorm")])
    assert "residual: expected x's shape (4, 32), got (1, 32)" in refused(UnsupportedError, source, tmp_path)
