"""The fields of a recipe (`RecipeFields`): name, type, default and meaning of each, in one place.

The names are those of the options of the commands. Checks of their values are in `checks`.
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from ...export.lowering.table import DEFAULT_TARGET
from ..accuracy.tolerances import KINDS_OF_LIMITS

# The files that a validation writes besides its JSON report.
ReportKind = Literal["html", "junit"]
REPORTS: Final[tuple[ReportKind, ...]] = get_args(ReportKind)


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _field(default: Any, description: str, example: Any = None, **more: Any) -> Any:
    """A field that is None where the file does not say, although it has a default then.

    Args:
        default: what it is then; None where that depends on others.
        description: its meaning, a phrase for a comment.
        example: a value for those who write their first recipe; the default, if None.
        more: as for `Field`.
    """
    shown = default if example is None else example
    return Field(
        default=None, description=description, examples=[shown], json_schema_extra={"default": default}, **more
    )


# Limits on the errors of one output, see `Limits`.
LimitFields = create_model("LimitFields", __base__=_Fields, **dict.fromkeys(KINDS_OF_LIMITS, (float | None, None)))  # type: ignore[call-overload]


class SourceFields(_Fields):
    """The model, and how it is loaded."""

    source: str | None = _field(
        None, "a folder, file.py:factory, package.module:factory, builtin:NAME, a hub name or an .onnx file", "./model"
    )
    against: str | None = _field(None, "of an .onnx file, the PyTorch model that it is compared with", "./model")
    revision: str | None = _field(None, "of a hub name: a branch, a tag or a commit", "main")
    subfolder: str | None = _field(None, "of a hub name: a folder in its repository", "small")
    trust_remote_code: bool | None = _field(False, "run Python code that comes with the checkpoint")
    allow_missing: list[str] | None = _field(
        [], "patterns of keys that only the model, or only the checkpoint, may have", ["lm_head.*"]
    )
    allow_pickle: bool | None = _field(False, "read weights that are pickled, which can run code that is in them")


class ExportFields(_Fields):
    """The ONNX file; a row for each target and dtype."""

    targets: list[str] | None = _field([DEFAULT_TARGET], "primitives, standard, ort, plugin: see `rmsnorm targets`")
    dtypes: list[str] | None = _field([], "the checkpoint's dtype if omitted", ["float32", "float16"])
    with_past: bool | None = _field(False, "for decoders of transformers: the KV cache is an input and an output")
    attention: str | None = _field(
        None, "node, decomposed or in-place (target ort with_past); of .onnx files decomposed if omitted", "node"
    )
    quantize: str | None = _field(None, "int4 or int8, for ONNX Runtime alone; or none", "int4")
    opset: int | None = _field(None, "the target's default if omitted", 23)
    function: bool | None = _field(True, "for target plugin: write local functions, which ONNX Runtime needs")
    ort_trt: bool | None = _field(False, "for target plugin: write for ONNX Runtime's TensorRT provider")
    static: bool | None = _field(False, "make every dim static, with the size of the example inputs")
    inputs: str | None = _field(None, "example inputs of a model that does not read tokens", "inputs.npz")
    weights: str | None = _field(None, "link, copy or pack; of .onnx files copy or link", "copy")


class EngineFields(_Fields):
    """Engines of TensorRT."""

    build: list[str] | None = _field([], "engines to build from the file: tensorrt, rtx", ["rtx"])
    profiles: list[str] | None = _field(
        [], "their shapes, as --profile of `rmsnorm build`", ["input_ids:1x1,4x512,16x4096"]
    )
    architectures: list[str] | None = _field([], "GPUs that an engine of rtx is for", ["sm_89"])
    norm: str | None = _field("auto", "auto, plugin or native: what runs the norms")
    plugin: str | None = _field("auto", "auto, library or python: how the plugin is written")
    float64_as_float32: bool | None = _field(False, "compute the float64 values of the file in float32")
    version_compatible: bool | None = _field(False, "let later versions of TensorRT load them")
    refit: bool | None = _field(False, "let their weights be replaced")
    workspace: int | None = _field(None, "memory limit of one layer at run time, in MiB", 4096)
    memory_limit: int | None = _field(None, "stop a build that uses more memory, in MiB", 32768)


class ComparisonFields(_Fields):
    """The comparison with PyTorch."""

    validate_: bool | None = _field(True, "compare the file and the engines with PyTorch", alias="validate")
    runners: list[str] | None = _field(None, "ort and the engines that are built; all of them if omitted", ["ort"])
    provider: str | None = _field("cpu", "ONNX Runtime's execution provider: cpu, cuda, tensorrt or rtx")
    lossy: str | None = _field(
        None, "limits of int8, int4, fp16 or bf16 instead of PyTorch's own error; or none", "int4"
    )
    limits: dict[str, LimitFields] | None = _field({}, "explicit limits by output", {"logits": {"max_kl": 1e-3}})  # type: ignore[valid-type]
    test_inputs: str | None = _field(None, ".npz, .safetensors, a folder of them, or file.py:function", "tests.npz")
    prompts: list[str] | None = _field([], "texts to tokenize as inputs", ["Once upon a time"])
    tokenizer: str | None = _field(None, "of the prompts, a folder or a hub name; the model's if omitted", "./model")
    shapes: list[str] | None = _field([], "batch and length of generated inputs", ["3x33"])
    seed: int | None = _field(0, "seed of generated inputs")
    thorough: bool | None = _field(False, "try generated inputs that take long too")
    outputs_only: bool | None = _field(False, "compare only the outputs, not norms and segments")
    reports: list[str] | None = _field(["html"], "reports besides JSON: html, junit")


class PackageFields(_Fields):
    """Folders for servers."""

    package: list[str] | None = _field([], "genai (with_past), triton, trtexec, ort-server", ["triton"])
    backend: str | None = _field("onnxruntime", "of triton: onnxruntime, python, or tensorrt (the engine)")
    max_batch: int | None = _field(8, "of triton: the most rows of a batch of several requests; 0: none")


class ClusterFields(_Fields):
    """What a row occupies on a cluster (`rmsnorm ship --ray`)."""

    cpus: float | None = _field(1, "cores")
    gpus: float | None = _field(0, "GPUs")
    memory: float | None = _field(0, "memory in GB")


GROUPS: Final[tuple[type[BaseModel], ...]] = (
    SourceFields, ExportFields, EngineFields, ComparisonFields, PackageFields, ClusterFields,
)  # fmt: skip


class Settings(ClusterFields, PackageFields, ComparisonFields, EngineFields, ExportFields, SourceFields):
    """The fields of a `[[model]]` that `[defaults]` may have too."""


class ModelFields(Settings):
    """A `[[model]]`: one model."""

    name: str = Field(description="the name of its results")


class RecipeFields(_Fields):
    """A recipe of `rmsnorm ship`."""

    output: str = Field(default="dist", description="the folder of the results, relative to the recipe")
    defaults: Settings = Field(default=Settings(), description="fields of every model that does not have them")
    model: list[ModelFields] = Field(description="the models")


def names_of(fields: type[BaseModel]) -> list[str]:
    """The names of fields, as the file has them."""
    return [field.alias or name for name, field in fields.model_fields.items()]


def field_of(name: str) -> FieldInfo:
    """The field of a name in the file."""
    return next(field for key, field in ModelFields.model_fields.items() if name == (field.alias or key))


def default_of(name: str) -> Any:
    """The value of a field that the file does not have."""
    extra = field_of(name).json_schema_extra
    assert isinstance(extra, dict)
    return extra["default"]


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors that check TOML."""
    schema = RecipeFields.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
