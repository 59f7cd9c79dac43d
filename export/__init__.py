"""PyTorch to ONNX, and ONNX to ONNX, with every RMSNorm in the form that a target requires.

from_torch: export a PyTorch model.
capture: capture a PyTorch model as a graph.
from_onnx: rewrite the norms of an existing ONNX model.
recognition: find the norms of an ONNX graph by what its nodes compute.
lowering: the table of what each target contains, and the nodes of one norm.
graph: norms, constants, dtypes and shapes of an ONNX graph.
onnx_io: read, check and write ONNX files, raise their opset, write a manifest.
"""
