"""Rewrite an ONNX file of another exporter for ONNX Runtime's fused operator, and print the proof."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import torch
from torch import nn

import rmsnorm_deploy as rd


def main() -> int:
    """Return 0 if the rewritten file computes the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 8)).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        before = folder / "plain.onnx"
        torch.onnx.export(model, (torch.randn(2, 32),), before, opset_version=20, dynamo=True, verbose=False)
        rewritten = rd.rewrite_model(before, folder / "new", target="ort")
        for path in (before, rewritten.model):
            operators = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
            print(f"{path.name}: {', '.join(f'{count} {name}' for name, count in operators.items())}")
    assert rewritten.proof is not None  # None only with verify=False
    print(f"proof: {rewritten.proof.verdict} ({rewritten.proof.reason})")
    return 0 if rewritten.proof.verdict == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
