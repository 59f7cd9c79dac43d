"""Charts of figures over runs: where their points are."""

from __future__ import annotations

import math

from rmsnorm_deploy.runtime.report.trend import EDGE, HEIGHT, HIGHEST_SHARE, WIDTH, chart


def test_points_run_from_the_left_edge_to_the_right() -> None:
    made = chart([1.0, 4.0, 2.0], ["a", "b", "c"])
    assert [point.x for point in made.points] == [EDGE, WIDTH / 2, WIDTH - EDGE]
    assert [point.y for point in made.points] == [HEIGHT - EDGE - (HEIGHT - 2 * EDGE) / 4, EDGE, HEIGHT / 2]
    assert (made.limit, made.spoken) == (None, "a; b; c")
    assert made.lines == [" ".join(f"{point.x:g},{point.y:g}" for point in made.points)]


def test_a_gap_splits_the_line() -> None:
    made = chart([1.0, None, 1.0, 1.0, None], list("abcde"))
    assert [point.title for point in made.points] == ["a", "c", "d"]
    assert [len(line.split()) for line in made.lines] == [2]


def test_values_beyond_the_limit_are_marked_and_stay_inside() -> None:
    made = chart([0.5, 1.0, 1.1, 900.0, math.inf], list("abcde"), limit=1.0)
    assert [point.is_beyond for point in made.points] == [False, False, True, True, True]
    assert [point.y for point in made.points[3:]] == [EDGE, EDGE]
    assert made.limit == made.points[1].y
    assert made.limit == round(HEIGHT - EDGE - (HEIGHT - 2 * EDGE) / HIGHEST_SHARE, 2)
    assert all(EDGE <= point.y <= HEIGHT - EDGE for point in made.points)


def test_charts_of_little_or_nothing() -> None:
    assert [point.x for point in chart([3.0], ["a"]).points] == [WIDTH - EDGE]
    assert [point.y for point in chart([0.0, 0.0], ["a", "b"]).points] == [HEIGHT - EDGE] * 2
    assert chart([None], ["a"]).points == []
