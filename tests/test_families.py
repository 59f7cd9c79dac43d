"""Every family, every target, fp32 and fp16, with and without KV cache: recognized, exported, run, compared.

A family is tested in one dtype with one target: with a cache, or without one if it has none; `RMSNORM_TESTS=all` tests
all.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.save import PreparedModel, save
from rmsnorm_deploy.export.lowering.table import TARGETS
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner, optimized_op_counts
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.extent import EVERY
from tests.helpers.models.families import CACHED, FAMILIES, VOCABULARY, build

DTYPES = ("float32", "float16")
# From one dynamic file.
SHAPES = list(itertools.product((1, 3), (1, 7, 33)))
FUSED = ("SimplifiedLayerNormalization", "RMSNormalization")


def cases(names: Iterable[str], first: int) -> list[tuple[str, str]]:
    """Families with their dtypes; in turns one of them, beginning with this one, if not all are tested."""
    every = [[(name, dtype) for dtype in DTYPES] for name in names]
    if EVERY:
        return list(itertools.chain.from_iterable(every))
    turn = {name: number for number, name in enumerate(FAMILIES)}
    return [pair[(first + turn[pair[0][0]]) % len(DTYPES)] for pair in every]


def targets_of(name: str, first: int) -> tuple[str, ...]:
    """The targets of a test of a family: all, or one of them, in turns beginning with this one."""
    if EVERY:
        return TARGETS
    return (TARGETS[(first + list(FAMILIES).index(name)) % len(TARGETS)],)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_is_recognized_and_nothing_else(name: str) -> None:
    model = build(name)
    found = find_norms(model)
    assert Counter(site.spec for site in found.sites) == FAMILIES[name].norms
    assert found.refusals == []
    named = {path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    assert {site.path for site in found.sites} == named


WITHOUT_CACHE = [name for name in FAMILIES if name not in CACHED or EVERY]


@pytest.mark.parametrize(("name", "dtype"), cases(WITHOUT_CACHE, 0))
def test_exports_without_cache_agree_with_pytorch(name: str, dtype: str, tmp_path: Path) -> None:
    model = build(name, getattr(torch, dtype))
    prepared = prepare(model)
    assert len(prepared.recognition.sites) == sum(FAMILIES[name].norms.values())
    for target in targets_of(name, 0):
        _check_target(prepared, model, name, dtype, target, tmp_path)


@pytest.mark.parametrize(("name", "dtype"), cases(CACHED, 1))
def test_exports_with_cache_agree_with_pytorch(name: str, dtype: str, tmp_path: Path) -> None:
    model = build(name, getattr(torch, dtype))
    prepared = prepare(model, with_past=True)
    for target in targets_of(name, 2):
        _check_target(prepared, model, name, dtype, target, tmp_path)


def test_an_overflowed_mask_is_refused_in_float64() -> None:
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM in float64: .* Export in float32"):
        prepare(build("llama", torch.float64), attention="decomposed")


def test_attention_as_a_node_has_a_finite_mask_in_float64(tmp_path: Path) -> None:
    model = build("llama", torch.float64).eval()
    file = save(prepare(model), tmp_path / "out", "ort").folder / "model.onnx"
    ids = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    with OrtRunner(file) as runner:
        got = runner.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got[0, 3:], wanted[0, 3:].numpy(), atol=1e-6)
    np.testing.assert_allclose(got[1], wanted[1].numpy(), atol=1e-6)


def test_a_rotation_by_complex_numbers_is_exported_with_real_ones(tmp_path: Path) -> None:
    options = {**FAMILIES["llama"].options, "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**options)).eval()
    assert len(find_norms(model).sites) == 7
    ids = torch.randint(3, VOCABULARY, (2, 9))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wanted = model(**feeds).logits
    file = save(prepare(model), tmp_path / "out", "standard").folder / "model.onnx"
    with OrtRunner(file) as runner:
        got = runner.run({name: value.numpy() for name, value in feeds.items()})["logits"]
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


def test_a_cache_of_states_goes_in_and_comes_out(tmp_path: Path) -> None:
    model = build("mamba2")
    result = save(prepare(model, with_past=True), tmp_path / "out", "ort")
    states = {f"{layer}.{kind}_state" for layer in range(2) for kind in ("conv", "recurrent")}
    inputs = {row["name"] for row in result.manifest["inputs"]}
    assert inputs == {"input_ids", "attention_mask", *(f"past_key_values.{state}" for state in states)}
    assert {f"present.{state}" for state in states} < {row["name"] for row in result.manifest["outputs"]}
    # A call may be longer than the model's chunk of 8 tokens.
    report = validate(result.folder, model, shapes=[(2, 19)])
    assert (report.verdict, report.culprits) == ("pass", [])


def test_the_whole_of_an_encoder_decoder_has_no_single_cache() -> None:
    with pytest.raises(UnsupportedError, match=r"is not a decoder with a KV cache of transformers\. Omit"):
        prepare(build("t5"), with_past=True)


def _check_target(prepared: PreparedModel, model: nn.Module, name: str, dtype: str, target: str, folder: Path) -> None:
    result = save(prepared, folder / target, target)
    count = sum(FAMILIES[name].norms.values())
    assert len(result.manifest["sites"]) == count
    assert all(len(site["calls"]) == 1 for site in result.manifest["sites"])
    report = validate(result.folder, model, shapes=SHAPES)
    assert (report.culprits, report.notes) == ([], []), f"{name} {dtype} {target}"
    assert len(report.rows) >= len(SHAPES)
    # Every norm alone, what is before each of them (and before a gate), and what is after the last.
    assert {check.norm.key for check in report.norms} == {(site["path"], 0) for site in result.manifest["sites"]}
    assert len(report.segments) > count
    assert report.verdict == "pass"
    if dtype == "float32":
        counts = optimized_op_counts(result.folder / "model.onnx")
        assert sum(counts[op] for op in FUSED) == count, f"{target}: {counts}"
        assert counts["ReduceMean"] == 0
