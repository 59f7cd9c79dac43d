"""Folders that servers run, made of exported folders: `rmsnorm package`.

api: `package_model`, which writes such a folder, and `Package`.
genai: `genai_config`, the configuration of onnxruntime-genai.
triton: `triton_config`, the configuration of a model in a repository of Triton Inference Server.
"""
