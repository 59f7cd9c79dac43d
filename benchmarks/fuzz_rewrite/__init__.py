"""Damaged files for the rewriter: `python -m benchmarks.fuzz_rewrite`.

run: the command line, and the loop over the cases.
sound_models: the models before the damage.
damage: what is done to them.
judging: what the rewriter makes of one file.
"""
