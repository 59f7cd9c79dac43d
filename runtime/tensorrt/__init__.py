"""TensorRT engines: what the file needs, the build in a process of its own, and proof of what runs each norm.

api: TensorRT 10, 11 and TensorRT-RTX, and everything in which they differ.
options: what an engine is built with.
build: `build_engine`.
plan: everything that is decided before TensorRT runs.
process: the worker started, listened to, limited, ended.
worker: what the worker does: parse, check, build.
engine_files: the engine, its record, its log.
network: what a file asks of TensorRT, checked before it is parsed.
profiles: optimization profiles from a file's dynamic dims.
layers: which layer of an engine runs each norm.
cache: engines kept by everything that they depend on.
trtexec: the same build as a command line.
"""
