"""The mutation suite: `python -m benchmarks.mutations`.

run: the command line and its tables.
catalog: every fault that is planted in a file.
faults: what a fault is.
norm_faults, segment_faults, runner_faults: the faults.
plants: how faults are planted.
steps: wrong steps of a norm that is spelled anew.
surgery: editing an exported file.
subjects: the models, exported once for each target.
honest: exports that must pass.
judging: what becomes of one fault.
"""
