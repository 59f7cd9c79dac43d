"""The lowest versions of runtimes that compute an exported file right, in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...models.errors import UsageError
from .metadata import REQUIRES_KEY


def requirement_metadata(versions: Mapping[str, str]) -> dict[str, str]:
    """The entry of an ONNX file's metadata for the lowest version of each runtime; none without versions."""
    return {REQUIRES_KEY: json.dumps(dict(versions), sort_keys=True)} if versions else {}


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
