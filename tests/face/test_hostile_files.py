"""Files that state the impossible: exit code 2 with file and place, or only the norm concerned is left as it is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, parser

from rmsnorm_deploy.cli.failures import failure_of
from tests.helpers.interface.command_line import CommandLine

_WEIGHT = "<float[8] w = {1, 1, 1, 1, 1, 1, 1, 1}>"


def _parsed(opset: int, signature: str, body: str) -> ModelProto:
    header = f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]>'
    return parser.parse_model(f"{header} main {signature} {_WEIGHT} {{ {body} }}")


def _norm(rows: int | None = None) -> ModelProto:
    model = _parsed(23, "(float[n, 8] x) => (float[n, 8] y)", "y = RMSNormalization <epsilon = 1e-5> (x, w)")
    for info in (model.graph.input[0], model.graph.output[0]):
        if rows is not None:
            info.type.tensor_type.shape.dim[0].dim_value = rows
    return model


@pytest.mark.parametrize("rows", [1 << 50, 1 << 34, 1 << 62])
def test_an_input_of_impossible_size(rmsnorm: CommandLine, tmp_path: Path, rows: int) -> None:
    onnx.save(_norm(rows), tmp_path / "rows.onnx")
    outcome = rmsnorm("rewrite", tmp_path / "rows.onnx", "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    reason = outcome.json["proof"]["reason"]
    assert "input 'x', dim 0: expected at most 268435456 elements in a generated input" in reason
    assert f"got size {rows}" in reason
    (tmp_path / "net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.RMSNorm):\n    def forward(self, x):\n        return super().forward(x)\n"
        "\n\ndef net():\n    return Net(8)\n"
    )
    outcome = rmsnorm("validate", tmp_path / "rows.onnx", "--against", f"{tmp_path / 'net.py'}:net")
    assert outcome.code == 2
    assert "input 'x', dim 0: expected" in outcome.err


@pytest.mark.parametrize("target", ["primitives", "standard", "ort", "plugin"])
@pytest.mark.parametrize(
    ("signature", "body"),
    [
        (
            "(float[n, 8] x, float[n, 8] r) => (float[n, 8] y, float[n, 1] s)",
            "y, m, s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (x, r, w)",
        ),
        (
            "(float[n, 8] x) => (float[n, 8] y, float[n, 1] s)",
            "y, s = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-5> (x, w)",
        ),
    ],
)
def test_a_norm_whose_statistics_are_an_output(
    rmsnorm: CommandLine, tmp_path: Path, signature: str, body: str, target: str
) -> None:
    onnx.save(_parsed(18, signature, body), tmp_path / "model.onnx")
    outcome = rmsnorm("rewrite", tmp_path / "model.onnx", "-o", tmp_path / "out", "--target", target, "--json")
    assert outcome.code == 0, outcome.err
    assert [row["reason"].rpartition("its statistics")[2] != "" for row in outcome.json["refusals"]] == [True]
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert [info.name for info in written.graph.output] == ["y", "s"]
    assert len(written.graph.node) == 1


@pytest.mark.parametrize("target", ["primitives", "ort"])
@pytest.mark.parametrize("epsilon", [math.nan, math.inf, -1.0])
def test_one_wrong_epsilon_leaves_one_norm(rmsnorm: CommandLine, tmp_path: Path, epsilon: float, target: str) -> None:
    body = "a = RMSNormalization <epsilon = 1e-5> (x, w) b = RMSNormalization <epsilon = 1e-4> (a, w) "
    model = _parsed(23, "(float[n, 8] x) => (float[n, 8] y)", f"{body} y = RMSNormalization <epsilon = 1e-5> (b, w)")
    (attribute,) = (row for row in model.graph.node[1].attribute if row.name == "epsilon")
    attribute.f = epsilon
    onnx.save(model, tmp_path / "model.onnx")
    outcome = rmsnorm("rewrite", tmp_path / "model.onnx", "-o", tmp_path / "out", "--target", target, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["changed"] == 2
    assert [row["reason"] for row in outcome.json["refusals"]] == [
        f"its epsilon is {epsilon:g}, expected a finite number of at least 0"
    ]


def test_pipes_and_devices_are_refused_before_they_are_opened(rmsnorm: CommandLine, tmp_path: Path) -> None:
    for name in ("pipe.onnx", "pipe.npz", "pipe.json"):
        os.mkfifo(tmp_path / name)
    onnx.save(_norm(), tmp_path / "model.onnx")
    out = tmp_path / "out.npz"
    for arguments in (
        ("run", tmp_path / "pipe.onnx", "--inputs", tmp_path / "pipe.npz", "-o", out),
        ("run", tmp_path / "model.onnx", "--inputs", tmp_path / "pipe.npz", "-o", out),
        ("run", tmp_path / "model.onnx", "--inputs", "/dev/zero", "-o", out),
        ("rewrite", tmp_path / "pipe.onnx", "-o", tmp_path / "out"),
        ("validate", tmp_path / "pipe.onnx", "--against", "builtin:small"),
        ("validate", "--replay", tmp_path / "pipe.json"),
        ("validate", "--replay", "/dev/zero"),
        ("compare", tmp_path / "pipe.json", tmp_path / "pipe.json"),
        ("compare", tmp_path / "pipe.npz", tmp_path / "pipe.npz"),
        ("build", tmp_path / "pipe.onnx", "-o", tmp_path / "engine"),
    ):
        outcome = rmsnorm(*arguments)
        assert outcome.code == 2, arguments
        assert "a regular file" in outcome.err, arguments


def test_a_pipe_in_place_of_a_manifest_or_a_config(rmsnorm: CommandLine, tmp_path: Path) -> None:
    for name, command in (("manifest.json", "run"), ("config.json", "inspect")):
        folder = tmp_path / name
        folder.mkdir()
        os.mkfifo(folder / name)
        more = ("--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz") if command == "run" else ()
        np.savez(tmp_path / "x.npz", x=np.ones(3))
        outcome = rmsnorm(command, folder, *more)
        assert outcome.code == 2
        assert f"{name}: expected a regular file, got a pipe" in outcome.err


def test_a_file_name_that_is_not_utf8(rmsnorm: CommandLine, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path / "n") + b"\xff.onnx"))
    path.write_bytes(_norm().SerializeToString())
    assert rmsnorm("inspect", path).code == 0
    assert rmsnorm("inspect", path, "--json").json["model"] == str(path)
    assert rmsnorm("rewrite", path, "-o", tmp_path / "out").code == 0
    assert rmsnorm("inspect", tmp_path / "out").code == 0
    np.savez(tmp_path / "x.npz", x=np.ones((2, 8), np.float32))
    outcome = rmsnorm("run", path, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert outcome.code == 2
    assert "n\\udcff.onnx: expected a path in UTF-8" in outcome.err


def test_a_posix_locale(tmp_path: Path) -> None:
    place = tmp_path / "ü"
    place.mkdir()
    onnx.save(_norm(), str(tmp_path / "m.onnx"))
    (tmp_path / "m.onnx").rename(place / "m.onnx")
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["rewrite", place / "m.onnx", "-o", place / "out"], ["inspect", place / "out"], ["targets"]):
        command = [sys.executable, "-m", "rmsnorm_deploy", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        done.stdout.decode("ascii")


def test_lack_of_memory_is_not_a_bug() -> None:
    failure = failure_of(MemoryError("Unable to allocate 1.00 TiB"))
    assert failure.exit_code == 2
    assert failure.message == (
        "this needs more memory than there is (Unable to allocate 1.00 TiB). Use smaller files or shapes."
    )


def test_deep_json_and_wrong_types_name_the_file(rmsnorm: CommandLine, tmp_path: Path) -> None:
    for name, content in (("deep", "[" * 200_000), ("list", json.dumps([1]))):
        report = tmp_path / f"{name}.json"
        report.write_text(content)
        for arguments in (("compare", report, report), ("validate", "--replay", report)):
            outcome = rmsnorm(*arguments)
            assert outcome.code == 2
            assert f"{name}.json: expected" in outcome.err
