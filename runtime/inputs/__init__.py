"""The inputs that a model runs on: generated with a seed, read from files, or made from prompts.

cases: `Case`, one run's inputs, and its sources: `load_cases`, `prompt_cases`, `given_cases`, `made_up_for`.
plan: `plan_cases`, the inputs that a validation generates by default, and what they leave out.
boundaries: the lengths and the special tokens that a model's config names.
synthetic: `make_feeds`, which generates inputs, and `cast_feeds`, which casts given ones to the model's dtypes.
cache_sizes: `cache_sizes`, the number of heads and their size in a KV cache whose dims are only named.
ranges: `shapes_within`, the default shapes moved into the sizes for which a model was exported.
arrays: `read_arrays`, for .npz and .safetensors files.
tokenizer: `load_tokenizer` and `has_tokenizer`.
encoder_decoder: `decoder_steps` and `encoder_decoder_tokens`, an exported encoder and its decoder together.
exported: `open_exported`, which opens an exported folder or an .onnx file.
derived: derived_cases, the inputs of a factory and others with values like theirs; factory_case.
"""
