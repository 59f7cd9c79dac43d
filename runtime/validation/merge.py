"""One report of several (`merged`): of the models of a folder, or of the runtimes that ran one model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .options import ValidationOptions
from .result import ValidationReport


def validate_runners(
    candidate: object, options: ValidationOptions, validate: Callable[[ValidationOptions], ValidationReport]
) -> ValidationReport:
    """Validate a candidate in each runtime of the options; one report with a verdict for each.

    Args:
        candidate: the candidate.
        options: the options, with several runners.
        validate: validates it with options that name one runner.
    """
    reports = {name: validate(dataclasses.replace(options, runners=(name,))) for name in options.runners}
    report = merged(str(candidate), {name: _named(name, own) for name, own in reports.items()})
    first = next(iter(reports.values()))
    report.runners = {name: own.verdict for name, own in reports.items()}
    report.settings = {**first.settings, **options.to_dict()}
    report.refusals = first.refusals
    return report


def _named(runner: str, report: ValidationReport) -> ValidationReport:
    """The report, the names of its norms and segments beginning with the runner's."""
    norms = [
        dataclasses.replace(check, norm=dataclasses.replace(check.norm, key=_key(runner, check.norm.key)))
        for check in report.norms
    ]
    segments = [
        dataclasses.replace(
            segment,
            name=f"{runner}: {segment.name}",
            contains=[f"{runner}: {name}" for name in segment.contains],
            end=None if segment.end is None else _key(runner, segment.end),
        )
        for segment in report.segments
    ]
    depth = [dataclasses.replace(point, key=_key(runner, point.key)) for point in report.depth]
    return dataclasses.replace(report, norms=norms, segments=segments, depth=depth)


def _key(runner: str, key: tuple[str, int]) -> tuple[str, int]:
    path, call = key
    return f"{runner}: {path}", call


def merged(name: str, reports: Mapping[str, ValidationReport], hint: str = "") -> ValidationReport:
    """One report with the parts of all.

    Args:
        name: what was validated.
        reports: the reports by name, which the rows and notes of each begin with.
        hint: see `ValidationReport`.
    """
    first = next(iter(reports.values()))
    unchecked = {part: [report.unchecked] for part, report in reports.items() if report.unchecked}
    nowhere = len(unchecked) == len(reports)
    notes = {
        part: [
            *report.notes,
            *([f"no norm was checked: {report.unchecked}"] if report.unchecked and not nowhere else []),
        ]
        for part, report in reports.items()
    }
    hints = [hint] if hint else []
    return ValidationReport(
        name,
        rows=[(f"{part}: {case}", row) for part, report in reports.items() for case, row in report.rows],
        norms=_chained(report.norms for report in reports.values()),
        segments=_chained(report.segments for report in reports.values()),
        depth=_chained(report.depth for report in reports.values()),
        notes=[*hints, *_joined(notes)],
        warnings=_joined({part: report.warnings for part, report in reports.items()}),
        untried=_joined({part: report.untried for part, report in reports.items()}),
        deviations=list({str(row): row for report in reports.values() for row in report.deviations}.values()),
        provenance={
            **first.provenance,
            "candidate": {part: report.provenance.get("candidate") for part, report in reports.items()},
        },
        schema=first.schema,
        unchecked="; ".join(_joined(unchecked)) if nowhere else "",
        hint=hint,
    )


def _chained(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def _joined(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """The texts of all models; one that all have is there once, and the others begin with the model's name."""
    shared = [text for text in next(iter(texts.values())) if all(text in own for own in texts.values())]
    own = [f"{name}: {text}" for name, found in texts.items() for text in found if text not in shared]
    return [*dict.fromkeys(shared), *own]
