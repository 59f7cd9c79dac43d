"""Speed of the CUDA kernel on a GPU, compared with other kernels and with a copy: `python -m benchmarks.kernel`.

run: the command line.
cases: `Case`, one row of the table, its tensors, and which rows are measured.
accuracy: `judged`, a result compared with float64.
compiled: kernels compiled in parallel processes, and `launched`, which launches one.
timing: CUDA graphs and their time with a cold and with a warm L2 cache.
peers: the other kernels: PyTorch's, torch.compile's, and those of libraries that are installed.
measure: `measured`, one row of the table.
table: the tables in Markdown, and the losses.
tune: the time of every layout of a kernel, beside the one that `choose` takes.
"""
