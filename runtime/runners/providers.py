"""Execution providers of ONNX Runtime as users name them: `cuda`, or `cuda:use_tf32=0` with an option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Final

from ...models.errors import EnvironmentMissingError, UsageError

CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_SUFFIX: Final = "executionprovider"


def chosen_providers(
    ort: ModuleType, texts: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, str]]:
    """The options of each chosen provider by its full name, in order of preference.

    Args:
        ort: the onnxruntime module.
        texts: `NAME` or `NAME:OPTION=VALUE,...`, short or full names in upper or lower case; None for the CPU provider.
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
    known = {full.lower().removesuffix(_SUFFIX): full for full in ort.get_all_providers()}
    full = known.get(name.strip().lower().removesuffix(_SUFFIX))
    if full is None:
        raise UsageError(f"unknown execution provider {name!r}: expected one of {', '.join(sorted(known))}.")
    available = ort.get_available_providers()
    if full not in available:
        raise EnvironmentMissingError(
            f"{full} is not in this build of onnxruntime {ort.__version__}, which has {', '.join(available)}. "
            'For CUDA and TensorRT: pip install "rmsnorm-deploy[gpu]" in place of onnxruntime.'
        )
    return full


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
