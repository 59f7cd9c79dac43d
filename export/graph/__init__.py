"""Norms, constants, dtypes and shapes of an ONNX graph, as the other packages of export read them.

site: GraphSite, GraphRefusal and GraphRecognition, the norms of a graph; node_name, how messages show a node.
constants: constant, scalar, integers and dims of a value; widens, is_half, is_floating for dtypes.
infer_types: fill_types, which infers missing dtypes and shapes.
stand_ins: StandIns, ONNX nodes with the dtypes and shapes of an operator of ONNX Runtime.
plugin_nodes: is_plugin_node, whether a node is a custom operator of this package.
captured_nodes: the names of the nodes of a captured graph that are not ONNX operators.
cache_names: cache_name, the names of a cache's tensors in exported files.
metadata: the keys that an exported file has on its nodes, and the names of its constants and its KV cache.
sizes: SizeLimits, the sizes of dynamic dims for which a graph is valid, and their form in a file's metadata.
requirements: required_version, the lowest version of a runtime that computes a file right.
repairs: repair, nodes of torch's exporter that ONNX Runtime does not take, in another form.
stored_weights: as_stored, linear layers that use weights as a checkpoint stores them; is_at_rest.
residual: residual_operands, the residual add in front of a norm.
shape_checks: fits, may_fit, reshapes_back and other checks of the shapes around a norm.
"""
