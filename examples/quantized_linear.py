"""Quantize a norm's result in the norm itself, and multiply it in INT8: a linear layer with W8A8.

python examples/quantized_linear.py    # on a GPU one kernel does norm and quantization; elsewhere PyTorch does
"""

from __future__ import annotations

import sys

import torch

import rmsnorm_deploy as rd


def main() -> int:
    """Return 0 if the quantized layer is within 2 percent of the layer in float32."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, residual = torch.randn(2, 32, 256, device=device).unbind()
    scale = torch.rand(256, device=device) + 0.5
    linear = torch.nn.Linear(256, 512, bias=False, device=device)
    with torch.no_grad():
        per_column = linear.weight.abs().amax(1) / 127
        weight = (linear.weight / per_column[:, None]).round().to(torch.int8).t()

        y, per_row, total = rd.add_rms_norm_quantized(x, residual, scale, 1e-6)  # int8, float32 [32, 1], x + residual
        found = torch._int_mm(y, weight) * per_row * per_column
        wanted = linear(rd.rms_norm(total, scale, 1e-6))
    error = float((found - wanted).norm() / wanted.norm())
    print(f"a linear layer of {y.dtype} rows and weights: relative error {error:.4f}")
    print(f"the W8A8 layer is {'within' if error < 0.02 else 'not within'} 2 percent of float32")
    return 0 if error < 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
