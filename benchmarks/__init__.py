"""Measurements behind the README's claims, each run as a module from the root of the repository.

rewrite: time and memory of rewriting, and the number of fused norms compared with two other optimizers.
fuzz_rewrite: the rewriter on damaged files.
damaged_files: the commands that read files, on damaged files of every kind.
mutations: `validate` and `bisect` on planted faults and on runs without faults.
norm_in_model: time of norm kernels and of the model, export time and memory, compared with `torch.onnx.export`.
lossy_profiles: what quantized and converted files lose, and what planted faults in them add.
kernel: time of the CUDA kernel on a GPU, compared with other kernels and a copy, and in all its layouts.
kernel_code: registers, instructions and the order of loads of the CUDA kernel.
kernel_faults: faults planted in the CUDA kernel's source, and what finds them without a GPU.
residual_add: residual add and norm as two operators, compared with ONNX Runtime's fused operator.
decode: time and memory of one step of a decoder, beside the files of other tools.
generation: tokens per second of whole generations, beside other loops.
genai_tokens: packages for onnxruntime-genai, run by it, for the decoders of the zoo.
validate_cost: memory and time of validating a model of 1.1e9 parameters.

Models and files that they share with the tests are in `tests.helpers`.
"""
