"""The formulas' own arithmetic: a formula after one more operation has the value that the operation gives."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.recognition.terms import Normed, Statistic, Step

X = ir.Value(name="x", shape=ir.Shape([2, 8]), type=ir.TensorType(ir.DataType.FLOAT))
REDUCE = ir.node("ReduceMean", [X], name="reduce")
NEXT = ir.node("Mul", [X, X], name="next")
# Means of squares at which formulas are compared.
MEANS = (0.0, 0.25, 3.0, 1e4)


def statistic(a: float = 2.0, b: float = 0.5, c: float = 1.0, p: float = 1.0) -> Statistic:
    return Statistic(X, X, 1, True, False, a, b, c, p, REDUCE, (REDUCE,))


def normed(coefficient: float = 1.0) -> Normed:
    return Normed(
        REDUCE.outputs[0], X, X, ir.DataType.FLOAT, 1e-6, coefficient, 1, True, False, False, REDUCE, (), (REDUCE,)
    )


def at(term: Statistic, mean: float) -> float:
    return term.c * (term.a * mean + term.b) ** term.p


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5, 2.0])
@pytest.mark.parametrize("before", [statistic(), statistic(p=-0.5, c=3.0), statistic(a=8.0, p=0.5, c=0.25)])
def test_power(before: Statistic, exponent: float) -> None:
    after = before.power(exponent)
    assert after is not None
    for mean in MEANS:
        assert math.isclose(at(after, mean), at(before, mean) ** exponent, rel_tol=1e-12)
    assert (after.a, after.b, after.p) == (before.a, before.b, before.p * exponent)


@pytest.mark.parametrize("before", [statistic(), statistic(p=-0.5, c=3.0), statistic(p=1.0, c=2.0)])
@pytest.mark.parametrize("number", [0.125, 3.0, -2.0])
def test_times(before: Statistic, number: float) -> None:
    after = before.times(number)
    for mean in MEANS:
        assert math.isclose(at(after, mean), at(before, mean) * number, rel_tol=1e-12)
    assert after.p == before.p


def test_a_factor_goes_inside_where_epsilon_may_still_be_added() -> None:
    inside, outside = statistic().times(4.0), statistic(p=-0.5).times(4.0)
    assert (inside.a, inside.b, inside.c) == (8.0, 2.0, 1.0)
    assert (outside.a, outside.b, outside.c) == (2.0, 0.5, 4.0)


@pytest.mark.parametrize("c", [0.0, -1.0])
def test_no_power_of_a_number_that_is_not_positive(c: float) -> None:
    assert statistic(c=c).power(0.5) is None


def test_no_power_of_a_factor_that_a_weight_was_multiplied_into() -> None:
    assert statistic(p=-0.5).with_node(NEXT, scale=X).power(2.0) is None


def test_with_node_adds_the_node_at_the_end_and_changes_what_is_named() -> None:
    after = statistic().with_node(NEXT, half=True, b=7.0)
    assert after.nodes == (REDUCE, NEXT)
    assert (after.half, after.b, after.a) == (True, 7.0, 2.0)
    assert statistic().nodes == (REDUCE,)


def test_then_appends_a_step_and_remembers_what_was_before() -> None:
    before = normed(0.5)
    step = Step("scale", ir.DataType.FLOAT, X)
    after = before.then(NEXT, step)
    assert (after.value, after.steps, after.nodes) == (NEXT.outputs[0], (step,), (REDUCE, NEXT))
    assert after.previous is before
    assert after.coefficient == 0.5
    assert before.steps == ()


def test_then_without_a_step_multiplies_the_coefficient() -> None:
    after = normed(0.5).then(NEXT, None, 4.0)
    assert (after.coefficient, after.steps) == (2.0, ())


def test_formulas_are_told_apart_by_identity() -> None:
    """Two norms of one value have equal fields; as keys they are two."""
    assert statistic() != statistic()
    assert len({statistic(), statistic()}) == 2
