"""Which execution providers ran the norms of a validated model (`norm_lines`, `cpu_notes`), from a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ...models.errors import few
from .text import counted

_CPU: Final = "CPUExecutionProvider"
_UNKNOWN: Final = "unknown"


def norm_lines(report: Mapping[str, Any]) -> list[str]:
    """`norms ran on: CPUExecutionProvider 5 (RMSNormalization)`, for the model or for each of its parts."""
    lines = []
    for part, provenance in _runs(report):
        counts = Counter(row["provider"] or _UNKNOWN for row in provenance["norms"])
        texts = []
        for provider, count in counts.most_common():
            rows = [row for row in provenance["norms"] if (row["provider"] or _UNKNOWN) == provider]
            ops = ", ".join(dict.fromkeys(row["op"] for row in rows if row["op"]))
            texts.append(f"{provider} {count}" + (f" ({ops})" if ops else ""))
        lines.append(f"{part}norms ran on: {', '.join(texts)}")
    return lines


def cpu_notes(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each part of the model of which norms ran on the CPU, although another provider was requested."""
    notes = []
    for part, provenance in _runs(report):
        asked = [name for name in provenance.get("providers_asked", ()) if name != _CPU]
        paths = [str(row["path"]) for row in provenance["norms"] if _CPU in (row["provider"] or "").split("+")]
        if asked and paths:
            notes.append(
                f"{part}{', '.join(asked)} was requested, and {counted(len(paths), 'norm')} ran on {_CPU}: {few(paths)}"
            )
    return notes


def _runs(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The provenance of each run that has providers of norms, after the name of the part as it begins a line."""
    candidate = (report.get("provenance") or {}).get("candidate") or {}
    parts = {"": candidate} if "norms" in candidate else {f"{name}: ": each for name, each in candidate.items()}
    for part, provenance in parts.items():
        rows = provenance.get("norms") if isinstance(provenance, Mapping) else None
        if rows and all("provider" in row for row in rows):
            yield part, provenance
