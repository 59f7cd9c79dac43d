"""ONNX to ONNX: rewrite the norms of an existing model in a target's form.

rewrite: rewrite, every norm of a model in a target's form; fuse_quantized, a norm with its QuantizeLinear; Rewritten.
inline_functions: inline_norm_functions, which inlines the model-local functions that contain norms.
annotate: annotate, which records the norm that each node belongs to in its metadata.
"""
