"""PyTorch to ONNX: swap, capture, lower, save."""
