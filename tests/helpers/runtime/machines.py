"""Machines as `rmsnorm doctor` finds them: one with a CPU only, and one with a GPU and everything installed."""

from __future__ import annotations

import dataclasses

from rmsnorm_deploy.runtime.doctor_records import Driver, PluginState, Product, Surroundings

CREATORS = tuple({"name": name, "version": "1", "namespace": "rmsnorm_deploy"} for name in ("RMSNorm", "AddRMSNorm"))

CPU_MACHINE = Surroundings(
    versions={"onnxruntime": "1.30.0", "onnxruntime-gpu": None, "transformers": "5.0.0"},
    imports={"torch": "", "onnx": ""},
    onnxruntime="1.30.0",
    providers={"cpu": "", "cuda": "no cuda", "tensorrt": "no tensorrt"},
    compiled=["CPUExecutionProvider"],
    gpus=[],
    torch_cuda=None,
    driver=Driver(),
    products={
        "tensorrt": Product(problem="tensorrt is not installed"),
        "rtx": Product(problem="tensorrt_rtx is not installed"),
    },
    plugin=PluginState(expected="/home/me/lib.so"),
)


def product(version: str, *distributions: str) -> Product:
    """A full product of this version, whose registry has taken the library."""
    return Product(
        version=version,
        has_builder=True,
        has_parser=True,
        distributions=dict.fromkeys(distributions, version),
        creators=CREATORS,
    )


GPU_MACHINE = dataclasses.replace(
    CPU_MACHINE,
    providers=dict.fromkeys(CPU_MACHINE.providers, ""),
    compiled=["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
    gpus=["a GPU, 80 GiB, 580.65"],
    torch_cuda="13.0",
    driver=Driver("580.65", (13, 0), (("a GPU", 90),)),
    products={
        "tensorrt": product("11.4.0", "tensorrt", "tensorrt-cu13"),
        "rtx": product("1.7.1.116", "tensorrt-rtx-cu13"),
    },
    plugin=PluginState(
        library="/lib.so", expected="/lib.so", is_current=True, headers="10.14", creators=CREATORS, nvrtc="13.0",
        registering="/register.so",
    ),
)  # fmt: skip
