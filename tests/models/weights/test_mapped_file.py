"""Tensors whose bytes stay in their file."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.weights import mapped_file as mapping
from rmsnorm_deploy.models.weights.checkpoint import stored_tensors
from rmsnorm_deploy.models.weights.mapped_file import places_of, release_pages

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="requires /proc of Linux")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"w": torch.randn(512, 512), "half": torch.randn(7, 3).half(), "odd": torch.ones(3, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) << 10


def test_a_mapped_tensor_has_the_values_of_the_file(file: Path) -> None:
    from safetensors.torch import load_file

    wanted, got = load_file(file), stored_tensors([file])
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    for place, tensor in zip(places_of(got.values()), got.values(), strict=True):
        assert place is not None
        assert place.file.path == file
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert file.read_bytes()[place.offset : place.offset + place.length] == raw


@linux
def test_nothing_is_read_until_a_value_is(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(64 << 20, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    gc.collect()
    before = resident("RssFile")
    tensor = stored_tensors([tmp_path / "m.safetensors"])["w"]
    assert resident("RssFile") - before < 1 << 20
    assert int(tensor.sum()) == 0
    assert resident("RssFile") - before > 60 << 20
    release_pages()
    assert resident("RssFile") - before < 1 << 20


def test_a_written_tensor_leaves_the_file_as_it_is_and_has_no_place(file: Path) -> None:
    before = file.read_bytes()
    tensors = stored_tensors([file])
    tensors["w"][3, 4] += 1.0
    places = dict(zip(tensors, places_of(tensors.values()), strict=True))
    assert file.read_bytes() == before
    assert places["w"] is None
    assert places["half"] is not None
    value = tensors["w"][3, 4].clone()
    release_pages()
    assert tensors["w"][3, 4] == value


def test_without_the_systems_tables_bytes_are_compared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_SMAPS", file.parent / "none")
    tensors = stored_tensors([file])
    assert all(place is not None for place in places_of(tensors.values()))
    tensors["w"][0, 0] += 1.0
    found = dict(zip(tensors, places_of(tensors.values()), strict=True))
    assert found["w"] is None
    assert found["half"] is not None
    release_pages()
    assert dict(zip(tensors, places_of(tensors.values()), strict=True))["w"] is None


def test_what_is_not_stored_as_it_is_has_no_place(file: Path) -> None:
    w = stored_tensors([file])["w"]
    assert places_of([w.t(), w[:, :3], w.clone(), torch.ones(3), w.double(), torch.empty(0)]) == [None] * 6
    part = places_of([w[2:5]])[0]
    assert part is not None
    assert part.length == 3 * 512 * 4


def test_a_mapping_ends_with_its_last_tensor(file: Path) -> None:
    gc.collect()
    before = len(mapping._mappings)
    tensors = stored_tensors([file])
    kept = tensors.pop("half")
    assert len(mapping._mappings) == before + 1
    del tensors
    gc.collect()
    assert len(mapping._mappings) == before + 1
    assert places_of([kept])[0] is not None
    del kept
    gc.collect()
    assert len(mapping._mappings) == before


@pytest.mark.parametrize("change", ["bytes", "removed", "replaced"])
def test_a_file_that_changed_since_is_named(file: Path, change: str) -> None:
    place = places_of(stored_tensors([file]).values())[0]
    assert place is not None
    place.file.stamp.check_unchanged()
    data = file.read_bytes()
    if change != "bytes":
        file.unlink()
    if change != "removed":
        file.write_bytes(data)
    with pytest.raises(UsageError, match=r"m\.safetensors changed while it was in use"):
        place.file.stamp.check_unchanged()


def test_an_unaligned_tensor_is_a_copy(tmp_path: Path) -> None:
    import json
    import struct

    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    text += b" " * ((3 - len(text)) % 8)
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<ff", 1.5, -2.0))
    tensor = stored_tensors([tmp_path / "m.safetensors"])["a"]
    assert tensor.tolist() == [1.5, -2.0]
    assert places_of([tensor]) == [None]


def test_an_empty_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for path in (tmp_path / "empty", tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="cannot be mapped"):
            mapping.map_file(path)
