"""Build TensorRT engines in a worker process, and check which layer runs each norm.

build: `build_engine` and its result, `Engine`.
options: `BuildOptions`, every option of a build.
plan: `plan_build`, every decision that is made before TensorRT runs.
network: `read_network`, which reads and checks an ONNX file before TensorRT parses it.
profiles: `make_profiles`, optimization profiles from the dynamic dims of a file.
process: `run_worker`, which starts the worker process, limits its memory and reports its progress.
worker: the worker process, which parses, checks and builds.
layers: `norm_layers`, the layer of an engine that runs each norm.
engine_files: the engine, its record and its log on disk.
cache: `EngineCache`, engines of earlier builds.
on_demand: `BuiltOnDemand`, a runner that builds engines for the shapes that come.
trtexec: `trtexec_command`, the same build as a command line.
"""
