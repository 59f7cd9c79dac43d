"""Weights at rest: tensors whose bytes stay in their files until somebody reads them.

header: read_header, the names, dtypes, shapes and places of the tensors of a safetensors file.
mapped_file: map_file, a file whose bytes are tensors without being read; places_of, where tensors' bytes live.
load_transformers: load_at_rest, a model of transformers whose weights stay in the checkpoint.
stand_ins: unread_weights, which runs a model with other values in place of its large weights.
side_file: SideFile, a temporary file for the weights that had to be computed.
digest: sample_digest, which tells other weights apart by some bytes of each tensor.
checkpoint: weight_files_of, the safetensors files of a checkpoint's folder; load_weights, for any module.
"""
