"""The rows of a recipe (`rows_of`): one for each model, target and dtype, as plain data that can be sent anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.lowering.table import DEFAULT_TARGET, parse_target
from ...models.dtypes import norm_dtype
from ...models.errors import UsageError
from ...models.versions import installed_version
from .sources import file_fingerprint, fingerprint, located

if TYPE_CHECKING:
    from .recipe import Recipe

Row = dict[str, Any]
NEEDS = ("cpus", "gpus", "memory")


def row_names(model: Mapping[str, Any]) -> list[str]:
    """The names of a model's rows: NAME-TARGET-DTYPE.

    The target is left out unless the model has several, and so is the dtype.
    """
    return [name for name, _, _ in _variants(model)]


def _variants(model: Mapping[str, Any]) -> list[tuple[str, str, str | None]]:
    """Name, target and dtype of each row."""
    targets, dtypes = model.get("targets") or [DEFAULT_TARGET], model.get("dtypes") or []
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


def rows_of(recipe: Recipe) -> list[Row]:
    """The rows, in the order of the file.

    Returns:
        JSON values: `row` (its name), `model`, `folder` (of its results), `source` and `inputs` (with absolute paths),
        `revision`, `subfolder`, `target`, `dtype`, `with_past`, `attention`, `quantize`, `opset`, `validate`, `lossy`,
        `package`, `trust_remote_code`; `needs`, what it occupies of a cluster (`cpus`, `gpus`, `memory` in GB);
        `facts`, what decides whether results are still those of this row; and `key`, their hash.

    Raises:
        UsageError: a source cannot be read.
    """

    base, rows = recipe.path.parent, []
    prints: dict[str, Any] = {}
    for model in recipe.models:
        source = model["source"]
        if source not in prints:
            prints[source] = fingerprint(source, base)
        inputs = base / Path(model["inputs"]).expanduser() if "inputs" in model else None
        for name, given, dtype in _variants(model):
            options = {
                "revision": model.get("revision"),
                "subfolder": model.get("subfolder"),
                "target": parse_target(given),
                "dtype": None if dtype is None else norm_dtype(dtype),
                "with_past": model.get("with_past", False),
                "attention": model.get("attention", "node"),
                "quantize": model.get("quantize"),
                "opset": model.get("opset"),
                "validate": model.get("validate", True),
                "lossy": model.get("lossy"),
                "package": list(model.get("package", [])),
                "trust_remote_code": model.get("trust_remote_code", False),
            }
            facts = {
                **options,
                "source": [source, prints[source]],
                "inputs": None if inputs is None else [model["inputs"], file_fingerprint(inputs)],
                "version": installed_version("rmsnorm-deploy"),
            }
            rows.append(
                {
                    "row": name,
                    "model": model["name"],
                    "folder": str(recipe.output / name),
                    **options,
                    "source": located(source, base),
                    "inputs": None if inputs is None else str(inputs.absolute()),
                    "needs": {"cpus": 1, "gpus": 0, "memory": 0, **{key: model[key] for key in NEEDS if key in model}},
                    "facts": {fact: _digest(value) for fact, value in facts.items()},
                    "key": _digest(facts),
                }
            )
    return rows


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
