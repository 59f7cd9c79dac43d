"""The values of a recipe that no export, validation or package could have, found before anything runs.

The rules are those of the export, the validation and the packages; here they are applied to every model, and each
problem names the key that is wrong.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from ...export.lowering.attention_table import check_attention, parse_attention
from ...export.lowering.table import DEFAULT_TARGET, opset_for, parse_target
from ...models.dtypes import norm_dtype
from ...models.errors import EnvironmentMissingError, RmsnormDeployError
from ...models.hub.options import is_revision, is_subfolder
from ..accuracy.lossy import PROFILES
from ..inputs.arrays import ARRAY_SUFFIXES
from ..packaging.api import Server
from .positions import Path as Keys
from .recipe import Merged, Problem, suggestion
from .rows import NEEDS, row_names
from .sources import located, source_kind

SERVERS: tuple[str, ...] = get_args(Server)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Files in the folder of the results, beside the folders of the rows.
RESERVED = ("summary.json", "junit.xml", "summary.html", "history.jsonl")


def value_problems(models: Sequence[Merged], base: Path, output: Path, wrong: Collection[Keys]) -> list[Problem]:
    """The problems of all models.

    Args:
        models: the models with their defaults.
        base: the folder that paths are relative to.
        output: the folder of the results.
        wrong: the paths of fields that have a problem already, and whose values are not looked at.
    """
    problems = []
    sound = [model._replace(values=_sound(model, wrong)) for model in models]
    for model in sound:
        problems += [*_own_problems(model, base), *_together(model), *_results_in_source(model, base, output)]
    return [*problems, *_same_names([model for model in sound if "name" in model.values])]


def _sound(model: Merged, wrong: Collection[Keys]) -> dict[str, Any]:
    """The fields of a model that have the right types."""
    return {key: value for key, value in model.values.items() if model.places[key] not in wrong}


def _own_problems(model: Merged, base: Path) -> Iterator[Problem]:
    """Problems of one value."""
    values = model.values
    if "name" in values and not _NAME.fullmatch(values["name"]):
        expected = "expected letters, digits, '.', '-' and '_' that begin with a letter or digit, at most 100"
        yield Problem(model.at("name"), f"{expected}, got {values['name'][:110]!r}")
    yield from _source(model, base)
    yield from _of_hub(model, base)
    if "inputs" in values:
        yield from _inputs(model, base)
    for key, check in (("targets", parse_target), ("dtypes", norm_dtype), ("package", _server)):
        yield from _list(model, key, check)
    if "attention" in values:
        yield from _refused(model.at("attention"), lambda: parse_attention(values["attention"]))
    if "quantize" in values:
        yield from _refused(model.at("quantize"), lambda: _scheme(values["quantize"]))
    for key in NEEDS:
        if key in values and not (math.isfinite(values[key]) and values[key] >= 0):
            yield Problem(model.at(key), f"expected a number of at least 0, got {values[key]}")
    if "lossy" in values and values["lossy"] not in PROFILES:
        hint = suggestion(values["lossy"], PROFILES)
        yield Problem(model.at("lossy"), f"expected one of {', '.join(PROFILES)}, got {values['lossy']!r}{hint}")


def _source(model: Merged, base: Path) -> Iterator[Problem]:
    source = model.values.get("source")
    if source is None and "source" in model.places:
        return  # it has another type
    if source is None:
        yield Problem((*model.header, "source"), "expected a model, as MODEL of rmsnorm export, got none")
        return
    match source_kind(source, base):
        case "missing":
            what = "an existing folder or file.py:factory, or a hub name (owner/model)"
            yield Problem(model.at("source"), f"expected {what}, got {source!r}, searched for in {base.absolute()}")
        case "builtin":
            from ...models.loading import BUILTINS

            known = [f"builtin:{name}" for name in BUILTINS]
            if source not in known:
                hint = suggestion(source, known)
                yield Problem(model.at("source"), f"expected one of {', '.join(known)}, got {source!r}{hint}")
            elif model.values.get("with_past"):
                yield Problem(
                    model.at("with_past"), f"expected a decoder of transformers, got {source!r}, without a cache"
                )
        case "file" | "module" | "folder" | "hub":
            pass


def _of_hub(model: Merged, base: Path) -> Iterator[Problem]:
    """Problems of what only a model with a hub name has."""
    source = model.values.get("source")
    for key, is_valid, what in (
        ("revision", is_revision, "a branch, a tag or a commit"),
        ("subfolder", is_subfolder, "a relative path in the repository"),
    ):
        value = model.values.get(key)
        if value is None:
            continue
        if source is not None and source_kind(source, base) not in ("hub", "missing"):
            yield Problem(model.at(key), f"expected a source with a hub name (owner/model), got {source!r}")
        elif not is_valid(value):
            yield Problem(model.at(key), f"expected {what}, got {value!r}")


def _results_in_source(model: Merged, base: Path, output: Path) -> Iterator[Problem]:
    """A source in which results would be written, so that it would never be the same again."""
    source = model.values.get("source")
    if source is None or "name" not in model.values or source_kind(source, base) != "folder":
        return
    place = Path(os.path.realpath(located(source, base)))
    for name in row_names(model.values):
        folder = Path(os.path.realpath(output / name))
        if place == folder or place in folder.parents:
            yield Problem(
                model.at("source"), f"expected a folder without the results, got {source!r}, which holds {folder}"
            )
            return


def _inputs(model: Merged, base: Path) -> Iterator[Problem]:
    path = base / Path(model.values["inputs"]).expanduser()
    if path.suffix not in ARRAY_SUFFIXES:
        yield Problem(model.at("inputs"), f"expected a file {' or '.join(ARRAY_SUFFIXES)}, got {path.name!r}")
    elif not path.is_file():
        yield Problem(model.at("inputs"), f"expected a file, got none at {path.absolute()}")


def _list(model: Merged, key: str, check: Callable[[str], str]) -> Iterator[Problem]:
    """Problems of a list of names."""
    if key not in model.values:
        return
    given, place = model.values[key], model.at(key)
    if not given and key != "package":
        yield Problem(place, "expected at least one, got none; omit the key for the default")
    names = []
    for number, text in enumerate(given):
        found = list(_refused((*place, number), lambda text=text: names.append(check(text))))  # type: ignore[misc]
        yield from found
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(place, f"expected each at most once, got {name!r} {count} times")


def _server(text: str) -> str:
    from ..packaging.api import check_server

    check_server(text)
    return text


def _scheme(text: str | None) -> Any:
    from ...export.lowering.weight_quantizer import parse_quantize

    return parse_quantize(text)


def _refused(place: Keys, check: Callable[[], Any], remedy: str = "") -> Iterator[Problem]:
    """The problem that a check of the command line names, without the options of the command line."""
    try:
        check()
    except EnvironmentMissingError:
        return  # not a problem of the recipe: the row says so
    except RmsnormDeployError as error:
        first = re.split(r"\. |; |\.$", str(error))[0] if remedy else str(error)
        text = re.sub(r"^(target|dtype|for|attention|quantize|opset): ", "", first)
        yield Problem(place, text + (f". {remedy}" if remedy else ""))


def _together(model: Merged) -> Iterator[Problem]:
    """Problems of several values, where each of them alone is one that exists."""
    values = model.values
    servers, with_past = values.get("package") or [], values.get("with_past", False)
    if "genai" in servers and not with_past:
        yield Problem(model.at("package"), "genai runs decoders with a cache: expected with_past = true, got false")
    try:
        targets = [parse_target(target) for target in values.get("targets") or [DEFAULT_TARGET]]
        dtypes: list[str | None] = [norm_dtype(dtype) for dtype in values.get("dtypes") or []] or [None]
        mode = parse_attention(values.get("attention", "node"))
        scheme = _scheme(values.get("quantize"))
    except RmsnormDeployError:
        return
    if mode == "in-place":
        remedy = 'Expected targets = ["ort"] and with_past = true.'
        yield from _refused(model.at("attention"), lambda: check_attention(mode, targets, with_past=with_past), remedy)
    for target in targets:
        remedy = "Omit opset, or use another target."
        yield from _refused(model.at("opset"), lambda target=target: opset_for(target, values.get("opset")), remedy)  # type: ignore[misc]
    for dtype in dtypes if scheme is not None else []:
        from ...export.lowering.weight_quantizer import check_quantize

        remedy = 'Use targets = ["ort"] and dtypes = ["float32"], or omit quantize.'
        yield from _refused(
            model.at("quantize"),
            lambda dtype=dtype: check_quantize(scheme, targets, dtype),  # type: ignore[misc]
            remedy,
        )
    if "trtexec" in servers and "ort" in targets:
        yield Problem(
            model.at("package"), "trtexec parses the targets standard, primitives and plugin, got the target ort"
        )
    if "trtexec" in servers and scheme is not None:
        yield Problem(model.at("package"), f"trtexec does not run quantize = {values['quantize']!r}; omit one of them")


def _same_names(models: Sequence[Merged]) -> Iterator[Problem]:
    """Models of one name, and rows whose folders are the same, also where the case of letters does not count."""
    seen = dict.fromkeys(RESERVED, "a file of the summary")
    for model in models:
        names = dict.fromkeys([model.values["name"], *row_names(model.values)])
        taken = next((name for name in names if name.casefold() in seen), None)
        if taken is not None:
            reason = seen[taken.casefold()]
            yield Problem(model.at("name"), f"expected another name, got {taken!r}, which is {reason} already")
        for name in names:
            seen.setdefault(name.casefold(), f"the name of [[model]] {int(model.header[1]) + 1} or of one of its rows")
