"""The CUDA kernel: its source, its layout over threads, and its compiler."""
