"""Measure what quantized and converted files lose, and what planted faults add: the figures behind `--lossy`.

    python -m benchmarks.lossy_profiles [--only int8 ...] [--models llama ...] [--faults N] [--json FILE]

Each model is exported in float32 and then quantized with onnxruntime.quantization (int8: dynamic, int4: MatMulNBits in
blocks of 32), or exported in float16; ONNX Runtime has few bfloat16 operators on the CPU, so bfloat16 is the PyTorch
module in that dtype. All are validated against the float32 model. The faults are planted in these files: a scale of
one layer that is 1.5 times too large (3 times in int4), the weights of another layer, and a norm that is skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from onnx import numpy_helper
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.save import save
from rmsnorm_deploy.models.builtin.checkpoint import addition
from rmsnorm_deploy.runtime.accuracy.lossy import PROFILES
from rmsnorm_deploy.runtime.accuracy.tolerances import FIGURE_LIMITS, Limits
from rmsnorm_deploy.runtime.inputs.plan import plan_cases
from rmsnorm_deploy.runtime.norms.adversarial_rows import AS_IT_RUNS, KINDS
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.validation.api import validate
from rmsnorm_deploy.runtime.validation.result import ValidationReport
from rmsnorm_deploy.runtime.validation.run_cases import made_up_cases

WIDTH, LAYERS, VOCABULARY = 128, 2, 256
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 32, "d_ff": 2 * WIDTH, "num_layers": LAYERS, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
# Class, config class, and options of each model with random weights.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _COMMON),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _COMMON),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_COMMON, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
}
SUBJECTS = (*MODELS, "addition")
# A scale that is this many times too large. The loss of int4 itself hides what is smaller.
_FACTOR = {"int8": 1.5, "int4": 3.0, "fp16": 1.5, "bf16": 1.5}
# Elsewhere a norm may be as far off as PyTorch's own.
_TAME = {kind.name for kind in (AS_IT_RUNS, *KINDS) if kind.tame}
FIGURES = ("cosine", "top1_agreement", "kl", "max_rel_row", "rms_rel_row")
PARTS = ("outputs", "norms", "segments")
_MATRICES = {"MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "MatMulNBits": 1}


@dataclass(frozen=True, slots=True)
class Measured:
    """One validation.

    Attributes:
        subject: the model.
        profile: the profile.
        fault: the planted fault; empty for an honest file.
        verdict: the report's verdict.
        figures: the figures of all outputs, norms and segments, by part.
        margin: the largest ratio of a figure to its limit (for cosine and top-1, of their distances from 1): at most 1
            in what passes.
        nearest: the part and the figure with that ratio.
    """

    subject: str
    profile: str
    fault: str
    verdict: str
    figures: dict[str, list[dict[str, float | None]]] = field(repr=False)
    margin: float = 0.0
    nearest: str = ""


def build(name: str) -> nn.Module:
    """A float32 model in eval mode: the trained checkpoint, or random weights that preserve the size of the values."""
    if name == "addition":
        return addition().eval()
    transformers.utils.logging.set_verbosity_error()
    made, config, options = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, made)(getattr(transformers, config)(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise * 0.2 + (0.0 if name == "gemma3" else 1.0))
            elif "embed" in path or "shared" in path:
                # With an RMS of 1 the first norm would change little, and skipping it would be no fault.
                parameter.copy_(noise * (0.4 if name != "gemma3" else 0.4 * WIDTH**-0.5))
            else:
                # T5 has no scale in its attention: its queries are initialized smaller.
                scale = _T5["d_kv"] ** -0.5 if path.endswith("Attention.q.weight") else 1.0
                parameter.copy_(noise * scale * parameter.shape[-1] ** -0.5)
    return model.eval()


def lossy_file(profile: str, model: nn.Module, folder: Path) -> Path | nn.Module:
    """The honest quantized or converted file of a model, or the module in bfloat16."""
    if profile == "bf16":
        return copy.deepcopy(model).to(torch.bfloat16)
    if profile == "fp16":
        return save(prepare(copy.deepcopy(model).half()), folder / "fp16", "standard").folder / "model.onnx"
    source = exported(model, folder)
    target = folder / profile / "model.onnx"
    target.parent.mkdir()
    if profile == "int8":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(source, target)
    else:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True)
        quantizer.process()
        onnx.save(quantizer.model.model, target)
    return target


def exported(model: nn.Module, folder: Path) -> Path:
    """The file of a model in float32."""
    source = folder / "fp32" / "model.onnx"
    return source if source.exists() else save(prepare(model), source.parent, "standard").folder / source.name


class FileFaults:
    """The faults that are planted in an ONNX file."""

    def __init__(self, path: Path, factor: float) -> None:
        self._factor = factor
        self._model = onnx.load(path)
        self._constants = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._linears = [
            node for node in self._model.graph.node
            if node.op_type in _MATRICES and node.input[_MATRICES[node.op_type]] in self._constants
        ]  # fmt: skip

    def names(self) -> Iterator[tuple[str, Callable[[onnx.ModelProto], None]]]:
        """Each fault, and a function that plants it in a copy of the file."""
        for index, node in enumerate(self._linears):
            yield f"scale of {node.name or node.op_type}", lambda model, i=index: self._scale(model, i)
        for index, node in enumerate(self._linears):
            other = next((i for i in range(index + 1, len(self._linears)) if self._alike(index, i)), None)
            if other is not None:
                yield f"weights of {node.name}", lambda model, i=index, j=other: self._swap(model, i, j)
        norms = [i for i, node in enumerate(self._model.graph.node) if node.op_type == "RMSNormalization"]
        for place in norms:
            yield f"no {self._model.graph.node[place].name}", lambda model, i=place: _skip(model, i)

    def plant(self, plant: Callable[[onnx.ModelProto], None], path: Path) -> Path:
        """The file with one fault."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        plant(model)
        path.parent.mkdir(exist_ok=True)
        onnx.save(model, path)
        return path

    def _stored(self, index: int) -> list[str]:
        """The constants of a layer: its weights, its scales and its zero points; the scales come last."""
        node = self._linears[index]
        weights = node.input[_MATRICES[node.op_type]]
        if node.op_type == "MatMulInteger":
            base = weights.removesuffix("_quantized")
            return [weights, f"{base}_zero_point", f"{base}_scale"]
        return [weights, node.input[2]] if node.op_type == "MatMulNBits" else [weights]

    def _alike(self, one: int, other: int) -> bool:
        pairs = zip(self._stored(one), self._stored(other), strict=True)
        return all(
            a != b and self._constants[a].dims == self._constants[b].dims
            and self._constants[a].raw_data != self._constants[b].raw_data
            for a, b in list(pairs)[:1]
        )  # fmt: skip

    def _scale(self, model: onnx.ModelProto, index: int) -> None:
        name = self._stored(index)[-1]
        array = numpy_helper.to_array(self._constants[name])
        _replace(model, name, numpy_helper.from_array((array * self._factor).astype(array.dtype), name))

    def _swap(self, model: onnx.ModelProto, index: int, other: int) -> None:
        for mine, theirs in zip(self._stored(index), self._stored(other), strict=True):
            tensor = onnx.TensorProto()
            tensor.CopyFrom(self._constants[theirs])
            tensor.name = mine
            _replace(model, mine, tensor)


def _replace(model: onnx.ModelProto, name: str, tensor: onnx.TensorProto) -> None:
    next(old for old in model.graph.initializer if old.name == name).CopyFrom(tensor)


def _skip(model: onnx.ModelProto, index: int) -> None:
    """Replace a norm by the identity, without its metadata."""
    node = model.graph.node[index]
    del node.input[1:], node.attribute[:], node.metadata_props[:]
    node.op_type, node.domain = "Identity", ""


def module_faults(model: nn.Module) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """The same faults of weights in a PyTorch module, each with a function that returns a changed copy."""

    def changed(name: str, change: Callable[[torch.Tensor], Any]) -> nn.Module:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            change(copied.get_parameter(f"{name}.weight"))
        return copied

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = {name: model.get_parameter(f"{name}.weight") for name in linears}
    for number, name in enumerate(linears):
        yield f"scale of {name}", partial(changed, name, lambda weight: weight.mul_(_FACTOR["bf16"]))
        alike = (o for o in linears[number + 1 :] if weights[o].shape == weights[name].shape)
        other = next((o for o in alike if not torch.equal(weights[o], weights[name])), None)
        if other is not None:
            yield f"weights of {name}", partial(changed, name, lambda weight, other=other: weight.copy_(weights[other]))


def measured(subject: str, profile: str, fault: str, report: ValidationReport) -> Measured:
    """The figures of a report, and how near they are to the profile's limits."""
    row = PROFILES[profile]
    verdicts = {
        "outputs": [verdict for _, verdict in report.rows],
        "norms": [kind for norm in report.norms for kind in norm.kinds if kind.name in _TAME],
        "segments": [segment.verdict for segment in report.segments],
    }
    figures = {
        part: [{name: getattr(v.figures, name) for name in FIGURES} for v in found if v.figures]
        for part, found in verdicts.items()
    }
    tame = {
        id(k) for norm in report.norms for k in norm.kinds if k.name not in ("large", "largest", "subnormal", "zeros")
    }
    figures["norms"] = [
        {name: getattr(v.figures, name) for name in FIGURES} for v in verdicts["norms"] if v.figures and id(v) in tame
    ]
    ratios = [
        (ratio, f"{part} {name}")
        for part in PARTS for found in figures[part] for name, ratio in _ratios(found, getattr(row, part))
    ]  # fmt: skip
    margin, nearest = max(ratios, default=(0.0, ""))
    return Measured(subject, profile, fault, report.verdict, figures, margin, nearest)


def _ratios(figures: dict[str, float | None], limits: Limits) -> Iterator[tuple[str, float]]:
    for label, limit in limits.on_figures.items():
        rule = FIGURE_LIMITS[label]
        value = figures[rule.figure]
        if value is not None:
            yield rule.figure, (1.0 - value) / (1.0 - limit) if rule.at_least else value / limit


def run(subject: str, profile: str, folder: Path, faults: int) -> Iterator[Measured]:
    """Validate the honest file of a model on every default case, and faults of each kind on the largest case."""
    model = build(subject)
    honest = lossy_file(profile, model, folder)
    with OrtRunner(exported(model, folder)) as runner:
        cases = [case.feeds for case in plan_cases(runner.inputs(), model, 0).cases if not case.optional]
        one = [case.feeds for case in made_up_cases(runner.inputs(), model, [(2, 33)], 0)]
    yield measured(subject, profile, "", validate(honest, model, lossy=profile, cases=cases))
    if isinstance(honest, nn.Module):
        for name, changed in chosen(module_faults(honest), faults):
            yield measured(subject, profile, name, validate(changed(), model, lossy=profile, cases=one))
        return
    planted = FileFaults(honest, _FACTOR[profile])
    for name, plant in chosen(planted.names(), faults):
        path = planted.plant(plant, folder / f"{profile}-fault" / "model.onnx")
        yield measured(subject, profile, name, validate(path, model, lossy=profile, cases=one))


def chosen(faults: Iterator[tuple[str, Any]], most: int) -> Iterator[tuple[str, Any]]:
    """At most so many faults of each kind (the first word of its name), evenly spaced."""
    found = list(faults)
    for kind in dict.fromkeys(name.partition(" ")[0] for name, _ in found):
        same = [fault for fault in found if fault[0].partition(" ")[0] == kind]
        count = min(most, len(same))
        yield from (same[i * len(same) // count] for i in range(count))


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{number:.4g}" for number in (min(values), statistics.median(values), max(values)))


def show(rows: list[Measured]) -> None:
    """Print the figures of honest files, and the margins of honest files and of faults."""
    for profile in dict.fromkeys(row.profile for row in rows):
        honest = [row for row in rows if row.profile == profile and not row.fault]
        faulty = [row for row in rows if row.profile == profile and row.fault]
        print(f"\n{profile}: {len(honest)} honest files, {len(faulty)} faults")
        for part in PARTS:
            for name in FIGURES:
                values = [f[name] for row in honest for f in row.figures[part]]
                known = [float(v) for v in values if v is not None and math.isfinite(v)]
                print(f"  {part:9} {name:15} min / median / max: {_spread(known)}")
        for row in honest:
            print(f"  honest {row.subject:10} {row.verdict:5} {row.margin:.3g} of the limit ({row.nearest})")
        for row in sorted(faulty, key=lambda row: row.margin)[:12]:
            print(
                f"  fault  {row.subject:10} {row.verdict:5} {row.margin:.3g} of the limit ({row.nearest}): {row.fault}"
            )
        passed = sum(row.verdict == "pass" for row in faulty)
        print(f"  {sum(row.verdict == 'pass' for row in honest)} of {len(honest)} honest files pass; "
              f"{passed} of {len(faulty)} faults pass")  # fmt: skip


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.lossy_profiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(PROFILES), default=list(PROFILES))
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="most faults of each kind and file")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    np.seterr(all="ignore")
    rows: list[Measured] = []
    for subject in given.models:
        with tempfile.TemporaryDirectory() as folder:
            for profile in given.only:
                for row in run(subject, profile, Path(folder), given.faults):
                    print(f"{subject}, {profile}, {row.fault or 'honest'}: {row.verdict}, {row.margin:.3g}", flush=True)
                    rows.append(row)
    if given.json is not None:
        content = [{name: getattr(row, name) for name in Measured.__dataclass_fields__} for row in rows]
        given.json.write_text(json.dumps(content))
    show(rows)


if __name__ == "__main__":
    main()
