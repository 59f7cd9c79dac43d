"""The values of a recipe that no export, validation or package could have, found before anything runs.

The rules are those of the export, the validation and the packages; here they are applied to every model, and each
problem names the key that is wrong.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ...export.lowering.attention_table import parse_attention
from ...export.lowering.table import parse_target
from ...models.dtypes import norm_dtype
from ...models.errors import UsageError, few
from ...models.hub.options import is_revision, is_subfolder
from ..engines.api import RUNNERS, flavor_name
from ..inputs.arrays import ARRAY_SUFFIXES
from ..inputs.tokenizer import ADDITION_MODEL
from ..packaging.api import Server
from ..packaging.triton import Backend
from .combinations import together
from .fields import REPORTS
from .hashes import HASHES
from .positions import Path as Keys
from .recipe import Merged, Problem, refused, scheme_of, suggestion
from .rows import NEEDS, row_names
from .sources import Kind, home_expanded, located, source_kind
from .step_options import build_options
from .steps import FIELDS

SERVERS: tuple[str, ...] = get_args(Server)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Files in the folder of the results, beside the folders of the rows.
RESERVED = ("summary.json", "junit.xml", "summary.html", "history.jsonl", HASHES)


def value_problems(models: Sequence[Merged], base: Path, output: Path, wrong: Collection[Keys]) -> list[Problem]:
    """The problems of all models.

    Args:
        models: the models with their defaults.
        base: the folder that paths are relative to.
        output: the folder of the results.
        wrong: the paths of fields that have a problem already, and whose values are not looked at.
    """
    sound = [model._replace(values=_sound(model, wrong)) for model in models]
    names: dict[Problem, list[str]] = {}
    for model in sound:
        shown = repr(model.values.get("name", f"[[model]] {int(model.header[1]) + 1}"))
        for problem in (*_own_problems(model, base), *together(model, base), *_results_in_source(model, base, output)):
            names.setdefault(problem, []).append(shown)
    problems = [_of_some(problem, having, len(sound)) for problem, having in names.items()]
    return [*problems, *_same_names([model for model in sound if "name" in model.values])]


def _of_some(problem: Problem, names: Sequence[str], count: int) -> Problem:
    """A problem that says which models have it, where it is one of the defaults with some of the models."""
    if problem.path[0] != "defaults" or len(names) == count:
        return problem
    return problem._replace(text=f"for the model {few(names)}: {problem.text}")


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
    yield from _against(model, base)
    yield from _tokenizer(model, base)
    yield from _of_hub(model, base)
    yield from _inputs(model, base)
    for key, check in _LISTS.items():
        yield from _list(model, key, check)
    if "backend" in values:
        yield from refused(model.at("backend"), partial(_one_of(get_args(Backend)), values["backend"]))
    if "attention" in values:
        yield from refused(model.at("attention"), partial(parse_attention, values["attention"]))
    if "quantize" in values:
        yield from refused(model.at("quantize"), partial(scheme_of, values["quantize"]))
    if "provider" in values:
        yield from refused(model.at("provider"), partial(_provider, values["provider"]))
    for key in FIELDS["build"]:
        if key in values:
            yield from refused(model.at(key), partial(build_options, {key: values[key]}, "rtx"))
    for key in (*NEEDS, "max_batch"):
        if key in values and not (math.isfinite(values[key]) and values[key] >= 0):
            yield Problem(model.at(key), f"expected a number of at least 0, got {values[key]}")


def _source(model: Merged, base: Path) -> Iterator[Problem]:
    source = model.values.get("source")
    if source is None and "source" in model.places:
        return  # it has another type
    if source is None:
        yield Problem((*model.header, "source"), "expected a model, as MODEL of rmsnorm export, got none")
        return
    match source_kind(source, base):
        case "missing":
            what = "an existing folder, .onnx file or file.py:factory, or a hub name (owner/model)"
            yield Problem(model.at("source"), f"expected {what}, got {source!r}, searched for in {base.absolute()}")
        case "arrays":
            yield Problem(model.at("source"), f"expected a model, got a file of arrays, {source!r}")
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
        case "file" | "module" | "folder" | "hub" | "onnx":
            pass


def _against(model: Merged, base: Path) -> Iterator[Problem]:
    source = model.values.get("against")
    kind: Kind | None = None if source is None else source_kind(source, base)
    if kind in ("missing", "arrays", "onnx"):
        what = "a PyTorch model: an existing folder or file.py:factory, or a hub name (owner/model)"
        yield Problem(model.at("against"), f"expected {what}, got {source!r}, searched for in {base.absolute()}")


def _tokenizer(model: Merged, base: Path) -> Iterator[Problem]:
    given = model.values.get("tokenizer")
    if given is None or given == ADDITION_MODEL or source_kind(given, base) in ("folder", "hub"):
        return
    what = "an existing folder with a tokenizer, or a hub name (owner/model)"
    yield Problem(model.at("tokenizer"), f"expected {what}, got {given!r}, searched for in {base.absolute()}")


def _of_hub(model: Merged, base: Path) -> Iterator[Problem]:
    """Problems of what only a model with a hub name has."""
    source = model.values.get("against", model.values.get("source"))
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
    """What is read, and where results would be written, so that it would never be the same again."""
    if "name" not in model.values:
        return
    folders = [Path(os.path.realpath(output / name)) for name in row_names(model.values)]
    for key in ("source", "against", "test_inputs", "tokenizer"):
        given = model.values.get(key)
        kind = None if given is None else source_kind(given, base)
        if given is None or kind not in ("folder", "onnx"):
            continue
        place = Path(os.path.realpath(located(given, base)))
        for folder in folders:
            if kind == "folder" and (place == folder or place in folder.parents):
                text = f"expected a folder without the results, got {given!r}, which holds {folder}"
            elif folder in place.parents and not (kind == "onnx" and place.parent == folder):
                text = f"expected a place outside of the results, got {given!r}, which is in {folder}"
            else:
                continue
            yield Problem(model.at(key), text)
            break


def _inputs(model: Merged, base: Path) -> Iterator[Problem]:
    """Problems of the files of inputs."""
    for key, kinds, more in (
        ("inputs", ("arrays",), ""),
        ("test_inputs", ("arrays", "folder", "file", "module"), ", a folder of them, or file.py:function"),
    ):
        given = model.values.get(key)
        if given is None or source_kind(given, base) in kinds:
            continue
        path = base / home_expanded(given)
        if path.suffix in ARRAY_SUFFIXES:
            yield Problem(model.at(key), f"expected a file, got none at {path.absolute()}")
        else:
            yield Problem(model.at(key), f"expected a file {' or '.join(ARRAY_SUFFIXES)}{more}, got {path.name!r}")


def _list(model: Merged, key: str, check: Callable[[str], str]) -> Iterator[Problem]:
    """Problems of a list of names."""
    if key not in model.values:
        return
    given, place = model.values[key], model.at(key)
    if not given and key in ("targets", "runners"):
        yield Problem(place, "expected at least one, got none; omit the key for the default")
    names = []

    def take(text: str) -> None:
        names.append(check(text))

    for number, text in enumerate(given):
        yield from refused((*place, number), partial(take, text))
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(place, f"expected each at most once, got {name!r} {count} times")


def _server(text: str) -> str:
    from ..packaging.api import check_server

    check_server(text)
    return text


def _profile(text: str) -> str:
    from ..tensorrt.profiles import parse_profile

    parse_profile(text)
    return text


def _one_of(known: Sequence[str]) -> Callable[[str], str]:
    """A check that a text is one of some."""

    def check(text: str) -> str:
        if text not in known:
            raise UsageError(f"expected one of {', '.join(known)}, got {text!r}{suggestion(text, known)}")
        return text

    return check


def _provider(text: str) -> None:
    with contextlib.suppress(ImportError):  # the row says that it is missing
        import onnxruntime

        from ..runners.providers import chosen_providers

        chosen_providers(onnxruntime, [text])


# The check of each element of a list.
_LISTS: Mapping[str, Callable[[str], str]] = {
    "targets": parse_target, "dtypes": norm_dtype, "build": flavor_name, "runners": _one_of(RUNNERS),
    "profiles": _profile, "package": _server, "reports": _one_of(REPORTS),
}  # fmt: skip


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
