"""RMSNorm and LayerNorm, before and behind the block, compared (`python -m benchmarks.norms_compared`).

- `variants`: the readable decoder in four variants that differ in their norms alone
- `training`: losses, gradients, accuracy, and the range of activations
- `times`: a norm alone in PyTorch and in ONNX Runtime, and a model's step
- `tables`: the results as Markdown
- `run`: the command line
"""
