"""What both forms of a report share: its names, its numbers as text, and writing a file whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...models.errors import UsageError

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
ABSENT = "–"


def command(report: Mapping[str, Any]) -> str:
    """The command that made a report, from its schema: `rmsnorm_deploy.validate/3` -> `rmsnorm validate`."""
    return "rmsnorm " + str(report["schema"]).partition(".")[2].partition("/")[0]


def label(row: Mapping[str, Any]) -> str:
    """The path of a norm, with the call where it is not the first one."""
    return f"{row['path']} (call {row['call']})" if row.get("call") else str(row["path"])


def clean(text: str) -> str:
    """The text with U+FFFD for every character that XML 1.0 forbids (and that UTF-8 cannot carry)."""
    return _NOT_XML.sub("\ufffd", text)


def plain(value: Any) -> str:
    """A JSON value as text, as it would be written in JSON, but a string without quotes and null as a dash."""
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short(value: float | str | None) -> str:
    """A figure with three significant digits: `1,230`, `0.0123`, `1.23e-6`, `inf`, `nan`, a dash for None."""
    if value is None:
        return ABSENT
    number = float(value)
    if number == 0.0 or not math.isfinite(number):
        return f"{abs(number) if number == 0.0 else number:g}"
    rounded = f"{number:.3g}"
    if 1e-3 <= abs(number) < 1e6:
        return f"{float(rounded):,.12g}"
    mantissa, _, exponent = f"{float(rounded):.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def exact(value: float | str | None) -> str:
    """An element of an array with the nine digits that tell any two float32 apart; a dash for None."""
    return ABSENT if value is None else f"{float(value):.9g}"


def percent(share: float | None) -> str:
    """A share of 1 rounded down to hundredths of a percent, so that only all of it reads 100 %."""
    if share is None:
        return ABSENT
    return "100 %" if share == 1.0 else f"{math.floor(share * 1e4) / 100:.2f} %"


def counted(count: int, noun: str) -> str:
    """A number with its noun: `1 norm`, `2 norms`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write UTF-8 text under a temporary name beside `path`, then rename it.

    Raises:
        UsageError: the place cannot be written to; nothing is left behind, and a file that was there is unharmed.
    """
    target = Path(path).expanduser().absolute()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, target)
    except OSError as error:
        raise UsageError(
            f"cannot write the report {target}: {error.strerror or error}. Name a file in a folder that can be "
            "written to; nothing was left behind."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
