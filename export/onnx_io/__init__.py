"""ONNX models as files: read, check and write them, raise their opset, and describe them in a manifest.

read_model: read_model, a file without its weights; to_ir, its graph in onnx_ir; ModelFile.
check_graph: check_graph, which refuses damaged and oversized graphs.
raise_opset: raise_opset, which raises the opset import without changing what operators compute.
write_model: write_model, a rewritten model beside its weights; graft.
atomic_files: new_folder and new_file, written completely or not at all.
destinations: check_destination, check_new_file and check_distinct, before slow work.
partial_files: temporary files and folders, locks, and what killed processes left.
owned_files: foreign_files and is_own_report, what this package wrote and may replace; sha256.
manifest_fields: the types of a manifest's fields; checked, which names a wrong field.
verify: verify_folder, the files of an exported folder against its manifest; check_weights.
place_weights: place_weights, the weights of a model beside its file, linked, copied or packed.
manifest: write_manifest and read_manifest, and the rows of a manifest.
"""
