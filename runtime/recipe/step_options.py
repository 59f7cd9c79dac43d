"""The options of a row's steps, from the fields of the recipe (`build_options`, `validation_options`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..accuracy.tolerances import Limits, with_inherited
from ..engines.api import ORT
from .steps import FIELDS

if TYPE_CHECKING:
    from ..tensorrt.options import BuildOptions
    from ..validation.options import ValidationOptions


def build_options(values: Mapping[str, Any], runtime: str) -> BuildOptions:
    """How an engine is built.

    Args:
        values: fields of a model or a row; the others have their defaults.
        runtime: `tensorrt` or `rtx`.

    Raises:
        UsageError: a value is invalid.
    """
    from ..tensorrt.options import BuildOptions

    given = {name: values[name] for name in FIELDS["build"] if values.get(name) is not None}
    return BuildOptions(runtime=runtime, **given)  # type: ignore[arg-type]


def validation_options(values: Mapping[str, Any], runner: str = ORT) -> ValidationOptions:
    """How the result is compared with PyTorch.

    Args:
        values: fields of a model or a row; the others have their defaults.
        runner: what is compared: `ort`, the file, which the field `provider` is for; or the runtime of an engine.

    Raises:
        UsageError: a value is invalid, or two exclude each other.
    """
    from ..validation.options import ValidationOptions, parse_shapes

    of_ort = ("provider",) if runner == ORT else ()
    names = ("lossy", "seed", "thorough", "outputs_only", "prompts", "tokenizer", *of_ort)
    given = {name: values[name] for name in names if values.get(name) is not None}
    return ValidationOptions(
        inputs=values.get("test_inputs"),
        shapes=parse_shapes(values.get("shapes")),
        limits=with_inherited({name: Limits(**kinds) for name, kinds in (values.get("limits") or {}).items()}),
        **given,
    )
