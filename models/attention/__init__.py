"""Attention: what one call of scaled dot-product attention computes, and which modules of a model compute it.

spec: AttentionSpec, what one attention computes.
attend: attend, the same in PyTorch.
call: AttentionCall, one call of an attention function.
functional: functional_calls, the calls of torch's own function by the modules of a model.
intercept: intercepted, the calls of a model's attention functions, of transformers' registry and of torch.
silent_queries: reads_silent_queries, whether a model reads what padding gets.
find_attention: find_attention, the attention modules whose functions follow a spec.
"""
