"""A PyTorch model as a graph: swap its norms and attentions for single nodes, and capture it.

capture: capture, a swapped model as an ONNX graph.
captured: Capture, what that returns.
causes: explained, why the exporter failed; CAUSES, the table of causes with advice.
transformers_model, torch_module: the two ways to capture, for a model of transformers and for any other module.
part_graphs: part_sample, vision_sample and keep_part, the parts of a model as graphs of their own.
quick_exporters: quick_exporters, the upstream exporters with less work for the same graph.
recurrences: traceable_recurrences, the recurrences of hybrid models as one scan.
attention_nodes: attention_nodes, which makes one node of each attention while a model is captured.
swap: swapped, which replaces the forward of every norm while a model is captured.
"""
