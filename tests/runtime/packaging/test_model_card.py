"""The card of a model on the hub: what it says, and that texts of others cannot write in it."""

from __future__ import annotations

from typing import Any

import pytest

from rmsnorm_deploy.runtime.packaging.model_card import MARK, model_card

_MANIFEST: dict[str, Any] = {
    "hub": {"name": "owner/base", "revision": None, "subfolder": None, "commit": "a" * 40},
    "target": "ort", "dtype": "float16", "opset": 21, "with_past": True, "sites": [{}, {}], "refusals": [{}],
    "versions": {"python": "3.11.7", "torch": "2.9"}, "requires": {"onnxruntime": "1.27"},
}  # fmt: skip
_REPORT: dict[str, Any] = {
    "verdict": "pass",
    "summary": "All 3 outputs agree.",
    "created": "2026-01-01T00:00:00+00:00",
    "outputs": [
        {"case": "a", "name": "logits", "passed": True, "figures": {"max_abs": 0.001, "max_rel_row": 0.5}},
        {"case": "b", "name": "logits", "passed": True, "figures": {"max_abs": 0.25, "max_rel_row": "inf"}},
        {"case": "a", "name": "present.0.key", "passed": True, "figures": {"max_abs": 0.125, "max_rel_row": 0.0}},
        {"case": "a", "name": "present.1.key", "passed": True, "figures": {"max_abs": 0.0, "max_rel_row": 0.75}},
    ],
    "norms": [{"passed": True}, {"passed": False}],
    "settings": {},
}


def test_it_says_what_the_model_is_how_it_was_validated_and_how_to_run_it() -> None:
    import yaml

    text = model_card("owner/small-onnx", _MANIFEST, _REPORT)
    _, block, body = text.split("---\n", 2)
    assert yaml.safe_load(block) == {
        "library_name": "onnx", "base_model": "owner/base",
        "tags": ["rmsnorm", "rmsnorm-deploy", "onnx", "ort", "float16"],
    }  # fmt: skip
    for line in (
        MARK,
        "# small-onnx",
        "| dtype | `float16` |",
        "| norms | 2 (1 left as they were) |",
        "| requires onnxruntime | `1.27` |",
        "| `logits` | 2 | 0.25 | inf |",
        "| `present.*` | 1 | 0.125 | 0.75 |",
        "Checked alone: 1 of 2 norms passed.",
        "hf download owner/small-onnx --local-dir small-onnx",
        "rmsnorm verify small-onnx",
        'rmsnorm generate small-onnx --prompt "..."',
        "python 3.11.7, torch 2.9.",
    ):
        assert line in body.splitlines(), line
    assert f"[owner/base](https://huggingface.co/owner/base), commit `{'a' * 40}`, exported with rmsnorm-deploy" in body
    assert "Verdict: **pass**, by the error of PyTorch in the same dtype, with a float64 reference" in body


def test_without_a_report_or_a_base_model_it_says_so() -> None:
    text = model_card("owner/x", {"source": "/home/me/model.py:net", "target": "standard"})
    assert "base_model" not in text
    assert "/home/me" not in text
    assert "No validation report is in this repository." in text
    assert "rmsnorm run x --inputs inputs.npz" in text


@pytest.mark.parametrize("verdict", ["fail", "cannot be judged"])
def test_another_verdict_is_not_hidden(verdict: str) -> None:
    text = model_card("owner/x", _MANIFEST, {**_REPORT, "verdict": verdict, "settings": {"lossy": "int4"}})
    assert f"Verdict: **{verdict}**, by the limits of the profile `int4`" in text


def test_texts_of_others_stay_texts() -> None:
    hostile = "`x` | <script>\n---\nlicense: mit\n![](http://x)\x1b[0m"
    manifest = {
        **_MANIFEST, "target": hostile, "dtype": hostile, "versions": {hostile: hostile},
        "hub": {"name": "a/b\nlicense: mit", "commit": hostile}, "quantized": {"profile": hostile},
    }  # fmt: skip
    report = {**_REPORT, "summary": hostile, "outputs": [{**_REPORT["outputs"][0], "name": hostile}]}
    text = model_card("owner/x", manifest, report)
    _, block, body = text.split("---\n", 2)
    assert "license" not in block
    assert "\x1b" not in text
    lines = body.splitlines()
    assert "license: mit" not in lines
    assert "---" not in lines
    outside = "".join(part for number, part in enumerate(body.replace("```", "").split("`")) if number % 2 == 0)
    assert "<script>" not in outside.replace("\\<script\\>", "")
    assert "![](" not in outside
