"""A validation, a comparison and a risk report on both kinds of page."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from lxml import html as parser

from rmsnorm_deploy.runtime.accuracy.compare_output import judge
from rmsnorm_deploy.runtime.report.page import HtmlPage, TextPage
from rmsnorm_deploy.runtime.report.printed import (
    brief,
    print_comparison,
    print_deviations,
    print_risk,
    print_validation,
)
from tests.helpers.interface.report_sample import sample_report

HOSTILE = "<b>&\"'"
FIGURES: dict[str, Any] = {
    "max_rel_row": 0.0125, "max_ulp": 3, "mean_ulp": 0.25, "cosine": 1.0, "max_abs": 2.5e-7, "differing": 4, "count": 9,
}  # fmt: skip
OWN = {**FIGURES, "max_rel_row": 0.5, "max_ulp": "inf", "mean_ulp": 7}


MARGIN = {"worst": 3.0, "allowed_worst": 7.5, "rms": 0.25, "allowed_rms": 2.0}
AS_GOOD = "error max 3 of 7.5 allowed (row 0 of 2), rms 0.25 of 2 allowed, in float32 eps x row scale; PyTorch's own"


def row(name: str = "y", passed: bool = True, reason: str = AS_GOOD, **changes: Any) -> dict[str, Any]:
    made = {"case": "1x1", "name": name, "passed": passed, "reason": reason, "figures": FIGURES,
            "baseline_figures": OWN, "margin": MARGIN if reason is AS_GOOD else None}  # fmt: skip
    return {**made, **changes}


def report(**parts: Any) -> dict[str, Any]:
    lists = ("norms", "segments", "depth", "notes", "warnings", "unjudged", "untried", "deviations", "culprits")
    empty: dict[str, Any] = {name: [] for name in lists}
    return {"outputs": [row()], "summary": "the summary", "verdict": "pass", **empty, **parts}


class Recorded:
    """A page that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tables: list[tuple[tuple[str, ...], list[tuple[Any, ...]]]] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)

    def table(self, columns: Any, rows: Any) -> None:
        self.tables.append((tuple(columns), [tuple(cells) for cells in rows]))


def validated(**options: Any) -> Recorded:
    page, parts = Recorded(), {k: v for k, v in options.items() if k not in ("show_parts", "again")}
    print_validation(page, report(**parts), **{k: v for k, v in options.items() if k not in parts})
    return page


# ------------------------------------------------------------------------------------------------------ validation


def test_outputs_are_shown_with_the_errors_that_decide_and_what_they_may_be() -> None:
    page = validated()
    ((columns, rows),) = page.tables
    assert rows == [("1x1", "y", "pass", "3 (7.5)", "0.25 (2)", "1.000000000")]
    assert columns == ("case", "output", "verdict", "max error (allowed)", "rms error (allowed)", "cosine")
    assert page.lines[-2:] == ["the summary", "verdict: pass"]


def test_an_output_without_figures_has_dashes_and_a_reason() -> None:
    page = validated(outputs=[row(passed=False, reason="because", figures=None, baseline_figures=None)], verdict="fail")
    assert page.tables[0][1] == [("1x1", "y", "fail", "-", "-", "-")]
    assert "1x1, y: because" in page.lines
    assert page.lines[-1] == "verdict: fail"


def test_passing_cases_have_one_row_for_each_output_the_nearest_to_its_limit() -> None:
    near = {**MARGIN, "rms": 1.9}
    rows = [
        row("y", case="1x1"),
        row("y", case="2x33", margin=near),
        row("y", case="5x7"),
        row("z", case="1x1", passed=False, reason="because", margin=None),
        row("z", case="2x33", passed=None, reason="no baseline", margin=None),
        row("present.0.key (worst of 4)", case="1x1"),
        row("present.1.value (worst of 4)", case="2x33", margin=near),
    ]
    page = validated(outputs=rows, verdict="fail")
    assert [cells[:4] for cells in page.tables[0][1]] == [
        ("1x1", "z", "fail", "-"),
        ("2x33", "z", "not judged", "-"),
        ("2x33 (worst of 3)", "y", "pass", "3 (7.5)"),
        ("2x33 (worst of 2)", "present.*", "pass", "3 (7.5)"),
    ]


def test_what_passed_has_no_reason() -> None:
    assert not any("allowed)" not in line and "error max" in line for line in validated().lines)


def test_a_reason_that_the_table_does_not_show_is_printed_once_with_its_places() -> None:
    rows = [row("a", reason="all 9 elements are equal"), row("b", reason="all 9 elements are equal"), row("c")]
    page = validated(outputs=rows)
    assert [line for line in page.lines if "equal" in line] == ["1x1, a; 1x1, b: all 9 elements are equal"]
    assert page.tables[0][1][0] == ("1x1", "a", "pass", "-", "-", "1.000000000")


def test_the_figures_are_those_of_the_pass_rule() -> None:
    """The reason of a real verdict is read, so that a change of its words is noticed."""
    reference = np.random.default_rng(0).standard_normal((4, 8))
    baseline = reference.astype(np.float32)
    verdict = judge("y", np.nextafter(baseline, np.float32(9)), reference, baseline)
    page = validated(outputs=[{"case": "1x1", **verdict.to_dict()}])
    _, _, word, largest, mean, _ = page.tables[0][1][0]
    assert f"error max {largest.split()[0]} of {largest.split('(')[1][:-1]} allowed" in verdict.reason
    assert f"rms {mean.split()[0]} of {mean.split('(')[1][:-1]} allowed" in verdict.reason
    assert word == "pass"


def test_the_three_largest_losses_are_printed() -> None:
    losses = [
        {"kind": "segment", "name": f"s{n}", "cosine": 0.9967, "rms_rel_row": "inf" if n == 0 else 0.082 / n}
        for n in range(5)
    ]
    lines = [line for line in validated(loss=losses).lines if "loss" in line]
    assert lines == [
        "largest loss: segment s0: cosine 0.9967, rms inf% of a row's RMS",
        "largest loss: segment s1: cosine 0.9967, rms 8.20% of a row's RMS",
        "largest loss: segment s2: cosine 0.9967, rms 4.10% of a row's RMS",
    ]


def test_of_passes_within_limits_only_the_worst_of_an_output_has_its_reason_printed() -> None:
    def limited(case: str, error: float, passed: bool = True) -> dict[str, Any]:
        figures = {**FIGURES, "rms_rel_row": error}
        return row(case=case, passed=passed, reason=f"RMS {error}", figures=figures, margin=None)

    rows = [limited("a", 0.1), limited("b", 0.3), limited("c", 0.2), limited("d", 0.9, False)]
    page = validated(outputs=rows)
    assert [line for line in page.lines if "RMS 0." in line] == ["b, y: RMS 0.3", "d, y: RMS 0.9"]
    assert [cells[0] for cells in page.tables[0][1]] == ["d", "b (worst of 3)"]


def test_quiet_lines_are_what_failed_and_the_verdict() -> None:
    rows = [row("a"), row("b", False, "because"), row("c", False, "because")]
    content = report(outputs=rows, verdict="fail", culprits=[{"kind": "norm", "name": "n", "reason": "why"}])
    assert brief(content) == ["1x1, b; 1x1, c: because", "norm n: why", "verdict: fail"]
    assert brief(report()) == ["verdict: pass"]
    unjudged = [{"reason": "why not", "parts": ["norm a", "norm b", "norm c", "norm d"]}]
    assert brief(report(outputs=[row(passed=None)], verdict="cannot be judged", unjudged=unjudged)) == [
        "cannot be judged: norm a, norm b, norm c and 1 more: why not", "verdict: cannot be judged",
    ]  # fmt: skip
    assert brief({"files": ["a"], "proof": {"verdict": "pass", "reason": "all"}}) == ["proof: pass (all)"]
    assert brief({"files": ["a"]}) == []


def test_notes_deviations_culprits_and_how_to_run_it_again() -> None:
    deviations = [{"at_most_ulp": 1.5, "reason": "a cast less", "sites": ["a", "b"]}]
    culprits = [{"kind": "norm", "name": "a", "reason": "why"}]
    page = validated(notes=["a note"], deviations=deviations, culprits=culprits, again="the command")
    texts = ("norm a: why", "a note", "a cast less", "the command", "the summary", "verdict: ")
    found = [next(number for number, line in enumerate(page.lines) if text in line) for text in texts]
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("bound", "sites", "parts"),
    [(None, ["a"], ["without a bound", "1 norm)"]), (2.0, ["a", "b"], ["2 ULP", "2 norms)"]), (0.5, [], ["0.5 ULP"])],
)
def test_deviations(bound: float | None, sites: list[str], parts: list[str]) -> None:
    page = Recorded()
    print_deviations(page, [{"at_most_ulp": bound, "reason": "why", "sites": sites}])
    assert len(page.lines) == 1
    assert all(part in page.lines[0] for part in [*parts, "why"])


def norm(path: str, call: int = 0, *, passed: bool = True, inputs: Any = ()) -> dict[str, Any]:
    return {"path": path, "call": call, "passed": passed, "inputs": list(inputs)}


def kind(name: str, error: float, *, passed: bool = True, own: float = 0.0) -> dict[str, Any]:
    reason = f"error max {error} of 7.5 allowed (row 0 of 2), rms 0.25 of 2 allowed, in float32 eps x row scale"
    return {"kind": name, "passed": passed, "reason": reason, "figures": {**FIGURES, "max_rel_row": error},
            "baseline_figures": {**OWN, "max_rel_row": own}, "margin": {**MARGIN, "worst": error}}  # fmt: skip


def norm_rows(*norms: dict[str, Any]) -> list[tuple[Any, ...]]:
    page = validated(norms=list(norms), show_parts=True)
    return page.tables[1][1]


def test_parts_are_shown_only_when_asked_for() -> None:
    parts = {"norms": [norm("a")], "segments": [row("a ... b")], "depth": [point()]}
    assert len(validated(**parts).tables) == 1
    assert len(validated(**parts, show_parts=True).tables) == 4


def test_a_norm_is_shown_on_the_input_on_which_it_is_worst() -> None:
    (cells,) = norm_rows(norm("a", inputs=[kind("small", 0.1), kind("large", 0.2), kind("middle", 0.15)]))
    assert cells[:4] == ("a", "pass", "large", "0.2 (7.5)")


def test_an_input_that_failed_comes_before_a_larger_error() -> None:
    inputs = [kind("large", 0.9), kind("failed", 0.1, passed=False)]
    assert norm_rows(norm("a", passed=False, inputs=inputs))[0][1:3] == ("fail", "failed")


def test_an_input_on_which_pytorch_is_lost_comes_last() -> None:
    assert norm_rows(norm("a", inputs=[kind("lost", 5.0, own=0.25), kind("sound", 0.0, own=0.24)]))[0][2] == "sound"


def test_an_input_that_could_not_be_compared_comes_first() -> None:
    broken = {"kind": "shape", "passed": False, "figures": None, "baseline_figures": None}
    cells = norm_rows(norm("a", passed=False, inputs=[kind("failed", 9.0, passed=False), broken]))[0]
    assert cells == ("a", "fail", "shape", "-", "-")


def test_a_norm_without_inputs_and_a_second_call() -> None:
    assert norm_rows(norm("a"), norm("a", 1)) == [
        ("a", "pass", "-", "-", "-"),
        ("a (call 2)", "pass", "-", "-", "-"),
    ]


def test_a_norm_that_is_the_model_itself_has_a_name() -> None:
    assert norm_rows(norm(""))[0][0] == "the model itself"


def point(**changes: Any) -> dict[str, Any]:
    made = {"path": "a", "call": 0, "side": "output", "error": 0.25, "baseline_error": "inf", "introduced": None,
            "baseline_introduced": None}  # fmt: skip
    return {**made, **changes}


def test_segments_and_the_depth() -> None:
    page = validated(
        segments=[row("a ... b", False), row("b ... y")],
        depth=[point(), point(introduced=0.5, baseline_introduced=0.125)],
        show_parts=True,
    )
    assert page.tables[1][1] == [
        ("a ... b", "fail", "3 (7.5)", "0.25 (2)"),
        ("b ... y", "pass", "3 (7.5)", "0.25 (2)"),
    ]
    assert page.tables[2][1] == [("a", "output", "0.25 (inf)", "-"), ("a", "output", "0.25 (inf)", "0.5 (0.125)")]


def test_the_depth_tells_the_calls_of_a_norm_apart() -> None:
    page = validated(depth=[point(), point(call=1)], show_parts=True)
    assert len({cells[0] for cells in page.tables[1][1]}) == 2


@pytest.mark.parametrize("passed", [True, False])
def test_a_whole_report_on_both_pages(passed: bool) -> None:
    made = sample_report(passed)
    before = copy.deepcopy(made)
    text, page = TextPage(), HtmlPage()
    for target in (text, page):
        print_validation(target, made, show_parts=True, again="again")
    lines = str(text).split("\n")
    assert lines[-1] == f"verdict: {'pass' if passed else 'fail'}"
    assert not any(line != line.rstrip() for line in lines)
    assert len(parser.fragment_fromstring(str(page), create_parent=True).findall("table")) == 4
    assert made == before


# ------------------------------------------------------------------------------------------------------------ risk


def risk(**changes: Any) -> dict[str, Any]:
    return {
        "norms": [risky()],
        "notes": [],
        "verdicts": {
            "float32": {"verdict": "safe", "norm": "a", "reason": "nothing"},
            "float16": {"verdict": "unsafe", "norm": "", "reason": "it overflows"},
            "bfloat16": {"verdict": "caution", "norm": "a.b", "reason": "it is near"},
        },
        **changes,
    }


def risky(**changes: Any) -> dict[str, Any]:
    return {
        "path": "a", "largest": 12.345, "least_margin": {"float16": "inf"}, "eps_decides": 0.125, "outliers": 2,
        "weight": {"ratio": 8.0, "zeros": 0},
        "verdicts": {d: {"verdict": v} for d, v in
                     (("float32", "safe"), ("float16", "unsafe"), ("bfloat16", "caution"))},
        **changes,
    }  # fmt: skip


def risk_rows(**changes: Any) -> tuple[Any, ...]:
    page = Recorded()
    print_risk(page, risk(norms=[risky(**changes)]))
    ((columns, rows),) = page.tables
    assert len(columns) == len(rows[0])
    return rows[0]


def test_a_norms_risk_in_one_row() -> None:
    assert risk_rows() == ("a", "12.3", "inf", "12.5%", "2", "8", "safe", "unsafe", "caution")


@pytest.mark.parametrize(
    ("weight", "cell"), [(None, "-"), ({"ratio": 8.0, "zeros": 3}, "8, 3 zeros"), ({"ratio": "inf", "zeros": 0}, "inf")]
)
def test_the_cell_of_the_weight(weight: Any, cell: str) -> None:
    assert risk_rows(weight=weight)[5] == cell


def test_the_model_itself_and_paths_that_are_long() -> None:
    assert risk_rows(path="")[0] == "the model itself"
    assert risk_rows(path="x" * 48)[0] == "x" * 48
    long = risk_rows(path="first." + "x" * 60 + ".last")[0]
    assert len(long) == 48
    assert long.startswith("...")
    assert long.endswith("x.last")


def test_the_verdicts_of_a_risk_report_name_norm_and_reason() -> None:
    page = Recorded()
    print_risk(page, risk(notes=["a note"]))
    assert page.lines[-3:] == [
        "float32: safe",
        "float16: unsafe, the model itself: it overflows",
        "bfloat16: caution, a.b: it is near",
    ]
    assert any("a note" in line for line in page.lines)


def test_a_model_without_norms_has_an_empty_table() -> None:
    page = Recorded()
    print_risk(page, {"norms": [], "notes": [], "verdicts": {}})
    assert page.tables[0][1] == []


# ------------------------------------------------------------------------------------------------------ comparison


def test_arrays_in_a_table_and_reasons_below() -> None:
    page = Recorded()
    rows = [row("a"), row("b", False, "because"), row("c", False, "gone", figures=None),
            row("d", figures={**FIGURES, "differing": None})]  # fmt: skip
    content = {"kind": "arrays", "outputs": rows, "summary": "the summary", "verdict": "fail"}
    print_comparison(page, content)
    assert page.tables[0][1] == [
        ("a", "pass", "3 (7.5)", "0.25 (2)", "2.5e-07", "4 of 9"),
        ("b", "fail", "-", "-", "2.5e-07", "4 of 9"),
        ("c", "fail", "-", "-", "-", "-"),
        ("d", "pass", "3 (7.5)", "0.25 (2)", "2.5e-07", "-"),
    ]
    assert page.lines[1:] == ["b: because", "c: gone", "the summary.", "verdict: fail"]


def reports(**changes: Any) -> Recorded:
    page = Recorded()
    empty: dict[str, Any] = {"verdicts": [], "missing": [], "added": [], "figures": [], "settings": []}
    print_comparison(page, {"kind": "reports", "summary": "s", "verdict": "pass", **empty, **changes})
    return page


def test_reports_without_a_difference() -> None:
    page = reports()
    assert (page.tables, page.lines) == ([], ["s.", "verdict: pass"])


def test_reports_that_differ() -> None:
    change = {"kind": "norm", "name": "a", "before": "pass", "after": "fail", "reason": "why"}
    better = {**change, "name": "b", "before": "fail", "after": "pass"}
    page = reports(
        verdicts=[change, better],
        missing=[{"kind": "output", "name": "x"}],
        added=[{"kind": "segment", "name": "y"}],
        figures=[{**change, "figure": "max_ulp", "before": 1.0, "after": "inf", "ratio": "inf"}],
        settings=[{"kind": "settings", "name": "seed", "before": 0, "after": 1}],
    )
    assert [rows for _, rows in page.tables] == [
        [("norm", "a", "pass", "fail"), ("norm", "b", "fail", "pass")],
        [("norm", "a", "max_ulp", "1", "inf", "inf")],
        [("settings", "seed", 0, 1)],
    ]
    assert page.lines == ["a: why", "missing: output x", "new: segment y", "s.", "verdict: pass"]


# -------------------------------------------------------------------------------------------------------- escaping


def test_nothing_of_a_report_is_html() -> None:
    page = HtmlPage()
    hostile = row(HOSTILE, False, HOSTILE)
    hostile_norm = norm(HOSTILE, inputs=[kind(HOSTILE, 0.1)])
    print_validation(
        page,
        report(outputs=[hostile], norms=[hostile_norm], segments=[hostile], depth=[point(path=HOSTILE)],
               notes=[HOSTILE], summary=HOSTILE, culprits=[{"kind": "norm", "name": HOSTILE, "reason": HOSTILE}]),
        show_parts=True, again=HOSTILE,
    )  # fmt: skip
    print_risk(page, risk(norms=[risky(path=HOSTILE)], notes=[HOSTILE]))
    print_comparison(page, {"kind": "arrays", "outputs": [hostile], "summary": HOSTILE, "verdict": "fail"})
    assert "<b" not in str(page).replace("<body", "").replace("<tbody", "")
    assert HOSTILE in parser.fragment_fromstring(str(page), create_parent=True).text_content()
