"""Engines of TensorRT 10, TensorRT 11 and TensorRT-RTX on disk, and opened on a GPU.

api: `Api`, the three products behind one interface, and `cuda_device`, the local GPU.
messages: `logger_class`, TensorRT's messages.
engine_file: `EngineFile`, an engine on disk with its record.
plugin_creators: `ensure_creators`, the plugins in TensorRT's registry.
open_engine: `open_engine`, an engine on this machine's GPU, or why it does not fit.
io_tensors: `IOTensor`, an input or output; `choose_profile`, the profile that runs given shapes.
device: `Device`, the GPU's memory, streams and CUDA graphs.
context: `EngineContext`, one execution context.
output_memory: where outputs are written.
device_cache: `DeviceCache`, the cache of a decoder on the GPU.
"""
