"""A folder or a file is there whole or not at all, and nothing that others wrote is touched."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from rmsnorm_deploy.export.onnx_io import atomic_files, destinations
from rmsnorm_deploy.export.onnx_io.atomic_files import (
    copy_companions,
    new_file,
    new_folder,
    partial_folder,
    restrict_mode,
)
from rmsnorm_deploy.export.onnx_io.destinations import check_destination, check_distinct, check_new_file
from rmsnorm_deploy.export.onnx_io.manifest import write_manifest
from rmsnorm_deploy.export.onnx_io.owned_files import MANIFEST
from rmsnorm_deploy.models.errors import UsageError
from tests.helpers.extent import EVERY


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too, with its text."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(out: Path, error: BaseException | None = None) -> None:
    """Make a folder with one file in it, or fail after that."""
    with new_folder(out) as partial:
        (partial / "f").write_text("1")
        if error is not None:
            raise error


def earlier(out: Path, **files: str) -> dict[str, str]:
    """An earlier export in `out`; returns its files."""
    with new_folder(out) as partial:
        for name, text in files.items():
            (partial / name).write_text(text)
        write_manifest(partial, {})
    return tree(out)


def fill_file(path: Path, error: BaseException | None = None) -> None:
    """Make a file, or fail after that."""
    with new_file(path) as partial:
        partial.write_text("new")
        if error is not None:
            raise error


def enter(check: bool, out: Path) -> None:
    """Ask whether a folder could be made, or begin to make it."""
    if check:
        check_destination(out)
        return
    with new_folder(out):
        raise AssertionError("the block must not run")


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        assert partial.parent == tmp_path
        assert partial.name.startswith(".out.rmsnorm-partial-")
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == {"out/a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_parents_are_made_and_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with new_folder("~/a/b/out") as partial:
        (partial / "f").write_text("1")
    assert tree(tmp_path) == {"a/b/out/f": "1"}


def test_a_folder_vanishes_when_the_block_fails_and_so_do_its_parents(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "a" / "b" / "out", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_parents_with_something_else_in_them_stay(tmp_path: Path) -> None:
    def fails() -> None:
        with new_folder(tmp_path / "a" / "out"):
            (tmp_path / "a" / "other").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert tree(tmp_path) == {"a/other": "1"}


def test_the_folder_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out"):
            pass
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_an_earlier_export_of_ours_is_replaced_whole(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic_files, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    before = earlier(out, old="1")
    out.chmod(0o700)
    with new_folder(out) as partial:
        (partial / "new").write_text("2")
        assert tree(out) == before
    assert tree(tmp_path) == {"out/new": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


def test_this_system_exchanges_folders_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not atomic_files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system cannot exchange two folders")
    assert tree(tmp_path) == {"a/b": "", "b/a": ""}


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("late", ["notes.txt", "old", "sub/notes.txt"])
def test_what_appears_during_the_export_is_not_lost(
    late: str, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic_files, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    before = earlier(out, old="1")

    def fails() -> None:
        with new_folder(out) as partial:
            (partial / "new").write_text("2")
            (out / late).parent.mkdir(exist_ok=True)
            (out / late).write_text("mine")

    with pytest.raises(UsageError, match=f"{late} appeared during the export"):
        fails()
    assert tree(out) == {**before, late: "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_stays_when_the_block_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = earlier(out, old="1")
    with pytest.raises(ZeroDivisionError), new_folder(out):
        raise ZeroDivisionError
    assert tree(out) == before


def test_an_earlier_export_comes_back_when_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    before = earlier(out, old="1")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if "rmsnorm-partial-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UsageError, match=r"writing .*out failed: No space left on device\. Nothing was left behind"):
        fill(out)
    assert tree(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as partial:
        (partial / "f").write_text("1")
    assert tree(tmp_path) == {"out/f": "1"}


@pytest.mark.parametrize("check", [True, False], ids=["check_destination", "new_folder"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: out.write_text("1"), "give another path"),
        (lambda out: out.symlink_to(out.parent / "nowhere"), "give another path"),
        (lambda out: (out.mkdir(), (out / "f").write_text("1")), "holds files that no export wrote.*: f"),
        (lambda out: (out.mkdir(), (out / MANIFEST).write_text('{"name": "a web app"}')), f": {MANIFEST}"),
        (lambda out: (out.mkdir(), (out / MANIFEST).write_text("[" * 100_000)), f": {MANIFEST}"),
        (lambda out: (earlier(out, f="1"), (out / "notes.txt").write_text("mine")), r": notes\.txt"),
        (lambda out: (earlier(out, f="1"), (out / ".git").mkdir(), (out / ".git/HEAD").write_text("")), r"\.git/HEAD"),
        (lambda out: (earlier(out, f="1"), (out / "empty").mkdir()), ": empty/"),
        (lambda out: (earlier(out, f="1"), (out / "f").write_text("2")), "were changed since: f"),
        (lambda out: (earlier(out, f="1"), (out / "f").unlink(), (out / "f").symlink_to("/etc/passwd")), ": f"),
        (lambda out: (earlier(out, f="1"), (out / "d").symlink_to("/etc")), ": d"),
    ],
    ids=[
        "file", "link", "folder of others", "manifest of others", "damaged manifest", "notes beside our files",
        ".git beside our files", "empty folder beside our files", "changed file", "link for a file", "link to a folder",
    ],
)  # fmt: skip
def test_what_others_wrote_is_refused_and_stays(check: bool, make: object, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)  # type: ignore[operator]
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=message):
        enter(check, out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("check", [True, False], ids=["check_destination", "new_folder"])
@pytest.mark.parametrize("path", ["", ".", "..", "../work", "../link"])
def test_the_working_directory_is_never_replaced(
    check: bool, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "link").symlink_to("work")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UsageError, match=r"is the working directory, or contains it|is not a folder"):
        enter(check, path)  # type: ignore[arg-type]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "work"]


@pytest.mark.parametrize("check", [True, False], ids=["check_destination", "new_folder"])
def test_a_place_below_a_file_cannot_be_written_to(check: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(UsageError, match=r"cannot (write to|read) "):
        enter(check, tmp_path / "file" / "out")
    assert tree(tmp_path) == {"file": "1"}


def test_a_full_disk_is_a_usage_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"writing .*out failed: No space left on device\."):
        fill(tmp_path / "out", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_block_does_not_find_is_the_blocks_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "missing").read_text()
    assert list(tmp_path.iterdir()) == []


def test_check_destination_leaves_nothing(tmp_path: Path) -> None:
    check_destination(tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


def test_check_destination_tries_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(prefix: str, dir: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(destinations.tempfile, "mkdtemp", failing)
    with pytest.raises(UsageError, match=f"cannot write to {tmp_path}: Permission denied"):
        check_destination(tmp_path / "out")


def test_check_destination_protects_what_is_read(tmp_path: Path) -> None:
    """By real path: through `..`, through a link, and as a folder that contains the input."""
    source = tmp_path / "a" / "b" / "model.onnx"
    earlier(source.parent, **{"model.onnx": "1"})
    (tmp_path / "link").symlink_to("a")
    for path in (source.parent, tmp_path / "a" / "b" / ".." / "b", tmp_path / "link" / "b"):
        with pytest.raises(UsageError, match="is the folder of the model itself, which is never changed"):
            check_destination(path, [source.parent])
        with pytest.raises(UsageError, match=r"contains .*model\.onnx, which is read and never changed"):
            check_destination(path, [source])
    check_destination(tmp_path / "a" / "c", [source])
    check_destination(tmp_path / "a" / "b" / "out", [source, source.parent])


# Killed processes -----------------------------------------------------------------------------------------------------


def left(folder: Path, name: str, **files: str) -> Path:
    """A temporary folder that a killed process left."""
    made = folder / name
    made.mkdir()
    for file, text in files.items():
        (made / file).write_text(text)
    return made


def test_what_a_killed_process_left_is_deleted_by_the_next_write(tmp_path: Path) -> None:
    left(tmp_path, ".out.rmsnorm-partial-abcdefgh", half="1")
    (tmp_path / ".m.rmsnorm-partial-abcdefgh.onnx").write_text("half")
    kept = left(tmp_path, ".out.partial-abcdefgh", notes="mine"), left(tmp_path, ".out2.rmsnorm-partial-abcdefgh")
    fill(tmp_path / "out")
    fill_file(tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["m.onnx", "out", *(k.name for k in kept)])


def test_what_a_living_process_writes_is_not_deleted(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as first:
        (first / "f").write_text("1")
        with pytest.raises(ZeroDivisionError):
            fill(tmp_path / "out", ZeroDivisionError())
        with partial_folder(tmp_path / "out"):
            pass
        assert tree(first) == {"f": "1"}
    assert tree(tmp_path) == {"out/f": "1"}


def test_an_earlier_export_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    """The process died between the two renames of a system that cannot exchange folders."""
    out = tmp_path / "out"
    before = earlier(out, old="1")
    left(tmp_path, ".out.rmsnorm-earlier-abcdefgh")
    out.rename(tmp_path / ".out.rmsnorm-earlier-abcdefgh" / "kept")
    with pytest.raises(ZeroDivisionError):
        fill(out, ZeroDivisionError())
    assert (tree(out), [path.name for path in tmp_path.iterdir()]) == (before, ["out"])


def test_an_earlier_export_that_was_replaced_already_is_deleted(tmp_path: Path) -> None:
    earlier(tmp_path / "kept", old="1")
    left(tmp_path, ".out.rmsnorm-earlier-abcdefgh")
    (tmp_path / "kept").rename(tmp_path / ".out.rmsnorm-earlier-abcdefgh" / "kept")
    before = earlier(tmp_path / "out", new="1")
    check_destination(tmp_path / "out")
    assert (tree(tmp_path / "out"), [path.name for path in tmp_path.iterdir()]) == (before, ["out"])


WRITER = """
import sys
from pathlib import Path
from rmsnorm_deploy.export.onnx_io import atomic_files, destinations
from rmsnorm_deploy.export.onnx_io.manifest import write_manifest
from rmsnorm_deploy.export.onnx_io.owned_files import is_own_report

folder, exchanges = Path(sys.argv[1]), sys.argv[2] == "True"
if not exchanges:
    atomic_files._exchange = lambda a, b: False
print("ready", flush=True)
for number in range(1_000_000):
    with atomic_files.new_folder(folder / "out") as partial:
        for name in "abc":
            (partial / name).write_text(f"{number}\\n" * 200)
        write_manifest(partial, {"number": number})
    with atomic_files.new_file(folder / "report.json", is_own_report) as file:
        file.write_text('{"schema": "rmsnorm_deploy.validate/7",' + f' "numbers": {[number] * 200}}}')
"""


def whole(folder: Path) -> set[str]:
    """The numbers in a folder's files: one, if all are of one export."""
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "c", MANIFEST]
    numbers = {str(json.loads((folder / MANIFEST).read_text())["number"])}
    for name in "abc":
        lines = (folder / name).read_text().splitlines()
        assert len(lines) == 200
        numbers.update(lines)
    return numbers


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_kills_lose_nothing_and_leave_nothing_half_written(exchanges: bool, tmp_path: Path) -> None:
    """Fifty of them with `RMSNORM_TESTS=all`."""
    random = Random(exchanges)
    for _ in range(50 if EVERY else 12):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(exchanges)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.0, 0.03))
            process.kill()
        check_destination(tmp_path / "out")  # as the next export does
        if (tmp_path / "report.json").exists():
            check_new_file(tmp_path / "report.json", lambda path: True)
            numbers = json.loads((tmp_path / "report.json").read_text())["numbers"]
            assert (len(numbers), len(set(numbers))) == (200, 1)
            assert len(whole(tmp_path / "out")) == 1
    fill_file(tmp_path / "report.json.new")
    with new_file(tmp_path / "report.json", lambda path: True) as partial:
        partial.write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "report.json", "report.json.new"]


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    with new_file(tmp_path / "m.onnx") as partial:
        assert (partial.parent, partial.suffix) == (tmp_path, ".onnx")
        partial.write_text("1")
        assert not (tmp_path / "m.onnx").exists()
    assert tree(tmp_path) == {"m.onnx": "1"}


def test_a_file_vanishes_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fill_file(tmp_path / "m.onnx", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(UsageError, match=r"m\.onnx exists; give a new file name"):
        fill_file(tmp_path / "m.onnx")
    assert tree(tmp_path) == {"m.onnx": "old"}


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"m\.onnx: the folder .*none does not exist"):
        fill_file(tmp_path / "none" / "m.onnx")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is a folder; give a file name"),
        (lambda path: path.symlink_to("other"), "is a link to other; name a file"),
        (lambda path: os.mkfifo(path), "is not a regular file, such as a device or a pipe"),
        (lambda path: path.write_text("old"), "exists; give a new file name"),
    ],
    ids=["folder", "link", "pipe", "file"],
)
def test_what_is_not_a_new_file_is_refused_and_stays(make: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    make(path)  # type: ignore[operator]
    before = path.lstat()
    for write in (check_new_file, fill_file):
        with pytest.raises(UsageError, match=message):
            write(path)
    assert path.lstat() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_device_stays_a_device() -> None:
    before = Path(os.devnull).stat().st_rdev
    with pytest.raises(UsageError, match="is not a regular file"):
        fill_file(Path(os.devnull))
    assert Path(os.devnull).stat().st_rdev == before


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def fails() -> None:
        with new_file(tmp_path / "f") as partial:
            partial.write_text("new")
            (tmp_path / "f").write_text("mine")

    with pytest.raises(UsageError, match="f exists; give a new file name"):
        fails()
    assert tree(tmp_path) == {"f": "mine"}


def test_outputs_and_inputs_are_distinct_by_real_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(".")
    a, other = tmp_path / "a", tmp_path / "link" / "a"
    check_distinct({"-o": a, "--html": None}, {"--inputs": tmp_path / "b", "MODEL": tmp_path / "b"})
    with pytest.raises(UsageError, match=r"-o and --html both name .*link/a; name another file for --html"):
        check_distinct({"-o": a, "--html": other}, {})
    with pytest.raises(UsageError, match=r"--inputs and -o both name .*/a; name another file for -o"):
        check_distinct({"-o": a}, {"--inputs": other})


# Companions and hashes ------------------------------------------------------------------------------------------------


def test_companions_are_configs_and_tokenizers_and_nothing_else(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "README.md",
        "secret.json",
    ):
        (source / name).write_text(name)
    (source / "vocab.json").mkdir()
    copy_companions(source, folder)
    assert tree(folder) == {name: name for name in ("chat_template.jinja", "config.json", "tokenizer.json")}


def test_companions_of_a_place_that_is_missing_are_none(tmp_path: Path) -> None:
    copy_companions(tmp_path / "none", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_companions_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / "real.json").write_text("inside")
    (source / "config.json").symlink_to("../secret")
    (source / "tokenizer.json").symlink_to("real.json")
    (source / "vocab.json").symlink_to("/dev/zero")
    notes = copy_companions(source, folder)
    assert tree(folder) == {"tokenizer.json": "inside"}
    assert notes == [f"config.json was not copied, because it is a link that leads out of {source}"]


def test_companions_of_the_hubs_cache_are_links_to_blobs(tmp_path: Path) -> None:
    source, folder = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "folder"
    source.mkdir(parents=True)
    folder.mkdir()
    (source.parent.parent / "blobs").mkdir()
    (source.parent.parent / "blobs" / "5678").write_text("blob")
    (source / "config.json").symlink_to("../../blobs/5678")
    assert copy_companions(source, folder) == []
    assert tree(folder) == {"config.json": "blob"}


def test_companions_do_not_replace_a_file_of_the_model(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    for place in (source, folder):
        place.mkdir()
        (place / "config.json").write_text(place.name)
    (source / "vocab.json").write_text("")
    (source / "vocab.json").chmod(0o600)
    notes = copy_companions(source, folder)
    assert notes == ["config.json was not copied, because a file of the model has that name"]
    assert tree(folder) == {"config.json": "folder", "vocab.json": ""}
    assert stat.S_IMODE((folder / "vocab.json").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("sources", "mode"), [([], 0o664), ([0o600], 0o600), ([0o644, 0o640], 0o640), ([0o400], 0o600)]
)
def test_a_file_is_no_more_readable_than_what_it_was_made_from(sources: list[int], mode: int, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.write_text("")
    made.chmod(0o664)
    for number, source in enumerate(sources):
        (tmp_path / str(number)).write_text("")
        (tmp_path / str(number)).chmod(source)
    restrict_mode(made, [tmp_path / str(number) for number in range(len(sources))])
    assert stat.S_IMODE(made.stat().st_mode) == mode
