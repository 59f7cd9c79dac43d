"""A first recipe for a model (`first_recipe`), with a comment for every field: `rmsnorm init`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ...models.errors import UsageError
from ...models.hub.options import HubOptions
from ...models.regular_files import read_json
from .recipe_file import parse_recipe
from .sources import located, source_kind

_TEXT = """\
# The models that `rmsnorm ship` exports, validates and packages. `rmsnorm ship --dry-run` says what it would do.
output = {output}  # the folder of the results, relative to this file

# Fields that a [[model]] does not have are those of [defaults].
[defaults]
targets = ["ort"]  # primitives, standard, ort, plugin: see `rmsnorm targets`

[[model]]
name = {name}
source = {source}  # a folder, file.py:factory, package.module:factory, builtin:NAME or a hub name
{revision}
{subfolder}
# dtypes = ["float32", "float16"]  # a row for each; the checkpoint's dtype if omitted
{with_past}
# attention = "node"  # or decomposed; in-place for target ort with_past
# quantize = "int4"  # or int8: for ONNX Runtime alone
# opset = 23  # the target's default if omitted
# inputs = "inputs.npz"  # example inputs of a model that does not read tokens
# validate = true  # compare the exported model with PyTorch
# lossy = "int4"  # limits of int8, int4, fp16 or bf16 instead of PyTorch's own error
{package}
# trust_remote_code = false  # run Python code that comes with the checkpoint
"""
_WITH_PAST = "with_past = true  # the KV cache is an input and an output"
_NO_PAST = "# with_past = true  # for decoders of transformers: the KV cache is an input and an output"
_PACKAGE = "package = {servers}  # folders for servers: genai (with_past), triton, trtexec"


def first_recipe(model: str, path: Path, hub: HubOptions | None = None) -> str:
    """The text of a recipe for one model, which `read_recipe` accepts.

    Args:
        model: as MODEL of `rmsnorm export`; a relative path is relative to the working directory.
        path: where the recipe will be; paths in it are relative to its folder.
        hub: the revision and subfolder of a hub name.

    Raises:
        UsageError: there is no such model, or it has no revision, or its config cannot be read.
    """
    here = Path.cwd()
    kind = source_kind(model, here)
    if kind == "missing":
        raise UsageError(
            f"MODEL: expected an existing folder or file.py:factory, or a hub name (owner/model), got {model!r}."
        )
    hub = hub or HubOptions()
    config = _config(Path(located(model, here))) if kind == "folder" else {}
    is_decoder = _is_text_decoder(config)
    servers = ["genai"] if is_decoder and config.get("eos_token_id") is not None else []
    text = _TEXT.format(
        output=_quoted("dist"),
        name=_quoted(_name(model)),
        source=_quoted(_source(model, kind, here, path)),
        revision=_given("revision", hub.revision, "main", "of a hub name: a branch, a tag or a commit"),
        subfolder=_given("subfolder", hub.subfolder, "small", "of a hub name: a folder in its repository"),
        with_past=_WITH_PAST if is_decoder else _NO_PAST,
        package=("" if servers else "# ") + _PACKAGE.format(servers=json.dumps(servers or ["triton"])),
    )
    parse_recipe(text, path)
    return text


def _given(key: str, value: str | None, example: str, comment: str) -> str:
    """The line of a field; a comment if it has no value."""
    return f"{'# ' if value is None else ''}{key} = {_quoted(value or example)}  # {comment}"


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
    if kind not in ("folder", "file") or os.path.isabs(os.path.expanduser(model)):
        return model
    relative = Path(os.path.relpath(located(model, here), path.absolute().parent)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def _name(model: str) -> str:
    """A name of the letters and digits of a source."""
    last = re.split(r"[/:\\]", model.rstrip("/"))[-1] or "model"
    return re.sub(r"^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9._-]+", "-", last))[:100].strip("-.") or "model"


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"MODEL: expected a name in UTF-8, as TOML requires, got {text!a}.") from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
