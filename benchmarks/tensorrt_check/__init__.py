"""Export, build, run and validate small decoders in TensorRT on a GPU: `python -m benchmarks.tensorrt_check`.

run: the command line.
products: which of TensorRT and TensorRT-RTX this machine can run.
rows: `Row`, one model in one dtype with its norms in one form; `examine`, the stages of a row.
stages: what is done in a row: export, build, run, validate, tokens, CUDA graphs, contexts, time of a step.
quick: an engine with the quick deployable plugins.
worker: `Worker`, the process that rows run in.
archive: the files of failed rows, without weights.
table: the tables that are printed.
"""
