"""Files that `torch.onnx.export` writes by itself: every norm is found, rewritten, proven and fused."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.accuracy.compare_output import judge
from rmsnorm_deploy.runtime.rewriting.rewrite_file import rewrite_model
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner, optimized_op_counts
from tests.helpers.models.families import FAMILIES
from tests.helpers.models.plain_export import plain_export

NAMES = ("llama", "qwen3", "gemma3", "olmo2", "t5", "mamba2", "gpt_oss")
FUSED = ("SimplifiedLayerNormalization", "RMSNormalization")


def shown(spec: NormSpec, dtype: str) -> NormSpec:
    """What of a module's spec a graph can show, whatever dtype its residual stream has."""
    scale = "weight" if dtype == "float32" and spec.scale == "one_plus_weight" else spec.scale  # 1 + w is folded
    return NormSpec(spec.eps, scale=scale, group_size=spec.group_size, gate=spec.gate, activation=spec.activation)


@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(NAMES, ("float32", "float16"))))
def test_every_norm_is_found_and_fused(name: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    plain_export(name, getattr(torch, dtype), path)
    result = rewrite_model(path, tmp_path / "out", target="ort")
    expected = Counter({shown(spec, dtype): count for spec, count in FAMILIES[name].norms.items()})
    found = [site.before for site in result.rewritten.sites]
    assert Counter(shown(site.spec, dtype) for site in found) == expected
    assert all(site.changed for site in result.rewritten.sites)
    assert (result.rewritten.refusals, result.manifest["notes"]) == ([], [])
    if dtype == "float16" and name not in ("mamba2", "t5"):  # whose residual stream is float32 in part
        orders = {spec.order for spec in FAMILIES[name].norms}
        assert {site.spec.order for site in found} == orders
    assert result.proof is not None
    assert result.proof.verdict == "pass"
    counts = optimized_op_counts(result.folder / "model.onnx")
    assert sum(counts[op] for op in FUSED) == sum(expected.values())


@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_norms_of_mixed_dtypes_are_repaired(name: str, tmp_path: Path) -> None:
    """At opset 23 torch writes RMSNormalization with x in float16 and a float32 scale, which does not load."""
    path = tmp_path / "model.onnx"
    model = plain_export(name, torch.float16, path, opset_version=23)
    with pytest.raises(RmsnormDeployError, match=r"RMSNormalization|Mul"):
        OrtRunner(path).__enter__()
    result = rewrite_model(path, tmp_path / "out", target="standard")
    assert len(result.rewritten.sites) == sum(FAMILIES[name].norms.values())
    ids = np.array([[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24, 25, 26]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with OrtRunner(result.folder / "model.onnx") as runner:
        (got,) = runner.run(feeds).values()
    tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
    with torch.no_grad():
        own = model(**tensors, use_cache=False).logits.numpy()
        reference = model.float()(**tensors, use_cache=False).logits.double().numpy()
    assert judge("logits", got, reference, own).passed
