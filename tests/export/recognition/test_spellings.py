"""Every spelling of a norm is recognized as what it is and can be rewritten for every target; no look-alike is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rmsnorm_deploy.export.from_onnx.inline_functions import inline_norm_functions
from rmsnorm_deploy.export.from_onnx.rewrite import Rewritten, rewrite
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.export.recognition.find_norms import find_graph_norms
from rmsnorm_deploy.models.dtypes import numpy_dtype
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.runtime.accuracy.compare_output import judge
from rmsnorm_deploy.runtime.rewriting.verify_norms import prove_norms
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.spellings.look_alike_graphs import LOOK_ALIKES
from tests.helpers.spellings.norm_oddities import ODDITIES
from tests.helpers.spellings.norm_places import PLACES
from tests.helpers.spellings.norm_spellings import SPELLINGS, WAYS, Spelling, build

ALL: dict[str, Spelling] = {**SPELLINGS, **PLACES, **ODDITIES}


def graph_of(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(proto)


def data(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def feeds(runner: OrtRunner) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    arrays: dict[str, Any] = {}
    for info in runner.inputs():
        shape = [dim if isinstance(dim, int) else 3 for dim in info.shape or ()]
        wanted = numpy_dtype(info.dtype)
        arrays[info.name] = np.array(True) if wanted == np.bool_ else rng.standard_normal(shape).astype(wanted)
    return arrays


def outputs(model: bytes, given: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    with OrtRunner(model) as runner:
        given = dict(given or feeds(runner))
        return runner.run(given), given


def targets_of(name: str) -> tuple[str, ...]:
    """The plugin has no float64, and stands in the main graph only."""
    return (
        TARGETS[:3]
        if name.startswith(("double", "in a Loop", "in a Scan", "in both")) or "float64" in name
        else TARGETS
    )


def test_there_are_many_and_no_two_are_the_same() -> None:
    assert len(ALL) >= 600
    assert len(LOOK_ALIKES) >= 85
    models = [spelling.build() for spelling in ALL.values()] + list(LOOK_ALIKES.values())
    hashes = {hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest() for model in models}
    assert len(hashes) == len(ALL) + len(LOOK_ALIKES)


@pytest.mark.parametrize("name", ALL)
def test_a_spelling_is_recognized_and_rewritten(name: str) -> None:
    spelling = ALL[name]
    proto = spelling.build()
    found = find_graph_norms(inline_norm_functions(graph_of(proto))[0])
    assert [(site.spec, site.form) for site in found.sites] == [(e.spec, e.form) for e in spelling.expected]
    assert found.refusals == []
    before = outputs(proto.SerializeToString()) if spelling.runs else None
    for target in targets_of(name):
        result = rewrite(graph_of(proto), target)
        for site, expected in zip(result.sites, spelling.expected, strict=True):
            assert site.lowered is None or site.lowered.spec == expected.spec
        assert data(rewrite(graph_of(proto), target).model) == data(result.model), f"{target}: not deterministic"
        _check_again(result, target)
        if before is not None:
            _check_outputs(before, data(result.model), target)


def _check_again(result: Rewritten, target: str) -> None:
    """A second run changes nothing."""
    once = data(result.model)
    again = rewrite(graph_of(onnx.ModelProto.FromString(once)), target)
    assert not again.changed, target
    assert data(again.model) == once, target


def _check_outputs(before: tuple[dict[str, Any], dict[str, Any]], after: bytes, target: str) -> None:
    """As the original; for float16 within two of its roundings, the casts that ONNX Runtime moves."""
    wanted, given = before
    got, _ = outputs(after, given)
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        verdict = judge(name, got[name], array.astype(np.float64), array)
        assert verdict.passed, f"{target}: {verdict.reason}"


@pytest.mark.parametrize("target", ["standard", "ort"])
def test_an_epsilon_that_float32_does_not_hold_is_kept(target: str) -> None:
    proto = build(replace(WAYS["double"], eps=1e-6))
    with pytest.raises(UnsupportedError, match=r"epsilon as float32, which cannot represent 1e-06 exactly"):
        rewrite(graph_of(proto), target)
    assert rewrite(graph_of(proto), "primitives").changed


@pytest.mark.parametrize("name", [name for name, spelling in ALL.items() if spelling.runs])
def test_a_rewritten_spelling_is_proven(name: str) -> None:
    """Each norm alone, before and after, on every kind of adversarial row; the target goes round."""
    targets = targets_of(name)
    target = targets[list(ALL).index(name) % len(targets)]
    result = rewrite(graph_of(ALL[name].build()), target)
    proof = prove_norms(result, Path(), seed=1, progress=lambda text: None)
    assert [(row.verdict, row.reason) for row in proof.sites if row.verdict != "pass"] == []
    assert len(proof.sites) == sum(site.changed for site in result.sites)
    assert proof.notes == []


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_is_left_as_it_is(name: str) -> None:
    model = graph_of(LOOK_ALIKES[name])
    before = data(model)
    assert find_graph_norms(model).sites == []
    for target in TARGETS:
        result = rewrite(graph_of(LOOK_ALIKES[name]), target)
        assert not result.changed
        assert data(result.model) == before


@pytest.mark.parametrize("name", ALL)
def test_a_round_trip_keeps_specs_and_results(name: str) -> None:
    """primitives -> standard -> ort -> plugin -> primitives."""
    spelling = ALL[name]
    model = graph_of(spelling.build())
    results = []
    for target in (*targets_of(name), "primitives"):
        result = rewrite(model, target)
        assert len(result.sites) == len(spelling.expected)
        for site, expected in zip(result.sites, spelling.expected, strict=True):
            spec = site.before.spec
            assert spec == expected.spec, target
        model = graph_of(onnx.ModelProto.FromString(data(result.model)))
        results.append(data(result.model))
    if spelling.runs:
        first, given = outputs(results[0])
        last, _ = outputs(results[-1], given)
        for key, array in first.items():
            assert judge(key, last[key], array.astype(np.float64), array).passed
