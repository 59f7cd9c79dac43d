"""ONNX to ONNX: rewrite the norms, and the attentions, of an existing model in a target's form.

rewrite: rewrite, every norm of a model in a target's form; fuse_quantized, a norm with its QuantizeLinear; Rewritten.
rewrite_attentions: AttentionRewriter, which replaces attentions that are spelled out by one operator each.
inline_functions: inline_norm_functions, which inlines the model-local functions that contain norms.
annotate: annotate, which records the norm that each node belongs to in its metadata.
"""
