"""Packages: their files and hashes, the report in them, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy import export_model, package_model, validate, verify_folder
from rmsnorm_deploy.export.onnx_io.owned_files import sha256
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.inputs.exported import open_exported
from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from tests.helpers.models.factory_file import small_model
from tests.helpers.models.families import build


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("packages"), "packaged_models")


@pytest.fixture(scope="module")
def exported(source: str) -> Path:
    """A model whose weights are in a file beside it."""
    folder = Path(source).parent / "small"
    export_model(source, folder, target="ort")
    (folder / "config.json").write_text('{"vocab_size": 12}')
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.json"] = {"bytes": 18, "sha256": sha256(folder / "config.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def report(exported: Path, source: str) -> Path:
    path = exported.parent / "report.json"
    path.write_text(json.dumps(validate(exported, source, shapes=((2, 5),)).to_dict()))
    return path


@pytest.mark.parametrize("weights", ["copy", "link"])
def test_a_repository_for_triton(exported: Path, report: Path, tmp_path: Path, weights: Any) -> None:
    made = package_model(exported, "triton", tmp_path / "repository", name="served", report=report, weights=weights)
    place = tmp_path / "repository"
    assert (place / "served" / "config.pbtxt").read_text().startswith('name: "served"\nbackend: "onnxruntime"\n')
    assert sorted(path.name for path in (place / "served" / "1").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert sorted(made.files) == sorted(
        path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()
    )
    assert (made.validated, made.notes) == ("pass", [])
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["package"] == {"for": "triton", "name": "served", "validated": "pass"}
    assert json.loads((place / "report.json").read_text())["verdict"] == "pass"
    same = os.path.samefile(place / "served" / "1" / "model.onnx.data", exported / "model.onnx.data")
    assert same == (weights == "link")
    # Every byte is checked on the machine that serves it, and the folder runs as the exported one does.
    assert {(file.compared, file.problem) for file in verify_folder(place)} == {("all bytes", None)}
    results = []
    for folder in (exported, place):
        with OrtRunner(open_exported(folder).model) as runner:
            results.append(runner.run(make_feeds(runner.inputs(), 2, 5, 0, 12)))
    np.testing.assert_equal(*results)


def test_a_changed_byte_is_found_there(exported: Path, tmp_path: Path) -> None:
    package_model(exported, "triton", tmp_path / "repository", name="small")
    weights = tmp_path / "repository" / "small" / "1" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert [file.name for file in verify_folder(tmp_path / "repository") if file.problem] == ["small/1/model.onnx.data"]


def test_without_a_report_the_user_is_told(exported: Path, tmp_path: Path) -> None:
    made = package_model(exported, "triton", tmp_path / "repository")
    assert (made.name, made.validated) == ("small", None)
    assert made.notes == ["no validation report is in it; add one with --report, from rmsnorm validate --json"]
    manifest = json.loads((tmp_path / "repository" / "manifest.json").read_text())
    assert manifest["package"]["validated"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "fail"}, "expected the verdict pass, got 'fail'"),
        ({"provenance": {}}, r"expected a report on the model in .* got one on .* \(sha256 None\)"),
        ({"schema": "rmsnorm_deploy.bisect/6"}, "expected a report of rmsnorm validate"),
    ],
)
def test_a_report_that_proves_nothing(
    exported: Path, report: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = tmp_path / "report.json"
    other.write_text(json.dumps({**json.loads(report.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        package_model(exported, "triton", tmp_path / "repository", report=other)
    assert not (tmp_path / "repository").exists()


def test_a_report_on_another_model(source: str, report: Path, tmp_path: Path) -> None:
    export_model(source, tmp_path / "other", target="primitives")
    with pytest.raises(UsageError, match="expected a report on the model in"):
        package_model(tmp_path / "other", "triton", tmp_path / "repository", report=report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": "tensorflow"}, "for: expected one of genai, triton, trtexec, ort-server, got 'tensorflow'"),
        ({"name": "../small"}, "name: expected letters, digits"),
        ({"name": ""}, "name: expected letters, digits"),
        ({"max_batch": -1}, "max_batch: expected at least 0, got -1"),
    ],
)
def test_wrong_options(exported: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given = {"server": "triton", **options}
    with pytest.raises(UsageError, match=message):
        package_model(exported, output=tmp_path / "repository", **given)


def test_a_folder_that_is_not_as_exported(exported: Path, tmp_path: Path) -> None:
    package_model(exported, "triton", tmp_path / "copy", name="small")
    (tmp_path / "copy" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config.json: expected .* bytes, got 2"):
        package_model(tmp_path / "copy", "triton", tmp_path / "again")


def test_a_folder_that_holds_something_else_is_not_replaced(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        package_model(exported, "triton", tmp_path / "repository")
    assert (tmp_path / "repository" / "notes.txt").read_text() == "mine"


def test_an_encoder_and_its_decoder_are_one_repository(tmp_path: Path) -> None:
    build("t5", num_layers=1, num_decoder_layers=1).save_pretrained(tmp_path / "checkpoint")
    folder = tmp_path / "parts"
    export_model(str(tmp_path / "checkpoint"), folder, target="ort", with_past=True)
    report = tmp_path / "report.json"
    validate(folder, str(tmp_path / "checkpoint"), shapes=((2, 5),), outputs_only=True).save(report)
    place = tmp_path / "repository"
    made = package_model(folder, "triton", place, name="t5", report=report)
    assert (made.validated, made.notes) == ("pass", [])
    for part in ("encoder", "decoder"):
        config = (place / f"t5-{part}" / "config.pbtxt").read_text()
        assert f'name: "t5-{part}"\nbackend: "onnxruntime"\n' in config
        one = open_exported(place / f"t5-{part}" / "1" / "model.onnx")
        with OrtRunner(one.model) as runner:
            assert all(f'name: "{info.name}"' in config for info in (*runner.inputs(), *runner.outputs()))
    assert all(file.problem is None for file in verify_folder(place))
    assert {file.name for file in verify_folder(place)} == {*made.files} - {"manifest.json"}
    with pytest.raises(UsageError, match=r"holds several models for a server\. Name one of them: .*t5-encoder"):
        open_exported(place)
    with pytest.raises(UnsupportedError, match="expected an exported folder, got a package"):
        package_model(place, "ort-server", tmp_path / "again")
    with (place / "t5-decoder" / "1" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert [file.name for file in verify_folder(place) if file.problem] == ["t5-decoder/1/model.safetensors"]
    content = json.loads(report.read_text())
    content["provenance"]["candidate"]["decoder"]["model"]["sha256"] = "0" * 64
    report.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"expected a report on the model in .* \(sha256 000000000000"):
        package_model(folder, "triton", tmp_path / "again", report=report)


def test_several_models_are_packaged_one_by_one_for_other_servers(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    manifest = json.loads((exported / "manifest.json").read_text())
    content = json.dumps({**manifest, "components": ["encoder", "decoder"]})
    (tmp_path / "parts" / "manifest.json").write_text(content)
    with pytest.raises(UnsupportedError, match=r"got several: encoder, decoder\. Package each of them"):
        package_model(tmp_path / "parts", "ort-server", tmp_path / "repository")
