"""What runs a model: PyTorch and ONNX Runtime."""
