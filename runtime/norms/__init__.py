"""The norms of a model: run and check each one alone, and the segments between them.

access: `NormAccess`, the interface to a model's norms, with `NormFeed`, `NormResult` and `CalledNorm`.
torch_norms: `TorchNorms`, that interface for a PyTorch model, and `survey_norms`, which lists the norms of a run.
onnx_norms: `OnnxNorms`, that interface for an ONNX file in ONNX Runtime.
recorded_norms: `RecordedNorms`, PyTorch's side of the norms of a file that are not modules.
graph_norms: `GraphNorms`, which locates the norms in an ONNX graph and cuts the graph at them.
cut: `cut_out` and `run_alone`, which extract norms from a graph and run them alone.
norm_model: `norm_model`, an ONNX model of a single norm.
check_norm: `check_norm`, the verdicts on one norm's result.
adversarial_rows: `adversarial`, inputs that expose the errors of a norm.
formula: `read_formulas`, what the norms of a file compute, and `differences` from PyTorch's.
float64_model: `in_float64`, which makes a model compute in float64.
activation_store: `ActivationStore`, activations on disk.
"""
