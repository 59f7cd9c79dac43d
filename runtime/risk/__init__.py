"""Find the norms of a PyTorch model that are at risk in float32, float16 or bfloat16, on real inputs.

report: `risk` and its result, `RiskReport`.
observe: `NormWatch`, which collects statistics of a norm's inputs while the model runs.
measure: the error of a norm in a dtype: `error_in_torch`, `error_in_onnxruntime`.
rules: `judge_norm`, the thresholds and the verdict.
"""
