"""Write a validation report as JUnit XML for CI systems (`render`, `write`), and other cases (`document`).

The file conforms to both common schemas, the strict one of Ant's JUnitReport task (github.com/windyroad/JUnit-Schema)
and junit-10 of Jenkins' xUnit plugin. The first requires that `testsuites` has no attributes, that every suite has
`package`, `id`, `hostname`, `system-out` and `system-err`, and that timestamps have no time zone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from ...export.onnx_io.owned_files import XML_MARK
from .text import clean, command, label, plain, short, write_text

_FIGURES = ("max_ulp", "mean_ulp", "p999_ulp", "max_abs", "max_rel_row", "cosine", "differing", "count")
# For a report without a time: the schema requires one, and the same report must give the same file.
_NO_TIME = "1970-01-01T00:00:00+00:00"


class Case(NamedTuple):
    """One test case.

    Attributes:
        name: its name.
        problem: the message and the text of a case that did not pass, else None.
        judged: whether it could be judged: a case that could not is an `error`, not a `failure`.
        seconds: how long it took.
        skipped: why it was not run, else None.
    """

    name: str
    problem: tuple[str, str] | None
    judged: bool = True
    seconds: float = 0
    skipped: str | None = None


def render(report: Mapping[str, Any]) -> str:
    """The report as JUnit XML.

    Args:
        report: a report of schema `rmsnorm_deploy.validate/7` or `rmsnorm_deploy.bisect/6`.

    Returns:
        The XML with its declaration. Suites `outputs`, `norms`, `attentions` and `segments`, each omitted if it has no
        case. If the report failed but none of its parts did, a failed case `verdict` is added, so that CI systems
        report a failure.
    """
    suites = {
        "outputs": [_output(row) for row in report["outputs"]],
        "norms": [_norm(row) for row in report.get("norms") or []],
        "attentions": [_norm(row) for row in report.get("attentions") or []],
        "segments": [_segment(row) for row in report.get("segments") or []],
    }
    if report["verdict"] != "pass" and not any(case.problem for cases in suites.values() for case in cases):
        reason = report.get("summary") or f"the verdict is: {report['verdict']}"
        suites["outputs"].append(Case("verdict", (reason, ""), report["verdict"] == "fail"))
    return document(suites, report)


def document(suites: Mapping[str, Sequence[Case]], report: Mapping[str, Any]) -> str:
    """JUnit XML with a suite for each name that has cases.

    Args:
        suites: the cases.
        report: what all of them are of: `schema`, `verdict` and, if known, `created`, `warnings` and `settings`.
    """
    root = ET.Element("testsuites")
    for name, cases in suites.items():
        if cases:
            _add_suite(root, name, cases, report)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{XML_MARK}\n' + ET.tostring(root, encoding="unicode") + "\n"


def write(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the report as JUnit XML, whole or not at all.

    Raises:
        UsageError: the file cannot be written.
    """
    write_text(render(report), path)


def _add_suite(root: ET.Element, name: str, cases: Sequence[Case], report: Mapping[str, Any]) -> None:
    title = command(report)
    suite = ET.SubElement(
        root,
        "testsuite",
        {
            "name": f"{title} {name}",
            "package": title,
            "id": str(len(root)),
            "hostname": "localhost",
            "timestamp": _timestamp(report.get("created") or _NO_TIME),
            "tests": str(len(cases)),
            "failures": str(sum(case.problem is not None and case.judged for case in cases)),
            "errors": str(sum(not case.judged for case in cases)),
            "skipped": str(sum(case.skipped is not None for case in cases)),
            "time": _seconds(sum(case.seconds for case in cases)),
        },
    )
    properties = ET.SubElement(suite, "properties")
    for key, value in _properties(report):
        ET.SubElement(properties, "property", {"name": clean(key), "value": clean(value)})
    for case in cases:
        # Jenkins uses the part before the last dot of a class name as the package.
        attributes = {"classname": f"{title}.{name}", "name": clean(case.name), "time": _seconds(case.seconds)}
        element = ET.SubElement(suite, "testcase", attributes)
        if case.problem is not None:
            message, text = map(clean, case.problem)
            tag, kind = ("failure", "mismatch") if case.judged else ("error", "not judged")
            ET.SubElement(element, tag, {"message": message, "type": kind}).text = text
        elif case.skipped is not None:
            ET.SubElement(element, "skipped", {"message": clean(case.skipped)})
    ET.SubElement(suite, "system-out")
    ET.SubElement(suite, "system-err")


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


def _properties(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "schema", str(report["schema"])
    yield "verdict", str(report["verdict"])
    for number, warning in enumerate(report.get("warnings") or []):
        yield f"warning.{number}", warning
    for key, value in (report.get("settings") or {}).items():
        if value is not None and not isinstance(value, list | dict):
            yield f"settings.{key}", plain(value)


def _timestamp(created: str) -> str:
    """UTC without a zone, to the second."""
    moment = datetime.fromisoformat(created)
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    return moment.replace(tzinfo=None).isoformat(timespec="seconds")


def _output(row: Mapping[str, Any]) -> Case:
    return _case(f"{row['case']}: {row['name']}", row, _figures(row))


def _segment(row: Mapping[str, Any]) -> Case:
    return _case(f"{row['index']}: {row['name']}", row, _figures(row))


def _norm(row: Mapping[str, Any]) -> Case:
    failed = [kind for kind in row.get("inputs") or [] if not kind["passed"]]
    return _case(label(row), row, "\n".join(f"{kind['kind']}: {kind['reason']}\n{_figures(kind)}" for kind in failed))


def _case(name: str, row: Mapping[str, Any], details: str) -> Case:
    if row["passed"]:
        return Case(name, None)
    return Case(name, (row["reason"], f"{row['reason']}\n{details}".rstrip()), row["passed"] is not None)


def _figures(row: Mapping[str, Any]) -> str:
    """The main statistics, a line for the candidate and one for PyTorch; empty if nothing was measured."""
    lines = []
    for who, key in (("candidate", "figures"), ("PyTorch", "baseline_figures")):
        figures = row.get(key)
        if figures:
            lines.append(f"{who}: " + ", ".join(_figure(k, figures[k]) for k in _FIGURES if figures.get(k) is not None))
    return "\n".join(lines)


def _figure(key: str, value: float | str) -> str:
    # Three digits are too few for a cosine near 1, and would round a count.
    return f"{key} {plain(value) if key in ('cosine', 'differing', 'count') else short(value)}"
