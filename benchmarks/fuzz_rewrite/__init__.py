"""Run the rewriter on damaged files: `python -m benchmarks.fuzz_rewrite`.

run: the command line, and the loop over the cases.
sound_models: the valid models.
damage: `damaged`, which damages a model.
judging: `judged`, which runs the rewriter on one file and checks the result.
"""
