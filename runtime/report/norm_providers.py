"""What ran the norms of a validated model (`norm_lines`, `cpu_notes`), from a report: providers, or an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ...models.errors import few
from .text import counted

_CPU: Final = "CPUExecutionProvider"
_UNKNOWN: Final = "unknown"


def norm_lines(report: Mapping[str, Any]) -> list[str]:
    """`norms ran on: CPUExecutionProvider 5 (RMSNormalization)`, for the model or for each of its parts.

    Of an engine, `norms ran in: the plugin 5 (float16, statistics in float32)`: what was built, as its record says.
    """
    lines = []
    for part, provenance in _each(report):
        if all("plugin" in row for row in provenance["norms"]):
            lines.append(f"{part}norms ran in: {_in_engine(provenance)}")
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


def _in_engine(provenance: Mapping[str, Any]) -> str:
    own = f"layers of {provenance['product']}"
    places = Counter("the plugin" if row["plugin"] else own for row in provenance["norms"])
    texts = []
    for place, count in places.most_common():
        rows = [row for row in provenance["norms"] if ("the plugin" if row["plugin"] else own) == place]
        kinds = dict.fromkeys(f"{row['precision']}, statistics in {row['statistics']}" for row in rows)
        texts.append(f"{place} {count} ({'; '.join(kinds)})")
    return ", ".join(texts)


def _runs(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The provenance of each run that has providers of norms, after the name of the part as it begins a line."""
    for part, provenance in _each(report):
        if all("provider" in row for row in provenance["norms"]):
            yield part, provenance


def _each(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The provenance of each run that has norms."""
    candidate = (report.get("provenance") or {}).get("candidate") or {}
    parts = {"": candidate} if "norms" in candidate else {f"{name}: ": each for name, each in candidate.items()}
    for part, provenance in parts.items():
        rows = provenance.get("norms") if isinstance(provenance, Mapping) else None
        if rows:
            yield part, provenance
