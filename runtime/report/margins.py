"""How near the errors of a report are to their limits: the worst of it, and the norms at most risk (`nearness`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .text import label

# Errors that a margin compares, each with the largest that passes.
_PAIRS = (("worst", "allowed_worst"), ("rms", "allowed_rms"))


class NormRisk(NamedTuple):
    """The kind of input on which a norm or an attention is nearest to its limit, or beyond it.

    Attributes:
        kind: `norm` or `attention`.
        name: its name, see `label`.
        on: the kind of input.
        passed: whether it passed there.
        figure: `max` or `rms`, whichever is nearer to its limit; or the explicit limit, see `Limits`.
        error, limit: that figure and the largest that passes, in eps x row scale; or as the explicit limit.
        share: error divided by limit, see `Nearest`.
    """

    kind: str
    name: str
    on: str
    passed: bool
    figure: str
    error: float
    limit: float
    share: float


@dataclass(frozen=True, slots=True)
class Nearness:
    """What a report says about limits.

    Attributes:
        verdict: the report's.
        worst: the largest error divided by its limit, over all outputs, norms, attentions and segments; None where
            nothing has a limit, such as integers, which are equal or not.
        where: the place of the worst; empty without one.
        norms: norms and attentions with the largest shares, one entry for each, in descending order.
    """

    verdict: str
    worst: float | None
    where: str
    norms: tuple[NormRisk, ...]


def limit_share(margin: Mapping[str, Any]) -> float:
    """How near the errors of a `margin` are to what they may be: 1 is the limit, infinity a NaN."""
    return max(_share(margin, pair) for pair in _PAIRS)


def row_share(row: Mapping[str, Any]) -> float | None:
    """How near the errors of a row are to what they may be; None if nothing limits them."""
    if row.get("margin") is not None:
        return limit_share(row["margin"])
    if row.get("nearest") is None:
        return None
    share = float(row["nearest"]["share"])
    return math.inf if math.isnan(share) else share


def nearness(report: Mapping[str, Any], most: int) -> Nearness:
    """The worst share of a limit in a report, and the norms at most risk.

    Parts that could not be judged have no meaningful limit, and do not count.

    Args:
        report: as `read_report` returns it.
        most: the largest number of norms.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the report is not as `validate` writes it.
    """
    norms = sorted(_norms(report), key=lambda norm: -norm.share)
    places = [(norm.share, f"{norm.kind} {norm.name}, {norm.on}") for norm in norms]
    places += [(share, f"output {row['case']}, {row['name']}") for row, share in _judged(report.get("outputs") or ())]
    places += [(share, f"segment {row['name']}") for row, share in _judged(report.get("segments") or ())]
    worst, where = max(places, key=lambda place: place[0], default=(None, ""))
    return Nearness(str(report.get("verdict")), worst, where, tuple(norms[:most]))


def worst_of(found: Iterable[Nearness | None]) -> float | None:
    """The largest share of a limit in several reports; None without any."""
    return max((near.worst for near in found if near is not None and near.worst is not None), default=None)


def _norms(report: Mapping[str, Any]) -> Iterator[NormRisk]:
    for kind, rows in (("norm", report.get("norms") or ()), ("attention", report.get("attentions") or ())):
        for row in rows:
            judged = list(_judged(row.get("inputs") or ()))
            if judged:
                part, share = max(judged, key=lambda found: found[1])
                figure, error, limit = _nearest(part)
                yield NormRisk(kind, label(row), str(part["kind"]), part["passed"], figure, error, limit, share)


def _nearest(row: Mapping[str, Any]) -> tuple[str, float, float]:
    """The figure of a row that is nearest to its limit, its value and the limit."""
    if row.get("nearest") is not None:
        return str(row["nearest"]["figure"]), float(row["nearest"]["value"]), float(row["nearest"]["limit"])
    margin = row["margin"]
    pair = max(_PAIRS, key=lambda pair: _share(margin, pair))
    error, limit = (float(margin[key]) for key in pair)
    return "max" if pair[0] == "worst" else "rms", error, limit


def _judged(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float]]:
    """The rows that have limits, each with its share."""
    for row in rows:
        share = row_share(row)
        if row["passed"] is not None and share is not None:
            yield row, share


def _share(margin: Mapping[str, Any], pair: tuple[str, str]) -> float:
    share = float(margin[pair[0]]) / (float(margin[pair[1]]) or 1.0)
    return math.inf if math.isnan(share) else share
