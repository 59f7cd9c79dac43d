"""The fields of a recipe (`RecipeFields`): name, type, default and meaning of each, in one place.

The names are those of the options of the commands. Checks of their values are in `checks`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model

from ...export.lowering.table import DEFAULT_TARGET
from ..accuracy.tolerances import KINDS_OF_LIMITS

# The files that a validation writes besides its JSON report.
ReportKind = Literal["html", "junit"]
REPORTS: tuple[ReportKind, ...] = get_args(ReportKind)


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _field(default: Any, description: str, **more: Any) -> Any:
    """A field that is None where the file does not say, although it has a default then."""
    return Field(default=None, description=description, json_schema_extra={"default": default}, **more)


# Limits on the errors of one output, see `Limits`.
LimitFields = create_model("LimitFields", __base__=_Fields, **dict.fromkeys(KINDS_OF_LIMITS, (float | None, None)))  # type: ignore[call-overload]


class Settings(_Fields):
    """The fields of a `[[model]]` that `[defaults]` may have too."""

    source: str | None = _field(
        None, "The model: a folder, file.py:factory, package.module:factory, builtin:NAME, a hub name or an .onnx file."
    )
    against: str | None = _field(None, "For an .onnx file, the PyTorch model that it is compared with.")
    revision: str | None = _field(None, "Of a hub name, a branch, a tag or a commit.")
    subfolder: str | None = _field(None, "Of a hub name, a folder in its repository.")
    trust_remote_code: bool | None = _field(False, "Run Python code that comes with the checkpoint.")
    allow_missing: list[str] | None = _field([], "Patterns of keys in which checkpoint and model may differ.")
    allow_pickle: bool | None = _field(False, "Read weights that are pickled, which can run code that is in them.")

    targets: list[str] | None = _field([DEFAULT_TARGET], "primitives, standard, ort or plugin; a row for each.")
    dtypes: list[str] | None = _field([], "float32, float16, bfloat16 or float64; a row for each.")
    with_past: bool | None = _field(False, "Make the KV cache an input and an output (decoders of transformers).")
    attention: str | None = _field(None, "node, decomposed or in-place; node if omitted, decomposed for .onnx files.")
    quantize: str | None = _field(None, "int4 or int8 weights, for ONNX Runtime alone.")
    opset: int | None = _field(None, "Opset import of the file; the target's default if omitted.")
    function: bool | None = _field(True, "For target plugin: write local functions, which ONNX Runtime needs.")
    ort_trt: bool | None = _field(False, "For target plugin: write for ONNX Runtime's TensorRT provider.")
    static: bool | None = _field(False, "Make every dim static, with the size of the example inputs.")
    inputs: str | None = _field(None, "Example inputs by name, .npz or .safetensors, of models without token inputs.")
    weights: str | None = _field(None, "link, copy or pack (.onnx files: copy or link): how the weights are placed.")

    build: list[str] | None = _field([], "Engines to build from the file: tensorrt, rtx.")
    profiles: list[str] | None = _field([], "Shapes of an engine, as --profile of rmsnorm build.")
    architectures: list[str] | None = _field([], "GPU architectures of an engine of rtx, such as sm_89.")
    norm: str | None = _field("auto", "auto, plugin or native: what runs the norms of an engine.")
    plugin: str | None = _field("auto", "auto, library or python: how the plugin of an engine is written.")
    float64_as_float32: bool | None = _field(False, "Compute the float64 values of the file in float32 in engines.")
    version_compatible: bool | None = _field(False, "Build engines that later versions of TensorRT can load.")
    refit: bool | None = _field(False, "Build engines whose weights can be replaced.")
    workspace: int | None = _field(None, "Memory limit of one layer of an engine at run time, in MiB.")
    memory_limit: int | None = _field(None, "Stop a build that uses more memory, in MiB.")

    validate_: bool | None = _field(True, "Compare the result with PyTorch.", alias="validate")
    runners: list[str] | None = _field(None, "What is compared: ort and the engines built; all of them if omitted.")
    provider: str | None = _field("cpu", "ONNX Runtime's execution provider: cpu, cuda, tensorrt or rtx.")
    lossy: str | None = _field(None, "Limits of int8, int4, fp16 or bf16 instead of PyTorch's own error.")
    limits: dict[str, LimitFields] | None = _field({}, "Explicit limits by output, such as {logits = {atol = 1e-3}}.")  # type: ignore[valid-type]
    test_inputs: str | None = _field(None, "Inputs of the comparison: .npz, .safetensors, a folder, file.py:function.")
    prompts: list[str] | None = _field([], "Texts to tokenize as inputs of the comparison.")
    shapes: list[str] | None = _field([], "Batch and length of generated inputs, such as 3x33.")
    seed: int | None = _field(0, "Seed of generated inputs.")
    thorough: bool | None = _field(False, "Try generated inputs that take long too.")
    outputs_only: bool | None = _field(False, "Compare only the outputs, not norms and segments.")
    reports: list[str] | None = _field(["html"], "Reports besides JSON: html, junit.")

    package: list[str] | None = _field([], "Folders for servers: genai, triton, trtexec, ort-server.")
    backend: str | None = _field("onnxruntime", "For triton: onnxruntime, python, or tensorrt (the engine).")
    max_batch: int | None = _field(8, "For triton: the most rows of a batch of several requests; 0: none.")

    cpus: float | None = _field(1, "Cores that the row occupies on a cluster.")
    gpus: float | None = _field(0, "GPUs that the row occupies on a cluster.")
    memory: float | None = _field(0, "Memory that the row occupies on a cluster, in GB.")


class ModelFields(Settings):
    """A `[[model]]`: one model, with a row for each of its targets and dtypes."""

    name: str = Field(description="The name of its results.")


class RecipeFields(_Fields):
    """A recipe of `rmsnorm ship`."""

    output: str = Field(default="dist", description="The folder of the results, relative to the recipe.")
    defaults: Settings = Field(default=Settings(), description="Fields of every model that does not have them.")
    model: list[ModelFields] = Field(description="The models.")


def names_of(fields: type[BaseModel]) -> list[str]:
    """The names of fields, as the file has them."""
    return [field.alias or name for name, field in fields.model_fields.items()]


def default_of(name: str) -> Any:
    """The value of a field that the file does not have."""
    field = next(field for key, field in Settings.model_fields.items() if name == (field.alias or key))
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra["default"]


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors that check TOML."""
    schema = RecipeFields.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
