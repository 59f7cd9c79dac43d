"""The common part of `validate` and `bisect`: options, the run, and writing and printing the report."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from rmsnorm_deploy.cli import options
from rmsnorm_deploy.cli.screen import Screen
from rmsnorm_deploy.export.onnx_io.destinations import check_distinct, check_new_file
from rmsnorm_deploy.export.onnx_io.owned_files import is_own_report
from rmsnorm_deploy.models.checkpoint_keys import allowing_missing
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy.tolerances import KINDS_OF_LIMITS, parse_limits
from rmsnorm_deploy.runtime.report.printed import print_validation
from rmsnorm_deploy.runtime.validation.options import ValidationOptions, parse_shapes

Candidate = Annotated[
    str | None,
    typer.Argument(
        metavar="[CANDIDATE]",
        help="An exported folder, an .onnx file, an engine, or another PyTorch model: a folder, module:factory or "
        "builtin:.",
        show_default=False,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="MODEL",
        help="The PyTorch model that was exported, as for export; the one that the manifest names if omitted.",
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Run the Python code that the report of --replay, or the manifest, names."),
]
# The options that become fields of `ValidationOptions`, by parameter name. `options_of` converts their values.
_LIMIT = "a fixed limit on an output's error instead of PyTorch's own error, such as logits:1e-3."
GIVEN: dict[str, Any] = {
    "dtype": Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Dtype to load MODEL in; the exported one if omitted.",
            callback=options.dtype_name,
        ),
    ],
    "provider": options.Provider,
    "runner": Annotated[
        list[str] | None,
        typer.Option(
            "--runner",
            metavar="NAME",
            help="What runs the candidate: ort, tensorrt or rtx (an engine; one is built if the candidate is none); "
            "repeat it for one report of several.",
            show_default="ort, or the product that built an engine",
        ),
    ],
    "deep": Annotated[
        bool,
        typer.Option(
            "--deep", help="Check norms and segments in TensorRT too, in engines of their own whose norms are marked."
        ),
    ],
    "seed": Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the generated inputs.")],
    "shape": Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="BATCHxLENGTH",
            help="Batch and length of a run, such as 3x33; may be repeated.",
            show_default="several, see README",
        ),
    ],
    "thorough": Annotated[
        bool,
        typer.Option("--thorough", help="Try inputs that take long too: long ones, all token ids, several seeds."),
    ],
    "inputs": Annotated[
        str | None,
        typer.Option(
            "--inputs",
            metavar="SOURCE",
            help="Inputs instead of generated ones: .npz, .safetensors, a folder of them, or file.py:function.",
        ),
    ],
    "prompt": Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A text to tokenize as input; may be repeated."),
    ],
    "tokenizer": Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="MODEL",
            help="Folder or hub name of the tokenizer; that of the export or of MODEL if omitted.",
        ),
    ],
    "window": Annotated[
        int | None,
        typer.Option(
            "--window", metavar="NORMS", min=1, help="Number of norms to check at a time: fewer require less memory."
        ),
    ],
    "atol": Annotated[list[str] | None, typer.Option("--atol", metavar="[OUTPUT:]X", help=f"With --rtol, {_LIMIT}")],
    "rtol": Annotated[
        list[str] | None, typer.Option("--rtol", metavar="[OUTPUT:]X", help="See --atol; relative to the reference.")
    ],
    "ulp": Annotated[list[str] | None, typer.Option("--ulp", metavar="[OUTPUT:]X", help="See --atol; in ULPs.")],
    "min_cosine": Annotated[
        list[str] | None,
        typer.Option(
            "--min-cosine",
            metavar="[OUTPUT:]X",
            help="See --atol: the least cosine. OUTPUT may be @norms or @segments, for all of them.",
        ),
    ],
    "min_top1": Annotated[
        list[str] | None,
        typer.Option(
            "--min-top1", metavar="[OUTPUT:]X", help="See --atol: the least share of rows with the same largest logit."
        ),
    ],
    "max_kl": Annotated[
        list[str] | None,
        typer.Option("--max-kl", metavar="[OUTPUT:]X", help="See --atol: the largest divergence of logits, in nats."),
    ],
    "max_rel": Annotated[
        list[str] | None,
        typer.Option("--max-rel", metavar="[OUTPUT:]X", help="See --atol: the largest error / RMS of its row."),
    ],
    "max_rms": Annotated[
        list[str] | None,
        typer.Option("--max-rms", metavar="[OUTPUT:]X", help="See --atol: the largest RMS error / RMS of a row."),
    ],
    "lossy": Annotated[
        str | None,
        typer.Option(
            "--lossy",
            metavar="PROFILE",
            help="Limits for a quantized or converted file instead of PyTorch's own error: int8, int4, fp16 or bf16.",
        ),
    ],
    "outputs_only": Annotated[
        bool, typer.Option("--outputs-only", help="Compare only the outputs, not norms and segments: faster.")
    ],
}
# What could not be judged is not a pass, and not a mismatch.
EXIT_CODES = {"pass": 0, "fail": 1, "cannot be judged": 3}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ValidationOptions)}


def takes_options(*without: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the options in `GIVEN`, and pass their values as its parameter `given`.

    Args:
        without: options in `GIVEN` that the command does not have.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        names = [name for name in GIVEN if name not in without]

        def run(**arguments: Any) -> int:
            return command(options_of({name: arguments.pop(name) for name in names}), **arguments)

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "given"]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=GIVEN[name])
            for name in names
        ]
        sides = [p for p in kept if p.name in ("candidate", "against")]
        parameters = [*sides, *added, *(p for p in kept if p not in sides)]
        run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": int}
        run.__name__, run.__doc__ = getattr(command, "__name__", "run"), command.__doc__
        return run

    return decorate


def options_of(values: Mapping[str, Any]) -> ValidationOptions:
    """The options from the values of the command line, in which shapes and limits are texts.

    Raises:
        UsageError: a text has the wrong form, or a value is out of range.
    """
    fields = dict(values)
    limits = {name: fields.pop(name, None) or () for name in KINDS_OF_LIMITS}
    shapes, prompts = parse_shapes(fields.pop("shape")), tuple(fields.pop("prompt") or ())
    runners = tuple(fields.pop("runner") or ())
    return ValidationOptions(**fields, shapes=shapes, prompts=prompts, runners=runners, limits=parse_limits(**limits))


Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML file.")]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write the report as JUnit XML.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the report as JSON, like --json.")
]
Replay = Annotated[
    Path | None,
    typer.Option("--replay", metavar="REPORT.json", help="Repeat the run of a JSON report, and compare."),
]


def required(candidate: str | None, command: str) -> str:
    """The candidate, which is required without --replay.

    Raises:
        UsageError: it is missing.
    """
    if candidate is None:
        raise UsageError(f"CANDIDATE is missing; give it, or --replay a report. See: rmsnorm {command} --help")
    return candidate


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """The files that a report is written to.

    Attributes:
        html, junit, output: the files; None where the option was not given.
        inputs: the files that are read, by the option or argument that names them.

    Raises:
        UsageError: a file cannot be written, or is named twice; checked before any work is done.
    """

    html: Path | None
    junit: Path | None
    output: Path | None
    inputs: Mapping[str, Path | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outputs = {"--html": self.html, "--junit": self.junit, "-o": self.output}
        check_distinct(outputs, self.inputs)
        for path in outputs.values():
            if path is not None:
                check_new_file(path, is_own_report)


def input_files(candidate: str | None, given: ValidationOptions) -> dict[str, Path | None]:
    """The files that a validation reads, by the argument or option that names them; for `ReportFiles`."""
    named = {"CANDIDATE": candidate, "--inputs": given.inputs}
    return {option: None if name is None else Path(name) for option, name in named.items()}


def run_validation(
    candidate: str,
    against: str | None,
    given: ValidationOptions,
    files: ReportFiles,
    screen: Screen,
    *,
    show_norms: bool,
    trust_remote_code: bool,
    allow_missing: Sequence[str] | None,
    allow_code: bool = False,
    before: Mapping[str, Any] | None = None,
) -> int:
    """Validate, write the files and print the report; returns the exit code.

    Args:
        candidate: see `Candidate`.
        against: see `Against`; None for the model that the manifest names.
        given: the other options.
        files: the files that the report is written to.
        screen: prints the report.
        show_norms: print a line for each norm and segment.
        trust_remote_code: run Python code that is part of a checkpoint.
        allow_missing: patterns of the keys in which a checkpoint may differ from its model.
        allow_code: run Python code that the manifest names.
        before: the report of the run that is repeated, or None.
    """
    if files.html is not None:
        from rmsnorm_deploy.runtime.report.html import check_installed

        check_installed()
    with screen.working(f"opening {candidate}") as progress, allowing_missing(allow_missing or ()):
        from rmsnorm_deploy.runtime.validation.api import validate

        report = validate(
            candidate, against, given, trust_remote_code=trust_remote_code, allow_code=allow_code, progress=progress
        )
        content = report.to_dict()
        if files.html is not None:
            progress(f"writing {files.html}")
            report.to_html(files.html)
        if files.junit is not None:
            report.to_junit(files.junit)
        if files.output is not None:
            report.save(files.output)
    again = None if before is None else _again(before, content)
    screen.result(content, lambda: print_validation(screen, content, show_parts=show_norms, again=again))
    if again is not None and screen.as_json:
        screen.note(again)
    return EXIT_CODES[report.verdict]


def _again(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    from rmsnorm_deploy.runtime.validation.result import differences

    found = differences(before, json.loads(json.dumps(now)))
    return f"replay: differs in {', '.join(found)}" if found else "replay: the same report, except for the time"
