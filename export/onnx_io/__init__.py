"""ONNX models as files: read, checked, raised to another opset, written, described by a manifest."""
