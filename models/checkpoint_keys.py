"""What a transformers checkpoint lacks, or has besides: its files, and the keys of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
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


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(key == pattern or fnmatchcase(key, pattern) for pattern in patterns)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
