"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="builtin:addition, builtin:small, package.module:factory, file.py:factory, a folder saved with "
        "save_pretrained, or a hub name such as Qwen/Qwen3-0.6B.",
    ),
]
Exported = Annotated[
    Path, typer.Argument(metavar="DIR_OR_ONNX", help="An exported folder, or a single .onnx file.", show_default=False)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="DTYPE", help="float32, float16, bfloat16 or float64; the checkpoint's own when left out."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a transformers checkpoint.")
]
Provider = Annotated[
    str, typer.Option("--provider", metavar="NAME", help="ONNX Runtime's execution provider: cpu, cuda or tensorrt.")
]
NoFunction = Annotated[
    bool,
    typer.Option(
        "--no-function",
        help="For --target plugin: plugin nodes without local functions, as TensorRT 10.6 and before need them.",
    ),
]
OrtTrt = Annotated[
    bool,
    typer.Option(
        "--ort-trt", help="For --target plugin: plugin nodes as ONNX Runtime's TensorRT provider looks for them."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
