"""Models of diffusers, timm, x-transformers and litgpt, through recognition, export and validation.

CI does not install these libraries. Where they are: `pip install diffusers timm x-transformers litgpt`.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from benchmarks.zoo.catalog import ENTRIES
from benchmarks.zoo.entries import norms_there
from benchmarks.zoo.libraries import LIBRARIES
from benchmarks.zoo.rows import run_row
from rmsnorm_deploy import export_model
from rmsnorm_deploy.models.errors import UnsupportedError
from rmsnorm_deploy.models.recognition.find_norms import find_norms

# Norms over channels, and norms that divide by a clamped length (F.normalize) or by the deviation: in the modules they
# are not RMS norms of the last dims that a NormSpec describes.
NOT_DESCRIBED = {
    name for name in ENTRIES if name.startswith("x_transformers_") or name in ("wan_vae", "timm_convnext")
}  # fmt: skip
REPRESENTATIVE = ("flux_transformer", "ltx_transformer", "timm_aimv2", "timm_naflexvit", "x_transformers_rms",
                  "litgpt_gemma3")  # fmt: skip
COMPLEX, DATA_DEPENDENT = "uses complex numbers", "decides by the values of tensors"
# What torch's exporter cannot capture, with the reason in the message.
REFUSED = {
    "qwen_image_transformer": COMPLEX, "z_image_transformer": COMPLEX, "lumina2_transformer": DATA_DEPENDENT,
    "mochi_transformer": DATA_DEPENDENT, "hidream_transformer": DATA_DEPENDENT,
}  # fmt: skip


def _entry(name: str) -> Any:
    """An entry; the test is skipped where its library is missing."""
    entry = ENTRIES[name]
    try:
        importlib.import_module(entry.requires)
    except ImportError:
        package = entry.requires.replace("_", "-")
        pytest.skip(f"{package} is not installed: pip install diffusers timm x-transformers litgpt")
    return entry


@pytest.mark.parametrize("name", [entry.name for entry in LIBRARIES if entry.name not in NOT_DESCRIBED])
def test_the_norms_found_are_the_norms_there(name: str) -> None:
    entry = _entry(name)
    model = entry.make()
    assert len(find_norms(model).sites) == norms_there(entry, model)


@pytest.mark.parametrize("name", sorted(NOT_DESCRIBED))
def test_other_norms_are_refused_with_a_reason(name: str) -> None:
    found = find_norms(_entry(name).make())
    assert found.sites == []
    assert all(refusal.reason for refusal in found.refusals)
    assert found.refusals


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_model_is_exported_and_validated(name: str) -> None:
    _entry(name)
    results = list(run_row(name, ("export", "validate")))
    assert [(result.step, result.status) for result in results] == [("export", "ok"), ("validate", "ok")], results


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_has_the_true_reason(name: str, tmp_path: Any) -> None:
    entry = _entry(name)
    model = entry.make()
    with pytest.raises(UnsupportedError, match=re.escape(REFUSED[name])):
        export_model(model, tmp_path / "out", inputs=entry.inputs(model))
