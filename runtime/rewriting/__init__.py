"""Rewrite the norms of an .onnx file for a target, and prove that the model computes the same.

rewrite_file: `rewrite_model`.
verify_norms: `prove_norms`, which compares each rewritten norm with the original one.
verify_attentions: `prove_attentions`, which compares each rewritten attention with the original one.
verify_model: `prove_model`, which compares the whole rewritten model with the original one.
"""
