"""Measurements behind the README's claims, each run as a module from the root of the repository.

rewrite: what rewriting costs, and norms fused beside two other optimizers.
fuzz_rewrite: damaged files thrown at the rewriter.
mutations: planted faults and honest runs, judged by `validate` and `bisect`.
norm_in_model: norm kernels, model time, export time and memory against `torch.onnx.export`.
residual_add: residual add and norm as two operators against ONNX Runtime's fused one.
validate_cost: memory and time of validating a model of 1.1e9 parameters.

The models and files that they share with the tests are in `tests.helpers`.
"""
