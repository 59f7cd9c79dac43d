"""RMSNorm and AddRMSNorm as TensorRT plugins, each also with a quantized output.

creators: Plugins, the plugins in Python, for a machine without the C++ library; read_fields.
images: KernelImages, the compiled kernels that an engine contains; compile_images, unpack, kernel_of.
launcher: Launcher, which runs a compiled kernel on a GPU through the CUDA driver.
quick: register_quick_plugins, the plugins for TensorRT 10.9 and later whose engines require no library.
library: find_library, build_library and read_library, for the C++ library.
header: contract_header, the contract as a C++ header.
cpp: the C++ sources of the library.
"""
