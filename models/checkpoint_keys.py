"""What a transformers checkpoint lacks, or has besides: its files, and the keys of its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .errors import UsageError, few

_LISTED = 5
_allowed: ContextVar[tuple[str, ...]] = ContextVar("allowed_missing", default=())
# What each kind of key means, and the words for it in a note on a model that was loaded in spite of it.
_KINDS = {
    "missing": ("in the model and not in the checkpoint, so the values are random", "have random values"),
    "mismatched": ("of another shape in the checkpoint, so the values are random", "have random values"),
    "unexpected": ("in the checkpoint and not in the model, so they are ignored", "are ignored"),
}


@contextmanager
def allowing_missing(patterns: Iterable[str]) -> Iterator[None]:
    """Load models in spite of keys that match these names or patterns (`fnmatch`), while the context is open."""
    token = _allowed.set((*_allowed.get(), *patterns))
    try:
        yield
    finally:
        _allowed.reset(token)


def check_keys(where: str, info: Mapping[str, Any], allow_missing: Sequence[str] = ()) -> list[str]:
    """Refuse a model that a checkpoint does not fill exactly.

    Args:
        where: the checkpoint, for the message, such as `the folder m`.
        info: what `from_pretrained(..., output_loading_info=True)` returns beside the model. Keys that transformers
            itself declares harmless (tied weights, `_keys_to_ignore_on_load_missing`) are not in it.
        allow_missing: names or patterns (`fnmatch`) of keys that may be missing, unexpected or of another shape; those
            of `allowing_missing` too.

    Returns:
        A note for each kind of key that was allowed.

    Raises:
        UsageError: other keys are missing, unexpected or of another shape, or a weight could not be loaded.
    """
    patterns = (*allow_missing, *_allowed.get())
    found = {
        "missing": {key: key for key in info.get("missing_keys", ())},
        "mismatched": {
            key: f"{key} (expected {_shape(model)}, got {_shape(saved)})"
            for key, saved, model in info.get("mismatched_keys", ())
        },
        "unexpected": {key: key for key in info.get("unexpected_keys", ())},
    }
    problems, notes = [], []
    for kind, keys in found.items():
        meaning, noted = _KINDS[kind]
        allowed = sorted(text for key, text in keys.items() if _matches(key, patterns))
        refused = sorted(text for key, text in keys.items() if not _matches(key, patterns))
        if refused:
            problems.append(f"{kind} keys ({meaning}): {len(refused)}, namely {few(refused, _LISTED)}")
        if allowed:
            listed = f"{len(allowed)}, namely {few(allowed, _LISTED)}"
            notes.append(f"{kind} keys of the checkpoint that were allowed and {noted}: {listed}")
    errors = sorted(map(str, info.get("error_msgs", ())))
    if errors:
        problems.append(f"errors: {len(errors)}, namely {few(errors, _LISTED)}")
    if problems:
        raise UsageError(
            f"{where}: the weights do not fit the model: {'; '.join(problems)}. Give a complete checkpoint whose "
            "config.json belongs to its weights; or, if these keys do not matter, allow them by name or pattern "
            "(--allow-missing PATTERN, allow_missing=[...])."
        )
    return notes


def check_weight_files(folder: Path) -> None:
    """Refuse a folder whose index names files that do not exist, or whose safetensors files are damaged.

    Raises:
        UsageError: with the file's name.
    """
    files = _read_files(folder)
    if not files:
        return
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{file} is not a complete safetensors file ({error}). It may be truncated, or a pointer of Git LFS; "
                "download it again."
            ) from error


def _read_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads: one file, else the shards of an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(index)
    other = folder / "pytorch_model.bin.index.json"
    if other.is_file() and not (folder / "pytorch_model.bin").is_file():
        _shards(other)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{index}: expected a JSON object with a weight_map of keys and files, got something else "
            f"({type(error).__name__}: {error}). Download it again."
        ) from error
    missing = [str(name) for name in names if not (index.parent / str(name)).is_file()]
    if missing:
        raise UsageError(
            f"{index} names {len(missing)} of {len(names)} files that do not exist in {index.parent}: "
            f"{few(missing, _LISTED)}. Download the missing files."
        )
    return [index.parent / str(name) for name in names if str(name).endswith(".safetensors")]


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(key == pattern or fnmatchcase(key, pattern) for pattern in patterns)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
