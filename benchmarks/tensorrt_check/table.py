"""The tables of the check, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from .rows import FAILED, LEFT_OUT, PASSED, Row, passed

Results = Mapping[str, Mapping[str, Any]]
HEAD: Final = (
    "| row | result | build s | plugin layers | norms: result/statistics | max error | of allowed | "
    "validate | run | tokens | graphs | contexts | step us |"
)
RULE: Final = "|" + "---|" * (HEAD.count("|") - 1)


def row_line(row: Row, results: Results) -> str:
    """One line of the table."""
    figures = {name: result.get("figures", {}) for name, result in results.items()}
    build, check = figures.get("build", {}), figures.get("validate", {})
    seconds = build.get("seconds", {})
    kinds = build.get("precision", [])
    source = {"inspector": "", "builder log": " (builder log)"}.get(str(build.get("layer_source", "inspector")), "")
    cells = [
        row.name + (" deep" if row.deep else ""),
        PASSED if passed(dict(results), row) else f"**{FAILED}**",  # type: ignore[arg-type]
        f"{sum(seconds.values()):.1f}" if seconds else _state(results, "build"),
        _plugin_cell(build),
        f"{', '.join(kinds)}{source}" if kinds else "-",
        _number(check.get("max_abs")),
        _number(check.get("of_allowed")),
        str(check.get("verdict", _state(results, "validate"))),
        *(_state(results, name) for name in ("run", "tokens", "graphs", "contexts")),
        _step_cell(results),
    ]
    return "| " + " | ".join(cells) + " |"


def rows_table(found: Sequence[tuple[Row, Results]]) -> str:
    """The table of all rows."""
    return "\n".join([HEAD, RULE, *(row_line(row, results) for row, results in found)])


def steps_table(found: Sequence[tuple[Row, Results]]) -> str:
    """The time of a decode step, native and in the plugin beside each other; empty without a pair."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for row, results in found:
        step = results.get("step", {}).get("figures", {}).get("microseconds")
        if step is not None:
            times.setdefault((row.runtime, row.family, row.dtype), {})[row.norms] = step
    lines = [
        f"| {'/'.join(key)} | {pair['native']:.0f} | {pair['plugin']:.0f} | {pair['plugin'] / pair['native']:.2f} |"
        for key, pair in times.items()
        if {"native", "plugin"} <= set(pair)
    ]
    if not lines:
        return ""
    head = "| decode step, median, us | native | plugin | plugin / native |"
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines])


def problems(found: Sequence[tuple[Row, Results]]) -> list[str]:
    """One line for each stage that failed or ended the row."""
    return [
        f"{row.name}, {name}: {result.get('text', '')}"
        for row, results in found
        for name, result in results.items()
        if result.get("state") == FAILED
    ]


def listed(title: str, lines: Sequence[str], otherwise: str) -> str:
    """A heading with its list."""
    return f"## {title}\n\n" + ("\n".join(f"- {line}" for line in lines) or otherwise)


def _state(results: Results, name: str) -> str:
    """`pass`, `fail`, `tie`, or `-` for a stage that did not run."""
    result = results.get(name, {})
    state = str(result.get("state", "-"))
    if state == PASSED and str(result.get("text", "")).startswith("a tie"):
        return "tie"
    return "-" if state == LEFT_OUT else state


def _step_cell(results: Results) -> str:
    step = results.get("step", {}).get("figures", {}).get("microseconds")
    return _state(results, "step") if step is None else f"{step:.0f}"


def _plugin_cell(build: Mapping[str, Any]) -> str:
    count = build.get("plugin_layers")
    if count is None:
        return "-"
    kind = build.get("plugin")
    return f"{count} ({kind})" if kind not in (None, "none") else str(count)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
