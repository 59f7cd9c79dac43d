"""The same build as a command line of TensorRT's own tool."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.runtime.engines.api import flavor_of
from rmsnorm_deploy.runtime.inputs.exported import Exported
from rmsnorm_deploy.runtime.tensorrt.network import NetworkFile
from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions
from rmsnorm_deploy.runtime.tensorrt.plan import BuildPlan, PluginUse
from rmsnorm_deploy.runtime.tensorrt.profiles import Profile
from rmsnorm_deploy.runtime.tensorrt.trtexec import LIBRARY_PLACE, shell_line, trtexec_command

NONE, PYTHON = PluginUse("none", None, ""), PluginUse("python", None, "")
LIBRARY = PluginUse("library", Path("/lib/the plugin.so"), "")


def command(plugin: PluginUse = NONE, profiles: list[Profile] | None = None, **options: Any) -> list[str]:
    path = Path("/models/a model.onnx")
    network = NetworkFile(path, [], [], [], [])
    made = BuildOptions(**{"runtime": "tensorrt", **options})
    plan = BuildPlan(Exported(path), network, made, (86, 89), profiles or [], plugin)
    return trtexec_command(plan, "out.engine")


def test_the_tool_the_model_and_the_engine() -> None:
    words = command()
    assert words[0] == flavor_of("tensorrt").tool
    assert {"--onnx=/models/a model.onnx", "--saveEngine=out.engine", "--skipInference"} <= set(words)
    assert "--stronglyTyped" in words
    assert not any(word.startswith(("--profile=", "--minShapes", "--dynamicPlugins", "--computeCap")) for word in words)


def test_the_tool_of_tensorrt_rtx_builds_for_architectures() -> None:
    words = command(runtime="rtx")
    assert words[0] == flavor_of("rtx").tool
    assert words[0] != flavor_of("tensorrt").tool
    assert "--computeCapabilities=86,89" in words
    assert "--stronglyTyped" not in words


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"workspace": 512}, "--memPoolSize=workspace:512M"),
        ({"version_compatible": True}, "--versionCompatible"),
        ({"refit": True}, "--refit"),
        ({"timing_cache": "a.cache"}, "--timingCacheFile=a.cache"),
    ],
)
def test_options_are_words(changes: dict[str, Any], word: str) -> None:
    assert word in command(**changes)
    assert word not in command()


SHAPES = {"ids": ((1, 1), (1, 128), (8, 512)), "odd:name": ((1,), (2,), (3,)), "scalar": ((), (), ())}


def test_one_profile_has_its_shapes_and_no_number() -> None:
    words = command(profiles=[Profile(SHAPES)])
    assert [word for word in words if "Shapes" in word] == [
        "--minShapes=ids:1x1,'odd:name':1,scalar:1",
        "--optShapes=ids:1x128,'odd:name':2,scalar:1",
        "--maxShapes=ids:8x512,'odd:name':3,scalar:1",
    ]
    assert not any(word.startswith("--profile=") for word in words)


def test_several_profiles_are_numbered_before_their_shapes() -> None:
    words = command(profiles=[Profile({"x": ((1,), (2,), (3,))}), Profile({"x": ((4,), (5,), (6,))})])
    first = words.index("--profile=0")
    assert words[first : first + 8] == [
        "--profile=0", "--minShapes=x:1", "--optShapes=x:2", "--maxShapes=x:3",
        "--profile=1", "--minShapes=x:4", "--optShapes=x:5", "--maxShapes=x:6",
    ]  # fmt: skip


@pytest.mark.parametrize(("plugin", "place"), [(LIBRARY, "/lib/the plugin.so"), (PYTHON, LIBRARY_PLACE)])
def test_the_library_or_a_place_for_it(plugin: PluginUse, place: str) -> None:
    assert f"--dynamicPlugins={place}" in command(plugin)


def test_one_line_for_a_shell_gives_the_words_again() -> None:
    words = command(LIBRARY, [Profile(SHAPES)])
    assert shlex.split(shell_line(words)) == words


def test_the_shell_finds_the_library_that_is_not_built_yet() -> None:
    line = shell_line(command(PYTHON))
    assert f'--dynamicPlugins="{LIBRARY_PLACE}"' in line
    assert "'--onnx=/models/a model.onnx'" in line
