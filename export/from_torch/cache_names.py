"""The names of a KV cache's tensors in an exported graph, as runtimes and servers expect them."""

# `past_key_values.N.key` goes in, `present.N.key` comes out; and the same with `value`.
PAST, PRESENT = "past_key_values.", "present."
