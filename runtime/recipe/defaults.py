"""The models of a recipe with its defaults (`merged`), without those that a model of its kind cannot have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from .positions import Path as Keys
from .recipe import Merged
from .sources import source_kind

# The fields of an export that a file has decided already.
EXPORTS_ONLY: Final = ("dtypes", "with_past", "quantize", "static")
# The fields that a model can have none of, although the defaults have one.
WITHOUT: Final = ("quantize", "lossy")
NONE: Final = "none"
# The fields of the target plugin.
OF_PLUGIN: Final = ("function", "ort_trt")
# How the weights of an .onnx file (True) and of a model of PyTorch may be kept.
WEIGHTS: Final = {True: ("copy", "link"), False: ("link", "copy", "pack")}


def merged(content: Mapping[str, Any], base: Path) -> list[Merged]:
    """The models with the defaults that they do not override; what has another type than a table is left out.

    Args:
        content: of a recipe, whose fields may have wrong types.
        base: the folder that paths are relative to.
    """
    defaults, models = content.get("defaults", {}), content.get("model", [])
    defaults = defaults if isinstance(defaults, dict) else {}
    found = []
    for number, model in enumerate(models if isinstance(models, list) else []):
        if isinstance(model, dict):
            unfit = set(_unfit({**defaults, **model}, base))
            taken = {key: value for key, value in defaults.items() if key not in unfit}
            header = ("model", number)
            places: dict[str, Keys] = {key: ("defaults", key) for key in taken}
            places |= {key: (*header, key) for key in model}
            values = {**taken, **model}
            none = [key for key in WITHOUT if values.get(key) == NONE]
            found.append(Merged({key: value for key, value in values.items() if key not in none}, places, header))
    return found


def _unfit(values: Mapping[str, Any], base: Path) -> Iterator[str]:
    """The fields that a model with such a source and such targets cannot have."""
    targets = values.get("targets")
    if not any(str(target).lower() == "plugin" for target in (targets if isinstance(targets, list) else ())):
        yield from OF_PLUGIN
    source, against = values.get("source"), values.get("against")
    if not isinstance(source, str):
        return
    kind = source_kind(source, base)
    if kind == "onnx":
        yield from EXPORTS_ONLY
        if values.get("weights") not in WEIGHTS[True]:
            yield "weights"
        if against is None and values.get("validate") is True:
            yield "validate"
    elif kind != "missing":
        yield "against"
    if kind == "builtin":
        yield "with_past"
    loaded = against if kind == "onnx" else source
    if not isinstance(loaded, str) or source_kind(loaded, base) not in ("hub", "missing"):
        yield from ("revision", "subfolder")
