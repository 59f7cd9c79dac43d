"""A validation report that goes with a model (`report_on`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ...models.errors import UsageError
from ..report.report_file import VALIDATE_SCHEMA, read_report

REPORT = "report.json"


def report_on(path: Path, known: Collection[str | None], source: Path) -> dict[str, Any]:
    """The report of a validation, with any verdict.

    Args:
        path: its file.
        known: the hashes of the models that it may be on; of a report on several parts or runtimes, all must be known.
        source: where they are, for messages.

    Raises:
        UsageError: it is not a report of `validate`, or is on another model.
    """
    content = read_report(path)
    if content["schema"] != VALIDATE_SCHEMA:
        raise UsageError(f"{path}: expected a report of rmsnorm validate, got one of {content['schema']}.")
    found = set(_models_of((content.get("provenance") or {}).get("candidate")))
    if not found or not found <= set(known):
        got = ", ".join(sorted(one[:12] for one in found)) or "None"
        raise UsageError(
            f"{path}: expected a report on the model in {source}, got one on {content.get('model')} (sha256 {got}). "
            "Validate it again."
        )
    return content


def _models_of(candidate: Any) -> Iterator[str]:
    """The hashes of the models of a report."""
    if not isinstance(candidate, dict):
        return
    model = candidate.get("model")
    if isinstance(model, dict) and isinstance(model.get("sha256"), str):
        yield model["sha256"]
        return
    for inner in candidate.values():
        yield from _models_of(inner)
