"""The plugin's C++ library inside the real builder: engines that carry its kernels, and libraries that do not fit."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from rmsnorm_deploy.models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from rmsnorm_deploy.plugins.tensorrt import library
from rmsnorm_deploy.plugins.tensorrt.header import contract_digest
from rmsnorm_deploy.plugins.tensorrt.images import compile_images, kernel_of, unpack
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions
from rmsnorm_deploy.runtime.tensorrt.plan import plan_build, request_of
from rmsnorm_deploy.runtime.tensorrt.process import run_worker
from tests.helpers.extent import EVERY
from tests.helpers.plugins import plugin_library
from tests.helpers.plugins.plugin_library import BuiltLibrary
from tests.helpers.tensorrt.tensorrt_models import WIDTH, rms_norm_model

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'rmsnorm-deploy[rtx]'")
OPTIONS = BuildOptions(architectures=(89,))


def with_library(place: Path, **changes: object) -> BuildOptions:
    return dataclasses.replace(OPTIONS, plugin_library=str(place), **changes)  # type: ignore[arg-type]


def packed_kernels(engine: Path) -> list[bytes]:
    content, found, position = engine.read_bytes(), [], 0
    while (position := content.find(b"RMSNORM1", position)) >= 0:
        found.append(content[position:])
        position += 1
    return found


def test_an_engine_carries_the_kernels_that_python_would_compile(built_library: BuiltLibrary, tmp_path: Path) -> None:
    model = rms_norm_model(tmp_path / "model.onnx")
    kinds = {"library": with_library(built_library.path), "python": dataclasses.replace(OPTIONS, plugin="python")}
    images = {}
    for kind, options in kinds.items():
        engine = build_engine(model, tmp_path / f"{kind}.engine", options)
        images[kind] = unpack(packed_kernels(engine.path)[0])
    expected = compile_images(kernel_of("RMSNorm", "float16", WIDTH, 1e-6, 0.0, 1), (89,))
    assert (images["library"].width, images["library"].dtype) == (WIDTH, "float16")
    assert images["python"] == expected
    for ours, theirs in zip(images["library"].images, expected.images, strict=True):
        # A cubin holds the options that it was compiled with; PTX is the same text.
        assert dataclasses.replace(ours, image=b"") == dataclasses.replace(theirs, image=b"")
        assert ours.image == theirs.image or ours.kind == "cubin"
        assert ours.image[:4] == theirs.image[:4]


def test_without_nvrtc_the_engine_has_the_generic_kernel(
    built_library: BuiltLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.NVRTC_VARIABLE, str(tmp_path / "none.so"))
    engine = build_engine(
        rms_norm_model(tmp_path / "model.onnx"), tmp_path / "e.engine", with_library(built_library.path)
    )
    assert [(row["generic"], row["architectures"]) for row in engine.record["kernels"]] == [(True, [])]
    assert unpack(packed_kernels(engine.path)[0]).images == ()
    assert "NVRTC is not found" in engine.log.read_text()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"scale_offset": 0.5}, "scale_offset: expected 0 or 1, got 0.5"),
        ({"epsilon": -1.0}, "epsilon: expected a finite number of at least 0, got -1"),
        ({"scale_type": 7}, "scale_type: expected one of 1 .float32., 10 .float16., 16 .bfloat16., got 7"),
        ({"scale_type": None}, "attribute scale_type is missing"),
    ],
)
def test_the_library_itself_refuses_what_it_cannot_do(
    built_library: BuiltLibrary, tmp_path: Path, attributes: dict[str, object], message: str
) -> None:
    """The check before the parse would refuse these; here the real parser asks the library."""
    model, wrong = rms_norm_model(tmp_path / "model.onnx"), tmp_path / "wrong.onnx"
    options = with_library(built_library.path)
    with plan_build(model, options) as plan:
        request = request_of(plan)
    request["model"] = str(rms_norm_model(wrong, **attributes))  # type: ignore[arg-type]
    folder = tmp_path / "work"
    folder.mkdir()
    with pytest.raises(UnsupportedError, match=message):
        run_worker(request, folder, options, lambda _: None)


def variant(built: BuiltLibrary, folder: Path, old: str, new: str) -> Path:
    """The library with another contract, built from changed sources."""
    sources = folder / "plugins" / "tensorrt" / "cpp"
    shutil.copytree(library.SOURCE_FOLDER, sources)
    shutil.copytree(plugin_library.SOURCE_FOLDER, folder / "plugins" / "kernel" / "cuda")
    header = sources / "contract.h"
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new))
    fatbin = folder / "generic.fatbin"
    fatbin.write_bytes(b"\x50\xed\x55\xba" + bytes(60))
    configure = [
        "cmake", "-S", str(sources), "-B", str(folder / "build"), f"-DTENSORRT_INCLUDE_DIR={plugin_library.HEADERS}",
        f"-DGENERIC_FATBIN={fatbin}", f"-DCUDA_INCLUDE_DIR={built.cuda_include}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    target = ["cmake", "--build", str(folder / "build"), "--target", "rmsnorm_deploy", "--parallel", "2"]
    subprocess.run(target, check=True, capture_output=True)
    return folder / "build" / library.LIBRARY_NAME


@pytest.mark.parametrize(
    ("old", "new", "brought"),
    [
        ('name_space[] = "rmsnorm_deploy"', 'name_space[] = "elsewhere"', "RMSNorm version 1 of namespace 'elsewhere'"),
        ('version[] = "1"', 'version[] = "2"', "RMSNorm version 2 of namespace 'rmsnorm_deploy'"),
    ][: 2 if EVERY else 1],
)
def test_a_library_for_something_else_is_named(
    built_library: BuiltLibrary, tmp_path: Path, old: str, new: str, brought: str
) -> None:
    other = variant(built_library, tmp_path / "variant", old, new)
    with pytest.raises(UsageError) as error:
        build_engine(rms_norm_model(tmp_path / "model.onnx"), tmp_path / "e.engine", with_library(other))
    assert "of namespace 'rmsnorm_deploy', version '1', got " in str(error.value)
    assert brought in str(error.value)
    assert not (tmp_path / "e.engine").exists()


def test_a_library_of_another_contract_is_named(built_library: BuiltLibrary, tmp_path: Path) -> None:
    old = variant(built_library, tmp_path / "variant", f'digest[] = "{contract_digest()}"', 'digest[] = "older"')
    with pytest.raises(UsageError, match="it was built by another version of rmsnorm-deploy with different operators"):
        build_engine(rms_norm_model(tmp_path / "model.onnx"), tmp_path / "e.engine", with_library(old))
    assert not (tmp_path / "e.engine").exists()


def test_without_nvrtc_the_plugins_in_python_are_missing_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "cuda"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    model, options = rms_norm_model(tmp_path / "model.onnx"), dataclasses.replace(OPTIONS, plugin="python")
    with pytest.raises(EnvironmentMissingError, match="compiling the kernel requires cuda-bindings and NVRTC; install"):
        build_engine(model, tmp_path / "e.engine", options)


def test_files_that_are_not_a_library(tmp_path: Path) -> None:
    model = rms_norm_model(tmp_path / "model.onnx")
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(RmsnormDeployError, match=r"text\.so"):
        build_engine(model, tmp_path / "e.engine", with_library(text))
    with pytest.raises(UsageError, match=r"--plugin-library: .*missing\.so does not exist"):
        build_engine(model, tmp_path / "e.engine", with_library(tmp_path / "missing.so"))
    assert not (tmp_path / "e.engine").exists()


def test_a_library_that_is_requested_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    model = rms_norm_model(tmp_path / "model.onnx")
    with pytest.raises(EnvironmentMissingError, match="Build it with: rmsnorm plugin build"):
        build_engine(model, tmp_path / "e.engine", dataclasses.replace(OPTIONS, plugin="library"))
    with plan_build(model, OPTIONS) as plan:
        assert plan.plugin.kind == "python"
        assert "the library does not exist" in plan.plugin.reason


def test_the_library_that_was_built_is_found(
    built_library: BuiltLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    place = library.default_folder()
    place.mkdir(parents=True)
    shutil.copy(built_library.path, place / library.LIBRARY_NAME)
    with plan_build(rms_norm_model(tmp_path / "model.onnx"), OPTIONS) as plan:
        assert (plan.plugin.kind, plan.plugin.library) == ("library", place / library.LIBRARY_NAME)
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(built_library.path))
    assert library.find_library() == built_library.path
