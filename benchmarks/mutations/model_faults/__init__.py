"""Faults of whole models that only some inputs show: masks, positions, caches, tokens, sizes, weights, values.

graph_values: conditions and masks as values of a graph, and ways to rewire them.
attention_faults: the attention mask, padding, holes, the sliding window.
node_faults: attentions that were captured as nodes.
position_faults: positions and rotary embeddings.
cache_faults: the KV cache.
token_faults: token embeddings, the output head, batch and length.
encoder_decoder_faults: encoder-decoders.
value_faults: some values only, and operators with random output.
file_faults: weights in external data.
"""
