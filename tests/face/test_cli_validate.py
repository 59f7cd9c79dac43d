"""`rmsnorm validate` and `rmsnorm bisect`: what they print, the files they write, reports run again, exit codes."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from rmsnorm_deploy.cli.application import run
from tests.helpers.interface.command_line import CommandLine

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def honest(exported: Path, models: Path) -> tuple[str | Path, ...]:
    """Arguments that pass."""
    return (exported / "ort", "--against", f"{models}:net", "--shape", "2x5")


@pytest.fixture
def wrong(exported: Path, tmp_path: Path) -> Path:
    """The export for ONNX Runtime with one weight of its norm changed by a hundredth."""
    model = onnx.load(exported / "ort" / "model.onnx")
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "norm.weight"]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3] *= 1.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    return tmp_path / "wrong.onnx"


# ---------------------------------------------------------------------------------------------------- what is printed


def test_validate_prints_outputs_and_the_verdict(rmsnorm: CommandLine, honest: Any) -> None:
    outcome = rmsnorm("validate", *honest)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].split()[:3] == ["case", "output", "verdict"]
    assert lines[1].split()[:3] == ["2x5", "output", "pass"]
    assert lines[-2:] == [
        "1 of 1 output, 1 of 1 norm, 2 of 2 segments as accurate as PyTorch.", "verdict: pass",
    ]  # fmt: skip
    assert "norm, alone" not in outcome.out
    assert "..." not in outcome.err  # no progress without a terminal


def test_norms_prints_a_line_for_each_part(rmsnorm: CommandLine, honest: Any) -> None:
    outcome = rmsnorm("validate", *honest, "--norms")
    assert outcome.code == 0
    starts = [line.split("  ")[0] for line in outcome.out.splitlines()]
    for heading, rows in (
        ("norm, alone", ["norm"]),
        ("segment between norms", ["the inputs ... norm", "norm ... output"]),
        ("as the whole model runs, at", ["norm", "norm"]),
    ):
        at = starts.index(heading)
        assert starts[at + 1 : at + 1 + len(rows)] == rows
    content = rmsnorm("validate", *honest, "--norms", "--json").json
    assert (len(content["norms"][0]["inputs"]), len(content["segments"]), len(content["depth"])) == (11, 2, 2)


def test_outputs_only(rmsnorm: CommandLine, honest: Any) -> None:
    content = rmsnorm("validate", *honest, "--outputs-only", "--json").json
    assert (content["verdict"], content["norms"], content["segments"]) == ("pass", [], [])
    assert content["settings"]["outputs_only"] is True


def test_bisect_prints_the_culprit(rmsnorm: CommandLine, models: Path, honest: Any, wrong: Path) -> None:
    outcome = rmsnorm("bisect", wrong, "--against", f"{models}:net")
    assert outcome.code == 1
    assert "\nnorm norm: wrong on: as it runs, normal," in outcome.out
    assert outcome.out.endswith("error is introduced in norm.\nverdict: fail\n")
    assert "as the whole model runs, at" in outcome.out
    content = rmsnorm("bisect", wrong, "--against", f"{models}:net", "--json").json
    assert content["schema"] == "rmsnorm_deploy.bisect/6"
    assert [(row["kind"], row["name"]) for row in content["culprits"]] == [("norm", "norm")]
    outcome = rmsnorm("bisect", *honest)
    assert outcome.code == 0
    assert "verdict: pass" in outcome.out


def test_a_pytorch_candidate(rmsnorm: CommandLine, models: Path) -> None:
    against = ("--against", f"{models}:floats", "--shape", "2x5")
    content = rmsnorm("validate", f"{models}:floats", *against, "--json").json
    assert (content["verdict"], content["model"], len(content["norms"])) == ("pass", "Floats", 1)
    assert rmsnorm("validate", f"{models}:other_net", "--against", f"{models}:net").code == 1


# ---------------------------------------------------------------------------------------------------- files it writes


def test_files_are_written_and_the_json_is_what_is_printed(rmsnorm: CommandLine, honest: Any, tmp_path: Path) -> None:
    files = {option: tmp_path / name for option, name in (("-o", "r.json"), ("--html", "r.html"), ("--junit", "r.xml"))}
    options = [part for option, path in files.items() for part in (option, path)]
    outcome = rmsnorm("validate", *honest, *options, "--json")
    assert outcome.code == 0
    assert json.loads(files["-o"].read_text()) == outcome.json
    assert files["--html"].read_text().lower().startswith("<!doctype html>")
    root = xml.etree.ElementTree.fromstring(files["--junit"].read_text())
    assert len(list(root.iter("testcase"))) >= 4
    assert list(root.iter("failure")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "r.xml"]
    # A page shows depth, so it is measured for one.
    assert len(outcome.json["depth"]) == 2


def test_a_report_that_fails_is_written_too(rmsnorm: CommandLine, models: Path, wrong: Path, tmp_path: Path) -> None:
    files = ("--junit", tmp_path / "r.xml", "-o", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert rmsnorm("bisect", wrong, "--against", f"{models}:net", *files).code == 1
    root = xml.etree.ElementTree.fromstring((tmp_path / "r.xml").read_text())
    assert list(root.iter("failure"))
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "fail"
    assert "norm" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("command", ["validate", "bisect"])
@pytest.mark.parametrize("option", ["--html", "--junit", "--output"])
def test_files_that_cannot_be_written_are_refused_before_any_work(
    rmsnorm: CommandLine, honest: Any, tmp_path: Path, command: str, option: str
) -> None:
    for place, message in ((tmp_path / "nosuch" / "r", "does not exist"), (tmp_path, "is a folder")):
        outcome = rmsnorm(command, *honest, option, place)
        assert outcome.code == 2
        assert message in outcome.err
        assert "loading" not in outcome.err


# ------------------------------------------------------------------------------------------------------ run it again


@pytest.fixture
def report(rmsnorm: CommandLine, honest: Any, tmp_path: Path) -> Path:
    assert rmsnorm("validate", *honest, "--seed", "7", "--atol", "output:1", "-o", tmp_path / "report.json").code == 0
    return tmp_path / "report.json"


def test_replay_gives_the_same_report(rmsnorm: CommandLine, report: Path) -> None:
    outcome = rmsnorm("validate", "--allow-code", "--replay", report)
    assert outcome.code == 0
    assert "replay: the same report, except for the time" in outcome.out
    outcome = rmsnorm("validate", "--allow-code", "--replay", report, "--json")
    assert "replay: the same report, except for the time" in outcome.err
    before, now = json.loads(report.read_text()), outcome.json
    assert (before.pop("created") <= now.pop("created"), before) == (True, now)
    assert (now["settings"]["seed"], now["settings"]["shapes"]) == (7, [[2, 5]])


def test_replay_runs_no_code_that_was_not_allowed(rmsnorm: CommandLine, report: Path, models: Path) -> None:
    """A report is data that anyone can send; the Python file that it names is run only after the user has seen it."""
    flag = report.parent / "ran"
    source = report.parent / "evil.py"
    source.write_text(f"open({str(flag)!r}, 'w')\ndef net():\n    raise SystemExit\n")
    content = json.loads(report.read_text())
    for setting, value in (("candidate", f"{source}:net"), ("against", f"{source}:net"), ("inputs", f"{source}:net")):
        settings = {**content["settings"], "against": "builtin:small", setting: value}
        report.write_text(json.dumps({**content, "settings": settings}))
        outcome = rmsnorm("validate", "--replay", report)
        assert (outcome.code, flag.exists()) == (2, False)
        assert f"names Python code that a replay would run: {source}:net ({setting})" in outcome.err
        assert "--allow-code" in outcome.err


def test_replay_of_a_model_that_is_data_needs_no_permission(
    rmsnorm: CommandLine, exported: Path, report: Path, tmp_path: Path
) -> None:
    content = json.loads(report.read_text())
    settings = {
        **content["settings"],
        "against": "builtin:small",
        "candidate": "builtin:small",
        "limits": {},
        "dtype": None,
    }
    report.write_text(json.dumps({**content, "settings": settings}))
    outcome = rmsnorm("validate", "--replay", report)
    assert outcome.code == 0, outcome.err


def test_replay_says_what_differs(rmsnorm: CommandLine, report: Path) -> None:
    content = json.loads(report.read_text())
    content["provenance"]["versions"]["numpy"] = "1.0"
    report.write_text(json.dumps({**content, "summary": "other"}))
    assert "replay: differs in summary, provenance" in rmsnorm("validate", "--allow-code", "--replay", report).out


def test_replay_of_a_bisection_is_one(rmsnorm: CommandLine, models: Path, wrong: Path, tmp_path: Path) -> None:
    path = tmp_path / "bisect.json"
    assert rmsnorm("bisect", wrong, "--against", f"{models}:net", "-o", path).code == 1
    outcome = rmsnorm("validate", "--allow-code", "--replay", path)
    assert outcome.code == 1
    assert "replay: the same report, except for the time" in outcome.out
    assert "norm, alone" in outcome.out


def test_replay_that_cannot_be(rmsnorm: CommandLine, report: Path, tmp_path: Path) -> None:
    content = json.loads(report.read_text())
    for text, message in (
        (
            json.dumps({**content, "schema": "rmsnorm_deploy.validate/1"}),
            "rmsnorm_deploy.bisect/6, got 'rmsnorm_deploy.validate/1'",
        ),
        (report.read_text()[:-40], "cannot be read as JSON"),
        (json.dumps({**content, "settings": {**content["settings"], "trust_remote_code": True}}), "trust_remote_code"),
        (
            json.dumps({**content, "settings": {**content["settings"], "candidate": str(tmp_path / "gone")}}),
            f"{tmp_path / 'gone'} does not exist",
        ),
    ):
        report.write_text(text)
        outcome = rmsnorm("validate", "--allow-code", "--replay", report)
        assert outcome.code == 2, message
        assert message in outcome.err
    outcome = rmsnorm("validate", "--allow-code", "--replay", report, "--seed", "3")
    assert outcome.code == 2
    assert "--replay reads the candidate and the options from the report" in outcome.err
    outcome = rmsnorm("validate", "--allow-code", "--replay", tmp_path / "nosuch.json")
    assert outcome.code == 2
    assert "nosuch.json: cannot be read" in outcome.err


def test_an_export_that_changed_since_shows(rmsnorm: CommandLine, exported: Path, models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported / "ort", tmp_path / "copy")
    path = tmp_path / "report.json"
    assert rmsnorm("validate", folder, "--against", f"{models}:net", "-o", path, "--shape", "1x2").code == 0
    shutil.copy(exported / "primitives" / "model.onnx", folder / "model.onnx")
    for file in (exported / "primitives").glob("*.data"):
        shutil.copy(file, folder / file.name)
    outcome = rmsnorm("validate", "--allow-code", "--replay", path)
    assert outcome.code == 0
    assert "replay: differs in" in outcome.out
    assert "provenance" in outcome.out.split("replay: differs in")[1].splitlines()[0]


# ------------------------------------------------------------------------------------------------------------ inputs


def written(folder: Path, kind: str) -> tuple[str, list[str]]:
    """Inputs of a kind, and the names of the cases that they are."""
    if kind == "npz":
        np.savez(folder / "one.npz", input_ids=IDS)
        return str(folder / "one.npz"), ["one.npz"]
    if kind == "safetensors":
        save_file({"input_ids": IDS}, folder / "one.safetensors")
        return str(folder / "one.safetensors"), ["one.safetensors"]
    if kind == "folder":
        (folder / "cases").mkdir()
        np.savez(folder / "cases" / "b.npz", input_ids=IDS)
        save_file({"input_ids": IDS[:, :3]}, folder / "cases" / "a.safetensors")
        return str(folder / "cases"), ["a.safetensors", "b.npz"]
    source = "import torch\ndef made():\n    yield 'short', {'input_ids': torch.ones(1, 3, dtype=torch.int64)}\n"
    (folder / "inputs.py").write_text(source)
    return f"{folder / 'inputs.py'}:made", ["short"]


@pytest.mark.parametrize("kind", ["npz", "safetensors", "folder", "python"])
def test_inputs_of_each_kind(rmsnorm: CommandLine, exported: Path, models: Path, tmp_path: Path, kind: str) -> None:
    source, names = written(tmp_path, kind)
    arguments = ("validate", exported / "ort", "--against", f"{models}:net", "--inputs", source)
    content = rmsnorm(*arguments, "--json", "-o", tmp_path / "report.json").json
    assert (content["verdict"], [row["case"] for row in content["outputs"]]) == ("pass", names)
    assert content["settings"]["inputs"] == source
    # The values of a file count; they are in the report by their hash.
    assert ("inputs" in content["provenance"]) is (kind in ("npz", "safetensors"))
    outcome = rmsnorm("validate", "--allow-code", "--replay", tmp_path / "report.json")
    assert (outcome.code, "the same report" in outcome.out) == (0, True)


def test_a_prompt_goes_through_the_tokenizer(rmsnorm: CommandLine, tmp_path: Path) -> None:
    assert rmsnorm("export", "builtin:addition", "-o", tmp_path / "out", "--target", "ort").code == 0
    arguments = ("validate", tmp_path / "out", "--against", "builtin:addition", "--outputs-only", "--json")
    content = rmsnorm(*arguments, "--prompt", "012+345=", "--prompt", "1+2=").json
    assert [row["case"] for row in content["outputs"]] == ["prompt 1 '012+345='", "prompt 2 '1+2='"]
    assert content["verdict"] == "pass"
    assert all(row["figures"]["top1_agreement"] == 1.0 for row in content["outputs"])
    outcome = rmsnorm(*arguments, "--prompt", "abc")
    assert outcome.code == 2


def test_a_prompt_without_a_tokenizer(rmsnorm: CommandLine, exported: Path, models: Path, tmp_path: Path) -> None:
    arguments = ("validate", exported / "ort", "--against", f"{models}:net", "--prompt", "hi")
    outcome = rmsnorm(*arguments, "--tokenizer", tmp_path)
    assert outcome.code == 2
    assert f"{tmp_path} contains no tokenizer" in outcome.err
    outcome = rmsnorm(*arguments)
    assert outcome.code == 2
    assert "tokenizer" in outcome.err


# ----------------------------------------------------------------------------------------- what is refused, exit codes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--inputs", "x.npz", "--prompt", "hi"), "inputs and prompts are both given"),
        (("--inputs", "nosuch.npz"), "nosuch.npz: there is no such file"),
        (("--inputs", "nosuch.py:made"), "the file nosuch.py does not exist"),
        (("--atol", "nosuch:1e-3"), "limits are given for nosuch, but there is no such output. The outputs are: out"),
        (("--atol", "output:x"), "--atol output:x: expected a number of at least 0"),
        (("--ulp=-1",), "--ulp -1: expected a number of at least 0"),
        (("--min-cosine", "output:1.5"), "--min-cosine output:1.5: expected a number from 0 to 1, such as 0.99"),
        (("--max-kl", "0.1"), "--max-kl: expected an output that holds logits, whose name ends with 'logits', got out"),
        (("--max-rms", "@norm:1"), "Limits may also be on @norms and @segments"),
        (("--lossy", "int7"), "lossy: expected one of int8, int4, fp16, bf16, or none, got 'int7'"),
        (("--window", "0"), "--window"),
        (("--shape", "3"), "3x33"),
        (("--seed", "-1"), "--seed"),
        (("--provider", "nosuch"), "unknown execution provider 'nosuch'"),
    ],
)
def test_options_that_cannot_be(
    rmsnorm: CommandLine, exported: Path, models: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = rmsnorm("validate", exported / "ort", "--against", f"{models}:net", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_limits_by_output(rmsnorm: CommandLine, honest: Any) -> None:
    assert rmsnorm("validate", *honest, "--atol", "output:1e-3").code == 0
    assert rmsnorm("validate", *honest, "--atol", "0", "--atol", "output:1e-3").code == 0
    outcome = rmsnorm("validate", *honest, "--ulp", "output:0")
    assert outcome.code == 1
    assert "ULP error <= 0" in outcome.out
    assert "no failed norm or segment explains output of 2x5" in outcome.out


@pytest.mark.parametrize("command", ["validate", "bisect"])
def test_a_side_that_is_missing(rmsnorm: CommandLine, command: str, models: Path, exported: Path) -> None:
    for arguments in (("--against", f"{models}:net"), ()):
        outcome = rmsnorm(command, *arguments)
        assert outcome.code == 2
        assert "CANDIDATE is missing" in outcome.err
        assert f"rmsnorm {command} --help" in outcome.err
    file = exported / "ort" / "model.onnx"
    outcome = rmsnorm(command, file)
    assert outcome.code == 2
    assert f"--against MODEL is missing, and {file} has no manifest" in outcome.err


@pytest.mark.parametrize("command", ["validate", "bisect"])
def test_the_model_may_be_the_one_that_the_manifest_names(
    rmsnorm: CommandLine, command: str, models: Path, exported: Path
) -> None:
    outcome = rmsnorm(command, exported / "ort")
    assert outcome.code == 2
    assert f"its manifest names Python code that a validation would run: {models}:net" in outcome.err
    assert "--allow-code" in outcome.err
    outcome = rmsnorm(command, exported / "ort", "--allow-code", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["settings"]["against"] == f"{models}:net"


def test_exit_codes(rmsnorm: CommandLine, honest: Any, models: Path, wrong: Path, tmp_path: Path) -> None:
    assert rmsnorm("validate", *honest).code == 0
    assert rmsnorm("validate", wrong, "--against", f"{models}:net").code == 1
    assert rmsnorm("validate", tmp_path / "nosuch", "--against", f"{models}:net").code == 2
    assert run(["export", f"{models}:net", "-o", str(tmp_path / "bf16"), "--dtype", "bfloat16"]) == 0
    outcome = rmsnorm("validate", tmp_path / "bf16", "--against", f"{models}:net", "--json")
    assert (outcome.code, outcome.json["error"]["exit_code"]) == (3, 3)
    assert "bfloat16" in outcome.json["error"]["message"]


def test_a_provider_that_is_not_there(rmsnorm: CommandLine, honest: Any) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    outcome = rmsnorm("validate", *honest, "--provider", "cuda")
    assert outcome.code == 4
    assert "rmsnorm-deploy[gpu]" in outcome.err


# ---------------------------------------------------------------------------------------------------------- outliers


def test_outliers_are_given_to_both_sides(rmsnorm: CommandLine, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert rmsnorm("export", f"{models}:net", "-o", out, "--outliers", "2x50", "--target", "ort").code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["outliers"] == {"channels": 2, "factor": 50.0, "seed": 0}
    arguments = ("validate", out, "--against", f"{models}:net", "--shape", "2x5")
    assert rmsnorm(*arguments).code == 0
    del manifest["outliers"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert rmsnorm(*arguments).code == 1


# ------------------------------------------------------------------------------------------------------ lossy files


def test_a_profile_and_limits_over_it(rmsnorm: CommandLine, wrong: Path, models: Path) -> None:
    """One of the norm's weights is off by a hundredth: more than any profile for a norm allows, unless limits do."""
    arguments = ("validate", wrong, "--against", f"{models}:net", "--shape", "2x5", "--lossy", "int8")
    outcome = rmsnorm(*arguments)
    assert (outcome.code, "RMS error / row RMS" in outcome.out) == (1, True)
    assert "within the limits of int8" in outcome.out
    outcome = rmsnorm(*arguments, "--max-rms", "@norms:0.1")
    assert outcome.code == 0
    losses = [line for line in outcome.out.splitlines() if line.startswith("largest loss: ")]
    assert losses[0].startswith("largest loss: norm norm: cosine 1.0000, rms 0.")
    assert losses[0].endswith("% of a row's RMS")
    content = rmsnorm(*arguments, "--max-rms", "@norms:0.1", "--min-cosine", "output:0.9", "--json").json
    assert content["settings"]["limits"]["@norms"]["max_rms"] == 0.1
    assert content["settings"]["limits"]["output"]["min_cosine"] == 0.9
    assert [row["kind"] for row in content["loss"]] == ["norm", "segment", "segment"]
    assert rmsnorm("bisect", wrong, "--against", f"{models}:net", "--shape", "2x5", "--lossy", "int8").code == 1
