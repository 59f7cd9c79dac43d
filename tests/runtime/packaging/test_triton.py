"""Configurations for Triton Inference Server, parsed by Triton's own schema."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy import package_model, verify_folder
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from rmsnorm_deploy.runtime.inputs.exported import open_exported
from rmsnorm_deploy.runtime.packaging.contents import Contents
from rmsnorm_deploy.runtime.packaging.triton import Serving, add_triton, triton_config


def schema() -> Any:
    """Triton's protobuf module, loaded apart from the clients, which need grpcio."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package tritonclient")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parsed() -> Any:
    from google.protobuf import text_format

    module = schema()
    return module, lambda text: text_format.Parse(text, module.ModelConfig())


def manifest(*inputs: tuple[str, str, list[Any]], outputs: Any = (), **more: Any) -> dict[str, Any]:
    def rows(given: Any) -> list[dict[str, Any]]:
        return [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in given]

    return {"inputs": rows(inputs), "outputs": rows(outputs), **more}


DECODER = manifest(
    ("input_ids", "int64", ["batch", "sequence"]),
    ("attention_mask", "int64", ["batch", "total_sequence"]),
    ("past_key_values.0.key", "float16", ["batch", 2, "past_sequence", 8]),
    outputs=[
        ("logits", "float16", ["batch", "sequence", 97]),
        ("present.0.key", "float16", ["batch", 2, "past_sequence + sequence", 8]),
    ],
)


def test_a_decoder_whose_requests_are_joined(parsed: Any) -> None:
    module, parse = parsed
    config = parse(triton_config(Serving("qwen", "onnxruntime", "model.onnx"), DECODER))
    assert (config.name, config.backend, config.default_model_filename) == ("qwen", "onnxruntime", "model.onnx")
    assert config.max_batch_size == 8
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    assert [(row.name, list(row.dims)) for row in config.input] == [
        ("input_ids", [-1]), ("attention_mask", [-1]), ("past_key_values.0.key", [2, -1, 8]),
    ]  # fmt: skip
    assert [list(row.dims) for row in config.output] == [[-1, 97], [2, -1, 8]]
    assert config.input[0].data_type == module.TYPE_INT64
    assert config.output[0].data_type == module.TYPE_FP16
    # The run before the first request has sizes that fit each other.
    warm = config.model_warmup[0]
    assert warm.batch_size == 1
    sizes = {name: list(row.dims) for name, row in warm.inputs.items()}
    assert sizes == {"input_ids": [8], "attention_mask": [16], "past_key_values.0.key": [2, 8, 8]}


def test_a_batch_that_is_fixed_or_elsewhere_is_not_joined(parsed: Any) -> None:
    for shape in ([2, "sequence"], ["sequence", "batch"]):
        rows = manifest(("x", "float32", shape), outputs=[("y", "float32", ["batch", 4])])
        config = parsed[1](triton_config(Serving("m", "onnxruntime", "model.onnx"), rows))
        assert config.max_batch_size == 0
        assert not config.HasField("dynamic_batching")
        assert list(config.input[0].dims) == [size if isinstance(size, int) else -1 for size in shape]
        assert config.model_warmup[0].batch_size == 0


def test_batches_can_be_turned_off(parsed: Any) -> None:
    config = parsed[1](triton_config(Serving("m", "onnxruntime", "model.onnx", most=0), DECODER))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, -1]


def test_sizes_for_which_the_file_was_exported(parsed: Any) -> None:
    rows = {**DECODER, "inputs": [dict(row) for row in DECODER["inputs"]]}
    rows["inputs"][0]["ranges"] = {"sequence": [2, 5], "past_sequence": [32, None]}
    config = parsed[1](triton_config(Serving("m", "onnxruntime", "model.onnx"), rows))
    assert list(config.model_warmup[0].inputs["attention_mask"].dims) == [37]


@pytest.mark.parametrize(("dtype", "name"), [("bool", "TYPE_BOOL"), ("bfloat16", "TYPE_BF16"), ("int8", "TYPE_INT8")])
def test_element_types(parsed: Any, dtype: str, name: str) -> None:
    rows = manifest(("x", dtype, ["batch"]), outputs=[("y", dtype, ["batch"])])
    config = parsed[1](triton_config(Serving("m", "tensorrt", "model.plan"), rows))
    assert config.input[0].data_type == getattr(parsed[0], name)


def test_an_element_type_that_triton_does_not_have() -> None:
    rows = manifest(("x", "float8_e4m3fn", ["batch"]))
    with pytest.raises(UnsupportedError, match=r"x: expected an element type of .*, as Triton has, got float8_e4m3fn"):
        triton_config(Serving("m", "onnxruntime", "model.onnx"), rows)


def _engine(folder: Path, **changes: Any) -> Path:
    """An engine as `rmsnorm build` leaves it, with bytes that stand for those of TensorRT, and a plugin's library."""
    folder.mkdir(exist_ok=True)
    engine, library = folder / "model.engine", folder / "libplugin.so"
    engine.write_bytes(b"engine")
    library.write_bytes(b"plugin")
    rows = manifest(
        ("x", "float16", ["batch", "sequence", 8]),
        outputs=[("y", "float16", ["batch", "sequence", 8])],
        target="plugin",
    )
    record = {
        "schema": "rmsnorm_deploy.engine/1", "engine": "model.engine", "bytes": 6,
        "sha256": hashlib.sha256(b"engine").hexdigest(),
        "runtime": {"name": "tensorrt", "title": "TensorRT", "version": "10.14.1"},
        "gpu": "NVIDIA L4", "architectures": ["sm_89"],
        "plugin": {"kind": "library", "library": str(library), "sha256": hashlib.sha256(b"plugin").hexdigest()},
        "profiles": [
            {"x": [[1, 1, 8], [2, 16, 8], [6, 64, 8]]}, {"x": [[1, 64, 8], [1, 128, 8], [4, 256, 8]]},
        ],
        "options": {"version_compatible": True},
        "model": {"path": "model.onnx", "manifest": {"schema": "rmsnorm_deploy.manifest/9", "sites": [], **rows}},
        **changes,
    }  # fmt: skip
    (folder / "model.engine.json").write_text(json.dumps(record))
    return engine


def test_an_engine_with_its_plugin(parsed: Any, tmp_path: Path) -> None:
    made = package_model(_engine(tmp_path / "built"), "triton", tmp_path / "repository", name="served")
    place = tmp_path / "repository"
    assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()) == [
        "manifest.json", "serve.sh", "served/1/model.plan", "served/1/model.plan.json", "served/config.pbtxt",
        "served/plugin/libplugin.so",
    ]  # fmt: skip
    config = parsed[1]((place / "served" / "config.pbtxt").read_text())
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.max_batch_size == 4  # every profile has room for as many
    assert [list(row.dims) for row in (*config.input, *config.output)] == [[-1, 8], [-1, 8]]
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert list(config.model_warmup[0].inputs["x"].dims) == [16, 8]
    script = (place / "serve.sh").read_text()
    assert '"--backend-config=tensorrt,plugins=$here/served/plugin/libplugin.so"' in script
    assert "--backend-config=tensorrt,version-compatible=true" in script
    assert os.access(place / "serve.sh", os.X_OK)
    assert subprocess.run(["sh", "-n", place / "serve.sh"], check=False).returncode == 0
    assert "the engine runs on NVIDIA L4 with TensorRT 10.14.1" in made.notes
    assert {file.problem for file in verify_folder(place)} == {None}
    opened = open_exported(place)
    assert (opened.is_engine, opened.model.name) == (True, "model.plan")


def test_the_script_starts_the_server_with_the_repository_and_its_plugin(tmp_path: Path) -> None:
    """A stand-in of Triton's program prints what it is given."""
    package_model(_engine(tmp_path / "built"), "triton", tmp_path / "a repository", name="served")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tritonserver"
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [tmp_path / "a repository" / "serve.sh", "--http-port=9000"], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    place = tmp_path / "a repository"
    assert done.stdout.splitlines() == [
        f"--model-repository={place}", f"--backend-config=tensorrt,plugins={place}/served/plugin/libplugin.so",
        "--backend-config=tensorrt,version-compatible=true", "--http-port=9000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"sha256": "0" * 64}, {}, "its SHA-256 is another one"),
        ({"runtime": {"name": "rtx", "version": "1.7"}}, {}, "expected an engine of TensorRT, which Triton runs, got"),
        ({"plugin": {"kind": "library", "library": "/gone/lib.so"}}, {}, "the plugin's library .* is missing"),
        ({"model": {"path": "m.onnx"}}, {}, "expected an engine of an exported folder, got one of m.onnx"),
        ({}, {"backend": "python"}, "backend: expected tensorrt for an engine, got python"),
        ({}, {"server": "genai"}, "for: expected triton for an engine, got genai"),
        ({}, {"server": "genai", "backend": "python"}, "backend: expected none for genai, got 'python'"),
        ({}, {"backend": "openvino"}, "backend: expected one of onnxruntime, python, tensorrt, got 'openvino'"),
    ],
)
def test_engines_that_are_refused(changes: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    engine = _engine(tmp_path / "built", **changes)
    with pytest.raises((UsageError, UnsupportedError), match=message):
        package_model(engine, output=tmp_path / "repository", **{"server": "triton", **options})
    assert not (tmp_path / "repository").exists()


def test_an_engine_without_its_record(tmp_path: Path) -> None:
    engine = _engine(tmp_path / "built")
    engine.with_name("model.engine.json").unlink()
    with pytest.raises((UsageError, EnvironmentMissingError), match=r"model\.engine"):
        package_model(engine, "triton", tmp_path / "repository")


def test_bfloat16_is_not_for_the_python_backend() -> None:
    rows = manifest(("x", "bfloat16", ["batch"]), outputs=[("y", "bfloat16", ["batch"])])
    contents = Contents(Path("m"), "m/1/model.onnx", rows, {}, None)
    with pytest.raises(UnsupportedError, match="x: expected an element type that Triton's Python backend gives"):
        add_triton(contents, "m", "python", 8)
