"""Compare a deployed model with PyTorch: every output, every norm, every attention, and every segment between norms.

api: `validate` and `bisect`.
options: `ValidationOptions`, every option of a validation.
result: `ValidationReport`, the verdict with its evidence.
components: `validate_components`, a folder of an encoder and its decoder; `validate_runners`, several runtimes.
sides: `open_sides`, which loads the candidate and the PyTorch model.
candidate: `Candidate`, the side that is checked, and `candidate_of`.
pipeline: the stages of a validation, from `run_candidate` to `check_parts`.
names: `match_inputs` and `match_outputs`, which name of a file is which of PyTorch's.
run_cases: `made_up_cases`, `run_guarded` and `judge_output`, for one case.
norm_checks: `check_norms`, every norm alone.
recorded_checks: `check_recorded`, every norm that is not a module.
segment_checks: `check_segments`, every segment between norms.
depth: `measure_depth`, errors along the depth of the model.
replay: `read_replay`, the options of an earlier report.
"""
