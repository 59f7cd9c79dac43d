"""PyTorch to ONNX: swap the norms for single nodes, capture the graph, lower the norms, save the files.

export_model: export_model, the whole export; prepare and save, its two halves; ExportResult, PreparedModel.
swap: swapped, which replaces the forward of every norm while a model is captured.
capture: capture, a swapped model as an ONNX graph; Capture.
ranges: size_limits, the sizes for which a captured graph is valid.
second_sizes: check_second_sizes, which runs the captured graph and the model at other sizes than the captured ones.
captured_program: GraphRun, a captured program that runs in PyTorch at any sizes; table_ends, the ends of its tables.
lower: lower, a captured graph with its norms in a target's form.
example_inputs: example_inputs, inputs to capture a model with; vocabulary_size.
"""
