"""The custom operators RMSNorm and AddRMSNorm, the CUDA kernel, and the TensorRT plugins that run it.

contract: names, attributes, inputs and dtypes of the operators; attribute_problems.
kernel: the CUDA kernel, its layout and its compilation.
tensorrt: the TensorRT plugins in C++ and Python.
torch: the kernel as operators of PyTorch.
"""
