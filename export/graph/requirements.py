"""What an exported file requires of its runtime, in the file's metadata: versions, and a cache in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ...models.errors import UsageError
from ...models.versions import older
from .metadata import IN_PLACE_KEY, REQUIRES_KEY


def requirement_metadata(versions: Mapping[str, str]) -> dict[str, str]:
    """The entry of an ONNX file's metadata for the lowest version of each runtime; none without versions."""
    return {REQUIRES_KEY: json.dumps(dict(versions), sort_keys=True)} if versions else {}


def merged_requirements(text: str | None, versions: Mapping[str, str]) -> str:
    """The entry with the higher version of each runtime: that of an entry, if it can be read, or the given one."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = {}
    before = found if isinstance(found, dict) else {}
    merged = {name: version for name, version in before.items() if isinstance(version, str)}
    for name, version in versions.items():
        if name not in merged or older(merged[name], version):
            merged[name] = version
    return json.dumps(merged, sort_keys=True)


def required_version(metadata: Mapping[str, str], runtime: str, where: str) -> str | None:
    """The lowest version of a runtime that an ONNX file's metadata names, or None.

    Raises:
        UsageError: the entry cannot be read.
    """
    text = metadata.get(REQUIRES_KEY)
    if text is None:
        return None
    try:
        versions = json.loads(text)
    except (ValueError, RecursionError):
        versions = None
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise UsageError(
            f"{where}: metadata {REQUIRES_KEY!r}: expected versions by runtime, got {text[:100]!r}. Export again."
        )
    return versions.get(runtime)


def in_place_metadata(names: Sequence[str]) -> dict[str, str]:
    """The entry of an ONNX file's metadata for the inputs of a cache that is written in place; none without them."""
    return {IN_PLACE_KEY: json.dumps(list(names))} if names else {}


def in_place_names(metadata: Mapping[str, str], where: str) -> frozenset[str]:
    """The inputs of the cache that a file writes in place, from its metadata.

    Raises:
        UsageError: the entry cannot be read.
    """
    text = metadata.get(IN_PLACE_KEY, "[]")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where}: metadata {IN_PLACE_KEY!r}: expected names, got {text[:100]!r}. Export again.")
    return frozenset(names)
