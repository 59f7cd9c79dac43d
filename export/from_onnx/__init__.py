"""ONNX to ONNX: the norms of a file in a target's form."""
