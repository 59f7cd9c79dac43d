"""Run a model: named arrays in, named arrays out, in PyTorch, ONNX Runtime or TensorRT.

base: the `Runner` and `OnnxSession` protocols, `TensorInfo`, and `check_feeds`, which validates the inputs of a run.
open: `open_runner`, which chooses the backend for a model.
onnxruntime: `OrtRunner` for ONNX models, and `optimized_op_counts`, the operators that ONNX Runtime runs.
providers: `chosen_providers`, ONNX Runtime's execution providers as users name them; `reduced_precision`.
threads: `using_threads`, the threads of sessions where nothing else says so.
torch: `TorchRunner` for PyTorch modules, and the conversions `to_torch` and `to_numpy`.
tensorrt: `TensorRTRunner` for engines.
ort_binding: `Binding`, inputs and outputs that stay bound from one run to the next.
ort_decoding: `OrtDecoding`, the steps of a decoder whose cache stays in ONNX Runtime's values.
decoding: `open_decoding`, the steps of a decoder whose cache stays where it runs.
ort_assignment: `norm_assignment`, the execution provider and the operators of each norm.
ort_errors: `load_error`, why ONNX Runtime cannot open a model, and the remedy.
ort_graph: facts about an ONNX model: `file_record`, `op_counts`, `input_dtypes`, `has_large_weights`.
"""
