"""The rows of a recipe (`rows_of`): one for each model, target and dtype, as plain data that can be sent anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...export.lowering.table import parse_target
from ...models.dtypes import norm_dtype
from ...models.errors import UsageError
from ..engines.api import ORT
from .fields import Settings, default_of, names_of
from .hashes import Hashes
from .sources import fingerprint, located, source_kind
from .steps import Step, library_versions, steps_of

if TYPE_CHECKING:
    from .recipe import Recipe

Row = dict[str, Any]
NEEDS = ("cpus", "gpus", "memory")
# The fields that may name files, which count by their content.
_NAMING_FILES = ("source", "against", "inputs", "test_inputs", "tokenizer")
# The fields of a model that its rows do not have under the same name.
_OF_MODELS = ("targets", "dtypes", "validate", *NEEDS)


def row_names(model: Mapping[str, Any]) -> list[str]:
    """The names of a model's rows: NAME-TARGET-DTYPE.

    The target is left out unless the model has several, and so is the dtype.
    """
    return [name for name, _, _ in _variants(model)]


def _variants(model: Mapping[str, Any]) -> list[tuple[str, str, str | None]]:
    """Name, target and dtype of each row."""
    targets, dtypes = model.get("targets") or default_of("targets"), model.get("dtypes") or []
    found = []
    for target in targets:
        for dtype in dtypes or [None]:
            parts = [model["name"]]
            parts += [target.lower()] if len(targets) > 1 else []
            parts += [_one_name(dtype)] if dtype is not None and len(dtypes) > 1 else []
            found.append(("-".join(parts), target, dtype))
    return found


def _one_name(dtype: str) -> str:
    """The table's name of a dtype; the text itself, where there is none."""
    try:
        return norm_dtype(dtype)
    except UsageError:
        return dtype


def is_validated(model: Mapping[str, Any], *, is_onnx: bool) -> bool:
    """Whether a model is compared with PyTorch: unless it says otherwise, wherever a PyTorch model is known."""
    return bool(model.get("validate", not is_onnx or "against" in model))


def runners_of(model: Mapping[str, Any], *, is_onnx: bool) -> list[str]:
    """What is compared with PyTorch: `ort` for the file, and the runtimes of engines."""
    if not is_validated(model, is_onnx=is_onnx):
        return []
    return list(model.get("runners") or [ORT, *model.get("build", ())])


def rows_of(recipe: Recipe, hashes: Hashes | None = None) -> list[Row]:
    """The rows, in the order of the file.

    Args:
        recipe: the recipe.
        hashes: those of the files of earlier runs; those in the folder of the results, if None.

    Returns:
        JSON values: `row` (its name), `model`, `folder` (of its results); the fields of the model, where paths are
        absolute, with `target` and `dtype` in place of the lists, and `runners`, empty where nothing is validated;
        `is_onnx`, whether the source is an .onnx file; `must_be_proven`, whether its rewriting is, because nothing else
        compares it; `needs`, what the row occupies of a cluster (`cpus`, `gpus`,
        `memory` in GB); and `steps`, see `Step`, with the hashes of their facts.

    Raises:
        UsageError: a source cannot be read.
    """
    rows = []
    prints: dict[str, Any] = {}
    hashes = hashes or Hashes(recipe.output)
    for model in recipe.models:
        for key in _NAMING_FILES:
            if key in model and model[key] not in prints:
                prints[model[key]] = fingerprint(model[key], recipe.path.parent, hashes)
        for name, given, dtype in _variants(model):
            rows.append(_row(recipe, model, name, given, dtype, prints))
    return rows


def _row(
    recipe: Recipe, model: Mapping[str, Any], name: str, target: str, dtype: str | None, prints: Mapping[str, Any]
) -> Row:
    base, source = recipe.path.parent, model["source"]
    is_onnx = source_kind(source, base) == "onnx"
    options: Row = {key: model.get(key, default_of(key)) for key in names_of(Settings) if key not in _OF_MODELS}
    options |= {
        "target": parse_target(target),
        "dtype": None if dtype is None else norm_dtype(dtype),
        "attention": options["attention"] or ("decomposed" if is_onnx else "node"),
        "weights": options["weights"] or ("copy" if is_onnx else None),
        "runners": runners_of(model, is_onnx=is_onnx),
        "must_be_proven": is_onnx and "against" not in model and model.get("validate") is not False,
    }
    steps = steps_of(options, is_onnx=is_onnx)
    facts = {**options, **library_versions(steps)}
    for key in _NAMING_FILES:
        if options[key] is not None:
            facts[key] = [options[key], prints[options[key]]]
            options[key] = located(options[key], base)
    return {
        "row": name,
        "model": model["name"],
        "folder": str(recipe.output / name),
        **options,
        "is_onnx": is_onnx,
        "needs": {key: model.get(key, default_of(key)) for key in NEEDS},
        "steps": [_with_hashes(step, facts) for step in steps],
    }


def _with_hashes(step: Step, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A step with the hash of each of its facts."""
    return {**step.to_dict(), "facts": {fact: _digest(facts[fact]) for fact in step.facts}}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
