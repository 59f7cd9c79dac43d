"""What is decided before TensorRT runs: the plugin, the file, the profiles, and the request to the worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmsnorm_deploy.export.onnx_io.owned_files import sha256
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from rmsnorm_deploy.plugins.tensorrt import library
from rmsnorm_deploy.runtime.tensorrt.network import NetworkFile
from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions
from rmsnorm_deploy.runtime.tensorrt.plan import PluginUse, choose_plugin, plan_build, request_of

from .conftest import Files


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_library", lambda: None)


@pytest.fixture
def a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "plugin.so"
    place.write_bytes(b"a library")
    monkeypatch.setattr(library, "find_library", lambda: place)
    return place


def network(plugins: bool = True, functions: bool = True) -> NetworkFile:
    return NetworkFile(Path("m.onnx"), [], [], ["norm"] if plugins else [], ["RMSNorm"] if functions else [])


def chosen(what: NetworkFile, **options: Any) -> tuple[str, Path | None]:
    use = choose_plugin(BuildOptions(**options), what)
    assert use.reason
    return use.kind, use.library


# --------------------------------------------------------------------------------------------------- choose_plugin


def test_a_file_without_plugin_nodes_needs_none(a_library: Path) -> None:
    for norm in ("auto", "native"):
        assert chosen(network(plugins=False), norm=norm) == ("none", None)


def test_native_norms_need_none_where_functions_stand_in(a_library: Path) -> None:
    assert chosen(network(), norm="native") == ("none", None)
    with pytest.raises(UnsupportedError, match=r"m\.onnx"):
        chosen(network(functions=False), norm="native")


def test_the_library_where_it_is_and_python_where_it_was_asked_for(a_library: Path) -> None:
    assert chosen(network()) == ("library", a_library)
    assert chosen(network(), plugin="library") == ("library", a_library)
    assert chosen(network(), plugin="python") == ("python", None)


@pytest.mark.usefixtures("no_library")
def test_without_the_library_python_or_a_refusal() -> None:
    assert chosen(network()) == ("python", None)
    with pytest.raises(EnvironmentMissingError, match=library.LIBRARY_VARIABLE):
        chosen(network(), plugin="library")


def test_a_library_that_is_named_comes_first(a_library: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.so"
    own.write_bytes(b"")
    assert chosen(network(), plugin_library=str(own)) == ("library", own)
    with pytest.raises(UsageError, match=r"gone\.so"):
        chosen(network(), plugin_library=str(tmp_path / "gone.so"))
    assert chosen(network(), plugin_library=str(tmp_path / "gone.so"), plugin="python") == ("python", None)


def test_the_digest_of_what_is_used(a_library: Path) -> None:
    assert PluginUse("library", a_library, "why").to_dict() == {
        "kind": "library", "library": str(a_library), "sha256": sha256(a_library), "reason": "why",
    }  # fmt: skip
    assert PluginUse("none", None, "").digest() is None
    digest = PluginUse("python", None, "").digest()
    assert digest is not None
    assert len(digest) == 64


# ------------------------------------------------------------------------------------------------------ plan_build


def options(**changes: Any) -> BuildOptions:
    return BuildOptions(**{"architectures": (86,), "plugin": "python", **changes})


def test_the_plan_of_a_file_without_norms(files: Files) -> None:
    path = files.matmul()
    with plan_build(path, options()) as plan:
        assert plan.source.model == plan.network.path == path
        assert plan.architectures == (86,)
        assert plan.plugin.kind == "none"
        assert [sorted(profile.shapes) for profile in plan.profiles] == [["x"]]


def test_a_file_of_fixed_dims_has_no_profile(files: Files) -> None:
    with plan_build(files.matmul(dims=(1, 4, 32)), options()) as plan:
        assert plan.profiles == []


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 48}, 48),
        ({"text_config": {"max_sequence_length": 40}}, 40),
        ({"max_position_embeddings": 0, "n_positions": 48}, 48),
        ({"max_position_embeddings": "64"}, None),
        ([], None),
    ],
)
def test_the_longest_sequence_is_the_configs(files: Files, config: Any, longest: int | None) -> None:
    path = files.matmul()

    def most() -> int:
        with plan_build(path, options()) as plan:
            return plan.profiles[0].shapes["x"][2][1]

    without = most()
    (path.parent / "config.json").write_text(json.dumps(config))
    assert most() == (longest or without)
    (path.parent / "config.json").write_text("{")
    assert most() == without


def test_norms_are_given_to_the_plugin_in_a_file_that_vanishes(files: Files) -> None:
    path = files.primitives()
    before = path.read_bytes()
    with plan_build(path, options(norm="plugin")) as plan:
        made = plan.network.path
        assert made != path
        assert made.is_file()
        assert plan.source.model == path
        assert len(plan.network.plugin_nodes) == 1
        assert plan.plugin.kind == "python"
    assert not made.exists()
    assert path.read_bytes() == before


def test_norms_that_are_the_plugins_already_stay_where_they_are(files: Files) -> None:
    path = files.plugin()
    with plan_build(path, options(norm="plugin")) as plan:
        assert plan.network.path == path


def test_elsewhere_nothing_is_rewritten_and_no_library_is_asked_for(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UsageError, match="rewrite"),
        plan_build(files.primitives(), options(norm="plugin"), elsewhere=True),
    ):
        pass
    monkeypatch.setattr(library, "find_library", lambda: None)
    with plan_build(files.plugin(), options(plugin="library"), elsewhere=True) as plan:
        assert plan.plugin.kind == "python"


def test_a_file_without_norms_has_nothing_for_the_plugin(files: Files) -> None:
    with pytest.raises((UnsupportedError, UsageError)), plan_build(files.matmul(), options(norm="plugin")):
        pass


def test_what_the_worker_is_asked_is_json(files: Files) -> None:
    path = files.plugin()
    with plan_build(path, options(profiles="x:1x1x32,2x4x32,4x8x32", workspace=64)) as plan:
        request = request_of(plan)
    assert json.loads(json.dumps(request)) == request
    assert request["model"] == request["shown"] == str(path)
    assert request["architectures"] == [86]
    assert request["profiles"] == [{"x": [[1, 1, 32], [2, 4, 32], [4, 8, 32]]}]
    assert request["plugin"] == {"kind": "python", "library": None}
    assert request["plugin_nodes"] == ["norm"]
    assert [(norm["node"], norm["is_plugin"]) for norm in request["norms"]] == [("norm", True)]
    assert request["options"]["workspace"] == 64
