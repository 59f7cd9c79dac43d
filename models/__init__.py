"""What an RMSNorm computes, and the PyTorch models that contain one.

spec: NormSpec, the definition of one norm.
reference: reference, the norm in float64 with NumPy.
eager: eager, the norm in PyTorch, bit for bit what the module computes; statistics_dtype.
errors: RmsnormDeployError and its kinds, each with an exit code.
dtypes: Dtype and DTYPES, the names of each dtype in PyTorch, NumPy and ONNX.
precision: model_dtype and convert, models that mix dtypes.
loading: load_model, a model from a built-in, Python code, a local folder or the Hugging Face hub; LoadedModel.
checkpoint_keys: check_keys, what a transformers checkpoint lacks; allowing_missing.
outliers: inject_outliers, outlier channels in a model's weights; apply_recorded.
tensors: to_torch and to_numpy, arrays as tensors and back.
regular_files: read_bytes and read_json, files that are not trusted; FileStamp, whether a file changed.
versions: LIBRARIES, the supported versions of other libraries; too_old, newer_than_tested.
configs: config_value, a value of a model's config.
companions: folder_of, where the config and tokenizer files of a model are.
weights: weights that stay in their files.
hub: models of the Hugging Face hub.
calling: how a model is called, and its parts.
recognition: finding the norms of a model.
builtin: the models shipped with this package.
"""
