"""The plots of a report as inline SVG (`depth`, `histogram`), drawn by matplotlib, with the page's CSS colors.

No text of a report is passed to matplotlib (which would interpret `$` and `_` as mathematics); names of norms are
added afterwards as `<title>` elements, the tooltips of browsers.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .text import clean, label, short

# Placeholder colors, each replaced by a CSS variable of the page; matplotlib accepts only literal colors.
_CANDIDATE, _BASELINE, _INK, _LINE, _FAIL = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {
    _CANDIDATE: "var(--candidate)",
    _BASELINE: "var(--pytorch)",
    _INK: "var(--muted)",
    _LINE: "var(--line)",
    _FAIL: "var(--fail)",
}
_STYLE = {
    "svg.fonttype": "none",  # keep text as text: it uses the page's font, and can be searched and copied
    "svg.hashsalt": "rmsnorm-deploy",
    "path.simplify": False,
    "font.size": 11.0,
    "figure.facecolor": "none",
    "figure.dpi": 72.0,
    "axes.facecolor": "none",
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}
_XLINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def depth(rows: Sequence[Mapping[str, Any]], culprits: Iterable[str], prefix: str) -> str:
    """Error along the order of execution, on a log scale.

    Args:
        rows: the report's `depth`, at least one row.
        culprits: paths of norms to mark with a vertical line.
        prefix: prefix of every id, so that a page can contain several figures.

    Returns:
        An `<svg>` element. Every row has a band of full height whose tooltip shows the norm and its errors.
    """
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(13.0, 4.0), layout="constrained")
        axes = figure.subplots()
        columns = {
            key: [math.nan if row.get(key) is None else float(row[key]) for row in rows]
            for key in ("error", "baseline_error", "introduced", "baseline_introduced")
        }
        low, high = _decades([value for values in columns.values() for value in values])
        places = list(range(1, len(rows) + 1))
        for place in _marked(rows, culprits):
            axes.axvline(place, color=_FAIL, linewidth=1.5, linestyle=(0, (2, 2)))
        drawn = {key: [_exponent(value, low, high) for value in values] for key, values in columns.items()}
        axes.plot(places, drawn["baseline_error"], color=_BASELINE, linewidth=1.6, linestyle=(0, (5, 2)))
        axes.plot(places, drawn["error"], color=_CANDIDATE, linewidth=1.8)
        _points(axes, places, drawn["baseline_introduced"], marker="D", color=_BASELINE, markerfacecolor="none")
        _points(axes, places, drawn["introduced"], marker="o", color=_CANDIDATE)
        titles = {}
        for place, row in zip(places, rows, strict=True):
            titles[f"tip-{place}"] = _depth_title(row)
            axes.bar(place, high - low, width=1.0, bottom=low, facecolor="none", edgecolor="none", gid=f"tip-{place}")
        axes.set(xlim=(0.5, len(rows) + 0.5), ylim=(low, high))
        axes.set(xlabel="place in the order of execution", ylabel="error / row RMS")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        _ticks_of_ten(axes)
        return _inline(figure, prefix, "Error of the candidate and of PyTorch at every norm", titles)


def histogram(candidate: Mapping[str, Any], baseline: Mapping[str, Any] | None, prefix: str) -> str:
    """Shares of the elements by ULP error, candidate beside PyTorch, on a log scale.

    Args:
        candidate: the `histogram` of the candidate's statistics.
        baseline: the `histogram` of PyTorch's statistics, or None.
        prefix: prefix of every id, so that a page can contain several figures.

    Returns:
        An `<svg>` element; the tooltip of a bar gives its count.
    """
    sides = [("candidate", _CANDIDATE, _counts(candidate)), ("PyTorch", _BASELINE, _counts(baseline))]
    edges = sorted({edge for _, _, counts in sides for edge in counts})
    last = max((n for n, edge in enumerate(edges) if any(counts.get(edge) for _, _, counts in sides)), default=0)
    edges = edges[: last + 1]
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(7.0, 3.2), layout="constrained")
        axes = figure.subplots()
        titles = {}
        low, _ = _decades(count / sum(counts.values()) for _, _, counts in sides for count in counts.values() if count)
        for side, (name, color, counts) in enumerate(sides):
            total = sum(counts.values())
            for place, edge in enumerate(edges):
                count = counts.get(edge, 0)
                if count:
                    gid = f"tip-{side}-{place}"
                    titles[gid] = f"{name}: {count:,} of {total:,} elements, {_bucket(edges, place)}"
                    height = math.log10(count / total) - low
                    axes.bar(place + 0.4 * side - 0.2, height, width=0.36, bottom=low, color=color, gid=gid)
        axes.set(xlim=(-0.6, len(edges) - 0.4), ylim=(low, 0))
        axes.set(xlabel="error of at most … ULP", ylabel="share of elements")
        step = 1 if len(edges) <= 12 else 2
        axes.set_xticks(range(0, len(edges), step), [_edge(edge) for edge in edges[::step]])
        _ticks_of_ten(axes)
        return _inline(figure, prefix, "Histogram of the ULP errors of the candidate and of PyTorch", titles)


def _marked(rows: Sequence[Mapping[str, Any]], culprits: Iterable[str]) -> Iterable[int]:
    """The place of each culprit, counted from 1: the row with its largest introduced error."""
    for path in culprits:
        places = [place for place, row in enumerate(rows, 1) if row["path"] == path]
        if places:
            yield max(places, key=lambda place: float(rows[place - 1].get("introduced") or 0.0))


def _points(axes: Axes, places: list[int], values: list[float], **look: Any) -> None:
    axes.plot(places, values, linestyle="none", markersize=4.5, markeredgewidth=1.0, clip_on=False, **look)


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """The limits of the axis: exponents of the powers of ten around the finite positive values.

    The axes show exponents, not values: a logarithmic axis of matplotlib overflows near the limits of float64.
    """
    exponents = [math.log10(value) for value in values if 0.0 < value < math.inf]
    if not exponents:
        return -10, 0
    low = math.ceil(min(exponents)) - 1
    return low, max(math.floor(max(exponents)) + 1, low + 1)


def _exponent(value: float, low: int, high: int) -> float:
    """The position of a value on the axis: zero is on the lower edge, infinity on the upper one; NaN is a gap."""
    if math.isnan(value):
        return value
    return min(max(math.log10(value), low), high) if value > 0.0 else low


def _ticks_of_ten(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda exponent, _: f"1e{exponent:g}"))


def _depth_title(row: Mapping[str, Any]) -> str:
    title = f"{label(row)}, {row['side']}: error {short(row['error'])}, PyTorch {short(row.get('baseline_error'))}"
    if row.get("introduced") is not None:
        title += f"; introduced {short(row['introduced'])}, PyTorch {short(row.get('baseline_introduced'))}"
    return title


def _counts(figures: Mapping[str, Any] | None) -> dict[float, int]:
    if figures is None:
        return {}
    return {float(edge): n for edge, n in zip(figures["ulp_at_most"], figures["count"], strict=True)}


def _edge(edge: float) -> str:
    return "more" if math.isinf(edge) else f"{edge:g}"


def _bucket(edges: Sequence[float], place: int) -> str:
    if math.isinf(edges[place]):
        return f"more than {edges[place - 1]:g} ULP" if place else "not finite"
    return f"at most {edges[place]:g} ULP" + (f" and more than {edges[place - 1]:g}" if place else "")


def _inline(figure: Figure, prefix: str, name: str, titles: Mapping[str, str]) -> str:
    """The figure as an element of an HTML page: without a fixed size, with prefixed ids and the page's style."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's stylesheet would apply to the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = {match for element in root.iter() for match in _references(element)}
    for element in root.iter():
        _adopt(element, prefix, used, titles)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": name}
    return ET.tostring(root, encoding="unicode")


def _references(element: ET.Element) -> list[str]:
    found = [match for value in element.attrib.values() for match in _REFERENCE.findall(value)]
    return [*found, element.attrib[_XLINK].removeprefix("#")] if _XLINK in element.attrib else found


def _adopt(element: ET.Element, prefix: str, used: set[str], titles: Mapping[str, str]) -> None:
    """Convert one element of matplotlib's SVG file to an element of the page."""
    element.tag = element.tag.rpartition("}")[2]  # HTML needs no namespaces
    element.tail = None
    attributes = element.attrib
    own = attributes.pop("id", None)
    if own is not None and own in titles:
        attributes["class"] = "tip"
        title = ET.Element("title")
        title.text = clean(titles[own])
        element.insert(0, title)
    if own in used:
        attributes["id"] = f"{prefix}-{own}"
    if _XLINK in attributes:
        attributes["href"] = f"#{prefix}-" + attributes.pop(_XLINK).removeprefix("#")
    if element.text is not None and not element.text.strip():
        element.text = None
    for key, value in attributes.items():
        new = _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
        if key == "style":
            new = re.sub(r"font-family: [^;]*;? ?", "", new)
            for color, variable in _VARIABLES.items():
                new = new.replace(color, variable)
        elif key == "d":
            new = " ".join(new.split())
        attributes[key] = new
