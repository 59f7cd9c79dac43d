"""Measure the error of an array against a float64 reference, and decide whether it passes.

compare_output: `judge`, the verdict on one output, and `figures`, the error statistics of one array.
errors: `errors_of`, absolute errors, `ulps_of`, errors in ULPs, and `row_scale_error`, errors relative to their row.
error_stats: `Figures`, the error statistics, and `FiguresOf`, which accumulates them.
baseline: `unless_wrong` and `signal_warning`: whether PyTorch's own result can be a baseline.
pass_rules: the rules of a verdict: `AsGood`, `Within`, `Equal`, `InPlace`.
tolerances: `TOLERANCES`, the default rule for each dtype, and `Limits`, explicit limits.
lossy: `PROFILES`, named limits for quantized and converted files, each with its reason.
float_formats: `format_of`, the format of a dtype, and `ulp_size`.
"""
