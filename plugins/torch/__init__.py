"""The kernel in PyTorch: operators that run it on CUDA tensors, and models whose norms call them.

operators: rms_norm and add_rms_norm, which are also `torch.ops.rmsnorm_deploy.rms_norm` and `add_rms_norm`.
kernel_choice: spec_problem and kernel_for, which kernel computes a call, if one does; RowStrides.
device_kernels: DeviceKernels, the kernels of one GPU, compiled at first use.
swap: use_kernel and KernelSwap, a model whose norms call the operators.
"""
