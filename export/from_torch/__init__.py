"""PyTorch to ONNX: swap the norms, capture the model, lower the norms, save."""
