"""Small charts of a figure over the runs of a recipe (`chart`), as the places of points and lines for inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# The size of a chart, and what is left free around its points, in units of the SVG.
WIDTH, HEIGHT, EDGE = 260.0, 56.0, 7.0
# Shares of a limit are drawn up to this one; larger ones are marked on the upper edge.
HIGHEST_SHARE = 1.25


class Point(NamedTuple):
    """One run: its place, the text of its tooltip, and whether its value is beyond the limit."""

    x: float
    y: float
    title: str
    is_beyond: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn.

    Attributes:
        points: the runs that have a value, from the first to the last.
        lines: for each group of runs in a row that have one, the `points` of an SVG polyline.
        limit: the height of the limit; None for figures without one.
        spoken: the values as text, for those who do not see the chart.
    """

    points: list[Point]
    lines: list[str]
    limit: float | None
    spoken: str


def chart(values: Sequence[float | None], texts: Sequence[str], *, limit: float | None = None) -> Chart:
    """The chart of one figure.

    Args:
        values: one for each run, at least 0; None, and a gap in the line, where there is none.
        texts: what each of them is called.
        limit: a value that is marked by a line, and beyond which values are bad. With it, the axis ends at
            `HIGHEST_SHARE` times the limit; without, at the largest value.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    top = limit * HIGHEST_SHARE if limit is not None else max(finite, default=0.0) or 1.0
    points: list[Point] = []
    lines: list[list[str]] = [[]]
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        if value is None:
            lines.append([])
            continue
        x, y = _across(place, len(values)), _height(value, top)
        points.append(Point(x, y, text, limit is not None and value > limit))
        lines[-1].append(f"{x:g},{y:g}")
    drawn = [" ".join(line) for line in lines if len(line) > 1]
    height = None if limit is None else _height(limit, top)
    return Chart(points, drawn, height, "; ".join(point.title for point in points))


def _across(place: int, count: int) -> float:
    """The last run is on the right edge; a single one too."""
    share = place / (count - 1) if count > 1 else 1.0
    return round(EDGE + share * (WIDTH - 2 * EDGE), 2)


def _height(value: float, top: float) -> float:
    share = min(value / top, 1.0) if math.isfinite(value) else 1.0
    return round(HEIGHT - EDGE - share * (HEIGHT - 2 * EDGE), 2)
