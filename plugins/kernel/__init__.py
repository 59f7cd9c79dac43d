"""The CUDA kernel: what it computes, its layout over threads, and its compilation with NVRTC.

norm_kernel: NormKernel, what one kernel computes.
launch_config: LaunchConfig, the layout over threads; choose, the layout for a kernel.
macros: macros, the preprocessor macros that configure the source.
compiler: compile_kernel, a kernel as cubin or PTX; CompiledKernel.
kernel_cache: compiled kernels on disk, in the folder that RMSNORM_KERNEL_CACHE names.
cuda: the CUDA sources.
"""
