"""Compiled kernels: compiled in parallel, named by their layout, and launched."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from rmsnorm_deploy.plugins.kernel.compiler import CompiledKernel, compile_kernel
from rmsnorm_deploy.plugins.kernel.launch_config import LaunchConfig
from rmsnorm_deploy.plugins.kernel.norm_kernel import NormKernel
from rmsnorm_deploy.plugins.tensorrt.images import KernelImages, image_of
from rmsnorm_deploy.plugins.tensorrt.launcher import Launcher, cuda_driver

from .cases import Case, Tensors

Work = tuple[NormKernel, LaunchConfig, int]
Compile = Callable[[Iterable[Work]], dict[Work, CompiledKernel]]


@contextlib.contextmanager
def compiling_processes() -> Iterator[Compile]:
    """A function that compiles many kernels, without those that are asked for twice.

    NVRTC compiles one kernel at a time in a process. The processes are forked, so they must begin before CUDA does.
    """
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:

        def compiled(works: Iterable[Work]) -> dict[Work, CompiledKernel]:
            once = list(dict.fromkeys(works))
            return dict(zip(once, pool.map(_compiled, once, chunksize=4), strict=True))

        yield compiled


def _compiled(work: Work) -> CompiledKernel:
    return compile_kernel(*work)


def launched(
    case: Case, compiled: CompiledKernel, config: LaunchConfig, overlap: bool = True
) -> Callable[[Tensors], None]:
    """A function that launches a kernel; with `overlap` before the kernel before it has ended, if it can."""
    image = image_of(config, compiled.architecture, compiled.image)
    image = dataclasses.replace(image, waits=image.waits and overlap)
    launcher = Launcher(KernelImages(case.kernel.width, case.kernel.dtype, (image,)), case.kernel.op, cuda_driver())

    def launch(given: Tensors) -> None:
        inputs = given.inputs()
        pointers = [tensor.data_ptr() for tensor in (*inputs, *given.outputs())]
        launcher.launch(pointers, len(inputs), case.rows, torch.cuda.current_stream().cuda_stream)

    return launch


def layout_name(config: LaunchConfig) -> str:
    """Rows x threads x vectors x elements of a block, the cluster, and `p` if the weight is loaded first."""
    prefetch = " p" if config.prefetch else ""
    return f"{config.rows}x{config.threads}x{config.vectors}x{config.elements} c{config.cluster}{prefetch}"


def resources(compiled: CompiledKernel) -> dict[str, Any]:
    """Registers of a thread, and the bytes of spilled registers."""
    return {"registers": compiled.registers, "spilled_bytes": compiled.spilled_bytes}
