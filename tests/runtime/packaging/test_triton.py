"""Configurations for Triton Inference Server, parsed by Triton's own schema."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.runtime.packaging.triton import Serving, triton_config


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
