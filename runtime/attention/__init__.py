"""The attentions of a file: run and check each one alone.

file_attentions: `FileAttentions`, which locates the attentions of an ONNX file and runs them alone.
torch_attentions: `recorded_attentions`, the calls of PyTorch's attention functions, and what they compute.
attention_inputs: `KINDS`, inputs that expose the errors of an attention.
attention_checks: `check_attentions`, the check of every attention alone.
"""
