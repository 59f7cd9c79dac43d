"""Validate in parts: the models of a folder (an encoder, its decoder) and both together; each of several runtimes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...export.onnx_io.manifest import read_manifest
from ...models.calling.example_inputs import vocabulary_size
from ...models.calling.parts import DECODER, ENCODER
from ...models.errors import RmsnormDeployError, UsageError
from ..accuracy import tolerances
from ..accuracy.compare_output import OutputVerdict
from ..accuracy.tolerances import EVERY_OUTPUT, Limits, check_limits
from ..engines.api import ORT
from ..engines.open_engine import local_gpu
from ..inputs.encoder_decoder import encoder_decoder_tokens, opened_parts
from ..inputs.exported import Exported
from ..inputs.tokenizer import has_tokenizer, load_tokenizer
from ..runners.base import Runner
from .options import ValidationOptions
from .replay import SIDES
from .result import ValidationReport, merged
from .sides import open_against

if TYPE_CHECKING:
    from torch import Tensor, nn

Progress = Callable[[str], None]
# Validates one component; gets its folder, the PyTorch model and the options.
Validate = Callable[[Path, "nn.Module", ValidationOptions], ValidationReport]

TOGETHER, TOKENS = "encoder and decoder: greedy", "tokens"
STEPS = 24
# Lengths of the generated prompts.
_LENGTHS = (7, 12)
# Two logits whose distance is smaller are a tie, which rounding decides. In eps of the larger logit: four roundings at
# worst (see `TOLERANCES`) are 2, in each of two logits, on both sides.
_TIE, _TIE_EPS = 1e-4, 8.0


def validate_components(
    folder: Path,
    parts: Mapping[str, Path],
    model: str | Path | nn.Module | None,
    options: ValidationOptions,
    validate: Validate,
    *,
    trust_remote_code: bool = False,
    allow_code: bool = False,
    progress: Progress,
) -> ValidationReport:
    """Validate each model of an exported folder, and the tokens that both generate together.

    Args:
        folder: the folder.
        parts: the folders of its models, by name.
        model: the whole PyTorch model, as in `validate`. It is loaded once.
        options: the options. Limits apply to the models that have the output; prompts to the encoder and to generation.
        validate: validates one of the models.
        trust_remote_code, allow_code, progress: see `validate`.

    Raises:
        UsageError: the options do not apply to several models, or as in `validate`.
    """
    if options.inputs is not None:
        raise UsageError(
            f"{folder} holds several models, whose inputs differ: {', '.join(parts)}. Give inputs to one of them, such "
            f"as {folder / DECODER}, or omit them."
        )
    manifest = read_manifest(folder)
    # Only the manifest and the dtype of the whole folder are used.
    against = open_against(
        folder, Exported(folder, folder, manifest), model, options, trust_remote_code, progress, allow_code
    )
    outputs = {name: [row["name"] for row in read_manifest(path)["outputs"]] for name, path in parts.items()}
    check_limits(options.limits, list(itertools.chain(*outputs.values())), tolerances.PARTS)
    reports = {}
    for name, path in parts.items():
        own = _options(options, name, outputs[name], folder)
        reports[name] = validate(path, against.model, own)
    report = merged(str(folder), reports, against.hint)
    report.refusals = list(manifest.get("refusals", ()))
    names = dict(zip(SIDES, (str(folder), against.name), strict=True))
    report.settings = {**names, **options.to_dict()}
    if options.prompts:
        report.notes.append(f"the prompts are inputs of the encoder; the {DECODER} was checked on generated inputs")
    if ENCODER not in parts:
        report.untried.append(
            "tokens that the models generate together from images or sounds: rmsnorm generate --inputs"
        )
    elif options.runners not in ((), (ORT,)):
        report.untried.append("greedy tokens of both together in TensorRT: use --runner ort")
    elif options.lossy is not None or {EVERY_OUTPUT, "logits"} & set(options.limits):
        report.untried.append("greedy tokens of both together: omit the limits on logits, or use generate")
    else:
        progress("generating tokens")
        prompts = _prompts(against.model, options, folder, trust_remote_code)
        report.rows.append((TOGETHER, together(parts, against.model, prompts, options.provider)))
    return report


def validate_runners(
    candidate: object, options: ValidationOptions, validate: Callable[[ValidationOptions], ValidationReport]
) -> ValidationReport:
    """Validate a candidate in each runtime of the options; one report with a verdict for each.

    Args:
        candidate: the candidate.
        options: the options, with several runners.
        validate: validates it with options that name one runner.

    Raises:
        EnvironmentMissingError: one of them is TensorRT, and there is no GPU.
    """
    if set(options.runners) - {ORT}:
        local_gpu()  # before the time that the other runtimes take
    reports = {name: validate(dataclasses.replace(options, runners=(name,))) for name in options.runners}
    report = merged(str(candidate), {name: _named(name, own) for name, own in reports.items()})
    first = next(iter(reports.values()))
    report.runners = {name: own.verdict for name, own in reports.items()}
    report.settings = {**first.settings, **options.to_dict()}
    report.refusals = first.refusals
    return report


def _named(runner: str, report: ValidationReport) -> ValidationReport:
    """The report, the names of its norms, attentions and segments beginning with the runner's."""
    norms = [
        dataclasses.replace(check, norm=dataclasses.replace(check.norm, key=_key(runner, check.norm.key)))
        for check in report.norms
    ]
    segments = [
        dataclasses.replace(
            segment,
            name=f"{runner}: {segment.name}",
            contains=[f"{runner}: {name}" for name in segment.contains],
            attentions=frozenset(f"{runner}: {path}" for path in segment.attentions),
            end=None if segment.end is None else _key(runner, segment.end),
        )
        for segment in report.segments
    ]
    depth = [dataclasses.replace(point, key=_key(runner, point.key)) for point in report.depth]
    attentions = [dataclasses.replace(one, key=_key(runner, one.key)) for one in report.attentions]
    return dataclasses.replace(report, norms=norms, attentions=attentions, segments=segments, depth=depth)


def _key(runner: str, key: tuple[str, int]) -> tuple[str, int]:
    path, call = key
    return f"{runner}: {path}", call


def _options(options: ValidationOptions, name: str, outputs: Sequence[str], folder: Path) -> ValidationOptions:
    """The options for one of the models: its limits, and prompts for the encoder only."""
    known = {*outputs, EVERY_OUTPUT, *tolerances.PARTS}
    limits = {output: given for output, given in options.limits.items() if output in known}
    if EVERY_OUTPUT in limits and "logits" not in outputs:
        limits[EVERY_OUTPUT] = limits[EVERY_OUTPUT].without_logits()
    limits = {output: given for output, given in limits.items() if given != Limits()}
    tokenizer = options.tokenizer or (str(folder) if has_tokenizer(folder) else None)
    prompts = () if name == DECODER else options.prompts
    return dataclasses.replace(options, limits=limits, prompts=prompts, tokenizer=tokenizer)


# Both together --------------------------------------------------------------------------------------------------------


def _prompts(model: nn.Module, options: ValidationOptions, folder: Path, trust_remote_code: bool) -> list[list[int]]:
    """Token ids of the prompts of the options, else two generated ones."""
    if options.prompts:
        own = str(folder) if has_tokenizer(folder) else str(getattr(model, "name_or_path", ""))
        tokenizer = load_tokenizer(options.tokenizer or own, trust_remote_code=trust_remote_code)
        return [tokenizer.encode(prompt) for prompt in options.prompts]
    rng = np.random.default_rng(options.seed)
    vocabulary = vocabulary_size(model) or 2
    return [rng.integers(0, vocabulary, length).tolist() for length in _LENGTHS]


def together(parts: Mapping[str, Path], model: Any, prompts: Sequence[list[int]], provider: str) -> OutputVerdict:
    """Whether both models together generate the tokens of PyTorch's greedy `generate`, as a row of the report.

    A first difference at a step whose two best logits in PyTorch are a tie passes, and the reason says so.

    Args:
        parts: the folders of the encoder and the decoder.
        model: the whole PyTorch model.
        prompts: token ids of each prompt.
        provider: ONNX Runtime's execution provider.
    """
    try:
        with opened_parts(parts, provider) as runners:
            compared = [_compared(runners, model, number, prompt) for number, prompt in enumerate(prompts, start=1)]
    except RmsnormDeployError as error:
        return OutputVerdict(TOKENS, False, f"generation fails: {_first_line(error)}", None, None)
    failed = [what for passed, what, _ in compared if passed is False]
    unjudged = [what for passed, what, _ in compared if passed is None]
    if failed or unjudged:
        return OutputVerdict(TOKENS, False if failed else None, "; ".join(failed or unjudged), None, None)
    count, ties = sum(number for *_, number in compared), [what for _, what, _ in compared if what]
    same = f"the greedy tokens of {len(prompts)} prompts are PyTorch's, {count} in all"
    return OutputVerdict(TOKENS, True, "; ".join([f"{same}, up to ties", *ties]) if ties else same, None, None)


def _compared(
    runners: tuple[Runner, Runner], model: Any, number: int, prompt: list[int]
) -> tuple[bool | None, str, int]:
    """Whether the tokens of a prompt are PyTorch's up to a tie; what differs; and the number of equal tokens."""
    try:
        wanted, logits, start, ends = torch_tokens(model, prompt)
    except (ValueError, RuntimeError, TypeError) as error:
        return None, f"PyTorch's generate fails on prompt {number}: {_first_line(error)}", 0
    got = encoder_decoder_tokens(runners, prompt, start, ends, STEPS)
    step = next((n for n, (a, b) in enumerate(itertools.zip_longest(wanted, got)) if a != b), None)
    if step is None:
        return True, "", len(wanted)
    margin, limit = tie(logits[min(step, len(logits) - 1)])
    what = f"prompt {number}: token {step + 1} is {_token(got, step)}, in PyTorch {_token(wanted, step)}"
    sizes = f"PyTorch's two best logits differ by {margin:.3g}, and a tie is at most {limit:.3g}"
    return margin <= limit, f"{what}; {sizes}", step


def tie(logits: Tensor) -> tuple[float, float]:
    """The distance of the two largest logits, and the one up to which rounding may decide between them.

    Args:
        logits: `[vocabulary]`, in the dtype of the model.
    """
    import torch

    values = logits.double()
    best = values.topk(2).values
    scale = max(float(best[0].abs()), float(values.square().mean().sqrt()))
    return float(best[0] - best[1]), max(_TIE, _TIE_EPS * torch.finfo(logits.dtype).eps * scale)


def torch_tokens(model: Any, prompt: list[int]) -> tuple[list[int], list[Tensor], int, set[int]]:
    """PyTorch's greedy tokens, their logits, the token with which the decoder starts, and those that end it.

    The model's generation config is replaced meanwhile by one without penalties, beams or forced tokens.
    """
    import torch
    from transformers import GenerationConfig

    before = model.generation_config
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
    plain = GenerationConfig(**{name: getattr(before, name, None) for name in names})
    start = plain.bos_token_id if plain.decoder_start_token_id is None else plain.decoder_start_token_id
    ids = torch.tensor([prompt], device=model.device)
    model.generation_config = plain
    try:
        with torch.no_grad():
            result = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False, num_beams=1,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
    finally:
        model.generation_config = before
    logits = [step[0] for step in result.logits]
    ends = plain.eos_token_id if isinstance(plain.eos_token_id, list) else [plain.eos_token_id]
    tokens = result.sequences[0, -len(logits) :].tolist()
    return tokens, logits, int(start), {token for token in ends if token is not None}


def _token(tokens: Sequence[int], step: int) -> str:
    return str(tokens[step]) if step < len(tokens) else "none"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
