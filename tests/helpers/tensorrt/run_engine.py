"""`python run_engine.py RUNTIME ENGINE LIBRARY|python FOLDER`: an engine from `x.npy` to `y.npy` on the first GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from rmsnorm_deploy.plugins.tensorrt.creators import Plugins
from rmsnorm_deploy.plugins.tensorrt.launcher import cuda_driver
from rmsnorm_deploy.runtime.engines.api import Api


def main(runtime: str, engine_file: str, library: str, folder: Path) -> None:
    """Load the plugins, open the engine, run it."""
    driver = cuda_driver()

    def call(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if int(status):
            raise SystemExit(f"CUDA's driver answers {status}")
        return values[0] if values else None

    call(driver.cuInit(0))
    context = call(driver.cuDevicePrimaryCtxRetain(call(driver.cuDeviceGet(0))))
    call(driver.cuCtxSetCurrent(context))
    trt = Api(runtime).trt
    if library == "python":
        plugins = Plugins(trt, ())
        plugins.register()
    else:
        trt.get_plugin_registry().load_library(library)
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(Path(engine_file).read_bytes())
    if engine is None:
        raise SystemExit(f"{engine_file}: TensorRT cannot open it")
    running = engine.create_execution_context()
    x = np.load(folder / "x.npy")
    y = np.empty_like(x)
    pointers = {name: call(driver.cuMemAlloc(array.nbytes)) for name, array in (("x", x), ("y", y))}
    call(driver.cuMemcpyHtoD(pointers["x"], x.ctypes.data, x.nbytes))
    if not running.set_input_shape("x", x.shape):
        raise SystemExit(f"{engine_file}: it takes no x of shape {x.shape}")
    for name, pointer in pointers.items():
        running.set_tensor_address(name, int(pointer))
    stream = call(driver.cuStreamCreate(0))
    if not running.execute_async_v3(int(stream)):
        raise SystemExit(f"{engine_file}: TensorRT does not run it")
    call(driver.cuStreamSynchronize(stream))
    call(driver.cuMemcpyDtoH(y.ctypes.data, pointers["y"], y.nbytes))
    np.save(folder / "y.npy", y)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
