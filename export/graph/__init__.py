"""What the other rooms ask of an ONNX graph: its norms, constants, dtypes and shapes."""
