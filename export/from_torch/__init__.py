"""PyTorch to ONNX: find and check the norms, capture the model, lower the norms, save the files.

export_model: export_model, the whole export; prepare, its first half.
save: save and save_all, its second half, which write the folder; ExportResult, PreparedModel.
graph_norms: find_unswapped, the norms of a captured graph that no recognized module computes.
lower: lower, a captured graph with its norms in a target's form.
"""
