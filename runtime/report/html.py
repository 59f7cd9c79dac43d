"""Write a validation report as one self-contained HTML page (`render`, `write`), which can be opened offline.

This module prepares the content of the page; the template `report.html.j2` defines its appearance.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...models.errors import EnvironmentMissingError
from .norm_providers import cpu_notes, norm_lines
from .printed import runner_rows
from .text import clean, command, exact, label, percent, plain, short, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

_SHOWN = ("max_ulp", "mean_ulp", "p999_ulp", "max_rel_row", "differing", "top1_agreement", "kl")
_HISTOGRAMS = 4
_WORST = 30
# If PyTorch's error exceeds this share of the row's RMS, its result is not meaningful.
_LOST = 0.25

# The class of the page's head for each verdict.
_KINDS = {"pass": "pass", "fail": "fail", "cannot be judged": "unjudged"}

Row = Mapping[str, Any]


def render(report: Mapping[str, Any]) -> str:
    """The report as an HTML page; the same report gives the same text.

    Args:
        report: a report of schema `rmsnorm_deploy.validate/7` or `rmsnorm_deploy.bisect/6`. `schema`, `verdict` and
            `outputs` are required; sections that are missing or empty are omitted.

    Raises:
        EnvironmentMissingError: jinja2 or matplotlib is not installed.
    """
    page = environment().get_template("report.html.j2").render(_view(report, _plots()))
    return clean(page)


def write(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the report as an HTML page, whole or not at all.

    Raises:
        UsageError: the file cannot be written.
        EnvironmentMissingError: jinja2 or matplotlib is not installed.
    """
    write_text(render(report), path)


def check_installed() -> None:
    """Check before a long run that an HTML report can be written.

    Raises:
        EnvironmentMissingError: jinja2 or matplotlib is not installed.
    """
    environment()
    _plots()


@cache
def environment() -> Environment:
    """The templates of pages, every value of which is escaped.

    Raises:
        EnvironmentMissingError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise _missing("jinja2", error) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"short": short, "exact": exact, "percent": percent, "plain": plain, "breakable": _breakable}
    environment.filters.update(filters)
    return environment


def _plots() -> ModuleType:
    try:
        from ..report import plots
    except ImportError as error:
        raise _missing("matplotlib", error) from error
    return plots


def _missing(package: str, error: ImportError) -> EnvironmentMissingError:
    return EnvironmentMissingError(
        f"an HTML report requires {package}, which cannot be imported ({error}). Install it with: "
        'pip install "rmsnorm-deploy[report]", or write the report as JSON or JUnit.'
    )


def _breakable(text: str) -> str:
    """A path as HTML that a browser may wrap after dots, slashes and underscores."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([./_])(?=\w)", r"\1<wbr>", str(escape(text))))


def _view(report: Mapping[str, Any], plots: ModuleType) -> dict[str, Any]:
    """The variables of the template; missing lists are empty."""
    lists = (
        "norms",
        "attentions",
        "segments",
        "depth",
        "culprits",
        "notes",
        "warnings",
        "unjudged",
        "untried",
        "refusals",
        "deviations",
    )
    view: dict[str, Any] = {name: report.get(name) or [] for name in ("outputs", *lists)}
    view["notes"] = [*view["notes"], *norm_lines(report), *cpu_notes(report)]
    norms = [_norm(row) for row in view["norms"]]
    attentions = [_norm(row) for row in view["attentions"]]
    anchors = {
        row["path"]: f"{kind}-{place}"
        for kind, rows in (("attention", attentions), ("norm", norms))
        for place, row in reversed(list(enumerate(rows, 1)))
        if not row["passed"]
    }
    culprits = [{**row, "anchor": anchors.get(row["name"])} for row in view["culprits"]]
    outputs = [_figured(row) for row in view["outputs"]]
    guilty = {row["name"] for row in culprits if row["kind"] == "norm"}
    guilty_attentions = {row["name"] for row in culprits if row["kind"] == "attention"}
    return {
        **view,
        "command": command(report),
        "schema": report["schema"],
        "created": report.get("created"),
        "verdict": report["verdict"],
        "kind": _KINDS[report["verdict"]],
        "model": report.get("model"),
        "summary": report.get("summary"),
        "runners": list(report.get("runners") or ()),
        "runner_rows": runner_rows(report) if report.get("runners") else [],
        "outputs": outputs,
        "logits": any(row["figures"]["top1_agreement"] is not None for row in outputs),
        "norms": norms,
        "attentions": attentions,
        "guilty_attentions": guilty_attentions,
        "segments": [_figured(row) for row in view["segments"]],
        "culprits": culprits,
        "guilty": guilty,
        "depth": [{**row, "label": label(row)} for row in view["depth"]],
        "depth_plot": plots.depth(view["depth"], sorted(guilty), "depth") if view["depth"] else None,
        "histograms": _histograms(view["outputs"], plots),
        "worst": _worst(view),
        "settings": report.get("settings") or {},
        "provenance": report.get("provenance") or {},
    }


def _figured(row: Row) -> dict[str, Any]:
    """A row whose statistics have every key that the page shows, None if it was not measured."""
    filled = {}
    for name in ("figures", "baseline_figures"):
        figures = row.get(name) or {}
        filled[name] = {key: figures.get(key) for key in _SHOWN}
        # Three digits of a cosine near 1 are all 9, so 1 - cosine is shown; rounding may make it slightly negative.
        cosine = figures.get("cosine")
        filled[name]["apart"] = None if cosine is None else max(0.0, 1.0 - float(cosine))
    return {**row, **filled}


def _norm(row: Row) -> dict[str, Any]:
    kinds = [_figured(kind) for kind in row.get("inputs") or []]
    candidates = [kind for kind in kinds if not kind["passed"]] or kinds
    return {**row, "label": label(row), "inputs": kinds, "worst": max(candidates, key=_telling, default=None)}


def _telling(row: Row) -> tuple[bool, float]:
    """The sort key for the kind of input to show: kinds on which PyTorch's result is meaningful come first."""
    own = (row.get("baseline_figures") or {}).get("max_rel_row")
    return own is None or float(own) < _LOST, _max_ulp(row)


def _max_ulp(row: Row) -> float:
    """The largest error, for sorting: infinity if it could not be measured."""
    value = (row.get("figures") or {}).get("max_ulp")
    number = math.inf if value is None else float(value)
    return math.inf if math.isnan(number) else number


def _histograms(outputs: Sequence[Row], plots: ModuleType) -> list[dict[str, Any]]:
    """Plots for the outputs with the largest errors."""
    rows = [row for row in outputs if (row.get("figures") or {}).get("histogram")]
    rows = sorted(rows, key=_max_ulp, reverse=True)[:_HISTOGRAMS]
    return [
        {
            "row": row,
            "plot": plots.histogram(
                row["figures"]["histogram"], (row.get("baseline_figures") or {}).get("histogram"), f"histogram-{place}"
            ),
        }
        for place, row in enumerate(rows, 1)
    ]


def _worst(view: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """The elements with the largest errors: first those of failed rows, then in descending order of ULPs."""
    judged = [(f"{row['case']}, {row['name']}", row) for row in view["outputs"]]
    judged += [
        (f"{label(row)}, {kind['kind']}", kind)
        for row in [*view["norms"], *view["attentions"]]
        for kind in row.get("inputs") or []
    ]
    judged += [(row["name"], row) for row in view["segments"]]
    found = [
        {**element, "where": where, "passed": row["passed"]}
        for where, row in judged
        for element in (row.get("figures") or {}).get("worst") or []
    ]
    return sorted(found, key=lambda element: (bool(element["passed"]), -float(element["ulp"])))[:_WORST]
