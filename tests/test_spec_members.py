"""Every place that must know the members of NormSpec's fields knows them all, and guesses at none.

The fields and their members are read from NormSpec itself. A member that is added there fails here for each place that
was not taught it; a place that meets a member it does not know must raise.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.lower import lower
from rmsnorm_deploy.export.lowering import steps
from rmsnorm_deploy.export.lowering.builder import Builder
from rmsnorm_deploy.export.lowering.table import TARGETS, cell, deviations
from rmsnorm_deploy.export.recognition import to_spec
from rmsnorm_deploy.export.recognition.find_norms import find_norms as find_graph_norms
from rmsnorm_deploy.models import eager as eager_module
from rmsnorm_deploy.models import spec as spec_module
from rmsnorm_deploy.models.eager import eager
from rmsnorm_deploy.models.errors import RmsnormDeployError, UsageError
from rmsnorm_deploy.models.recognition import candidates
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.models.recognition.intercept import NormCall
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.plugins.kernel import norm_kernel
from rmsnorm_deploy.plugins.tensorrt import images
from rmsnorm_deploy.runtime.norms import formula
from rmsnorm_deploy.runtime.risk.measure import NormError, NormRows
from rmsnorm_deploy.runtime.risk.observe import NormWatch
from rmsnorm_deploy.runtime.risk.rules import judge_norm
from tests.helpers.graphs.capture_graph import DATA_TYPES, GraphMaker

ROOT = Path(__file__).parent.parent
FIELDS: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(NormSpec).items() if get_origin(hint) is Literal
}
MEMBERS = [(field, member) for field, members in FIELDS.items() for member in members]
INVENTED = "invented"
ROWS, WIDTH = 6, 8
BASE = NormSpec(eps=1e-6, order="cast_then_scale")
# Reads every field: it has a weight to which 1 is added, and a gate.
FULL = BASE.replace(scale="one_plus_weight", gate="before", activation="silu")


def with_member(field: str, member: str) -> NormSpec:
    """The spec nearest to the default that has this member."""
    others = [(name, value) for name, values in FIELDS.items() if name != field for value in values]
    for changes in [{}, *({name: value} for name, value in others)]:
        try:
            return BASE.replace(**{field: member, **changes})
        except UsageError:
            continue
    raise AssertionError(f"NormSpec.{field} {member!r} goes with no single other member; teach `with_member` more")


def with_invented(field: str) -> NormSpec:
    spec = FULL.replace()
    object.__setattr__(spec, field, INVENTED)
    return spec


def tensors(spec: NormSpec, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
    """x, weight, bias and gate; a field that says what nobody knows gets all of them."""
    generator = torch.Generator().manual_seed(5)
    x, gate = (torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    weight = (torch.randn(WIDTH, generator=generator) * 0.5 + 0.3).to(dtype)
    return x, None if spec.scale == "none" else weight, None, None if spec.gate == "none" else gate


# Places ---------------------------------------------------------------------------------------------------------------


def _properties(spec: NormSpec) -> None:
    for name, value in vars(NormSpec).items():
        if isinstance(value, property):
            getattr(spec, name)


def _reference(spec: NormSpec) -> None:
    reference(spec, *tensors(spec))


def _eager(spec: NormSpec) -> None:
    eager(spec, *tensors(spec))


def _emit(target: str) -> Callable[[NormSpec], None]:
    def place(spec: NormSpec) -> None:
        dtype = ir.DataType.FLOAT16

        def value(name: str, *dims: int) -> ir.Value:
            return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))

        x, weight, _, gate = tensors(spec)
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="main")
        given = steps.NormInputs(
            value("x", *x.shape),
            None if weight is None else value("weight", WIDTH), None,
            None if gate is None else value("gate", *gate.shape),
        )  # fmt: skip
        steps.emit(Builder(graph, graph, {}, {}, 23), spec, given, target, "norm")

    return place


def _deviations(spec: NormSpec) -> None:
    for target, dtype in itertools.product(TARGETS, ("float16", "float64")):
        deviations(cell(target, "plain"), spec, dtype)


def _call(spec: NormSpec) -> NormCall:
    return NormCall(spec, *tensors(spec))


def _observe(spec: NormSpec) -> NormWatch:
    call = _call(spec)
    watch = NormWatch("norm", call)
    watch.observe(call, call.x)
    watch.sample()
    watch.seen()
    return watch


def _judge_risk(spec: NormSpec) -> None:
    seen = _observe(BASE).seen()
    object.__setattr__(seen, "spec", spec)
    rows = NormRows(spec, *(None if t is None else t.numpy() for t in tensors(spec)))  # type: ignore[arg-type]
    judge_norm(seen, rows, "float16", NormError(0.0, 0.0, 0.0, 0.0, 0), {})


_SPELLING = "the formula is the same for all of them"
_NO_ROUNDING = "it rounds nothing that depends on it"
# Each place, and the fields that it need not know, with the reason.
PLACES: dict[str, tuple[Callable[[NormSpec], Any], Mapping[str, str]]] = {
    "models.spec.NormSpec's properties": (
        _properties,
        {"root": "no property is about it", "activation": "no property is about it"},
    ),
    "models.spec.NormSpec.describe": (
        NormSpec.describe,
        dict.fromkeys(("order", "activation"), "the member's own name is written")
        | dict.fromkeys(("statistics", "root"), "it is not written"),
    ),
    "models.reference.reference": (_reference, dict.fromkeys(("order", "statistics", "root"), _SPELLING)),
    "models.eager.eager": (_eager, {}),
    **{f"export.lowering.steps.emit, target {target}": (_emit(target), {}) for target in TARGETS},
    "export.lowering.table.deviations": (
        _deviations,
        dict.fromkeys(("scale", "root", "reduction", "activation"), _NO_ROUNDING),
    ),
    "runtime.risk.observe.NormWatch": (_observe, dict.fromkeys(("order", "statistics", "root"), _SPELLING)),
    "runtime.risk.rules.judge_norm": (
        _judge_risk,
        dict.fromkeys(("order", "root", "gate", "activation"), "no rule is about it"),
    ),
}
KNOWING = [(place, field) for place, (_, ignored) in PLACES.items() for field in FIELDS if field not in ignored]


def _raised(place: str, spec: NormSpec) -> str | None:
    """What a place says to a spec that it does not know; None where it knows it."""
    try:
        PLACES[place][0](spec)
    except (AssertionError, KeyError, RmsnormDeployError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _unknown(place: str, field: str, member: str) -> str | None:
    """What is wrong where a place does not know a member; None where it does."""
    raised = _raised(place, with_member(field, member))
    return raised and f"NormSpec.{field}: {place} does not know the member {member!r} ({raised})"


def test_the_fields_are_found() -> None:
    assert {"scale", "order", "statistics", "root", "reduction", "gate", "activation"} <= set(FIELDS)
    assert all(set(ignored) <= set(FIELDS) for _, ignored in PLACES.values())


@pytest.mark.parametrize(("place", "field"), KNOWING)
def test_every_place_knows_every_member(place: str, field: str) -> None:
    problems = [problem for member in FIELDS[field] if (problem := _unknown(place, field, member))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("place", "field"), KNOWING)
def test_no_place_guesses_at_a_member_that_it_does_not_know(place: str, field: str) -> None:
    problem = _raised(place, with_invented(field))
    assert problem is not None, f"NormSpec.{field}: {place} takes the unknown member {INVENTED!r} for another"
    assert INVENTED in problem, f"NormSpec.{field}: {place} does not name the member {INVENTED!r}: {problem}"


@pytest.mark.parametrize("field", FIELDS)
def test_a_spec_refuses_what_is_not_a_member(field: str) -> None:
    for make in (lambda: BASE.replace(**{field: INVENTED}), lambda: NormSpec.from_dict({"eps": 0.0, field: INVENTED})):
        with pytest.raises(UsageError, match=f"NormSpec.{field} is '{INVENTED}'; it must be one of"):
            make()


@pytest.mark.parametrize("field", FIELDS)
def test_a_new_member_would_be_missed_by_name(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above, put to the test: a member that only NormSpec's own list of choices has."""
    monkeypatch.setitem(spec_module._CHOICES, field, (*FIELDS[field], INVENTED))
    for place in (place for place, known in KNOWING if known == field):
        problem = _unknown(place, field, INVENTED)
        assert problem is not None, place
        assert problem.startswith(f"NormSpec.{field}: {place} does not know the member {INVENTED!r}")


# Tables ---------------------------------------------------------------------------------------------------------------


def _values(table: Mapping[Any, tuple[str, ...]]) -> set[str]:
    return {member for members in table.values() for member in members}


# What each table must have, by field: its keys, or the members among its values.
TABLES: dict[str, tuple[str, Any]] = {
    "models.spec._SCALE_TEXTS": ("scale", spec_module._SCALE_TEXTS),
    **{f"models.spec._CHOICES[{field!r}]": (field, spec_module._CHOICES.get(field, ())) for field in FIELDS},
    "models.eager._ACTIVATIONS": ("activation", eager_module._ACTIVATIONS),
    "models.recognition.candidates.SCALES": ("scale", _values(candidates.SCALES)),
    "models.recognition.candidates.GATES": ("gate", _values(candidates.GATES)),
    "models.recognition.candidates.ACTIVATIONS, its keys": ("gate", candidates.ACTIVATIONS),
    "models.recognition.candidates.ACTIVATIONS": ("activation", _values(candidates.ACTIVATIONS)),
    "models.recognition.candidates.REDUCTIONS": ("reduction", candidates.REDUCTIONS),
    "models.recognition.candidates.ROOTS": ("root", candidates.ROOTS),
    "models.recognition.candidates.ORDERS": ("order", candidates.ORDERS),
    "models.recognition.candidates.SAME_IN_HALF, its keys": ("statistics", candidates.SAME_IN_HALF),
    "models.recognition.candidates.SAME_IN_HALF": ("statistics", _values(candidates.SAME_IN_HALF)),
    "models.recognition.candidates._MULTIPLIES": ("root", candidates._MULTIPLIES),
    "models.recognition.candidates._GATES_BEFORE": ("gate", candidates._GATES_BEFORE),
    "export.lowering.steps._CASTS_FIRST": ("order", steps._CASTS_FIRST),
    "export.lowering.steps._CASTS_FACTOR": ("order", steps._CASTS_FACTOR),
    "export.recognition.to_spec._STATISTICS": ("order", to_spec._STATISTICS),
    "export.recognition.to_spec._SCALES_LAST": ("order", to_spec._SCALES_LAST),
    "export.recognition.to_spec._MAY_DIVIDE": ("order", to_spec._MAY_DIVIDE),
    "runtime.norms.formula.ORDERS": ("order", formula.ORDERS),
    "runtime.norms.formula.REDUCTIONS": ("reduction", formula.REDUCTIONS),
    "runtime.norms.formula.GATES": ("gate", formula.GATES),
    "runtime.norms.formula.ACTIVATIONS": ("activation", formula.ACTIVATIONS),
    "plugins.tensorrt.images._SCALES (except none)": ("scale", {"none", *images._SCALES.values()}),
}


def _differs(name: str, field: str, found: Any) -> str:
    missing, unknown = (sorted(set(a) - set(b)) for a, b in ((FIELDS[field], found), (found, FIELDS[field])))
    problems = [f"NormSpec.{field}: {name} lacks the member {member!r}" for member in missing]
    return "\n".join([*problems, *(f"NormSpec.{field} has no member {member!r}, but {name} has" for member in unknown)])


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_every_member(name: str) -> None:
    problem = _differs(name, *TABLES[name])
    assert not problem, problem


def test_a_member_that_a_table_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIELDS, "order", (*FIELDS["order"], INVENTED))
    assert _differs("here", *TABLES["export.lowering.steps._CASTS_FIRST"]) == (
        f"NormSpec.order: here lacks the member {INVENTED!r}"
    )


def test_the_kernel_and_its_source_have_the_members_in_one_order() -> None:
    source = (norm_kernel.SOURCE_FOLDER / "rms_norm.cuh").read_text(encoding="utf-8")
    enumerations = {field.capitalize(): FIELDS[field] for field in ("scale", "gate", "activation")}
    for enumeration, members in {**enumerations, "Quantization": get_args(norm_kernel.Quantization)}.items():
        inside = source.split(f"enum {enumeration} {{")[1].split("}")[0]
        for name, member in zip(inside.split(","), members, strict=True):
            fits = name.strip().startswith("no") if member == "none" else member in name
            assert fits, f"enum {enumeration} of rms_norm.cuh: {inside}; expected the order {members}"
    assert set(images._SCALES) == set(contract.SCALE_OFFSETS)


# Recognition ----------------------------------------------------------------------------------------------------------


class Computed(nn.Module):
    """A module that computes a spec without a gate."""

    def __init__(self, spec: NormSpec) -> None:
        super().__init__()
        self.spec = spec
        weight = tensors(spec)[1]
        self.weight = None if weight is None else nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return eager(self.spec, x, self.weight)


class ComputedWithGate(Computed):
    """The same with a gate."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return eager(self.spec, x, self.weight, None, gate)


@pytest.mark.parametrize(("field", "member"), MEMBERS)
def test_a_module_that_computes_a_member_is_recognized_by_it(field: str, member: str) -> None:
    spec = with_member(field, member)
    found = find_norms(nn.ModuleDict({"norm": ComputedWithGate(spec) if spec.has_gate else Computed(spec)}))
    members = [getattr(site.spec, field) for site in found.sites]
    assert members == [member], f"NormSpec.{field}: models.recognition does not recognize {member!r}: {found.refusals}"


# Members that no graph is recognized by, and why.
UNREAD = {("reduction", "sum"): "an L2 norm is refused"}


@pytest.mark.parametrize(("field", "member"), MEMBERS)
def test_a_graph_that_computes_a_member_is_not_taken_for_another(field: str, member: str) -> None:
    spec = with_member(field, member)
    x, weight, _, gate = tensors(spec, torch.float16)
    maker = GraphMaker(DATA_TYPES[torch.float16])
    inputs = [
        maker.input("x", x.shape), None if weight is None else maker.initializer("w", weight), None,
        None if gate is None else maker.input("gate", gate.shape),
    ]  # fmt: skip
    lowered, _ = lower(maker.model([maker.norm(spec, inputs, "y", x.shape)]), "primitives")
    for node in lowered.graph:
        node.metadata_props.clear()
    found = find_graph_norms(lowered).sites
    place = "export.recognition.find_norms"
    if (field, member) in UNREAD:
        assert not found, f"NormSpec.{field}: {place} takes {member!r} for {found[0].spec.describe()}"
        return
    assert len(found) == 1, f"NormSpec.{field}: {place} does not recognize {member!r}"
    arrays = [None if t is None else t.double().numpy() for t in (x, weight, None, gate)]
    kept = found[0].weight  # 1 + weight may be a constant by now
    own = None if kept is None or kept.const_value is None else kept.const_value.numpy()
    expected = reference(spec, *arrays)  # type: ignore[arg-type]
    got = reference(found[0].spec, arrays[0], own, None, arrays[3])  # type: ignore[arg-type]
    message = f"NormSpec.{field}: {place} takes {member!r} for {found[0].spec.describe()}"
    np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=message)


# Sources --------------------------------------------------------------------------------------------------------------


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("models", "export", "plugins", "runtime", "src"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def _field(node: ast.expr) -> str | None:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name if name in FIELDS else None


def _strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def guesses(tree: ast.Module) -> Iterator[str]:
    """Branches over a field that another member would slip through: comparisons, and matches without `assert_never`."""
    allowed = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and node not in allowed:
            sides = [node.left, *node.comparators]
            for field in filter(None, map(_field, sides)):
                members = set().union(*map(_strings, sides)) & set(FIELDS[field])
                if members:
                    yield f"line {node.lineno}: {field} is compared with {', '.join(sorted(members))}"
        elif isinstance(node, ast.Match) and (field := _field(node.subject)) is not None:
            last = node.cases[-1]
            calls = {n.func.id for n in ast.walk(last) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            if not (isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None and "assert_never" in calls):
                yield f"line {node.lineno}: the match over {field} does not end in assert_never"


def test_no_source_compares_a_field_with_a_member() -> None:
    found = [f"{path}, {problem}" for path, tree in _sources() for problem in guesses(tree)]
    advice = "use a table with every member, a match that ends in assert_never, or a property of NormSpec"
    assert not found, f"{advice}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        'spec.gate != "none"',
        'order in ("no_upcast", "cast_factor")',
        'match spec.scale:\n    case "none":\n        pass\n    case _:\n        pass',
    ],
)
def test_guesses_are_found(source: str) -> None:
    assert list(guesses(ast.parse(source)))
