"""The report of a validation (`ValidationReport`): its verdict, the evidence for it, and the settings of the run.

`merged` is one report of several: of the models of a folder, or of the runtimes that ran one model.
"""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...models.recognition.site import norm_name
from ..accuracy.compare_output import OutputVerdict, all_passed
from ..accuracy.error_stats import json_value
from ..attention.attention_checks import AttentionCheck
from ..norms.adversarial_rows import AS_IT_RUNS
from ..report.page import Page, Shown
from ..report.printed import print_validation
from ..report.report_file import VALIDATE_SCHEMA
from .depth import DepthPoint
from .norm_checks import NormCheck
from .segment_checks import SegmentCheck

CREATED = "created"
Verdict = Literal["pass", "fail", "cannot be judged"]
VERDICTS: dict[bool | None, Verdict] = {True: "pass", False: "fail", None: "cannot be judged"}


@dataclass(frozen=True, slots=True)
class Culprit:
    """Where error is introduced: a norm, an attention, a segment between norms, or the whole run."""

    kind: Literal["norm", "attention", "segment", "output"]
    name: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """The culprit as JSON values."""
        return {"kind": self.kind, "name": self.name, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Loss:
    """The error of a norm or an attention on the values that it receives, or of a segment, against float64.

    Attributes:
        kind: `norm`, `attention` or `segment`.
        name: its name.
        cosine: see `Figures`.
        rms_rel_row: see `Figures`.
    """

    kind: Literal["norm", "attention", "segment"]
    name: str
    cosine: float
    rms_rel_row: float

    def to_dict(self) -> dict[str, Any]:
        """The loss as JSON values."""
        values = {"kind": self.kind, "name": self.name, "cosine": self.cosine, "rms_rel_row": self.rms_rel_row}
        return {name: json_value(value) for name, value in values.items()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()


@dataclass(slots=True)
class ValidationReport(Shown):
    """The verdict and the evidence for it.

    Attributes:
        model: name of the candidate.
        rows: one verdict for each case and output.
        norms: the check of every norm alone.
        segments: the checks of the segments between the norms.
        depth: errors along the depth, if requested.
        notes: what could not be checked, and why.
        warnings: why a pass may say little: where PyTorch itself has lost the signal.
        untried: the kinds of inputs that were not tried, and what to do about each.
        refusals: norms that the exporter left unchanged, from the manifest.
        deviations: known deviations of the target, from the manifest.
        settings: the arguments of the validation, from which it can be run again.
        provenance: versions, files and options of both sides.
        schema: `rmsnorm_deploy.validate/7` or `rmsnorm_deploy.bisect/6`.
        runners: the verdict by the runtime that ran the candidate, if there were several.
        unchecked: why no norm was checked; empty if one was, or if only outputs were asked for.
        hint: that the export came from another model than the one that is compared; else empty.
        attentions: the check of every attention alone.
        created: when the report was made, ISO 8601 in UTC, to the second.
    """

    model: str
    rows: list[tuple[str, OutputVerdict]] = field(default_factory=list)
    norms: list[NormCheck] = field(default_factory=list)
    segments: list[SegmentCheck] = field(default_factory=list)
    depth: list[DepthPoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    deviations: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: str = VALIDATE_SCHEMA
    runners: dict[str, str] = field(default_factory=dict)
    unchecked: str = ""
    hint: str = ""
    attentions: list[AttentionCheck] = field(default_factory=list)
    created: str = field(default_factory=_now)

    @property
    def verdict(self) -> Verdict:
        """`fail` if an output or a part failed; `cannot be judged` if one could not be; else `pass`."""
        parts = [row.passed for _, row in self.rows]
        parts += [*(norm.passed for norm in self.norms), *(one.passed for one in self.attentions)]
        passed = all_passed([*parts, *(segment.verdict.passed for segment in self.segments)])
        if passed and not self.rows:
            return "cannot be judged"
        return VERDICTS[passed]

    @property
    def unjudged(self) -> list[tuple[str, list[str]]]:
        """What could not be judged: each reason once, with the parts and outputs to which it applies."""
        found: dict[str, list[str]] = {}
        for name, passed, reason in self._parts():
            if passed is None:
                found.setdefault(reason, []).append(name)
        return list(found.items())

    def _parts(self) -> Iterator[tuple[str, bool | None, str]]:
        for norm in self.norms:
            yield f"norm {norm_name(*norm.norm.key)}", norm.passed, norm.reason
        for one in self.attentions:
            yield f"attention {norm_name(*one.key)}", one.passed, one.reason
        for segment in self.segments:
            yield f"segment {segment.name}", segment.verdict.passed, segment.verdict.reason
        for case, row in self.rows:
            yield f"output {row.name} of {case}", row.passed, row.reason

    @property
    def culprits(self) -> list[Culprit]:
        """Where error is introduced: norms, attentions, then segments; outputs only if no part failed.

        A segment that has a wrong attention inside is explained by it.
        """
        found = [Culprit("norm", norm_name(*n.norm.key), n.reason) for n in self.norms if n.passed is False]
        wrong = [one for one in self.attentions if one.passed is False]
        found += [Culprit("attention", norm_name(*one.key), one.reason) for one in wrong]
        paths = {one.key[0] for one in wrong}
        for segment in (segment for segment in self.segments if segment.verdict.passed is False):
            if segment.attentions & paths:
                continue
            reason = segment.verdict.reason
            if segment.contains:
                found += [Culprit("norm", name, f"inside {segment.name}: {reason}") for name in segment.contains]
            else:
                found.append(Culprit("segment", segment.name, reason))
        if found:
            return list({(c.kind, c.name): c for c in reversed(found)}.values())[::-1]
        failed = [(case, row) for case, row in self.rows if row.passed is False]
        return [Culprit("output", f"{row.name} of {case}", row.reason) for case, row in failed]

    @property
    def loss(self) -> list[Loss]:
        """The error of every part, largest first, where a profile of lossy files was given; else empty."""
        if not self.settings.get("lossy"):
            return []
        found = [
            Loss("norm", norm_name(*norm.norm.key), kind.figures.cosine, kind.figures.rms_rel_row)
            for norm in self.norms for kind in norm.kinds if kind.name == AS_IT_RUNS.name and kind.figures is not None
        ]  # fmt: skip
        found += [
            Loss("attention", norm_name(*one.key), kind.figures.cosine, kind.figures.rms_rel_row)
            for one in self.attentions for kind in one.kinds
            if kind.name == AS_IT_RUNS.name and kind.figures is not None
        ]  # fmt: skip
        for segment in self.segments:
            figures = segment.verdict.figures
            if figures is not None:
                found.append(Loss("segment", segment.name, figures.cosine, figures.rms_rel_row))
        return sorted(found, key=lambda part: -part.rms_rel_row)

    @property
    def _claim(self) -> str:
        """What a part that passed is, in a sentence."""
        lossy = self.settings.get("lossy")
        return f"within the limits of {lossy}" if lossy else "as accurate as PyTorch"

    @property
    def summary(self) -> str:
        """The result in one sentence."""
        counts = (
            _share("output", [row.passed for _, row in self.rows]),
            _share("norm", [norm.passed for norm in self.norms]),
            _share("attention node", [one.passed for one in self.attentions]),
            _share("segment", [segment.verdict.passed for segment in self.segments]),
        )
        text = ", ".join(count for count in counts if count)
        if self.verdict == "pass":
            return f"{text} {self._claim}{f'; no norm was checked: {self.unchecked}' * bool(self.unchecked)}."
        culprits = self.culprits
        if not culprits:
            return self._no_verdict(text)
        more = f" and {len(culprits) - 1} more" if len(culprits) > 1 else ""
        name, hint = f"{culprits[0].name}{more}", f"; {self.hint}" * bool(self.hint)
        if culprits[0].kind != "output":
            return f"{text} {self._claim}; error is introduced in {name}{hint}."
        if self.unchecked:
            why = f"no norm was checked, so the place where error is introduced is not known: {self.unchecked}"
            return f"{text} {self._claim}; {why}{hint}."
        return f"{text} {self._claim}; no failed norm or segment explains {name}{hint}."

    def _no_verdict(self, counts: str) -> str:
        if not self.rows:
            return "Nothing was compared."
        reason, names = self.unjudged[0]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        unchecked = f"; no norm was checked: {self.unchecked}" * bool(self.unchecked)
        return f"{counts} {self._claim}; {names[0]}{more} cannot be judged: {reason}{unchecked}."

    def show(self, page: Page) -> None:
        """Print the table of outputs, the reasons of what failed, and the verdict."""
        print_validation(page, self.to_dict())

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML file.

        Raises:
            EnvironmentMissingError: jinja2 or matplotlib is not installed.
            UsageError: the place cannot be written to; a file that was there is left as it was.
        """
        from ..report import html

        html.write(self.to_dict(), path)

    def to_junit(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JUnit XML: a test case for each output and part.

        Raises:
            UsageError: the place cannot be written to; a file that was there is left as it was.
        """
        from ..report import junit

        junit.write(self.to_dict(), path)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; a second run on the same machine gives the same values except `created`."""
        return {
            "schema": self.schema,
            CREATED: self.created,
            "model": self.model,
            "verdict": self.verdict,
            "runners": self.runners,
            "summary": self.summary,
            "warnings": self.warnings,
            "unjudged": [{"reason": reason, "parts": parts} for reason, parts in self.unjudged],
            "culprits": [culprit.to_dict() for culprit in self.culprits],
            "loss": [part.to_dict() for part in self.loss],
            "settings": self.settings,
            "outputs": [{"case": case, **row.to_dict()} for case, row in self.rows],
            "norms": [norm.to_dict() for norm in self.norms],
            "attentions": [one.to_dict() for one in self.attentions],
            "segments": [segment.to_dict(index) for index, segment in enumerate(self.segments)],
            "depth": [point.to_dict() for point in self.depth],
            "notes": self.notes,
            "untried": self.untried,
            "refusals": self.refusals,
            "deviations": self.deviations,
            "provenance": self.provenance,
        }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The top-level parts in which two reports differ; timestamps are ignored."""
    names = dict.fromkeys([*old, *new])
    return [name for name in names if name != CREATED and old.get(name) != new.get(name)]


def _share(noun: str, passed: list[bool | None]) -> str:
    if not passed:
        return ""
    return f"{sum(map(bool, passed))} of {len(passed)} {noun}{'s' * (len(passed) > 1)}"


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
        attentions=_chained(report.attentions for report in reports.values()),
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
