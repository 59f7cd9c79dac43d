"""Finding the norms of an ONNX graph by what its nodes compute."""
