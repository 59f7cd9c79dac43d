"""Print norms, refusals, deviations and risks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.report.text import counted

_PATHS_SHOWN = 3


def print_found(
    screen: Screen, sites: Sequence[Mapping[str, Any]], refusals: Sequence[Mapping[str, Any]], first: str
) -> None:
    """Print the result of recognition: a first line, the norms, and the refusals."""
    screen.line(first)
    if sites:
        screen.line()
        print_sites(screen, sites)
    if refusals:
        screen.line()
        _print_refusals(screen, refusals)


def print_sites(screen: Screen, sites: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of norms, with norms that compute the same in one row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in sites:
        spec = NormSpec.from_dict(site["spec"]).describe()
        width = _width(site["width"]) if site["class"] is not None or site["width"] is not None else "?"
        unknown = "(in the graph)" if site.get("found") == "graph" else "?"
        key = (spec, width, site["dtype"] or "?", (site["class"] or unknown).rpartition(".")[2])
        groups.setdefault(key, []).append(site["path"])
    rows = [(len(paths), *key, _patterns(paths)) for key, paths in groups.items()]
    columns: tuple[str, ...] = ("norms", "computes", "width", "dtype", "class", "where")
    if all(site["class"] is None for site in sites):  # norms of a graph have no class
        columns = columns[:4] + columns[5:]
        rows = [row[:4] + row[5:] for row in rows]
    screen.table(columns, rows)


def _print_refusals(screen: Screen, refusals: Sequence[Mapping[str, Any]]) -> None:
    """Print the refusals: each reason once, with its modules."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for refusal in refusals:
        groups.setdefault(refusal["reason"], []).append(refusal)
    screen.line(f"Not changed: {len(refusals)}")
    for reason, rows in groups.items():
        classes = ", ".join(sorted({row["class"].rpartition(".")[2] for row in rows}))
        screen.line(f"  {_patterns([row['path'] for row in rows])} ({classes}): {reason}")


def found_line(
    sites: Sequence[Any], refusals: Sequence[Any], model: str, calls: int | None = None, *, modules_only: bool = False
) -> str:
    """A sentence with the number of norms that recognition found.

    Args:
        sites: the norms, one for each module; a module with several paths or calls is one norm.
        refusals: what was refused.
        model: the name of the model.
        calls: the number of calls, which is shown if it differs; None if it is unknown.
        modules_only: whether only modules were searched, so that norms outside of them are unknown.
    """
    if not sites:
        first = (
            f"No module in {model} was recognized as an RMSNorm. Norms outside of modules are found at export."
            if modules_only
            else f"There is no RMSNorm in {model}."
        )
        return first + (" What was refused is listed below." if refusals else "")
    called = "" if calls in (None, len(sites)) else f" ({counted(calls or 0, 'call')})"
    return f"{counted(len(sites), 'RMSNorm')} in {model}{called}."


def _width(width: Any) -> str:
    if width is None:
        return "any"
    return "x".join(map(str, width)) if isinstance(width, list | tuple) else str(width)


def _patterns(paths: Sequence[str]) -> str:
    """The paths with `*` for layer numbers, such as `layers.*.norm`; at most a few of them."""
    counts = Counter(re.sub(r"(^|\.)\d+(?=[.:]|$)", r"\1*", path) or "the model itself" for path in paths)
    shown = list(counts)[:_PATHS_SHOWN]
    return ", ".join(shown) + (f" and {len(counts) - len(shown)} more" if len(counts) > len(shown) else "")


def attention_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the attentions of an exported file were written, from its manifest: a line for each way, with the reason."""
    ways: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        how = "left as the function's operators" if row.get("node") is None else f"as {row.get('emits')}"
        ways.setdefault((how, row.get("reason") or ""), []).append(row["path"])
    return [
        f"{len(paths)} attention{'s' * (len(paths) > 1)} {how}: {_patterns(paths)}{f' ({reason})' if reason else ''}"
        for (how, reason), paths in ways.items()
    ]


def quantized_line(quantized: Mapping[str, Any]) -> str:
    """What the weights of an exported file were quantized to, from its manifest."""
    left = "".join(f"; left: {count} ({reason})" for reason, count in quantized.get("left", {}).items())
    profile = quantized["profile"]
    return f"  quantized to {profile}: the weights of {quantized['nodes']} MatMuls{left}"
