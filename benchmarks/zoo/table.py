"""Results as JSON (`read`, `write`), as a table in Markdown, and the summary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmsnorm_deploy.models.errors import UsageError

from .catalog import ENTRIES
from .rows import STEPS

Rows = dict[str, list[dict[str, Any]]]
_SCHEMA = "rmsnorm_deploy.zoo/1"
_WIDEST = 90


def read(path: Path) -> Rows:
    """The rows of an earlier run; none if the file does not exist.

    Raises:
        UsageError: the file is not one that `write` made.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
        raise UsageError(f"{path}: expected a JSON file with schema {_SCHEMA}; remove it, or name another file.")
    return content["rows"]


def write(path: Path, rows: Rows) -> None:
    """Write the rows, completely or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps({"schema": _SCHEMA, "rows": rows}, indent=1), encoding="utf-8")
    os.replace(new, path)


def markdown(rows: Rows) -> str:
    """One line for each row, one column for each step, and the messages below."""
    lines = ["| model | kind | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 2) + "|"]
    notes = []
    for name, results in rows.items():
        by_step = {result["step"]: result for result in results}
        lines.append(f"| {name} | {_kind(name)} | " + " | ".join(_cell(by_step.get(step)) for step in STEPS) + " |")
        notes += [
            f"- {name}, {r['step']}: {r['status']}: {r['detail']}" for r in results if r["status"] not in ("ok", "none")
        ]
    return "\n".join([*lines, "", *notes, "", summary(rows)]) + "\n"


def _kind(name: str) -> str:
    return ENTRIES[name].kind if name in ENTRIES else "-"


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None or result["status"] == "none":
        return "-"
    if result["step"] == "recognize":
        return str(result["detail"]).partition(":")[0]
    return str(result["status"])


def line(name: str, results: Sequence[Mapping[str, Any]]) -> str:
    """One row as text."""
    parts = [f"{name:28}"]
    for result in results:
        detail = result["detail"] if result["status"] not in ("ok", "none") or result["step"] == "recognize" else ""
        parts.append(f"{result['step']}: {result['status']} {detail[:_WIDEST]}".rstrip())
    return ", ".join(parts)


def wrong(rows: Rows) -> list[str]:
    """The names of rows with a wrong result."""
    return [name for name, results in rows.items() if any(result["status"] == "wrong" for result in results)]


def summary(rows: Rows) -> str:
    """The counts."""
    found = {name: {result["step"]: result["status"] for result in results} for name, results in rows.items()}
    upstream = [steps for steps in found.values() if steps.get("upstream") == "ok"]
    tokens = [
        steps["tokens"] for steps in found.values() if steps.get("tokens") in ("ok", "wrong", "failed", "refused")
    ]
    exported = [steps for steps in found.values() if steps.get("export") == "ok"]
    missing = [steps for steps in found.values() if steps.get("build") == "not installed"]
    return (
        f"{len(rows)} rows ({len(missing)} not installed): exported {len(exported)}; exported "
        f"{sum(steps.get('export') == 'ok' for steps in upstream)} of {len(upstream)} that upstream exports; tokens "
        f"equal in {tokens.count('ok')} of {len(tokens)} decoders; wrong: {', '.join(wrong(rows)) or 'none'}"
    )
