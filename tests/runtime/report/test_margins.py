"""How near a report is to its limits."""

from __future__ import annotations

import math

import pytest

from rmsnorm_deploy.runtime.report.margins import limit_share, nearness
from tests.helpers.interface.report_sample import sample_report, with_margins


def _margin(worst: float | str, rms: float, limit: float = 4.0) -> dict[str, float | str]:
    return {"worst": worst, "allowed_worst": limit, "rms": rms, "allowed_rms": 1.0}


def test_the_nearer_of_two_limits_counts() -> None:
    assert limit_share(_margin(3.0, 0.5)) == 0.75
    assert limit_share(_margin(1.0, 0.5)) == 0.5
    assert limit_share(_margin("inf", 0.5)) == limit_share(_margin("nan", 0.5)) == math.inf
    assert limit_share(_margin(0.0, 0.0, limit=0.0)) == 0.0


def test_norms_are_in_the_order_of_their_risk() -> None:
    report = with_margins(sample_report())
    report["norms"][4]["inputs"][2]["margin"] = _margin(3.9, 0.99)
    report["norms"][7]["inputs"][5]["margin"] = _margin(3.8, 0.1)
    found = nearness(report, 3)
    first, second, third = found.norms
    assert first == ("norm", "model.layers.2.input_layernorm", "outlier channels", True, "rms", 0.99, 1.0, 0.99)
    assert (second.on, second.figure, second.error, second.limit) == ("zeros", "max", 3.8, 4.0)
    assert second.share == pytest.approx(0.95)
    assert second.share >= third.share
    assert (found.verdict, found.worst) == ("pass", 0.99)
    assert found.where == "norm model.layers.2.input_layernorm, outlier channels"


def test_outputs_and_segments_count_for_the_worst() -> None:
    report = with_margins(sample_report(), limit=40.0)
    report["outputs"][1]["margin"] = _margin(5.0, 0.1)
    found = nearness(report, 3)
    assert (found.worst, found.where) == (1.25, "output 1x7, logits")
    report["segments"][0]["margin"] = _margin(6.0, 0.1)
    assert nearness(report, 3).worst == 1.5


def test_explicit_limits_have_a_share_too() -> None:
    report = sample_report()
    near = {"figure": "max_rms", "value": 9e-4, "limit": 1e-3, "share": 0.9}
    report["norms"][4]["inputs"][2].update(margin=None, nearest=near)
    report["outputs"][1].update(margin=None, nearest={"figure": "max_kl", "value": 2.0, "limit": 1.0, "share": 2.0})
    report["outputs"][0].update(margin=None, nearest={**near, "share": "inf"}, passed=None)
    found = nearness(report, 3)
    (norm,) = found.norms
    assert (norm.figure, norm.error, norm.limit, norm.share) == ("max_rms", 9e-4, 1e-3, 0.9)
    assert (found.worst, found.where) == (2.0, "output 1x7, logits")


def test_what_is_not_judged_by_a_margin_does_not_count() -> None:
    report = with_margins(sample_report())
    report["norms"][0]["inputs"][0].update(passed=None, margin=_margin(4000.0, 1.0))
    assert (nearness(report, 1).worst or 9) < 1
    found = nearness(sample_report(), 3)
    assert (found.worst, found.norms) == (None, ())
