"""A validation report as the runtime writes it, made without running anything; every figure is made up."""

from __future__ import annotations

import random
from typing import Any

KINDS = ("as it runs", "normal", "outlier channels", "large", "tiny", "zeros", "constants", "subnormals")
EDGES: list[float | str] = [0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, "inf"]


def sample_report(passed: bool = True, norms: int = 9) -> dict[str, Any]:
    """A report of schema `rmsnorm_deploy.validate/7`, with three outputs and two segments.

    Args:
        passed: whether everything passed; else the norm in the middle, all outputs and the second segment failed.
        norms: how many norms, at least 1, each with the eight kinds of input of `KINDS`.
    """
    rng = random.Random(0)
    paths = _paths(norms)
    bad = None if passed else paths[norms // 2]
    return {
        "schema": "rmsnorm_deploy.validate/7",
        "created": "2026-11-23T04:00:00+00:00",
        "verdict": "pass" if passed else "fail",
        "summary": (
            f"All 3 outputs, {norms} norms and 2 segments are as accurate as PyTorch."
            if passed
            else f"{bad} is where the error enters: 3 outputs, 1 norm and 1 segment are further off than PyTorch."
        ),
        "settings": {"model": "out/model.onnx", "against": "Qwen/Qwen3-0.6B", "provider": "cpu", "seed": 0,
                     "atol": None, "shapes": ["1x1", "1x7", "3x33"]},
        "outputs": [_output(rng, case, passed) for case in ("1x1", "1x7", "3x33")],
        "norms": [_norm(rng, path, path != bad) for path in paths],
        "segments": [_segment(rng, paths, 0, True), _segment(rng, paths, 1, passed)],
        "depth": _depth(rng, paths, bad),
        "culprits": [] if passed else [{"kind": "norm", "name": bad, "reason": "error max 913 of 4.1 allowed"}],
        "warnings": [],
        "unjudged": [],
        "untried": [],
        "notes": ["model.norm runs on 1 row only, so its statistics were checked on made-up rows alone."],
        "refusals": [
            {"path": "model.vision.norm", "class": "CenteredNorm", "reason": "it subtracts the mean of each group"}
        ],
        "deviations": [
            {"runtime": "onnxruntime", "at_most_ulp": 1.5, "reason": "the scale is applied in float32",
             "sites": paths[:3]}
        ],
        "provenance": {
            "candidate": {"runtime": "onnxruntime", "providers_used": ["CPUExecutionProvider"],
                          "files": [{"name": "model.onnx", "sha256": "5f2c" * 16}, {"name": "model.onnx.data",
                                                                                   "sha256": "09ab" * 16}]},
            "baseline": {"runtime": "torch", "dtype": "float16", "device": "cpu"},
            "versions": {"rmsnorm-deploy": "0.1.0", "torch": "2.11.0", "onnxruntime": "1.23.2"},
        },
    }  # fmt: skip


def with_margins(report: dict[str, Any], limit: float = 4.0) -> dict[str, Any]:
    """The report with a margin wherever there are figures: the largest error is `max_ulp`, the mean is `mean_ulp`."""
    norms = [kind for norm in report["norms"] for kind in norm["inputs"]]
    for row in (*report["outputs"], *norms, *report["segments"]):
        figures = row["figures"]
        row["margin"] = figures and {
            "worst": figures["max_ulp"],
            "allowed_worst": limit,
            "rms": figures["mean_ulp"],
            "allowed_rms": limit,
        }
    return report


def _paths(count: int) -> list[str]:
    names = [f"model.layers.{i // 2}.{('input', 'post_attention')[i % 2]}_layernorm" for i in range(count - 1)]
    return [*names, "model.norm"]


def _figures(rng: random.Random, scale: float, *, logits: bool = False) -> dict[str, Any]:
    count = 4096
    ulp = round(scale * rng.uniform(0.8, 1.2), 4)
    counts = [int(count * 0.5 ** (abs(place - 2) + 1)) for place in range(len(EDGES) - 1)]
    counts = [n if edge == 0 or float(edge) / 2 < ulp else 0 for n, edge in zip(counts, EDGES, strict=False)]
    if ulp > 1024:
        counts = [n // 2 for n in counts]
    beyond = 40 if ulp > 1024 else 0
    return {
        "max_ulp": ulp,
        "mean_ulp": round(ulp / 11, 5),
        "p999_ulp": round(ulp / 1.4, 4),
        "max_abs": ulp * 4.8e-7,
        "max_rel_row": ulp * 9.7e-8,
        "cosine": 1.0 - ulp * 1e-9,
        "differing": int(100 * scale) % count,
        "nonfinite_agree": True,
        "count": count,
        "top1_agreement": (0.99995 if scale < 10 else 0.93) if logits else None,
        "kl": ulp * 1e-10 if logits else None,
        "histogram": {"ulp_at_most": EDGES, "count": [*counts, beyond]},
        "worst": [
            {"index": [0, place, 17 * place], "value": 1.2000 + place / 7, "reference": 1.1999 + place / 7,
             "baseline": 1.2001 + place / 7, "ulp": round(ulp / (1 + place), 3)}
            for place in range(5)
        ],
    }  # fmt: skip


def _judged(rng: random.Random, passed: bool, *, logits: bool = False) -> dict[str, Any]:
    mine = _figures(rng, 3.0 if passed else 900.0, logits=logits)
    verdict = f"error max {mine['max_ulp']:.3g} of {4.1:.3g} allowed (row 2 of 99), in float16 eps x row scale"
    return {
        "passed": passed,
        "reason": verdict,
        "figures": mine,
        "baseline_figures": _figures(rng, 2.8, logits=logits),
    }


def _output(rng: random.Random, case: str, passed: bool) -> dict[str, Any]:
    return {"case": case, "name": "logits", **_judged(rng, passed, logits=True)}


def _norm(rng: random.Random, path: str, passed: bool) -> dict[str, Any]:
    inputs = [{"kind": kind, **_judged(rng, passed or kind not in KINDS[2:4])} for kind in KINDS]
    if not passed:
        inputs[3]["figures"] = {**inputs[3]["figures"], "max_ulp": "inf", "mean_ulp": "inf", "nonfinite_agree": False}
        inputs[4].update(figures=None, baseline_figures=None, reason="shape mismatch: (2, 8) and (2, 9)", passed=False)
    reason = "all kinds of input passed" if passed else "outlier channels: error max 913 of 4.1 allowed"
    return {
        "path": path,
        "call": 0,
        "computes": "weight, cast-then-scale, eps 1e-06",
        "form": "residual_add" if "post_attention" in path else "plain",
        "passed": passed,
        "reason": reason,
        "inputs": inputs,
    }


def _segment(rng: random.Random, paths: list[str], index: int, passed: bool) -> dict[str, Any]:
    ends = paths[index % len(paths)], paths[(index + 1) % len(paths)]
    return {
        "name": " ... ".join(ends),
        "index": index,
        "contains": [f"model.layers.{index}.self_attn.q_norm"],
        **_judged(rng, passed),
    }


def _depth(rng: random.Random, paths: list[str], bad: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    error = baseline = 2e-7
    for path in paths:
        for side in ("input", "output"):
            jump = 3e-3 if path == bad and side == "output" else 0.0
            added, own = rng.uniform(1e-7, 4e-7), rng.uniform(1e-7, 4e-7)
            error, baseline = error * 1.02 + added / 3 + jump, baseline * 1.02 + own / 3
            rows.append(
                {
                    "path": path,
                    "call": 0,
                    "side": side,
                    "error": error,
                    "baseline_error": baseline,
                    "introduced": added + jump if side == "output" else None,
                    "baseline_introduced": own if side == "output" else None,
                }
            )
    return rows
