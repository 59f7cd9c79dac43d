"""Folders that servers run, made of exported folders: `rmsnorm package`.

api: `package_model`, which writes such a folder, and `Package`.
genai: `genai_config`, the configuration of onnxruntime-genai.
trtexec: `build_script`, which builds the engine with TensorRT's own tool.
triton: `triton_config`, the configuration of a model in a repository of Triton Inference Server.
"""
