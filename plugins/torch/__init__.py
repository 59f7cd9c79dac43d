"""The kernel in PyTorch: operators that run it on CUDA tensors, and models whose norms call them.

operators: rms_norm and add_rms_norm, which are also `torch.ops.rmsnorm_deploy.rms_norm` and `add_rms_norm`.
kernel_choice: spec_problem and kernel_for, which kernel computes a call, if one does; RowStrides.
quantized_operators: rms_norm_quantized and add_rms_norm_quantized, the same with an int8 or e4m3 output.
registration: register, an operator for every device, the compiler and a refused gradient.
call: Call, the tensors and the spec of a call; its result in PyTorch, by the kernel, and without values.
quantize: quantize, in PyTorch with the bits of the kernel.
device_kernels: DeviceKernels, the kernels of one GPU, compiled at first use; LaunchTensors.
swap: use_kernel and KernelSwap, a model whose norms call the operators.
"""
