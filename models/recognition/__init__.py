"""Finding the norms of a PyTorch model by what they compute.

find_norms: find_norms, every norm of a model with its NormSpec.
probe: probe, the NormSpec that reproduces one module bit for bit.
likeness: likeness, what modules have in common that differ in the values of their tensors only.
caller: Caller, which calls copies of one module; own_tensors; RefusedError, the reason for a refusal.
candidates: in_float32 and in_half, the specs that are tried; stated_eps, the values of eps that are tried.
probe_rows: adversarial_rows and outlier_rows, inputs on which different specs give different results; same_bits.
conditions: probe_conditions and call_conditions, the shapes, strides, values and modes of torch of a proof; differs.
signature: second_input, whether a forward takes a second input; NotANormError.
state: Snapshot, what a module can change when it is called; UnwatchableError.
site: Site, Refusal and Recognition, the result.
isolate: stand_in, a copy of a module that is safe to call; untouched_random_state, thread_count.
intercept: replace_forward and at_norms, which run other code in place of a norm's forward; NormCall.
"""
