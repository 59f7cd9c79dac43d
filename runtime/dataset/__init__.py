"""Run a model on the rows of a data set: Parquet in, Parquet out, each row once.

run_dataset: `run_dataset`, the data set in parts, here or on a cluster of Ray; what is done stays done.
parts: `Part`, some rows of a file, and `plan_parts`; `is_written`, whether a part's result is there.
run_part: `PartRunner`, which runs the rows of a part and writes its result in one step.
columns: the values of a column as arrays (`cells`), and arrays as a column (`to_column`).
texts: the tokens of a column of texts (`token_cells`).
"""
