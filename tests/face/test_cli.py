"""Every command: what it prints for people, its JSON, and its exit code."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

from rmsnorm_deploy.cli.arrays import write_npz
from rmsnorm_deploy.cli.table import COMMANDS
from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.from_torch.save import ExportResult
from rmsnorm_deploy.export.lowering.attention_table import ATTENTION_TABLE
from rmsnorm_deploy.export.lowering.table import TABLE, TARGETS
from rmsnorm_deploy.runtime.doctor import diagnose
from rmsnorm_deploy.runtime.inputs.arrays import read_arrays
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.interface.command_line import CommandLine
from tests.helpers.models.families import build
from tests.helpers.runtime.machines import CPU_MACHINE, GPU_MACHINE

SITE_KEYS = {"path", "class", "spec", "width", "dtype", "parameters"}


# ------------------------------------------------------------------------------------------------------ the whole


def test_help_names_every_command(rmsnorm: CommandLine) -> None:
    outcome = rmsnorm("--help")
    assert outcome.code == 0
    assert all(f"\n  {name} " in outcome.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(rmsnorm: CommandLine, name: str) -> None:
    outcome = rmsnorm(name, "--help")
    assert outcome.code == 0
    assert "--json" in outcome.out


def test_nothing_asked_shows_help_and_fails(rmsnorm: CommandLine) -> None:
    outcome = rmsnorm()
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage: rmsnorm" in outcome.err


def test_version(rmsnorm: CommandLine) -> None:
    outcome = rmsnorm("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("rmsnorm-deploy ")


# -------------------------------------------------------------------------------------------------------- inspect


def test_inspect_model(rmsnorm: CommandLine, models: Path) -> None:
    outcome = rmsnorm("inspect", f"{models}:net", "--json")
    assert outcome.code == 0
    content = outcome.json
    assert content["schema"] == "rmsnorm_deploy.inspect/1"
    (site,) = content["sites"]
    assert set(site) == SITE_KEYS
    assert (site["path"], site["width"], site["dtype"]) == ("norm", 16, "float32")
    assert site["spec"]["order"] == "cast_then_scale"
    assert site["parameters"] == ["norm.weight"]
    (refusal,) = content["refusals"]
    assert (refusal["path"], refusal["class"]) == ("centered", "torch.nn.modules.normalization.LayerNorm")
    assert "mean" in refusal["reason"]
    assert "a factory may print" in outcome.err


def test_inspect_for_people_groups_equal_norms(rmsnorm: CommandLine) -> None:
    outcome = rmsnorm("inspect", "builtin:small")
    lines = outcome.out.splitlines()
    assert lines[0] == "5 RMSNorms in builtin:small."
    (row,) = [line for line in lines if line.startswith("5 ") and "eps" in line]
    assert "weight, cast-then-scale, eps 1e-06" in row
    assert "layers.*.attention_norm, layers.*.mlp_norm, norm" in row


def test_inspect_dtype(rmsnorm: CommandLine, models: Path) -> None:
    outcome = rmsnorm("inspect", f"{models}:net", "--dtype", "float16", "--json")
    assert outcome.json["sites"][0]["dtype"] == "float16"


def test_inspect_exported(rmsnorm: CommandLine, models: Path, exported: Path) -> None:
    wanted = rmsnorm("inspect", f"{models}:net", "--json").json
    for target in TARGETS:
        found = rmsnorm("inspect", exported / target, "--json").json
        assert (found["sites"], found["refusals"]) == (wanted["sites"], wanted["refusals"])
        (site,) = rmsnorm("inspect", exported / target / "model.onnx", "--json").json["sites"]
        assert set(site) == SITE_KEYS
        assert (site["path"], site["spec"]) == ("norm", wanted["sites"][0]["spec"])
    assert "1 RMSNorm in" in rmsnorm("inspect", exported / "ort" / "model.onnx").out


def test_a_norm_outside_of_modules_is_listed(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    name = f"{models}:functional"
    assert "Norms outside of modules are found at export." in rmsnorm("inspect", name).out
    out = rmsnorm("export", name, "-o", tmp_path / "out", "--static").out
    for text in (out, rmsnorm("inspect", tmp_path / "out").out):
        (row,) = [line for line in text.splitlines() if "rms_norm_0" in line]
        computes = "1 no weight, scale-then-cast, eps 1e-06 16 float32 :rms_norm_0"
        assert row.split() == computes.split()
    for place in (tmp_path / "out", tmp_path / "out" / "model.onnx"):
        (site,) = rmsnorm("inspect", place, "--json").json["sites"]
        assert (site["path"], site["found"], site["class"]) == (":rms_norm_0", "graph", None)


def test_a_model_without_norms_succeeds_and_says_so(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    name = f"{models}:without_norms"
    outcome = rmsnorm("inspect", name)
    assert (outcome.code, outcome.out) == (
        0,
        f"No module in {name} was recognized as an RMSNorm. Norms outside of modules are found at export.\n",
    )
    outcome = rmsnorm("inspect", name, "--json")
    assert (outcome.code, outcome.json["sites"], outcome.json["refusals"]) == (0, [], [])
    outcome = rmsnorm("export", name, "-o", tmp_path / "out")
    assert outcome.code == 0
    assert "There is no RMSNorm in" in outcome.out
    assert "exported unchanged" in outcome.out
    assert rmsnorm("validate", tmp_path / "out", "--against", name).code == 0


# --------------------------------------------------------------------------------------------------------- export


def test_export_json(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    outcome = rmsnorm("export", f"{models}:net", "-o", tmp_path / "out", "--dtype", "float16", "--json")
    assert outcome.code == 0
    content = outcome.json
    assert content["schema"] == "rmsnorm_deploy.export/1"
    assert {"exports", "files", "manifest", "sites", "refusals", "notes"} <= set(content)
    assert content["manifest"] == str(tmp_path / "out" / "manifest.json")
    assert {Path(file).name for file in content["files"]} >= {"model.onnx", "manifest.json"}
    assert all(Path(file).is_file() for file in content["files"])
    assert [site["path"] for site in content["sites"]] == ["norm"]
    (row,) = content["exports"]
    assert (row["target"], row["dtype"], row["opset"]) == ("primitives", "float16", 20)
    (deviation,) = row["deviations"]
    assert (deviation["at_most_ulp"], deviation["sites"]) == (1.5, ["norm"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"] == f"{models}:net"
    # The baseline is loaded in the exported dtype without an option.
    outcome = rmsnorm("validate", tmp_path / "out", "--against", f"{models}:net")
    assert outcome.code == 0
    assert outcome.out.count("not exact, at most 1.5 ULP: ") == 1


def test_export_several_targets(
    rmsnorm: CommandLine, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("export", f"{models}:net", "-o", tmp_path / "out", "--target", "ort", "--target", "plugin")
    content = rmsnorm(*arguments, "--json").json
    assert [row["target"] for row in content["exports"]] == ["ort", "plugin"]
    assert content["manifest"] == [str(tmp_path / "out" / name / "manifest.json") for name in ("ort", "plugin")]
    assert content["files"] == [file for row in content["exports"] for file in row["files"]]
    monkeypatch.setenv("RMSNORM_PROGRESS", "1")
    again = rmsnorm(*arguments)  # an earlier export of ours is replaced
    assert again.code == 0
    assert f"plugin (opset 20, float32) -> {tmp_path / 'out' / 'plugin'}" in again.out
    assert "... capturing the graph" in again.err


def test_export_inputs_and_static(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 4, 8), np.float32))
    inputs = ("--inputs", tmp_path / "x.npz")
    assert rmsnorm("export", f"{models}:floats", "-o", tmp_path / "out", *inputs, "--static").code == 0
    with OrtRunner(tmp_path / "out" / "model.onnx") as runner:
        assert runner.inputs()[0].shape == (3, 4, 8)
    (row,) = rmsnorm("validate", tmp_path / "out", "--against", f"{models}:floats", *inputs, "--json").json["outputs"]
    assert row["passed"]
    assert row["figures"]["count"] == 3 * 4 * 16


# ------------------------------------------------------------------------------------------------------- validate


@pytest.mark.parametrize("target", TARGETS)
def test_validate_passes(rmsnorm: CommandLine, models: Path, exported: Path, target: str) -> None:
    outcome = rmsnorm("validate", exported / target, "--against", f"{models}:net", "--json")
    assert outcome.code == 0
    assert (outcome.json["schema"], outcome.json["verdict"]) == ("rmsnorm_deploy.validate/7", "pass")
    assert [len(outcome.json[part]) for part in ("outputs", "norms", "segments")] == [7, 1, 2]


def test_validate_fails_against_another_model(rmsnorm: CommandLine, models: Path, exported: Path) -> None:
    outcome = rmsnorm("validate", exported / "ort" / "model.onnx", "--against", f"{models}:other_net")
    assert outcome.code == 1
    assert "verdict: fail" in outcome.out
    assert "allowed" in outcome.out  # the reason of each output that failed
    as_json = rmsnorm("validate", exported / "ort", "--against", f"{models}:other_net", "--json")
    assert (as_json.code, as_json.json["verdict"]) == (1, "fail")


def test_validate_options(rmsnorm: CommandLine, models: Path, exported: Path) -> None:
    arguments = ("validate", exported / "ort", "--against", f"{models}:net", "--json")
    shapes = rmsnorm(*arguments, "--shape", "1x7", "--shape", "2x3", "--seed", "5").json
    assert [row["case"] for row in shapes["outputs"]] == ["1x7", "2x3"]
    assert (shapes["settings"]["seed"], shapes["settings"]["shapes"]) == (5, [[1, 7], [2, 3]])
    assert rmsnorm(*arguments, "--atol", "0", "--rtol", "0").code == 1
    assert rmsnorm(*arguments, "--atol", "1e-3").code == 0


# ------------------------------------------------------------------------------------------------ run and generate


def test_run(rmsnorm: CommandLine, exported: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 12, (2, 5))
    np.savez(tmp_path / "x.npz", input_ids=ids)
    arguments = ("run", exported / "plugin", "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    outcome = rmsnorm(*arguments, "--json")
    assert outcome.code == 0
    (row,) = outcome.json["outputs"]
    assert (row["dtype"], row["saved_as"], row["shape"]) == ("float32", "float32", [2, 5, 64])
    with OrtRunner(exported / "plugin" / "model.onnx") as runner:
        wanted = runner.run({"input_ids": ids})
    np.testing.assert_array_equal(read_arrays(tmp_path / "y.npz")[row["name"]], wanted[row["name"]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "y.npz"]
    assert "2x5x64" in rmsnorm(*arguments).out


def test_npz_supports_any_name_and_widens_bfloat16(tmp_path: Path) -> None:
    values = np.array([1.0, 2.5, -3.0])
    arrays = {"file": values, "a/b": values.astype(np.float16), "half": values.astype(ml_dtypes.bfloat16)}
    assert write_npz(tmp_path / "y.npz", arrays) == ["half"]
    found = read_arrays(tmp_path / "y.npz")
    assert {name: array.dtype.name for name, array in found.items()} == {
        "file": "float64", "a/b": "float16", "half": "float32",
    }  # fmt: skip
    assert all((array == values).all() for array in found.values())


def test_npz_of_bfloat16_written_by_numpy(tmp_path: Path) -> None:
    values = np.array([1.0, 2.5, -3.0]).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "x.npz", x=values)
    found = read_arrays(tmp_path / "x.npz")["x"]
    assert found.dtype == ml_dtypes.bfloat16
    assert (found == values).all()


class StandInGenerator:
    """Answers with one token more at each call."""

    asked: ClassVar[list[Any]] = []

    def __init__(self, folder: Path, *, provider: str, runner: Any) -> None:
        self.asked.append((folder, provider, runner))

    def __enter__(self) -> StandInGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.asked.append("closed")

    def generate(self, prompt: Any, *, stream: Any = None, inputs: Any = None, **settings: Any) -> SimpleNamespace:
        self.asked.append((prompt, settings))
        text = None if isinstance(prompt[0], int) else "75\x1b30"
        for piece in (text or "", ""):
            if stream is not None:
                stream(piece)
        return SimpleNamespace(
            text=text, ids=[7, 5, 3, 0], prompt_ids=[0, 1], tokens_per_second=9.5, with_past=True, finish="length"
        )

    def generate_batch(self, prompts: Any, **settings: Any) -> list[SimpleNamespace]:
        return [self.generate(prompt, **settings) for prompt in prompts]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(StandInGenerator, "asked", [])
    monkeypatch.setattr("rmsnorm_deploy.runtime.generation.api.Generator", StandInGenerator)
    return StandInGenerator.asked


def test_generate(rmsnorm: CommandLine, asked: list[Any]) -> None:
    outcome = rmsnorm("generate", "out", "--prompt", "012+345=", "--max-new-tokens", "4")
    assert (outcome.code, outcome.out) == (0, "75\\x1b30\n")
    assert "9.5 tokens/s" in outcome.err
    outcome = rmsnorm("generate", "out", "--prompt-ids", "0,1", "--provider", "cuda")
    assert outcome.out == "7,5,3,0\n"
    content = rmsnorm("generate", "out", "--prompt-ids", "0,1", "--prompt-ids", "2", "--json").json
    assert content["schema"] == "rmsnorm_deploy.generate/2"
    assert [(one["ids"], one["text"], one["finish"]) for one in content["generations"]] == [
        ([7, 5, 3, 0], None, "length")
    ] * 2
    assert asked == [
        (Path("out"), "cpu", None), ("012+345=", {"max_new_tokens": 4, "seed": None}), "closed",
        (Path("out"), "cuda", None), ([0, 1], {"max_new_tokens": 32, "seed": None}), "closed",
        (Path("out"), "cpu", None), ([0, 1], {"max_new_tokens": 32, "seed": None}),
        ([2], {"max_new_tokens": 32, "seed": None}), "closed",
    ]  # fmt: skip


def test_generate_settings(rmsnorm: CommandLine, asked: list[Any]) -> None:
    rmsnorm(
        *("generate", "out", "--prompt", "a", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--seed", "1"),
        *("--repetition-penalty", "1.1", "--beams", "2", "--stop", "x", "--stop", "y", "--sample"),
    )
    assert asked[1][1] == {
        "max_new_tokens": 32, "seed": 1, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9,
        "repetition_penalty": 1.1, "num_beams": 2, "stop_strings": ["x", "y"],
    }  # fmt: skip


def test_a_chat_of_one_message_and_a_stream(rmsnorm: CommandLine, asked: list[Any]) -> None:
    outcome = rmsnorm("generate", "out", "--chat", "--prompt", "hello", "--system", "be kind", "--stream")
    assert (outcome.code, outcome.out) == (0, "75\\x1b30\n")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert asked[1][0] == messages


def test_a_chat_reads_messages_from_stdin(
    rmsnorm: CommandLine, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand you\n"))
    outcome = rmsnorm("generate", "out", "--chat")
    assert (outcome.code, outcome.out) == (0, "75\\x1b30\n" * 2)
    assert [message["role"] for message in asked[2][0]] == ["user", "assistant", "user", "assistant"]
    assert [message["content"] for message in asked[2][0]] == ["hello", "75\x1b30", "and you", "75\x1b30"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either --prompt TEXT or --prompt-ids 1,2,3, got neither"),
        (("--prompt", "a", "--prompt-ids", "1"), "got both"),
        (("--prompt-ids", "1,x"), "expected integers separated by commas, such as 1,2,3, got '1,x'"),
        (("--prompt-ids", ""), "expected integers separated by commas"),
        (("--prompt-ids", "1", "--chat"), "--chat: expected --prompt TEXT or no prompt"),
        (("--prompt", "a", "--system", "b"), "--system: expected --chat with it"),
        (("--prompt", "a", "--stream", "--json"), "--stream: expected it without --json"),
        (("--prompt", "a", "--prompt", "b", "--stream"), "--stream: expected one prompt, got 2"),
        (("--prompt", "a", "--prompt", "b", "--inputs", "x.npz"), "--inputs: expected one prompt, got 2"),
        (("--chat", "--json"), "--json: expected --prompt with it"),
    ],
)
def test_generate_refuses(rmsnorm: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    outcome = rmsnorm("generate", "out", *arguments)
    assert outcome.code == 2
    assert message in outcome.err


def test_inspect_shows_how_attention_was_written(rmsnorm: CommandLine, tmp_path: Path) -> None:
    export_model(build("gpt_oss"), tmp_path / "out", target="ort", with_past=True, attention="in-place")
    outcome = rmsnorm("inspect", tmp_path / "out")
    line = "2 attentions as com.microsoft::GroupQueryAttention: model.layers.*.self_attn"
    assert line in outcome.out.splitlines()
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["attention"][1] = {"path": "model.layers.1.self_attn", "class": "A", "reason": "it adds one"}
    path.write_text(json.dumps(manifest))
    shown = rmsnorm("inspect", tmp_path / "out").out.splitlines()
    assert "1 attention left as the function's operators: model.layers.*.self_attn (it adds one)" in shown
    assert rmsnorm("inspect", tmp_path / "out", "--json").json["attention"] == manifest["attention"]


# -------------------------------------------------------------------------------------------------------- targets


def test_targets(rmsnorm: CommandLine) -> None:
    content = rmsnorm("targets", "--json").json
    assert content["schema"] == "rmsnorm_deploy.targets/4"
    assert [(row["target"], row["form"], row["opset"]) for row in content["targets"]] == [
        (cell.target, cell.form, cell.opset) for cell in TABLE
    ]
    assert [(row["target"], row["kind"], row["emits"]) for row in content["attention"]] == [
        (cell.target, cell.kind, cell.emits) for cell in ATTENTION_TABLE
    ]
    people = rmsnorm("targets").out
    reasons = {deviation.reason for cell in TABLE for deviation in cell.deviations}
    assert all(people.count(reason) >= 1 for reason in reasons)


def test_targets_markdown(rmsnorm: CommandLine) -> None:
    table = [line for line in rmsnorm("targets", "--markdown").out.splitlines() if line.startswith("|")]
    norms, attentions = table[: 2 + len(TABLE)], table[2 + len(TABLE) :]
    assert len(attentions) == 2 + len(ATTENTION_TABLE)
    assert {line.count("|") for line in norms} == {8}
    assert {line.count("|") for line in attentions} == {7}


# --------------------------------------------------------------------------------------------------------- doctor


def test_doctor_here(rmsnorm: CommandLine) -> None:
    outcome = rmsnorm("doctor", "--json")
    assert outcome.code == 0
    content = outcome.json
    assert content["schema"] == "rmsnorm_deploy.doctor/2"
    assert content["onnxruntime"]["providers"]["cpu"] == {"works": True, "problem": ""}
    assert all(content["targets"][target]["can_export"] for target in TARGETS)
    outcome = rmsnorm("doctor", "--target", "ort")
    assert outcome.code == 0
    assert "onnxruntime cpu" in outcome.out


def test_doctor_target_that_cannot_run(rmsnorm: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = dict.fromkeys(CPU_MACHINE.providers, "onnxruntime is not installed")
    diagnosis = diagnose(dataclasses.replace(CPU_MACHINE, onnxruntime=None, providers=problems, compiled=[]))
    monkeypatch.setattr("rmsnorm_deploy.runtime.doctor.examine", lambda progress: diagnosis)
    assert rmsnorm("doctor").code == 0
    outcome = rmsnorm("doctor", "--target", "ort")
    assert outcome.code == 4
    assert 'pip install "rmsnorm-deploy[cpu]"' in outcome.out
    assert rmsnorm("doctor", "--target", "nosuch").code == 2


def test_doctor_prints_a_machine_with_a_gpu(rmsnorm: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmsnorm_deploy.runtime.doctor.examine", lambda progress: diagnose(GPU_MACHINE))
    lines = [line.strip() for line in rmsnorm("doctor").out.splitlines()]
    for line in (
        "driver: 580.65, for CUDA up to 13.0",
        "a GPU (sm_90): TensorRT supports it, TensorRT-RTX does not support it",
        "TensorRT for Python: 11.4.0 (full)",
        "TensorRT plugin's library: /lib.so (current; TensorRT's headers 10.14; NVRTC 13.0)",
        "library that registers itself, for ONNX Runtime's TensorRT provider: /register.so",
        "plugins in Python: not available",
        "target: plugin (TensorRT 11.4.0 runs the fused kernel with its C++ library)",
    ):
        assert line in lines
    assert lines.count("creators of the plugin's library in its registry: RMSNorm, AddRMSNorm") == 2
    assert "creators: RMSNorm, AddRMSNorm (namespace rmsnorm_deploy, version 1)" in lines


# ----------------------------------------------------------------------------------------------------------- demo


def test_demo(rmsnorm: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmsnorm_deploy.export.lowering.table.TARGETS", ("ort",))
    monkeypatch.setattr("rmsnorm_deploy.cli.commands.demo._PROBLEMS", 20)
    results: list[ExportResult] = []

    def exported_once(*arguments: Any, **options: Any) -> list[ExportResult]:
        return results or results.extend(export_model(*arguments, **options)) or results

    monkeypatch.setattr("rmsnorm_deploy.export.from_torch.export_model.export_model", exported_once)
    outcome = rmsnorm("demo", "-o", tmp_path / "demo", "--json")
    assert outcome.code == 0
    content = outcome.json
    assert (content["schema"], content["verdict"], content["problems"]) == ("rmsnorm_deploy.demo/1", "pass", 20)
    (row,) = content["targets"]
    assert (row["target"], row["parity"], row["accuracy"]) == ("ort", "pass", content["pytorch_accuracy"])
    manifest = json.loads((Path(row["folder"]) / "manifest.json").read_text())
    assert (manifest["task"], manifest["tokenizer"]) == ("addition", "rmsnorm_deploy.addition")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        assert row["engine"] is None
        assert "install: pip install" in content["engines"]["problem"]
    else:
        engine = row["engine"]
        assert (engine["problem"], engine["plugin_layers"], len(engine["norms"])) == (None, 0, 5)
        assert {norm["precision"] for norm in engine["norms"]} == {"float32"}
        assert all(norm["layer"] for norm in engine["norms"])
        assert (tmp_path / "demo" / "engines" / "ort.engine").stat().st_size > 0
    # A file with fewer correct sums than PyTorch fails, even if its outputs pass.
    run = OrtRunner.run
    monkeypatch.setattr(OrtRunner, "run", lambda runner, feeds: _forgetful(run(runner, feeds)))
    outcome = rmsnorm("demo")
    assert outcome.code == 1
    assert "0 of 20" in outcome.out
    assert "verdict: fail" in outcome.out


def _forgetful(outputs: dict[str, Any]) -> dict[str, Any]:
    """Zeros for the batch of sums; the runs of the validation are smaller."""
    return {name: value * 0 if len(value) == 20 else value for name, value in outputs.items()}
