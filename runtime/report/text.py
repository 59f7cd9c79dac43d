"""Helpers of the HTML and JUnit reports: names and numbers as text, and atomic writing (`write_text`)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from ...export.onnx_io.atomic_files import new_file
from ...export.onnx_io.owned_files import is_own_report
from ...models.recognition.site import norm_name

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Control characters, soft hyphens, marks of direction, line separators, invisible operators, surrogates, BOM.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)
ABSENT = "–"


def command(report: Mapping[str, Any]) -> str:
    """The command that made a report, from its schema: `rmsnorm_deploy.validate/7` -> `rmsnorm validate`."""
    return "rmsnorm " + str(report["schema"]).partition(".")[2].partition("/")[0]


def label(row: Mapping[str, Any]) -> str:
    """The name of a norm in a report, see `norm_name`."""
    return norm_name(str(row["path"]), int(row.get("call") or 0))


def verdict_word(passed: bool | None) -> str:
    """`pass`, `fail` or `not judged`: how tables show whether a part passed."""
    return {True: "pass", False: "fail", None: "not judged"}[passed]


def clean(text: str) -> str:
    """The text with U+FFFD for every character that XML 1.0 forbids or UTF-8 cannot encode."""
    return _NOT_XML.sub("\ufffd", text)


def printable(text: str) -> str:
    r"""The text with an escape such as `\x1b` for every character that a terminal would obey instead of showing.

    These are control characters except newline and tab, marks that reorder or hide text, and surrogates.
    """
    return _OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def plain(value: Any) -> str:
    """A JSON value as JSON text, except that strings have no quotes and null is a dash."""
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short(value: float | str | None) -> str:
    """A number with three significant digits: `1,230`, `0.0123`, `1.23e-6`, `inf`, `nan`, a dash for None."""
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
    """An element of an array with nine digits, which distinguish any two float32 values; a dash for None."""
    return ABSENT if value is None else f"{float(value):.9g}"


def percent(share: float | None) -> str:
    """A share of 1 as a percentage, rounded down to hundredths, so that only 1 gives 100 %."""
    if share is None:
        return ABSENT
    return "100 %" if share == 1.0 else f"{min(math.floor(round(share * 1e4, 6)) / 100, 99.99):.2f} %"


def counted(count: int, noun: str) -> str:
    """A number with its noun: `1 norm`, `2 norms`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size_text(count: int) -> str:
    """A number of bytes with its unit, such as `1.2 MB`."""
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a report as UTF-8 text under a temporary name beside `path`, then rename it.

    Raises:
        UsageError: the file cannot be written, or exists and is not a report of this package; no partial file is left
            behind, and an existing file is unchanged.
    """
    with new_file(path, is_own_report) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
