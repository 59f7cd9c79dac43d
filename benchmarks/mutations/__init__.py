"""The mutation suite, which plants faults and runs `validate` and `bisect`: `python -m benchmarks.mutations`.

run: the command line and its tables.
catalog: `FILE_FAULTS`, every fault that is planted in a file.
faults: `Fault`, one fault.
norm_faults, segment_faults, runner_faults: the faults.
plants: functions that plant faults.
steps: wrong steps of a rewritten norm.
surgery: `Edit`, which edits an exported file, and `respell`, which rewrites a norm with a wrong step.
subjects: `Subject`, a model, and `Exports`, which exports it once for each target.
honest: exports without faults, which must pass.
judging: `judge_fault`, the result of one fault.
"""
