"""The safetensors files of a checkpoint's folder, and their tensors at rest (`stored_tensors`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import Tensor, nn

from ..errors import UsageError, few
from .header import read_header
from .mapped_file import map_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LISTED = 5
_pickles_allowed: ContextVar[bool] = ContextVar("pickles_allowed", default=False)


def weight_files_of(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads from a folder: one file, else the shards of an index.

    Returns:
        The files in the order in which they are named first; empty for a folder without such files.

    Raises:
        UsageError: the index is damaged, or names files that do not exist or are outside of the folder.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    return [folder / name for name in _shards(index)] if index.is_file() else []


def _shards(index: Path) -> list[str]:
    try:
        names = list(dict.fromkeys(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{index}: expected a JSON object with a weight_map of keys and files, got something else "
            f"({type(error).__name__}: {error}). Download it again."
        ) from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UsageError(f"{index}: expected names of files in its folder, got {few(outside, _LISTED)}.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UsageError(
            f"{index} names {len(missing)} of {len(names)} files that do not exist in {index.parent}: "
            f"{few(missing, _LISTED)}. Download the missing files."
        )
    return names


@contextmanager
def allowing_pickles() -> Iterator[None]:
    """Load models whose weights are pickled, while the context is open."""
    token = _pickles_allowed.set(True)
    try:
        yield
    finally:
        _pickles_allowed.reset(token)


def pickles_allowed() -> bool:
    """Whether a context of `allowing_pickles` is open."""
    return _pickles_allowed.get()


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are pickled: loading them can run any code, and copies them to memory.

    Raises:
        UsageError: it has weights in `pytorch_model.bin` and none in safetensors.
    """
    pickled = [name for name in PICKLED if (folder / name).is_file()]
    if pickled and not weight_files_of(folder):
        raise UsageError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run any code when it is loaded and cannot "
            "be read in place. If you trust it, convert it once: load it with transformers' from_pretrained and save "
            "it with save_pretrained, which writes safetensors; or allow it with --allow-pickle (allow_pickle=True)."
        )


def stored_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files by their keys, at rest: no bytes are read but the headers.

    Raises:
        UsageError: a file is damaged, or two files have the same key.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        stored = read_header(file)
        if not stored:
            continue
        mapped = map_file(file)
        twice = [tensor.name for tensor in stored if tensor.name in found]
        if twice:
            raise UsageError(f"{file}: another file of the checkpoint has these tensors too: {few(twice, _LISTED)}.")
        found |= {tensor.name: mapped.tensor(tensor) for tensor in stored}
    return found


def load_weights(module: nn.Module, source: str | os.PathLike[str]) -> None:
    """Give a module the weights of safetensors files without reading them; its exports then refer to these files.

    Args:
        module: any module; its parameters and saved buffers are replaced, also those on the meta device.
        source: a safetensors file whose keys are those of `module.state_dict()`, or a folder with `model.safetensors`
            or an index of shards.

    Raises:
        UsageError: a file is damaged, or its keys or shapes are not the module's; the module is then unchanged.
    """
    path = Path(source)
    files = weight_files_of(path) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path}: expected a safetensors file, or a folder with {SINGLE} or {INDEX}.")
    tensors, wanted = stored_tensors(files), module.state_dict(keep_vars=True)
    names: dict[int, str] = {id(tensor): name for name, tensor in wanted.items() if name in tensors}
    # A weight that two modules share is saved under one of its names.
    tied = {name: names[id(tensor)] for name, tensor in wanted.items() if name not in tensors and id(tensor) in names}
    problems = [
        f"{kind} keys: {few(sorted(keys), _LISTED)}"
        for kind, keys in (
            ("missing", wanted.keys() - tensors.keys() - tied.keys()),
            ("unexpected", tensors.keys() - wanted.keys()),
        )
        if keys
    ]
    problems += [
        f"{name}: expected {list(wanted[name].shape)}, got {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in wanted and wanted[name].shape != tensor.shape
    ]
    if problems:
        raise UsageError(f"{path} does not fit {type(module).__name__}: {'; '.join(problems[:_LISTED])}.")
    module.load_state_dict(tensors, strict=False, assign=True)
    for name, other in tied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, module.get_parameter(other))
