"""Addresses without a cluster, and nodes that are not as where the run was started."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.runtime.cluster.connection import SharedFolder, check_node, connected, shared_folder


def test_a_node_must_see_the_folder_and_have_the_version(tmp_path: Path) -> None:
    with shared_folder(tmp_path) as folder:
        check_node(folder)
        other = SharedFolder(str(tmp_path / "elsewhere"), folder.mark, folder.content, folder.version)
        with pytest.raises(EnvironmentMissingError, match=r"expected to see .*elsewhere"):
            check_node(other)
        older = SharedFolder(folder.path, folder.mark, folder.content, "0.0.1")
        with pytest.raises(EnvironmentMissingError, match=r"expected rmsnorm-deploy 0\.0\.1.*Install the same version"):
            check_node(older)
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test of this process may have a cluster
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(UsageError, match=rf"{address}', where nothing answers: .*ray start"), connected(address):
            pass


def test_an_error_of_ray_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**options: object) -> None:
        raise ValueError("Invalid address format\nand more")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    expected = r"expected local, auto, .* got 'here': Invalid address format$"
    with pytest.raises(UsageError, match=expected), connected("here"):
        pass


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentMissingError, match=r"pip install 'rmsnorm-deploy\[ray\]'"), connected("local"):
        pass
