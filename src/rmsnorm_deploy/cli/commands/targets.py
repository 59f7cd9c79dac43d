"""`rmsnorm targets`: print the lowering table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen

if TYPE_CHECKING:
    from rmsnorm_deploy.export.lowering.attention_table import AttentionCell
    from rmsnorm_deploy.export.lowering.table import Cell, Deviation

SCHEMA = "rmsnorm_deploy.targets/4"
COLUMNS = ("target", "form", "writes", "opset", "dtypes", "runs in", "not exact")
ATTENTION_COLUMNS = ("target", "attention", "writes", "opset", "dtypes", "runs in")
_KINDS = {"plain": "plain", "softcap": "with a softcap", "sink": "with sinks"}


def targets(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what each target writes, what it requires, and where it is not exact."""
    from rmsnorm_deploy.export.lowering.attention_table import ATTENTION_TABLE
    from rmsnorm_deploy.export.lowering.table import TABLE

    screen = Screen(as_json)
    payload = {
        "schema": SCHEMA,
        "targets": [_json_row(cell) for cell in TABLE],
        "attention": [_attention_json(cell) for cell in ATTENTION_TABLE],
    }
    screen.result(payload, lambda: print(_markdown(), end="") if markdown else _print(screen))


def _markdown() -> str:
    return f"{markdown_table()}\n{attention_markdown_table()}"


def attention_markdown_table() -> str:
    """The table of attention in GitHub's Markdown."""
    from rmsnorm_deploy.export.lowering.attention_table import ATTENTION_TABLE

    lines = ["| " + " | ".join(ATTENTION_COLUMNS) + " |", "|" + " --- |" * len(ATTENTION_COLUMNS)]
    lines += ["| " + " | ".join(_attention_row(cell, code="`")) + " |" for cell in ATTENTION_TABLE]
    return "\n".join(lines) + "\n"


def markdown_table() -> str:
    """The lowering table in GitHub's Markdown, followed by the cases in which targets are not exact."""
    from rmsnorm_deploy.export.lowering.table import TABLE

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_row(cell, code="`")) + " |" for cell in TABLE]
    lines += ["", *(f"{number}. {_deviation(d)}" for number, d in _deviations().items())]
    return "\n".join(lines) + "\n"


def _print(screen: Screen) -> None:
    from rmsnorm_deploy.export.lowering.attention_table import ATTENTION_TABLE
    from rmsnorm_deploy.export.lowering.table import TABLE

    screen.table(COLUMNS, [_row(cell) for cell in TABLE])
    screen.line()
    screen.table(ATTENTION_COLUMNS, [_attention_row(cell) for cell in ATTENTION_TABLE])
    screen.line()
    screen.line("Not exact means: the result differs from the module's in these cases.")
    for number, deviation in _deviations().items():
        screen.line(f"{number}. {_deviation(deviation)}")


def _row(cell: Cell, code: str = "") -> tuple[str, ...]:
    numbers = [str(number) for number, d in _deviations().items() if d in cell.deviations]
    return (
        f"{code}{cell.target}{code}",
        {"plain": "norm", "residual_add": "residual add + norm"}[cell.form],
        *_requirements(cell),
        ", ".join(numbers) or "-",
    )


def _attention_row(cell: AttentionCell, code: str = "") -> tuple[str, ...]:
    return (
        f"{code}{cell.target}{code}",
        _KINDS[cell.kind] + (", in place" if cell.mode == "in-place" else ""),
        *_requirements(cell),
    )


def _requirements(cell: Cell | AttentionCell) -> tuple[str, ...]:
    """What a cell writes, and what that requires: the columns that both tables have."""
    return (
        f"{cell.emits} ({cell.note})",
        f"{cell.opset}+",
        ", ".join(cell.dtypes),
        ", ".join(f"{runtime} {version}+" for runtime, version in cell.runtimes),
    )


def _attention_json(cell: AttentionCell) -> dict[str, Any]:
    return {
        "target": cell.target,
        "kind": cell.kind,
        "mode": cell.mode,
        "emits": cell.emits,
        "opset": cell.opset,
        "dtypes": list(cell.dtypes),
        "runtimes": dict(cell.runtimes),
        "note": cell.note,
    }


def _deviations() -> dict[int, Deviation]:
    """Every deviation of the table once, numbered from 1."""
    from rmsnorm_deploy.export.lowering.table import TABLE

    return dict(enumerate(dict.fromkeys(d for cell in TABLE for d in cell.deviations), start=1))


def _deviation(deviation: Deviation) -> str:
    bound = "no bound" if deviation.ulp is None else f"at most {deviation.ulp:g} ULP"
    where = "in every runtime" if deviation.runtime == "any" else f"in {deviation.runtime}"
    order = deviation.order.replace("_", "-")
    return f"{order} norms in {' and '.join(deviation.dtypes)}, {where}: {bound}; {deviation.reason}."


def _json_row(cell: Cell) -> dict[str, Any]:
    return {
        "target": cell.target,
        "form": cell.form,
        "emits": cell.emits,
        "opset": cell.opset,
        "dtypes": list(cell.dtypes),
        "runtimes": dict(cell.runtimes),
        "deviations": [
            {"order": d.order, "dtypes": list(d.dtypes), "runtime": d.runtime, "at_most_ulp": d.ulp, "reason": d.reason}
            for d in cell.deviations
        ],
        "note": cell.note,
    }
