"""Arguments and options of several commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rmsnorm_deploy.models.dtypes import norm_dtype
from rmsnorm_deploy.models.hub.options import HubOptions, using_hub

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="builtin:addition, builtin:small, package.module:factory, file.py:factory, a folder saved with "
        "save_pretrained, or a hub name such as Qwen/Qwen3-0.6B.",
    ),
]
Exported = Annotated[
    Path,
    typer.Argument(metavar="DIR_OR_ONNX", help="An exported folder, an .onnx file, or an engine.", show_default=False),
]


def dtype_name(given: str | None) -> str | None:
    """The table's name of a dtype option, which is refused before slow work."""
    return None if given is None else norm_dtype(given)


Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, float16, bfloat16 or float64 (also fp16, half, bf16 and so on); the checkpoint's if omitted.",
        callback=dtype_name,
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="primitives, standard, ort or plugin, see `rmsnorm targets`; several as ort,standard or by repeating it.",
        show_default="primitives, which every runtime runs",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that is part of a transformers checkpoint.")
]
AllowMissing = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-missing",
        metavar="PATTERN",
        help="Load a transformers checkpoint although keys of this name or pattern, such as 'lm_head.*', are missing, "
        "unexpected or of another shape; missing weights are random. May be repeated.",
    ),
]


def _allow_pickles(context: typer.Context, value: bool) -> bool:
    """Open a context in which pickled weights are loaded, until the command ends."""
    if value and not context.resilient_parsing:
        from rmsnorm_deploy.models.weights.checkpoint import allowing_pickles

        context.with_resource(allowing_pickles())
    return value


AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        callback=_allow_pickles,
        help="Read weights that are pickled (pytorch_model.bin): loading a pickle can run code that is in it.",
    ),
]
# The options that become fields of `HubOptions`, by parameter name.
HUB: dict[str, Any] = {
    "revision": Annotated[
        str | None,
        typer.Option(
            "--revision",
            metavar="REV",
            help="Of a hub name, a branch, a tag or a commit.",
            show_default="the default branch; for an export that is validated, the exported commit",
        ),
    ],
    "subfolder": Annotated[
        str | None,
        typer.Option("--subfolder", metavar="DIR", help="Of a hub name, the folder of the model in its repository."),
    ],
    "cache_dir": Annotated[
        Path | None,
        typer.Option(
            "--cache-dir", metavar="DIR", help="The cache of hub models.", show_default="that of huggingface_hub"
        ),
    ],
    "token_file": Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="A file with the hub's token, which is never an argument, because shells and process lists keep "
            "arguments.",
            show_default="the environment variable HF_TOKEN, or the login of hf auth login",
        ),
    ],
    "offline": Annotated[
        bool, typer.Option("--offline", help="Read hub models from the cache alone, as HF_HUB_OFFLINE=1 does.")
    ],
}


def takes_hub(*without: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options in `HUB`; they hold for the model that it names, until it ends.

    Args:
        without: options in `HUB` that the command does not have.
    """
    names = [name for name in HUB if name not in without]
    defaults = HubOptions()

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(**arguments: Any) -> Any:
            options = HubOptions(**{name: arguments.pop(name) for name in names})
            model = arguments.get("against") or arguments.get("model")
            with using_hub(options, model):
                return command(**arguments)

        signature = inspect.signature(command, eval_str=True)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values()]
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, name), annotation=HUB[name]
            )
            for name in names
        ]
        last = [p for p in own if p.name in ("quiet", "as_json")]
        parameters = [*(p for p in own if p not in last), *added, *last]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": signature.return_annotation}
        return run

    return decorate


Provider = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="ONNX Runtime's execution provider: cpu, cuda, tensorrt or rtx; with options as in cuda:use_tf32=0.",
    ),
]
Runner = Annotated[
    str | None,
    typer.Option(
        "--runner",
        metavar="NAME",
        help="ort (ONNX Runtime), tensorrt or rtx (an engine; one is built if the model is none).",
        show_default="ort, or the product that built an engine",
    ),
]
NoFunction = Annotated[
    bool,
    typer.Option(
        "--no-function",
        help="For --target plugin: write plugin nodes without local functions, which TensorRT up to 10.6 requires.",
    ),
]
OrtTrt = Annotated[
    bool,
    typer.Option("--ort-trt", help="For --target plugin: write plugin nodes for ONNX Runtime's TensorRT provider."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print no progress and no notes; of the result, only the verdict and what failed.",
    ),
]
