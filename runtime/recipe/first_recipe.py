"""A first recipe for a model (`first_recipe`), with a comment for every field: `rmsnorm init`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ...models.errors import UsageError
from ...models.hub.options import HubOptions
from ...models.regular_files import read_json
from .fields import GROUPS, RecipeFields, field_of, names_of
from .recipe_file import parse_recipe
from .sources import located, source_kind

_HEAD = """\
# The models that `rmsnorm ship` exports, validates and packages. `rmsnorm ship --dry-run` says what it would do.
output = "dist"  # {output}

# Fields that a [[model]] does not have are those of [defaults].
[defaults]
targets = ["ort"]  # {targets}

[[model]]
name = {name}  # {named}
"""


def first_recipe(model: str, path: Path, hub: HubOptions | None = None) -> str:
    """The text of a recipe for one model, which `read_recipe` accepts.

    Args:
        model: as MODEL of `rmsnorm export`, or an .onnx file; a relative path is relative to the working directory.
        path: where the recipe will be; paths in it are relative to its folder.
        hub: the revision and subfolder of a hub name.

    Raises:
        UsageError: there is no such model, or it has no revision, or its config cannot be read.
    """
    here = Path.cwd()
    kind = source_kind(model, here)
    if kind in ("missing", "arrays"):
        raise UsageError(
            f"MODEL: expected an existing folder, .onnx file or file.py:factory, or a hub name (owner/model), got "
            f"{model!r}."
        )
    hub = hub or HubOptions()
    config = _config(Path(located(model, here))) if kind == "folder" else {}
    is_decoder = _is_text_decoder(config)
    given: dict[str, Any] = {"source": _source(model, kind, here, path)}
    given |= {name: value for name in ("revision", "subfolder") if (value := getattr(hub, name)) is not None}
    if is_decoder:
        given["with_past"] = True
        given |= {"package": ["genai"]} if config.get("eos_token_id") is not None else {}
    text = _head(_name(model)) + "".join(_section(group, given) for group in GROUPS)
    parse_recipe(text, path)
    return text


def _head(name: str) -> str:
    fields = RecipeFields.model_fields
    return _HEAD.format(
        output=fields["output"].description,
        targets=field_of("targets").description,
        name=_toml(name),
        named=field_of("name").description,
    )


def _section(group: type[BaseModel], given: Mapping[str, Any]) -> str:
    """The fields of a group: those that are given, and the others as comments with an example."""
    lines = [f"\n# {group.__doc__}"]
    for name in names_of(group):
        if name != "targets":  # it is among the defaults
            field = field_of(name)
            example = (field.examples or [None])[0]
            line = f"{name} = {_toml(given.get(name, example))}  # {field.description}"
            lines.append(line if name in given else f"# {line}")
    return "\n".join(lines) + "\n"


def _config(folder: Path) -> dict[str, Any]:
    """The model's config with what config.json of generation says of the last token; empty without one."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: expected a config.json, got none. Save the model with save_pretrained.")
    config = read_json(folder / "config.json", "Save the model again with save_pretrained.")
    if not isinstance(config, dict):
        raise UsageError(f"{folder / 'config.json'}: expected a JSON object, got {type(config).__name__}.")
    generation = folder / "generation_config.json"
    more = read_json(generation, "Save the model again.") if generation.is_file() else {}
    ends = {name: more[name] for name in ("eos_token_id",) if isinstance(more, dict) and name in more}
    return {**config, **ends}


def _is_text_decoder(config: dict[str, Any]) -> bool:
    """Whether the checkpoint is a decoder that reads text alone."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    media = any(name.endswith(("vision_config", "audio_config")) for name in config)
    return str(first).endswith("ForCausalLM") and not config.get("is_encoder_decoder") and not media


def _source(model: str, kind: str, here: Path, path: Path) -> str:
    """The source as the recipe says it: a relative path is relative to the recipe, and begins with a dot."""
    if kind not in ("folder", "file", "onnx") or os.path.isabs(os.path.expanduser(model)):
        return model
    relative = Path(os.path.relpath(located(model, here), path.absolute().parent)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def _name(model: str) -> str:
    """A name of the letters and digits of a source."""
    last = re.split(r"[/:\\]", model.rstrip("/").removesuffix(".onnx"))[-1] or "model"
    return re.sub(r"^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9._-]+", "-", last))[:100].strip("-.") or "model"


def _toml(value: Any) -> str:
    """A value as TOML has it."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return _quoted(value)
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return f"{{{', '.join(f'{key} = {_toml(item)}' for key, item in value.items())}}}"
        case _:
            return repr(value)


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"MODEL: expected a name in UTF-8, as TOML requires, got {text!a}.") from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
