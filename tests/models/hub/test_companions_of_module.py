"""Where the config and tokenizer files of a module are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rmsnorm_deploy.models.companions import COMPANIONS
from rmsnorm_deploy.models.hub.download import companions_of_module


def named(name: Any) -> nn.Module:
    model = nn.Identity()
    model.name_or_path = name
    return model


@pytest.mark.parametrize("model", [nn.Identity(), named(""), named(None)])
def test_a_module_that_names_no_checkpoint_has_none(model: nn.Module) -> None:
    assert companions_of_module(model) == (None, "")


def test_a_local_folder(tmp_path: Path) -> None:
    assert companions_of_module(named(str(tmp_path))) == (tmp_path, "")
    folder, reason = companions_of_module(named(str(tmp_path / "gone")))
    assert folder is None
    assert reason.endswith(f"the folder {tmp_path / 'gone'} does not exist")


def test_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "owner/gone":
            raise FileNotFoundError("no such\n repository")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert companions_of_module(named("owner/model")) == (tmp_path, "")
    folder, reason = companions_of_module(named("owner/gone"))
    assert (folder, reason.partition(": ")[2]) == (None, "FileNotFoundError: no such repository")
    assert asked == [("owner/model", list(COMPANIONS)), ("owner/gone", list(COMPANIONS))]
