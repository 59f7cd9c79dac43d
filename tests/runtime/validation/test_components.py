"""A folder of an encoder and a decoder is validated in one report, with the tokens of both together."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from rmsnorm_deploy.cli.application import run
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.accuracy.tolerances import Limits
from rmsnorm_deploy.runtime.inputs.exported import component_folders
from rmsnorm_deploy.runtime.validation import components
from rmsnorm_deploy.runtime.validation.api import validate
from rmsnorm_deploy.runtime.validation.components import TOGETHER, tie, together, torch_tokens, validate_components
from rmsnorm_deploy.runtime.validation.options import ValidationOptions
from rmsnorm_deploy.runtime.validation.result import ValidationReport
from tests.helpers.models.encoder_decoders import PROMPTS, export_t5, t5

SHAPES = ((2, 9),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def report(folder: Path) -> ValidationReport:
    return validate(folder, t5(), shapes=SHAPES, window=99)


def test_rows_norms_and_segments_of_both(report: ValidationReport) -> None:
    assert report.verdict == "pass"
    # The cache's row is that of the worse of key and value.
    assert [(case, re.sub(r"decoder\.(key|value)", "decoder", row.name)) for case, row in report.rows] == [
        ("encoder: 2x9", "present.0.encoder.key"),
        ("encoder: 2x9", "present.0.encoder.value"),
        ("encoder: 2x9", "last_hidden_state"),
        ("decoder: 2x9 then 1 more", "logits"),
        ("decoder: 2x9 then 1 more", "logits@decode"),
        ("decoder: 2x9 then 1 more", "present.0.decoder (worst of 2)"),
        (TOGETHER, "tokens"),
    ]
    assert report.rows[-1][1].reason == "the greedy tokens of 2 prompts are PyTorch's, 46 in all"
    assert [norm.norm.key[0].split(".")[0] for norm in report.norms] == ["encoder"] * 3 + ["decoder"] * 4
    assert (
        report.summary
        == "7 of 7 outputs, 7 of 7 norms, 3 of 3 attention nodes, 11 of 11 segments as accurate as PyTorch."
    )
    assert sorted(report.provenance["candidate"]) == ["decoder", "encoder"]
    assert report.untried == [
        "padding, special token ids and other generated inputs: omit --shape, or repeat without it"
    ]


def test_the_report_can_be_written_compared_and_repeated(folder: Path, tmp_path: Path, capsys: Any) -> None:
    files = [tmp_path / name for name in ("a.json", "a.xml", "a.html")]
    options = ["-o", str(files[0]), "--junit", str(files[1]), "--html", str(files[2])]
    assert run(["validate", str(folder), "--shape", "2x9", "--outputs-only", "--quiet", *options]) == 0
    content = json.loads(files[0].read_text())
    assert content["settings"]["candidate"] == str(folder)
    assert content["settings"]["against"] == str(folder.parent / "checkpoint")
    assert f'name="{TOGETHER}: tokens"' in files[1].read_text()
    assert TOGETHER in files[2].read_text()
    again = tmp_path / "b.json"
    assert run(["validate", "--replay", str(files[0]), "-o", str(again)]) == 0
    assert "replay: the same report" in capsys.readouterr().out
    assert run(["compare", str(files[0]), str(again)]) == 0


def test_another_decoder_is_found_by_both_the_logits_and_the_tokens(folder: Path, tmp_path: Path) -> None:
    model = t5()
    with torch.no_grad():
        model.decoder.block[0].layer[2].DenseReluDense.wo.weight.neg_()
    found = validate(folder, model, shapes=SHAPES)
    assert found.verdict == "fail"
    failed = {f"{case}, {row.name}" for case, row in found.rows if row.passed is False}
    assert {"decoder: 2x9 then 1 more, logits", f"{TOGETHER}, tokens"} <= failed
    assert not any(name.startswith("encoder:") for name in failed)
    assert [culprit.kind for culprit in found.culprits] == ["segment"]
    assert found.culprits[0].name.startswith("decoder.block.0.layer.2.layer_norm ...")


def test_tokens_that_differ_say_where_and_by_how_much(folder: Path) -> None:
    model = t5()
    wanted = torch_tokens(model, PROMPTS[0])[0]
    with torch.no_grad():
        model.shared.weight[wanted[0]] = 0.0
    row = together(component_folders(folder), model, PROMPTS, "cpu")
    assert row.passed is False
    assert row.reason.startswith(f"prompt 1: token 1 is {wanted[0]}, in PyTorch ")
    assert "two best logits differ by" in row.reason


def test_a_difference_at_a_tie_passes_and_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_changed(model: Any, prompt: list[int]) -> Any:
        tokens, logits, start, ends = torch_tokens(model, prompt)
        logits[3] = torch.tensor([5.0, 5.00005, 1.0])
        return [*tokens[:3], 63, *tokens[4:]], logits, start, ends

    monkeypatch.setattr(components, "torch_tokens", one_changed)
    row = together(component_folders(folder), t5(), PROMPTS[:1], "cpu")
    assert row.passed is True
    assert row.reason.startswith(
        "the greedy tokens of 1 prompts are PyTorch's, 3 in all, up to ties; prompt 1: token 4"
    )
    assert row.reason.endswith("PyTorch's two best logits differ by 5.01e-05, and a tie is at most 0.0001")


def test_a_model_that_cannot_generate_gives_no_verdict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = t5()
    monkeypatch.setattr(model, "generate", lambda **_: (_ for _ in ()).throw(ValueError("no start\nmore")))
    row = together(component_folders(folder), model, PROMPTS[:1], "cpu")
    assert (row.passed, row.reason) == (None, "PyTorch's generate fails on prompt 1: no start")


def test_pytorchs_tokens_are_those_without_penalties_and_its_config_is_kept() -> None:
    model = t5()
    model.generation_config.repetition_penalty = 9.0
    before = model.generation_config
    tokens, logits, start, ends = torch_tokens(model, PROMPTS[0])
    assert model.generation_config is before
    assert tokens == [int(step.argmax()) for step in logits]
    assert (start, ends, len(tokens)) == (0, {1}, 24)
    assert len(set(tokens)) > 2


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-4), (torch.float64, 1e-4), (torch.float16, 0.0625), (torch.bfloat16, 0.5)],
)
def test_what_a_tie_is_depends_on_the_dtype(dtype: torch.dtype, limit: float) -> None:
    margin, allowed = tie(torch.tensor([-2.0, 8.0, 7.5], dtype=dtype))
    assert (margin, allowed) == (0.5, limit)


PLAIN = ValidationOptions(shapes=SHAPES, outputs_only=True)


def validated(folder: Path, options: ValidationOptions) -> tuple[ValidationReport, dict[str, ValidationOptions]]:
    """The report of components that return an empty report each, and the options that each got."""
    asked = {}

    def each(path: Path, model: Any, own: ValidationOptions) -> ValidationReport:
        asked[path.name] = own
        return ValidationReport(str(path), notes=["of both", path.name], unchecked=f"no {path.name}")

    parts = component_folders(folder)
    found = validate_components(folder, parts, t5(), options, each, progress=lambda _: None)
    return found, asked


def test_limits_go_to_the_models_that_have_the_output(folder: Path) -> None:
    loose = Limits(atol=1.0)
    star = Limits(atol=1.0, min_top1=0.5)
    options = dataclasses.replace(PLAIN, limits={"logits": loose, "last_hidden_state": loose, "*": star})
    report, asked = validated(folder, options)
    assert asked["encoder"].limits == {"last_hidden_state": loose, "*": loose}
    assert asked["decoder"].limits == {"logits": loose, "*": star}
    assert report.untried == ["greedy tokens of both together: omit the limits on logits, or use generate"]
    assert report.settings["limits"].keys() == {"logits", "last_hidden_state", "*"}
    with pytest.raises(
        UsageError, match=r"limits are given for other, but .* The outputs are: present.0.encoder.key, "
    ):
        validated(folder, dataclasses.replace(PLAIN, limits={"other": loose}))


def test_notes_are_told_once_or_with_their_model(folder: Path) -> None:
    report, _ = validated(folder, PLAIN)
    assert report.notes == ["of both", "encoder: encoder", "decoder: decoder"]
    assert report.unchecked == "encoder: no encoder; decoder: no decoder"


def test_inputs_are_for_one_of_the_models(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"holds several models, whose inputs differ: encoder, decoder\. Give inputs"):
        validated(folder, ValidationOptions(inputs="x.npz"))
    with pytest.raises(UsageError, match=r"holds several models: encoder, decoder\. Give inputs to one of them"):
        validate(folder, t5(), cases=[{"input_ids": np.ones((1, 2), np.int64)}])


def test_the_folders_of_the_models(folder: Path) -> None:
    assert set(component_folders(folder)) == {"encoder", "decoder"}


@pytest.mark.parametrize("command", [["build"], ["run", "--inputs", "x.npz"]])
def test_commands_on_one_model_name_the_models(command: list[str], folder: Path, tmp_path: Path, capsys: Any) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones(1))
    arguments = [str(tmp_path / word) if word == "x.npz" else word for word in command]
    assert run([arguments[0], str(folder), *arguments[1:], "-o", str(tmp_path / "out.npz")]) == 2
    assert f"{folder} holds several models: encoder, decoder. Name one of them" in capsys.readouterr().err


def test_inspect_counts_the_norms_of_both(folder: Path, capsys: Any) -> None:
    assert run(["inspect", str(folder)]) == 0
    assert "7 RMSNorms in" in capsys.readouterr().out


def test_both_files_are_valid(folder: Path) -> None:
    for path in component_folders(folder).values():
        onnx.checker.check_model(str(path / "model.onnx"))
