"""The tables in Markdown: every figure of a row, ours beside the best peer and the copy, and the losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from .cases import OPS, Case

Row = Mapping[str, Any]

# From these rows on ours must have this share of the speed of a copy of the same size.
COPY_ROWS: Final = 2048
COPY_SHARE: Final = 0.97
# From these bytes on ours must have this share of the bandwidth of a large copy.
LARGE_BYTES: Final = 200_000_000
LARGE_SHARE: Final = 0.93


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By operator, dtype, width and rows."""
    return sorted(rows, key=lambda row: (OPS.index(row["op"].split()[0]), row["op"], *_key(row)))


def _key(row: Row) -> tuple[str, int, int]:
    return row["dtype"], row["width"], row["rows"]


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _table(head: Sequence[str], lines: Iterable[str]) -> str:
    return "\n".join([_line(head), "|" + "---|" * len(head), *lines])


def _us(found: Mapping[str, Any]) -> str:
    return f"{found['cold']['median']:.2f}"


def _peer(found: Mapping[str, Any]) -> str:
    """Microseconds, `-` if the peer has no such operator, or what is wrong."""
    if "problem" in found:
        return str(found["problem"])
    return "-" if "missing" in found else _us(found)


def _best(row: Row, state: str) -> tuple[str, str, str]:
    """Name, microseconds and ratio of the best peer."""
    best = row["best"].get(state)
    return ("", "", "") if best is None else (best["peer"], f"{best['median']:.2f}", f"{best['ratio']:.2f}")


def row_line(row: Row) -> str:
    """One line of the first table; peers have the order of the row."""
    cold, warm = _best(row, "cold"), _best(row, "warm")
    wrong = f" WRONG: {row['problem']}" if row["problem"] else ""
    return _line([
        row["op"], row["dtype"], row["rows"], row["width"], _us(row["ours"]), f"{row['ours']['warm']['median']:.2f}",
        *(_peer(found) for found in row["peers"].values()), cold[0], cold[1], warm[0], warm[1],
        cold[2], warm[2], _us(row["copy"]), f"{row['tb_per_second']:.2f}", f"{row['of_copy']:.0%}",
        f"{row['error']:.2f}{wrong}", row["layout"], row["registers"], row["spilled_bytes"],
    ])  # fmt: skip


def row_head(versions: Mapping[str, str]) -> list[str]:
    """Head of the first table, with the version of each peer."""
    return [
        "op", "dtype", "rows", "width", "ours, cold", "ours, warm",
        *(f"{name} {version}" for name, version in versions.items()),
        "best, cold", "us", "best, warm", "us", "ours / best, cold", "ours / best, warm", "copy", "TB/s", "of copy",
        "error", "layout", "registers", "spilled",
    ]  # fmt: skip


def rows_table(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """Every row with all its figures."""
    return _table(row_head(versions), map(row_line, in_order(rows)))


def summary_table(rows: Sequence[Row]) -> str:
    """Ours, the best peer and the copy."""
    head = [
        "op", "dtype", "rows", "width", "ours, us", "best peer, us", "copy, us", "ours / best", "of copy",
        "warm: ours, us", "warm: best peer, us", "warm: ours / best",
    ]  # fmt: skip
    lines = []
    for row in in_order(rows):
        cold, warm = _best(row, "cold"), _best(row, "warm")
        lines.append(_line([
            row["op"], row["dtype"], row["rows"], row["width"], _us(row["ours"]), f"{cold[1]} {cold[0]}",
            _us(row["copy"]), cold[2], f"{row['of_copy']:.0%}", f"{row['ours']['warm']['median']:.2f}",
            f"{warm[1]} {warm[0]}", warm[2],
        ]))  # fmt: skip
    return _table(head, lines)


def losses(rows: Sequence[Row], bandwidth: float) -> list[str]:
    """Where ours is slower than the best peer or than it should be beside a copy.

    Args:
        rows: the rows.
        bandwidth: of a large copy, in TB/s.
    """
    found = []
    for row in in_order(rows):
        name = f"{row['op']} {row['dtype']} {row['rows']}x{row['width']}"
        for state, best in row["best"].items():
            if best["ratio"] > 1.0:
                ours = row["ours"][state]["median"]
                found.append(
                    f"{name}: {ours:.2f} us, {best['peer']} {best['median']:.2f} us, "
                    f"ratio {best['ratio']:.3f} with a {state} L2"
                )
        if row["rows"] >= COPY_ROWS and row["of_copy"] < COPY_SHARE:
            found.append(f"{name}: {row['of_copy']:.1%} of a copy of the same bytes, expected {COPY_SHARE:.0%}")
        share = row["tb_per_second"] / bandwidth
        if row["bytes"] >= LARGE_BYTES and share < LARGE_SHARE:
            found.append(
                f"{name}: {row['tb_per_second']:.2f} TB/s is {share:.1%} of the copy bandwidth of "
                f"{bandwidth:.2f} TB/s, expected {LARGE_SHARE:.0%}"
            )
    return found


def problems(rows: Sequence[Row]) -> list[str]:
    """What is wrong with our results, and with those of peers."""
    found = []
    for row in in_order(rows):
        name = f"{row['op']} {row['dtype']} {row['rows']}x{row['width']}"
        found += [f"{name}: ours is wrong: {row['problem']}"] if row["problem"] else []
        found += [
            f"{name}: {peer} {other['version']}: {other['problem']}"
            for peer, other in row["peers"].items()
            if "problem" in other
        ]
    return found


def listed(title: str, items: Sequence[str], none: str) -> str:
    """A section with a list, or with the sentence that there is nothing to list."""
    return f"## {title}\n\n" + ("\n".join(f"- {item}" for item in items) if items else none)


def conclusion(rows: Sequence[Row], bandwidth: float, left: Sequence[Case], failed: Sequence[str]) -> str:
    """What is printed last: the summary, what was not measured, what is wrong, and the losses."""
    sections = [
        "## Ours, the best peer, and a copy\n\n" + summary_table(rows),
        listed("Not measured", [*failed, *(case.name for case in left)], "Every row was measured."),
        listed("Wrong or failed", problems(rows), "Every result is accurate, and every peer ran."),
        listed("Losses", losses(rows, bandwidth), f"None in {len(rows)} rows."),
    ]
    return "\n\n".join(sections)


def as_json(value: Any) -> Any:
    """The same with rounded numbers, and with texts for those that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else str(value)
    return value
