"""Explain why torch's exporter could not capture a model (`explained`): a table of causes with advice for each."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import nn

from ...models.errors import UnsupportedError
from ...models.versions import newer_than_tested

_REASON_LENGTH = 400
# How the message of a check of torch begins and ends that says nothing.
_UNNAMED, _REQUEST = "Expected cond to be True", "(Could this error message be improved?"


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause of a failed capture.

    Attributes:
        name: a short name, for tests and readers of the table.
        pattern: what the error says, or the class of the model, as `searches` says.
        advice: what to do; `{0}` is the first group of the pattern.
        searches: `error` (the text of the innermost error, and the class names of all of them) or `model` (the names
            of the model's classes).
    """

    name: str
    pattern: re.Pattern[str]
    advice: str
    searches: str = "error"


def _cause(name: str, pattern: str, advice: str, searches: str = "error") -> Cause:
    return Cause(name, re.compile(pattern, re.IGNORECASE), advice, searches)


# The first cause that matches is named.
CAUSES: Final = (
    _cause(
        "parallel", r"\b(DataParallel|DistributedDataParallel|FullyShardedDataParallel)\b",
        "{0} distributes another model over devices. Export that model, its attribute .module.", "model",
    ),
    _cause(
        "adapters", r"\bPeft\w*Model\w*\b",
        "The model has PEFT adapters. Export what model.merge_and_unload() returns.", "model",
    ),
    _cause(
        "complex", r"complex",
        "The model uses complex numbers (usually in its rotary embedding), which ONNX does not support. Try a version "
        "of the model that rotates with cos and sin, or replace that module before exporting.",
    ),
    _cause(
        "no function", r"No ONNX function found for <OpOverload\(op='([\w.:]+)'",
        "torch's ONNX exporter has no function for the operator {0}. Write that part of the model with other "
        "operators, or use a newer torch and onnxscript.",
    ),
    _cause(
        "missing decomposition", r"No decompositions registered for .*?([\w]+\.[\w.]+)",
        "torch's ONNX exporter cannot decompose {0}. Write that part of the model with other operators, or use a newer "
        "torch.",
    ),
    _cause(
        "experts", r"grouped_mm|experts",
        'Try model.set_experts_implementation("batched_mm") before exporting.',
    ),
    _cause(
        "output type", r"outputs? with type|output of type|Found <class .*> in output|"
        r"unsupported output type|register_dataclass",
        "An output has a type that torch's exporter does not know, such as a dataclass. Return tensors, tuples or "
        "dicts: with transformers, set model.config.return_dict = False or call it with return_dict=False.",
    ),
    _cause(
        "input type", r"inputs? with type",
        "An input has a type that torch's exporter does not know. Give tensors, or tuples and dicts of tensors.",
    ),
    _cause(
        "data-dependent", r"GuardOnDataDependentSymNode|data-dependent|Could not extract specialized integer|"
        r"Dynamic control flow|UserError.*torch\.cond|unhashable type: non-nested SymInt|\.numpy\(\) is not supported",
        "The model decides by the values of tensors (an if, a loop or a shape), which a graph cannot follow. Use "
        "torch.where or torch.cond there, or fix the value before exporting.",
    ),
    _cause(
        "fixed size", r"Constraints violated|ConstraintViolation|specialized|marked .* as dynamic",
        "The model works only for some sizes of a dim. Make the dims static with --static (dynamic=False), or give "
        "example inputs of other sizes with --inputs.",
    ),
    _cause(
        "vmap", r"\bvmap\b|functorch|BatchedTensor",
        "The model uses torch.vmap or another function of torch.func, which torch's exporter does not support here. "
        "For a model of transformers, set its attention implementation to 'eager'; otherwise write the batch dim out.",
    ),
    _cause(
        "compiled", r"torch\._dynamo|torch\.compile|OptimizedModule|BackendCompilerFailed|InductorError",
        "Part of the model is compiled with torch.compile, or skipped by it. Export the model as it was before: "
        "a compiled module has it as _orig_mod.",
    ),
)  # fmt: skip
OTHER: Final = "Try other example inputs, a newer torch or transformers, or an attention implementation of 'eager'."


def explained(model: nn.Module, error: Exception) -> UnsupportedError:
    """The error of torch's exporter as one line with its reason and advice.

    Args:
        model: the model that could not be captured.
        error: what the exporter raised; the innermost of its causes has the reason.
    """
    errors: list[BaseException] = [error]
    while (inner := errors[-1].__cause__) is not None:
        errors.append(inner)
    text = next((str(e).strip() for e in reversed(errors) if str(e).strip()), type(error).__name__)
    kinds = " ".join(type(e).__module__ + "." + type(e).__name__ for e in errors)
    first = " ".join(text.splitlines()[0].split()).partition(_REQUEST)[0][:_REASON_LENGTH].rstrip(" .")
    first = _checked(errors) or first if first.startswith(_UNNAMED) else first
    message = f"{type(model).__name__} could not be captured by torch's exporter{_place(model, errors)}: {first}."
    return UnsupportedError(f"{message} {_advice(model, f'{text} {kinds}')}")


def _place(model: nn.Module, errors: Sequence[BaseException]) -> str:
    """Where the model's own code was when it failed, such as ` at llama/modeling_llama.py:213`; empty if not known."""
    files = {inspect.getsourcefile(type(module)) for module in model.modules() if not _is_torch(module)}
    for error in reversed(errors):
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        if frames:
            path = Path(frames[-1].filename)
            return f" at {path.parent.name}/{path.name}:{frames[-1].lineno}"
    return ""


def _checked(errors: Sequence[BaseException]) -> str:
    """The source of the innermost call of `torch._check`; empty if there is none."""
    lines = [frame.line or "" for error in errors for frame in traceback.extract_tb(error.__traceback__)]
    return next((f"{line} does not hold" for line in reversed(lines) if line.startswith("torch._check(")), "")


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] in ("torch", "builtins")


def _advice(model: nn.Module, text: str) -> str:
    searched = {"error": text, "model": " ".join(cls.__name__ for cls in type(model).__mro__)}
    for cause in CAUSES:
        if match := cause.pattern.search(searched[cause.searches]):
            return cause.advice.format(*match.groups())
    remarks = filter(None, map(newer_than_tested, ("torch", "transformers", "onnxscript")))
    return " ".join([OTHER, *(f"Note: {remark}." for remark in remarks)])
