"""Norms, refusals and deviations as the commands print them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.spec import NormSpec

_PATHS_SHOWN = 3


def print_sites(screen: Screen, sites: Sequence[Mapping[str, Any]]) -> None:
    """A table of norms, those that compute the same together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in sites:
        spec = NormSpec.from_dict(site["spec"]).describe()
        width = _width(site["width"]) if site["class"] else "?"
        key = (spec, width, site["dtype"] or "?", (site["class"] or "?").rpartition(".")[2])
        groups.setdefault(key, []).append(site["path"])
    rows = [(len(paths), *key, _patterns(paths)) for key, paths in groups.items()]
    screen.table(("norms", "computes", "width", "dtype", "class", "where"), rows)


def print_refusals(screen: Screen, refusals: Sequence[Mapping[str, Any]]) -> None:
    """The modules left alone: each reason once, with its modules."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for refusal in refusals:
        groups.setdefault(refusal["reason"], []).append(refusal)
    if refusals:
        screen.line(f"Left as they are: {len(refusals)}")
    for reason, rows in groups.items():
        classes = ", ".join(sorted({row["class"].rpartition(".")[2] for row in rows}))
        screen.line(f"  {_patterns([row['path'] for row in rows])} ({classes}): {reason}")


def print_deviations(screen: Screen, deviations: Iterable[Mapping[str, Any]]) -> None:
    """One line for each deviation."""
    for row in deviations:
        bound = "without a bound" if row["at_most_ulp"] is None else f"at most {row['at_most_ulp']:g} ULP"
        screen.line(f"not exact, {bound}: {row['reason']} ({_counted(len(row['sites']), 'norm')})")


def found_line(sites: Sequence[Any], refusals: Sequence[Any], model: str) -> str:
    """A sentence on what recognition found."""
    if not sites:
        return f"There is no RMSNorm in {model}." + (" See below for what was left as it is." if refusals else "")
    return f"{_counted(len(sites), 'RMSNorm')} in {model}."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _width(width: Any) -> str:
    if width is None:
        return "any"
    return "x".join(map(str, width)) if isinstance(width, list | tuple) else str(width)


def _patterns(paths: Sequence[str]) -> str:
    """The paths with their layer numbers left out, such as `layers.*.norm`, and a few of them only."""
    counts = Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) or "the model itself" for path in paths)
    shown = list(counts)[:_PATHS_SHOWN]
    return ", ".join(shown) + (f" and {len(counts) - len(shown)} more" if len(counts) > len(shown) else "")
