"""Attention: what one call of scaled dot-product attention computes, and which modules of a model compute it.

spec: AttentionSpec, what one attention computes.
attend: attend, the same in PyTorch.
intercept: intercepted, the calls of a transformers model's attention functions.
find_attention: find_attention, the attention modules whose functions follow a spec.
"""
