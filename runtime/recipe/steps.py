"""The steps of a row (`steps_of`): what each reads, and the facts by which its result is still that of the row.

A step is done again if one of its facts changed, or if a step before it is done again; others stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, assert_never, get_args

from ...models.versions import installed_version
from ..engines.api import FLAVORS, ORT, flavor_name

Kind = Literal["export", "rewrite", "build", "validate", "package"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
EXPORT, REWRITE, BUILD, VALIDATE, PACKAGE = KINDS
TRITON: Final = "triton"
OWN: Final = "rmsnorm-deploy"

# The fields of a row that decide what a step makes, besides the files that it reads and the libraries that it uses.
_LOADING = ("revision", "subfolder", "trust_remote_code", "allow_missing", "allow_pickle")
_WRITTEN = ("source", "target", "attention", "opset", "function", "ort_trt", "inputs", "weights")
FIELDS: Final[dict[Kind, tuple[str, ...]]] = {
    "export": (*_WRITTEN, "dtype", "with_past", "quantize", "static", *_LOADING),
    "rewrite": (*_WRITTEN, "must_be_proven"),
    "build": (
        "profiles", "architectures", "norm", "plugin", "float64_as_float32", "version_compatible", "refit", "workspace",
        "memory_limit",
    ),
    "validate": (
        "against", "lossy", "limits", "test_inputs", "prompts", "tokenizer", "shapes", "seed", "thorough",
        "outputs_only", "reports", *_LOADING,
    ),
    "package": (),
}  # fmt: skip
_OF_ORT, _OF_TRITON = ("provider",), ("backend", "max_batch")
_LIBRARIES: Final[dict[Kind, tuple[str, ...]]] = {
    "export": ("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
    "rewrite": ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu"),
    "build": (),
    "validate": ("torch", "transformers", "onnxruntime", "onnxruntime-gpu"),
    "package": (),
}


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a row.

    Attributes:
        step: its name: the kind, and for all but the first validation and the first step what it is for, as
            `build:rtx`, `validate:rtx` and `package:triton`.
        kind: what is done.
        subject: the runtime of an engine, or the server of a package; empty for the file itself.
        after: the names of the steps whose results it reads.
        facts: the names of the row's fields and the distributions that decide what it makes.
    """

    step: str
    kind: Kind
    subject: str
    after: tuple[str, ...]
    facts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The step as JSON values."""
        return {**asdict(self), "after": list(self.after), "facts": list(self.facts)}


def steps_of(options: Mapping[str, Any], *, is_onnx: bool) -> list[Step]:
    """The steps of a row in the order in which they run.

    Args:
        options: the fields of the row: `build`, `runners` (empty where nothing is validated), `package`, `backend`.
        is_onnx: whether the source is an .onnx file, which is rewritten, not exported.
    """
    first: Kind = "rewrite" if is_onnx else "export"
    steps = [_step(first)]
    if ORT in options["runners"]:
        steps.append(_step("validate", ORT, after=[first]))
    for runtime in options["build"]:
        steps.append(_step("build", runtime, after=[step.step for step in steps if step.subject in ("", ORT)]))
        if runtime in options["runners"]:
            steps.append(_step("validate", runtime, after=[steps[-1].step]))
    for server in options["package"]:
        subject = "tensorrt" if server == TRITON and options["backend"] == "tensorrt" else ORT
        read = [step.step for step in steps if step.subject in ("", subject)]
        steps.append(_step("package", server, after=read))
    return steps


def _step(kind: Kind, subject: str = "", after: Iterable[str] = ()) -> Step:
    facts = [OWN, *FIELDS[kind], *_LIBRARIES[kind]]
    match kind:
        case "build":
            facts += FLAVORS[flavor_name(subject)].distributions
        case "validate":
            facts += _OF_ORT if subject == ORT else ()
        case "package":
            facts += _OF_TRITON if subject == TRITON else ()
        case "export" | "rewrite":
            pass
        case _:
            assert_never(kind)
    is_plain = kind in ("export", "rewrite") or (kind == "validate" and subject == ORT)
    return Step(kind if is_plain else f"{kind}:{subject}", kind, subject, tuple(after), tuple(facts))


def kind_of(name: str) -> str:
    """The kind of a step, by its name."""
    return name.partition(":")[0]


def subject_of(name: str) -> str:
    """What a step is for, by its name; empty for the file itself."""
    kind, _, subject = name.partition(":")
    return subject or (ORT if kind == VALIDATE else "")


def library_versions(steps: Iterable[Step]) -> dict[str, str | None]:
    """The installed version of each distribution that is a fact of a step; None where it is not installed."""
    known = {OWN, *(name for names in _LIBRARIES.values() for name in names)}
    known |= {name for flavor in FLAVORS.values() for name in flavor.distributions}
    facts = dict.fromkeys(fact for step in steps for fact in step.facts if fact in known)
    return {fact: installed_version(fact) for fact in facts}
