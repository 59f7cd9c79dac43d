"""A PyTorch model as a graph: swap the norms for single nodes, capture the model, name its dims, check other sizes.

capture: capture, a swapped model as an ONNX graph.
captured: Capture, what that returns.
causes: explained, why the exporter failed; CAUSES, the table of causes with advice.
transformers_model, torch_module: the two ways to capture, for a model of transformers and for any other module.
part_graphs: part_sample, vision_sample and keep_part, the parts of a model as graphs of their own.
measured_dims: measured_dims, which dims of a model's inputs vary, and which only together.
quick_exporters: quick_exporters, the upstream exporters with less work for the same graph.
recurrences: traceable_recurrences, the recurrences of hybrid models as one scan.
dims: name_dims, the names of dynamic dims.
swap: swapped, which replaces the forward of every norm while a model is captured.
ranges: size_limits, the sizes for which a captured graph is valid.
second_sizes: check_second_sizes, which runs the captured graph and the model at other sizes than the captured ones.
captured_program: GraphRun, a captured program that runs in PyTorch at any sizes; table_ends, the ends of its tables.
"""
