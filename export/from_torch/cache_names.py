"""The names of a KV cache's tensors in an exported graph, which runtimes and servers expect."""

# `past_key_values.N.key` is an input and `present.N.key` an output of layer N; the same with `value`.
PAST, PRESENT = "past_key_values.", "present."
