"""Let the norms of a PyTorch model call the fused kernel, alone and under torch.compile.

python examples/pytorch_kernel.py    # on a GPU the kernel runs; elsewhere PyTorch computes the same formula
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

import rmsnorm_deploy as rd


def main() -> int:
    """Return 0 if the model's outputs stay the same: every bit on the CPU, within float32's accuracy on a GPU."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval().to(device)
    tokens = torch.arange(14, device=device).reshape(2, 7)
    calls = []

    def count(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        calls.append(sum("rmsnorm_deploy.rms_norm" in str(node.target) for node in graph.graph.nodes))
        return graph

    with torch.no_grad():
        before = model(tokens).logits
        with rd.use_kernel(model) as swap:
            print(swap)
            swapped = model(tokens).logits
            compiled = torch.compile(model, fullgraph=True, backend=count)(tokens).logits
        restored = model(tokens).logits
    atol = 0.0 if device == "cpu" else 1e-5
    same = all(torch.allclose(logits, before, rtol=0, atol=atol) for logits in (swapped, compiled, restored))
    graphs = "one graph" if len(calls) == 1 else f"{len(calls)} graphs"
    print(f"{graphs} with {sum(calls)} calls of the kernel, and the outputs {'as before' if same else 'differ'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
