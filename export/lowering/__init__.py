"""The tables of lowering, and the ONNX nodes of one norm and one attention for each target.

table: TABLE, the operators of each target and form, their requirements and accuracy; resolve, deviations, opset_for.
norm_writer: NormWriter, which writes one norm into a graph; the keys of a node's metadata.
steps: emit, the nodes of one NormSpec.
builder: Builder, which collects new nodes and constants.
already_lowered: counterparts, the nodes of a graph that are equal to new ones.
attention_table: ATTENTION_TABLE, the operators of each target and kind of attention; attention_form.
attention_writer: AttentionWriter, which writes one attention into a graph.
in_place_cache: InPlaceCache, attentions that write the cache in place.
head_layout: rows_of, the heads of a token in one row, as projections have them.
rotary: write_rotary and decompose_rotary, rotary embeddings as one operator each, and back.
plugin_functions: plugin_function, the local function of a custom operator; style_plugin_nodes, is_plugin_node.
quantized_norms: fuse_quantized_outputs and split_quantized_outputs, norms of the plugin with a quantized output.
weight_quantizer: SCHEMES; QuantizedMatrix, a weight that ONNX Runtime's own quantizer quantizes when it is read.
quantized_weights: quantize_weights, which gives the MatMuls of a lowered graph quantized weights.
"""
