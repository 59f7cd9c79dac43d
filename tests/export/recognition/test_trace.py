"""The worked trace in the room's docstring is what the code does, and its list of names is complete."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from rmsnorm_deploy.export import recognition
from rmsnorm_deploy.export.graph.infer_types import fill_types
from rmsnorm_deploy.export.recognition.dataflow import GraphReader
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.export.recognition.terms import Normed, Squares, Statistic, Term
from rmsnorm_deploy.models.spec import NormSpec
from tests.helpers.graphs.onnx_text import parsed

DOCSTRING = str(recognition.__doc__)
ROWS = re.findall(r"^ {4}(\w+) = (.+?\)) {2,}(.+)$", DOCSTRING, re.MULTILINE)
FOLDER = Path(str(recognition.__file__)).parent
GRAPH = """
norm (float16[batch, 4] x) => (float16[batch, 4] y)
<float16[4] weight = {15360, 15361, 15362, 15363}, float two = {2.0}, float eps = {0.00001}, int64[1] axes = {-1}>
{ NODES }
"""


def described(term: Term | None, root: str) -> str:
    """A formula as the docstring writes it."""
    if isinstance(term, Squares):
        assert not term.half
        return f"Squares    {term.root.name}^2"
    if isinstance(term, Statistic):
        assert (term.axes, term.reduced, term.half, term.factor_half, term.scale) == (1, True, False, False, None)
        x = term.root.name
        return f"Statistic  {term.c:.17g} * ({term.a:.17g} * mean({x}^2) + {term.b:.16g})^{term.p:.17g}"
    if isinstance(term, Normed):
        assert (term.coefficient, term.axes, term.divided, term.half, term.factor_half) == (1.0, 1, True, False, False)
        steps = [" ".join((s.kind, s.dtype.name, *([str(s.operand.name)] if s.operand else ()))) for s in term.steps]
        return "Normed     " + ", ".join([term.inner.name, *steps])
    assert term is None
    return f"-          root({root}) is x"


@pytest.fixture(scope="module")
def reader_and_terms() -> tuple[GraphReader, dict[str, Term | None]]:
    model = parsed(GRAPH.replace("NODES", "\n".join(f"{name} = {node}" for name, node, _ in ROWS)))
    fill_types(model)
    reader = GraphReader()
    reader.read(model.graph)
    return reader, {str(node.outputs[0].name): reader.terms.get(node.outputs[0]) for node in model.graph}


def test_each_node_has_the_formula_of_the_table(
    reader_and_terms: tuple[GraphReader, dict[str, Term | None]],
) -> None:
    reader, terms = reader_and_terms
    assert {name: text for name, _, text in ROWS} == {name: described(term, name) for name, term in terms.items()}
    assert len(ROWS) == 8
    assert reader.refusals == {}
    wide = terms["squares"]
    assert isinstance(wide, Squares)
    assert (wide.taken.name, reader.root(wide.taken).name) == ("wide", "x")


def test_what_the_text_says_of_the_values_on_the_way(
    reader_and_terms: tuple[GraphReader, dict[str, Term | None]],
) -> None:
    reader, terms = reader_and_terms
    assert {value.name for value in reader.continued} == {"normed", "narrow"}
    y = terms["y"]
    assert isinstance(y, Normed)
    assert y.previous is terms["narrow"]
    assert y.previous is not None
    assert y.previous.previous is terms["normed"]


def test_the_spec_is_the_one_of_the_text() -> None:
    model = parsed(GRAPH.replace("NODES", "\n".join(f"{name} = {node}" for name, node, _ in ROWS)))
    found = find_graph_norms(model)
    (site,) = found.sites
    assert found.refusals == []
    defaults = {field.name: field.default for field in dataclasses.fields(NormSpec)}
    shown = {name: getattr(site.spec, name) for name in ("eps", "scale", "order", "root")}
    assert {name: value for name, value in dataclasses.asdict(site.spec).items() if defaults[name] != value} == {
        name: value for name, value in shown.items() if defaults[name] != value
    }
    assert f"\n    NormSpec({', '.join(f'{name}={value!r}' for name, value in shown.items())})\n" in DOCSTRING


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_module_and_its_public_names_are_listed(path: Path) -> None:
    definitions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    public = {node.name for node in definitions if not node.name.startswith("_")}
    block = DOCSTRING.partition(f"\n{path.stem}:\n")[2]
    listed = re.match(r"(?: {4}.+\n)+", block)
    assert listed is not None
    assert set(re.findall(r"^ {4}(\w+): ", listed[0], re.MULTILINE)) == public
