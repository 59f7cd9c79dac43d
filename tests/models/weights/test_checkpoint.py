"""The safetensors files of a checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.weights.checkpoint import load_weights, refuse_pickles, stored_tensors, weight_files_of
from rmsnorm_deploy.models.weights.mapped_file import places_of


def index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_shards_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index(tmp_path, {"b": "b.safetensors", "a": "a.safetensors", "c": "b.safetensors"})
    assert [file.name for file in weight_files_of(tmp_path)] == ["b.safetensors", "a.safetensors"]
    save_file({"one": torch.ones(2)}, tmp_path / "model.safetensors")
    assert [file.name for file in weight_files_of(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    index(tmp_path, {"a": name})
    with pytest.raises(UsageError, match="expected names of files in its folder"):
        weight_files_of(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index(tmp_path, {"a": "a.safetensors"})
    with pytest.raises(UsageError, match=r"1 of 1 files that do not exist in .*: a\.safetensors"):
        weight_files_of(tmp_path)


def test_two_files_with_one_key_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"same": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="another file of the checkpoint has these tensors too: same"):
        stored_tensors([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=rf"(?s){name}, a pickle.*save_pretrained.*--allow-pickle"):
        refuse_pickles(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    refuse_pickles(tmp_path)


class TestLoadWeights:
    @staticmethod
    def saved(folder: Path) -> torch.nn.Module:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.RMSNorm(3))
        save_file(module.state_dict(), folder / "m.safetensors")
        return module

    def test_a_module_gets_the_tensors_of_the_file(self, tmp_path: Path) -> None:
        module = self.saved(tmp_path)
        with torch.device("meta"):
            other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.RMSNorm(3))
        load_weights(other, tmp_path / "m.safetensors")
        x = torch.randn(2, 4)
        assert torch.equal(other(x), module(x))
        assert all(place is not None for place in places_of(other.parameters()))

    def test_a_weight_that_two_modules_share_is_shared_again(self, tmp_path: Path) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
        module[1].weight = module[0].weight
        wanted = module[0].weight.detach().clone()
        save_file({"1.weight": wanted}, tmp_path / "m.safetensors")
        with torch.no_grad():
            module[0].weight.zero_()
        load_weights(module, tmp_path / "m.safetensors")
        assert module[0].weight is module[1].weight
        assert torch.equal(module[0].weight, wanted)

    def test_a_folder_of_shards(self, tmp_path: Path) -> None:
        module = self.saved(tmp_path)
        (tmp_path / "m.safetensors").rename(tmp_path / "model.safetensors")
        other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.RMSNorm(3))
        load_weights(other, tmp_path)
        assert torch.equal(other[0].weight, module[0].weight)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (torch.nn.Sequential(torch.nn.Linear(4, 3)), "unexpected keys: 1.weight"),
            (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)), "missing keys: 1.bias"),
            (
                torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.RMSNorm(3)),
                r"0.weight: expected \[3, 5\], got \[3, 4\]",
            ),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused(self, tmp_path: Path, other: torch.nn.Module, message: str) -> None:
        self.saved(tmp_path)
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(UsageError, match=message):
            load_weights(other, tmp_path / "m.safetensors")
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())

    def test_a_folder_without_weights(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="expected a safetensors file, or a folder with"):
            load_weights(torch.nn.Linear(2, 2), tmp_path)
