"""Finding the norms of a PyTorch model by what they compute.

find_norms: find_norms, every norm of a model with its NormSpec.
probe: probe, the NormSpec that reproduces one module bit for bit.
candidates: in_float32 and in_half, the specs that are tried; stated_eps, the values of eps that are tried.
probe_rows: adversarial_rows, inputs on which different specs give different results; same_bits.
site: Site, Refusal and Recognition, the result.
isolate: stand_in, a copy of a module that is safe to call; untouched_random_state, one_thread.
intercept: replace_forward and at_norms, which run other code in place of a norm's forward; NormCall.
"""
