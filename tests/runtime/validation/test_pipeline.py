"""The stages of a validation, one by one: what each gives, and that none changes what it was given."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
from rmsnorm_deploy.runtime.inputs.cases import Case
from rmsnorm_deploy.runtime.norms.access import RecordedNorm
from rmsnorm_deploy.runtime.norms.activation_store import ActivationStore, Key
from rmsnorm_deploy.runtime.norms.torch_norms import TorchNorms
from rmsnorm_deploy.runtime.runners.torch import TorchRunner
from rmsnorm_deploy.runtime.validation.candidate import Candidate, candidate_of
from rmsnorm_deploy.runtime.validation.norm_checks import try_or_note
from rmsnorm_deploy.runtime.validation.options import ValidationOptions
from rmsnorm_deploy.runtime.validation.pipeline import (
    Baseline,
    BaselineRuns,
    CandidateRuns,
    MatchedNorms,
    PartChecks,
    References,
    Stores,
    check_parts,
    compute_references,
    judge_outputs,
    match_norms,
    missing_outputs,
    run_baseline,
    run_candidate,
)
from rmsnorm_deploy.runtime.validation.run_cases import Call, Run
from tests.helpers.runtime.stand_ins import FunctionRunner, called

FIRST, SECOND = ("first", 0), ("second", 0)
KEYS = [FIRST, SECOND]
SEGMENTS = ["the inputs ... first", "first ... second", "second ... output"]
EPS = 1e-5
CASES = [Case(f"{rows} rows", {"x": np.random.default_rng(rows).standard_normal((rows, 16)).astype(np.float32)})
         for rows in (2, 5, 3)]  # fmt: skip


class Small(nn.Module):
    """A residual block between two norms."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.linear, self.second = nn.RMSNorm(16, eps=EPS), nn.Linear(16, 16), nn.RMSNorm(16, eps=EPS)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.linear(self.first(x))) * 2.0


def in_numpy(model: Small, x: np.ndarray) -> dict[str, np.ndarray]:
    """Every value of the model in float64."""
    tensors = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def norm(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return value / np.sqrt(np.mean(value * value, axis=-1, keepdims=True) + EPS) * weight

    wide = x.astype(np.float64)
    y1 = norm(wide, tensors["first.weight"])
    x2 = wide + y1 @ tensors["linear.weight"].T + tensors["linear.bias"]
    y2 = norm(x2, tensors["second.weight"])
    return {"x1": wide, "y1": y1, "x2": x2, "y2": y2, "output": 2 * y2}


def silent(text: str) -> None:
    pass


@dataclass
class Stages:
    """All that the stages take, for one candidate against `Small`."""

    candidate_model: nn.Module
    model: Small = field(default_factory=lambda: Small().eval())

    def __post_init__(self) -> None:
        self.candidate = candidate_of(self.candidate_model, ValidationOptions())
        with self.candidate.opened() as runner:
            self.runs = run_candidate(runner, "candidate", CASES, silent)
        self.baseline = Baseline(self.model, TorchRunner(self.model), find_norms(self.model))
        self.runs, self.own = run_baseline(self.baseline, self.runs, silent)
        self.norms = TorchNorms(self.model, self.baseline.runner, self.baseline.recognition, self.own.called)
        assert self.candidate.norms is not None
        self.access = self.candidate.norms(self.runs.runs[self.runs.largest].torch_feeds)
        self.matched = match_norms(self.candidate, self.access, self.own.called)

    def references(self, stores: Stores, keys: list[Key], **options: Any) -> References:
        return compute_references(
            self.baseline, self.norms, self.runs, keys, stores,
            with_depth=options.pop("with_depth", False), progress=options.pop("progress", silent),
        )  # fmt: skip


@contextmanager
def stores() -> Iterator[Stores]:
    with ActivationStore() as fed, ActivationStore() as free:
        yield Stores(fed, free)


def faulty(change: str, factor: float = 1.01) -> Small:
    """The model with one element of a parameter changed."""
    model = Small().eval()
    with torch.no_grad():
        model.get_parameter(change).view(-1)[3] *= factor
    return model


@pytest.fixture(scope="module")
def right() -> Stages:
    return Stages(Small().eval())


# -------------------------------------------------------------------------------------------------- run_candidate


def test_run_candidate_runs_every_case_in_order() -> None:
    runner = FunctionRunner(lambda feeds: {"y": feeds["x"] + 1, "z": feeds["x"]}, outputs=["y", "z"])
    texts: list[str] = []
    cases = tuple(CASES)
    found = run_candidate(runner, "it", cases, texts.append)
    assert [run.case for run in found.runs] == CASES
    assert all(np.array_equal(run.got["y"], run.case.feeds["x"] + 1) for run in found.runs)
    assert found.names == ("y", "z")
    assert len(texts) == 3
    assert all(case.name in text for case, text in zip(CASES, texts, strict=True))


def test_the_names_of_a_decoder_are_without_the_step() -> None:
    def decoder(feeds: Any) -> dict[str, np.ndarray]:
        return {"logits": np.zeros((1, feeds["input_ids"].shape[1], 4)), "present.0.key": np.zeros((1, 0))}

    feeds = {"input_ids": np.ones((1, 3), np.int64), "past_key_values.0.key": np.zeros((1, 0))}
    found = run_candidate(FunctionRunner(decoder), "it", [Case("c", feeds)], silent)
    assert set(found.runs[0].got) == {"logits", "logits@decode"}
    assert found.names == ("logits",)


def test_run_candidate_refuses_what_fails() -> None:
    with pytest.raises(UsageError, match="2 rows"):
        run_candidate(FunctionRunner(lambda feeds: {}), "it", CASES, silent)


@pytest.mark.parametrize(("sizes", "largest"), [((2, 5, 3), 1), ((4, 4), 0), ((1,), 0), ((1, 2, 9), 2)])
def test_the_largest_case_is_the_first_with_most_elements(sizes: tuple[int, ...], largest: int) -> None:
    runs = tuple(Run(Case(str(size), {"x": np.zeros(size)}), ()) for size in sizes)
    assert CandidateRuns(runs, ()).largest == largest


# --------------------------------------------------------------------------------------------------- run_baseline


def test_run_baseline_gives_pytorchs_outputs_and_the_norms_of_the_largest_case(right: Stages) -> None:
    assert list(right.own.called) == KEYS
    assert {norm.shape for norm in right.own.called.values()} == {(5, 16)}
    for run, outputs in zip(right.runs.runs, right.own.outputs, strict=True):
        with torch.no_grad():
            expected = right.model(torch.from_numpy(run.case.feeds["x"])).numpy()
        assert np.array_equal(outputs["output"], expected)


def test_run_baseline_leaves_the_cache_out() -> None:
    runner = FunctionRunner(lambda feeds: {"y": feeds["x"]})
    feeds = {"x": np.ones(3), "past_key_values.0.key": np.ones(1)}
    runs = CandidateRuns((Run(Case("a", feeds), ()), Run(Case("b", {**feeds, "x": np.ones(9)}), ())), ("y",))
    model = nn.Identity()
    _, found = run_baseline(Baseline(model, runner, find_norms(model)), runs, silent)
    assert [set(fed) for fed in runner.fed] == [{"x"}, {"x"}]
    assert [outputs["y"].size for outputs in found.outputs] == [3, 9]
    assert dict(found.called) == {}


def optional(size: int) -> Case:
    return Case(f"{size} rows", {"x": np.zeros((size, 1))}, optional=True)


def picky(most: int) -> FunctionRunner:
    """Fails on more rows than `most`."""

    def run(feeds: Any) -> dict[str, np.ndarray]:
        if len(feeds["x"]) > most:
            raise UsageError("too many rows")
        return {"y": feeds["x"]}

    return FunctionRunner(run, outputs=["y"])


def test_a_case_that_only_the_candidate_fails_on_is_a_failure_and_one_that_both_fail_on_is_untried() -> None:
    cases = [Case("required", {"x": np.zeros((1, 1))}), optional(2), optional(5), optional(9)]
    runs = run_candidate(picky(2), "it", cases, silent)
    assert [run.error for run in runs.runs] == ["", "", *["it fails, and PyTorch does not: too many rows"] * 2]
    model = nn.Identity()
    kept, own = run_baseline(Baseline(model, picky(5), find_norms(model)), runs, silent)
    assert [run.case.name for run in kept.runs] == ["required", "2 rows", "5 rows"]
    assert own.untried == ("9 rows: PyTorch itself does not run it (too many rows)",)
    references = References(own.outputs, {}, {})
    rows = [(case, row.name, row.passed) for case, row in judge_outputs(kept, own, references, {})]
    assert rows == [("required", "y", True), ("2 rows", "y", True), ("5 rows", "the run", False)]


def test_a_model_that_runs_none_of_the_inputs_is_an_error() -> None:
    runs = run_candidate(picky(9), "it", [optional(2), optional(3)], silent)
    model = nn.Identity()
    with pytest.raises(
        UsageError, match=r"Identity runs none of the generated inputs: 2 rows.*too many rows.*Give inputs"
    ):
        run_baseline(Baseline(model, picky(1), find_norms(model)), runs, silent)


def test_a_required_case_that_fails_is_an_error() -> None:
    with pytest.raises(UsageError, match="too many rows"):
        run_candidate(picky(2), "it", [Case("required", {"x": np.zeros((3, 1))})], silent)


def test_the_first_optional_case_and_the_largest_run_twice() -> None:
    runner = FunctionRunner(lambda feeds: {"y": feeds["x"]}, outputs=["y"])
    cases = [Case("required", {"x": np.zeros((1, 1))}), optional(2), optional(4), optional(3)]
    runs = run_candidate(runner, "it", cases, silent)
    assert [len(fed["x"]) for fed in runner.fed] == [1, 2, 4, 3, 2, 4]
    assert [run.repeated for run in runs.runs] == [None, True, True, None]


def test_cases_of_the_user_run_once() -> None:
    runner = FunctionRunner(lambda feeds: {"y": feeds["x"]}, outputs=["y"])
    runs = run_candidate(runner, "it", [Case("required", {"x": np.zeros((2, 1))})], silent)
    assert [len(fed["x"]) for fed in runner.fed] == [2]
    assert runs.runs[0].repeated is None


def test_long_cases_and_failed_ones_are_not_those_of_the_norms() -> None:
    runs = (
        Run(Case("a", {"x": np.zeros(2)}), ()),
        Run(Case("b", {"x": np.zeros(9)}, long=True), ()),
        Run(Case("c", {"x": np.zeros(8)}), (), error="it fails"),
        Run(Case("d", {"x": np.zeros(5)}), ()),
    )
    assert CandidateRuns(runs, ()).largest == 3


# ---------------------------------------------------------------------------------------------------- match_norms


@dataclass
class Access:
    """A side that says which norms it has."""

    keys: list[Key] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    recorded: dict[Key, RecordedNorm] = field(default_factory=dict)


@contextmanager
def unopened() -> Iterator[Any]:
    raise AssertionError
    yield


def matched(access: Access | None, manifest: dict[str, Any] | None = None, *keys: Key) -> MatchedNorms:
    calls = {key: called(*key) for key in keys or KEYS}
    return match_norms(Candidate("it", unopened, None, manifest or {}), access, calls)  # type: ignore[arg-type]


def test_norms_on_both_sides_are_in_pytorchs_order() -> None:
    found = matched(Access([SECOND, FIRST]))
    assert (found.keys, found.lost, found.notes) == (KEYS, frozenset(), [])


def test_a_norm_without_any_node_is_lost() -> None:
    found = matched(Access([SECOND]))
    assert (found.keys, found.lost) == ([SECOND], {FIRST})
    assert "first" in found.notes[0]


@pytest.mark.parametrize(
    ("access", "manifest"),
    [
        (Access([SECOND], {"first": "the reason"}), {}),
        (Access([SECOND]), {"refusals": [{"path": "first", "reason": "the reason"}]}),
    ],
)
def test_a_norm_with_a_reason_is_not_lost(access: Access, manifest: dict[str, Any]) -> None:
    found = matched(access, manifest)
    assert (found.keys, found.lost) == ([SECOND], frozenset())
    assert len(found.notes) == 1
    assert "first" in found.notes[0]
    assert "the reason" in found.notes[0]


def test_a_norm_that_was_not_reached_is_noted() -> None:
    found = matched(Access([FIRST, SECOND, ("first", 1)]))
    assert found.keys == KEYS
    assert "first (call 2)" in found.notes[0]


@pytest.mark.parametrize("access", [None, Access()])
def test_a_side_that_shows_no_norms_is_noted_once(access: Access | None) -> None:
    found = matched(access)
    assert (found.keys, found.lost, len(found.notes)) == ([], frozenset(), 1)
    assert "it" in found.notes[0].split()


def test_without_norms_in_pytorch_there_is_nothing_to_note() -> None:
    assert match_norms(Candidate("it", unopened), None, {}) == MatchedNorms()


def test_a_side_with_problems_only_has_a_note_for_each() -> None:
    found = matched(Access([], {"first": "why one", "second": "why two"}))
    assert [("why one" in note, "why two" in note) for note in found.notes] == [(True, False), (False, True)]


# --------------------------------------------------------------------------------------------- compute_references


def test_references_are_the_model_in_float64(right: Stages) -> None:
    with stores() as kept:
        found = right.references(kept, [])
        assert not any(kept.fed.has(key, "x") or kept.free.has(key, "x") for key in KEYS)
    assert (found.from_norms, dict(found.disagreements)) == ({}, {})
    for run, outputs in zip(right.runs.runs, found.outputs, strict=True):
        assert outputs["output"].dtype == np.float64
        expected = in_numpy(right.model, run.case.feeds["x"])["output"]
        np.testing.assert_allclose(outputs["output"], expected, rtol=1e-12, atol=1e-14)
    assert {p.dtype for p in right.model.parameters()} == {torch.float32}


def test_references_at_the_norms_are_rounded_there(right: Stages) -> None:
    x = CASES[1].feeds["x"]
    truth = in_numpy(right.model, x)
    with stores() as kept:
        found = right.references(kept, KEYS)
        np.testing.assert_allclose(kept.fed.get(FIRST, "y"), truth["y1"], rtol=1e-12)
        fed_x, fed_y = np.array(kept.fed.get(SECOND, "fed_x")), np.array(kept.fed.get(SECOND, "fed_y"))
        assert fed_x.dtype == fed_y.dtype == np.float32
        assert np.array_equal(kept.fed.get(FIRST, "fed_y"), kept.fed.get(FIRST, "y").astype(np.float32))
        np.testing.assert_allclose(fed_x, truth["x2"], rtol=1e-5, atol=1e-6)
        assert not kept.free.has(FIRST, "x")
    assert np.array_equal(found.from_norms["output"], 2.0 * fed_y.astype(np.float64))
    assert list(found.disagreements) == KEYS
    assert max(found.disagreements.values()) < 1e-12


def test_references_for_the_depth_are_not_rounded(right: Stages) -> None:
    truth = in_numpy(right.model, CASES[1].feeds["x"])
    texts: list[str] = []
    with stores() as kept:
        found = right.references(kept, KEYS, with_depth=True, progress=texts.append)
        places = {"x1": (FIRST, "x"), "y1": (FIRST, "y"), "x2": (SECOND, "x"), "y2": (SECOND, "y")}
        for name, (key, role) in places.items():
            np.testing.assert_allclose(kept.free.get(key, role), truth[name], rtol=1e-12, atol=1e-14)
        assert kept.fed.has(SECOND, "fed_x")
    np.testing.assert_allclose(found.outputs[1]["output"], truth["output"], rtol=1e-12, atol=1e-14)
    assert len(texts) == 4


# -------------------------------------------------------------------------------------------------- judge_outputs


def judged(stages: Stages, limits: dict[str, Limits] | None = None) -> list[tuple[str, str, bool]]:
    with stores() as kept:
        references = stages.references(kept, [])
    rows = judge_outputs(stages.runs, stages.own, references, limits or {})
    return [(case, verdict.name, verdict.passed) for case, verdict in rows]


def test_a_row_for_each_output_of_each_case(right: Stages) -> None:
    assert judged(right) == [(case.name, "output", True) for case in CASES]


def test_a_wrong_output_fails_unless_limits_let_it_pass() -> None:
    stages = Stages(faulty("second.weight"))
    assert {passed for _, _, passed in judged(stages)} == {False}
    assert {passed for _, _, passed in judged(stages, {"*": Limits(rtol=0.02)})} == {True}
    assert {passed for _, _, passed in judged(stages, {"other": Limits(rtol=0.02)})} == {False}


def test_outputs_go_by_order_where_names_differ(right: Stages) -> None:
    runs = CandidateRuns(tuple(Run(run.case, (Call({"y": run.got["output"]}),)) for run in right.runs.runs), ("y",))
    with stores() as kept:
        rows = judge_outputs(runs, right.own, right.references(kept, []), {})
    assert [(verdict.name, verdict.passed) for _, verdict in rows] == [("y", True)] * 3


# ---------------------------------------------------------------------------------------------------- check_parts


def parts(stages: Stages, access: Any = None, changes: dict[str, Any] | None = None, **options: Any) -> PartChecks:
    with stores() as kept:
        references = dataclasses.replace(stages.references(kept, stages.matched.keys), **(changes or {}))
        return check_parts(
            access or stages.access, stages.norms, stages.runs, options.pop("own", stages.own), stages.matched,
            references, kept, ValidationOptions(**options), silent,
        )  # fmt: skip


def failures(found: PartChecks) -> list[str]:
    names = [check.norm.key[0] for check in found.norms if not check.passed]
    return names + [check.name for check in found.segments if not check.verdict.passed]


@pytest.mark.parametrize("window", [None, 1])
def test_what_is_right_passes_part_by_part(right: Stages, window: int | None) -> None:
    found = parts(right, window=window)
    assert [check.norm.key for check in found.norms] == KEYS
    assert [check.name for check in found.segments] == SEGMENTS
    assert failures(found) == []
    assert found.notes == []


@pytest.mark.parametrize(
    ("parameter", "where"),
    [("first.weight", "first"), ("second.weight", "second"), ("linear.weight", "first ... second"),
     ("linear.bias", "first ... second")],
)  # fmt: skip
def test_what_is_wrong_is_the_part_that_is_wrong(parameter: str, where: str) -> None:
    assert failures(parts(Stages(faulty(parameter)))) == [where]


@dataclass
class Changed:
    """A candidate's norms, with something else in their place."""

    inner: Any
    changes: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.changes[name] if name in self.changes else getattr(self.inner, name)


def test_a_norm_whose_result_nothing_reads_fails(right: Stages) -> None:
    found = parts(right, Changed(right.access, {"unused": frozenset([FIRST])}))
    assert failures(found) == ["first"]


def test_a_norm_whose_own_code_is_not_its_formula_fails(right: Stages) -> None:
    found = parts(right, changes={"disagreements": {FIRST: 0.0, SECOND: 1e-3}})
    assert failures(found) == ["second"]
    (check,) = [check for check in found.norms if not check.passed]
    assert "0.001" in check.reason


def test_a_norm_that_is_unsound_and_not_on_both_sides_fails_too(right: Stages) -> None:
    """One that the candidate does not have, and that is 1000 eps off as the model runs."""
    more = {**right.own.called, ("third", 0): called("third", off=1000.0), ("fourth", 0): called("fourth", off=1.0)}
    found = parts(right, own=BaselineRuns(right.own.outputs, more))
    assert failures(found) == ["third"]
    assert [check.norm.key[0] for check in found.norms] == ["first", "second", "third"]


def test_remarks_are_noted_first(right: Stages) -> None:
    assert parts(right, Changed(right.access, {"remarks": ["run otherwise"]})).notes == ["run otherwise"]


def test_what_cannot_be_run_by_itself_is_noted(right: Stages) -> None:
    def failing(*given: Any) -> Any:
        raise UnsupportedError("cannot be cut")

    found = parts(right, Changed(right.access, {"alone": failing}))
    assert (found.norms, len(found.segments), len(found.notes)) == ([], 3, 1)
    assert "cannot be cut" in found.notes[0]
    found = parts(right, Changed(right.access, {"between": failing, "remarks": ["first"]}))
    assert (len(found.norms), found.segments, len(found.notes)) == (2, [], 2)
    assert "cannot be cut" in found.notes[1]


def test_try_or_note_notes_our_own_errors_only() -> None:
    notes: list[str] = ["before"]
    assert try_or_note("it", notes, lambda: [1, 2]) == [1, 2]
    assert notes == ["before"]

    def failing(error: Exception) -> list[Any]:
        raise error

    assert try_or_note("it", notes, lambda: failing(UsageError("why"))) == []
    assert len(notes) == 2
    assert "it" in notes[1]
    assert "why" in notes[1]
    with pytest.raises(ZeroDivisionError):
        try_or_note("it", notes, lambda: failing(ZeroDivisionError()))


# ------------------------------------------------------------------------------------------------ missing_outputs


@pytest.mark.parametrize(
    ("names", "missing"), [(("a",), ["b", "c"]), (("a", "b", "c"), []), (("y", "z"), []), (("c", "y"), ["a", "b"])]
)
def test_missing_outputs_are_noted_where_names_are_shared(names: tuple[str, ...], missing: list[str]) -> None:
    runs = CandidateRuns((Run(Case("c", {}), ()),), names)
    own = BaselineRuns((dict.fromkeys("abc", np.zeros(1)),), {})
    notes = missing_outputs(Candidate("it", unopened), runs, own)
    assert len(notes) == len(missing)
    assert all(f" {name}," in note for name, note in zip(missing, notes, strict=True))


# ------------------------------------------------------------------------------------- no stage changes its arguments


def test_no_stage_changes_what_it_was_given() -> None:
    stages = Stages(faulty("linear.weight"))
    state = copy.deepcopy(stages.model.state_dict())
    cases = pickle.dumps(CASES)

    def snapshot() -> list[bytes]:
        return [pickle.dumps(part) for part in (stages.runs, stages.own, stages.matched)]

    before = snapshot()
    run_baseline(stages.baseline, stages.runs, silent)
    assert snapshot() == before
    match_norms(stages.candidate, stages.access, stages.own.called)
    assert snapshot() == before
    with stores() as kept:
        references = stages.references(kept, stages.matched.keys, with_depth=True)
        assert snapshot() == before
        kept_references = pickle.dumps(references)
        judge_outputs(stages.runs, stages.own, references, {"*": Limits(ulp=1.0)})
        roles = [(key, role) for key in KEYS for role in ("x", "y", "fed_x", "fed_y")]
        values = {place: np.array(kept.fed.get(*place)) for place in roles}
        free = {place: np.array(kept.free.get(*place)) for place in roles[:2]}
        check_parts(
            stages.access, stages.norms, stages.runs, stages.own, stages.matched, references, kept,
            ValidationOptions(depth=True), silent,
        )  # fmt: skip
        missing_outputs(stages.candidate, stages.runs, stages.own)
        assert snapshot() == before
        assert pickle.dumps(references) == kept_references
        assert all(np.array_equal(kept.fed.get(*place), value) for place, value in values.items())
        assert all(np.array_equal(kept.free.get(*place), value) for place, value in free.items())
    assert pickle.dumps(CASES) == cases
    assert all(torch.equal(value, state[name]) for name, value in stages.model.state_dict().items())
    assert not vars(stages.model.first).keys() & {"forward"}
