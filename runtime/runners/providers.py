"""Execution providers of ONNX Runtime as users name them: `cuda`, or `cuda:use_tf32=0` with an option."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from ...models.errors import EnvironmentMissingError, UsageError
from ...plugins import contract
from ...plugins.tensorrt.library import default_registering_library

if TYPE_CHECKING:
    from onnx import ModelProto

CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
RTX: Final = "NvTensorRTRTXExecutionProvider"
_SUFFIX: Final = "executionprovider"
_SHORT: Final = {"rtx": RTX}
# The package that brings TensorRT-RTX's provider as a library of its own, and that package's module.
GET_RTX_PROVIDER: Final = 'pip install "onnxruntime>=1.24" onnxruntime-ep-nv-tensorrt-rtx-cu13'
RTX_MODULE: Final = "onnxruntime_ep_nv_tensorrt_rtx"
# Libraries that TensorRT's provider opens before it registers TensorRT's plugins as operators.
PLUGIN_LIBRARIES: Final = "trt_extra_plugin_lib_paths"


def chosen_providers(
    ort: ModuleType, texts: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, str]]:
    """The options of each chosen provider by its full name, in order of preference.

    Args:
        ort: the onnxruntime module.
        texts: `NAME` or `NAME:OPTION=VALUE,...`, short or full names in upper or lower case (`rtx` is TensorRT-RTX's);
            None for the CPU provider.
        options: more options by the name of the provider.

    Raises:
        UsageError: a name is unknown, or an option is not of this form.
        EnvironmentMissingError: a provider is not in this build of onnxruntime.
    """
    if isinstance(texts, str) or (texts is not None and not texts):
        raise UsageError(f"providers: expected a list of one or more providers, got {texts!r}.")
    found: dict[str, dict[str, str]] = {}
    for text in texts or [CPU]:
        name, _, given = text.partition(":")
        found.setdefault(_full_name(ort, name), {}).update(_options_in(given, text))
    for name, more in (options or {}).items():
        full = _full_name(ort, name)
        if full not in found:
            raise UsageError(
                f"provider_options: expected names among the providers {', '.join(found)}, "
                f"got {', '.join(options or {})}."
            )
        found[full].update({option: str(value) for option, value in more.items()})
    return found


def _options_in(given: str, text: str) -> dict[str, str]:
    options = {}
    for pair in given.split(",") if given else ():
        option, equals, value = pair.partition("=")
        if not (option and equals):
            raise UsageError(f"provider {text!r}: expected NAME:OPTION=VALUE,..., such as cuda:use_tf32=0.")
        options[option.strip()] = value.strip()
    return options


def _full_name(ort: ModuleType, name: str) -> str:
    known = {full.lower().removesuffix(_SUFFIX): full for full in (*ort.get_all_providers(), RTX)} | _SHORT
    full = known.get(name.strip().lower().removesuffix(_SUFFIX))
    if full is None:
        raise UsageError(f"unknown execution provider {name!r}: expected one of {', '.join(sorted(known))}.")
    available = ort.get_available_providers()
    if full == RTX and full not in available:
        _check_rtx(ort)
    elif full not in available:
        raise EnvironmentMissingError(
            f"{full} is not in this build of onnxruntime {ort.__version__}, which has {', '.join(available)}. "
            'For CUDA and TensorRT: pip install "rmsnorm-deploy[gpu]" in place of onnxruntime.'
        )
    return full


def _check_rtx(ort: ModuleType) -> None:
    if not hasattr(ort, "register_execution_provider_library"):
        raise EnvironmentMissingError(
            f"{RTX}: expected onnxruntime 1.24 or later, which loads providers from other packages, got "
            f"{ort.__version__}. Install: {GET_RTX_PROVIDER}"
        )
    if importlib.util.find_spec(RTX_MODULE) is None:
        raise EnvironmentMissingError(
            f"{RTX} is not in this build of onnxruntime {ort.__version__}, and the package that brings it is not "
            f"installed. Install it, without onnxruntime-gpu beside it: {GET_RTX_PROVIDER}"
        )


def open_session(ort: ModuleType, source: str | bytes, options: Any, chosen: Mapping[str, Mapping[str, str]]) -> Any:
    """A session on the chosen providers; TensorRT-RTX's is loaded from its package where onnxruntime lacks it.

    Args:
        ort: the onnxruntime module.
        source: path or bytes of the model.
        options: onnxruntime's session options.
        chosen: options by provider, see `chosen_providers`.

    Raises:
        UsageError: TensorRT-RTX's provider is combined with others than the CPU's.
        EnvironmentMissingError: TensorRT-RTX's provider cannot be loaded, or finds no GPU that it supports.
    """
    if RTX in chosen and RTX not in ort.get_available_providers():
        others = [name for name in chosen if name not in (RTX, CPU)]
        if others:
            raise UsageError(f"{RTX}: expected it alone or before {CPU}, got it with {', '.join(others)}.")
        options.add_provider_for_devices(_rtx_devices(ort)[:1], dict(chosen[RTX]))
        return ort.InferenceSession(source, options, enable_fallback=0)
    return ort.InferenceSession(
        source,
        options,
        providers=list(chosen),
        provider_options=[dict(each) for each in chosen.values()],
        enable_fallback=0,
    )


def _rtx_devices(ort: ModuleType) -> list[Any]:
    """The devices of TensorRT-RTX's provider, whose library is registered once in a process."""
    devices = [device for device in ort.get_ep_devices() if device.ep_name == RTX]
    if devices:
        return devices
    try:
        package = importlib.import_module(RTX_MODULE)
        ort.register_execution_provider_library(RTX, package.get_library_path())
    except Exception as error:  # a missing library of CUDA may raise any error
        raise EnvironmentMissingError(
            f"{RTX} is installed but cannot be loaded (it requires a driver of NVIDIA): {' '.join(str(error).split())}"
        ) from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == RTX]
    if not devices:
        raise EnvironmentMissingError(f"{RTX} finds no GPU that it supports: it requires an RTX GPU, Ampere or later.")
    return devices


def with_plugin_library(
    chosen: Mapping[str, Mapping[str, str]], model: ModelProto, where: str
) -> dict[str, dict[str, str]]:
    """The providers' options, with the plugin's library for TensorRT's provider if the file has plugin nodes.

    Args:
        chosen: options by provider, see `chosen_providers`; a library that the user names is kept.
        model: the graph.
        where: the model's name in the message.

    Raises:
        EnvironmentMissingError: the file has plugin nodes without local functions, and the library is missing.
    """
    options = {name: dict(each) for name, each in chosen.items()}
    if TENSORRT not in options or PLUGIN_LIBRARIES in options[TENSORRT]:
        return options
    functions = {(function.domain, function.name) for function in model.functions}
    nodes = {(node.domain, node.op_type) for node in model.graph.node}
    plugins = {key for key in nodes if key[0] in (contract.DOMAIN, contract.ORT_DOMAIN) and key[1] in contract.INPUTS}
    library = default_registering_library()
    if plugins and library.is_file():
        options[TENSORRT][PLUGIN_LIBRARIES] = str(library)
    elif plugins - functions:
        raise EnvironmentMissingError(
            f"{where}: it has plugin nodes without local functions, which ONNX Runtime's {TENSORRT} runs with the "
            f"plugin's library that registers itself: expected {library}. Build it with the headers of the TensorRT "
            "that onnxruntime-gpu loads, version 10: rmsnorm plugin build --tensorrt-include DIR; or name it: "
            f"--provider tensorrt:{PLUGIN_LIBRARIES}=FILE"
        )
    return options


def reduced_precision(provenance: Mapping[str, Any]) -> str | None:
    """Why float32 is less than float32 in a run, and how to change it; None if it is not.

    Args:
        provenance: of the runner, see `OrtRunner.provenance`.
    """
    used = provenance.get("provider_options", {}).get(_CUDA)
    if used is None or used.get("use_tf32", "1") == "0":
        return None
    return (
        "ONNX Runtime's CUDA provider multiplies float32 matrices in TF32, with 10 bits of mantissa; PyTorch does not, "
        "unless it is told to. For float32 results set the provider's option use_tf32 to 0 where the model is "
        "deployed, and compare with --provider cuda:use_tf32=0."
    )
