"""RMSNorm and AddRMSNorm as TensorRT plugins, each also with a quantized output.

creators: the plugins in Python, for a machine without the library.
images: the compiled kernels that a plugin takes with it into an engine.
launcher: a packed kernel run on a GPU through CUDA's driver.
library: where the C++ library is, how it is built, what one holds.
"""
