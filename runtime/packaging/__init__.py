"""Folders that servers run, made of exported folders: `rmsnorm package`.

api: `package_model`, which writes such a folder, and `Package`.
contents: `Contents`, the files of a package: those of an exported folder, or an engine with its plugin.
push: `push_folder`, which uploads an exported folder or a package to the hub, and `Push`.
model_card: `model_card`, the README.md of a model there.
reports: `report_on`, the report of a validation that goes with a model.
genai: `genai_config`, the configuration of onnxruntime-genai.
trtexec: `build_script`, which builds the engine with TensorRT's own tool.
triton: `add_triton`, the configuration of a model in a repository of Triton Inference Server, and what starts it.
ort_server: `server_texts`, for this package's own server.
"""
