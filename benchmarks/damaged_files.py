"""Run the commands that read files on damaged files: they must refuse them, or work, and never crash.

    python -m benchmarks.damaged_files --count 1000 --seed 0

Honest reports, manifests, .npz, .safetensors and ONNX files are damaged: bits, truncation, JSON of other types at
random places, deep nesting, fields of protobuf messages, huge dims, odd names. `compare`, `validate --replay` without
`--allow-code`, `validate`, `run`, `inspect` and `rewrite` read them in a child process, in which a crash of a library
or an endless run harms nothing else. A table shows the exit codes by kind. The exit code is 1 if a run ended with 70
(a bug), took more than `--limit` seconds, ended its process, or changed anything outside of its own folder; the files
of such runs are written to `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from rmsnorm_deploy.cli.application import run

from .fuzz_rewrite.damage import damaged
from .fuzz_rewrite.sound_models import sound_models

MEMORY = 24 << 30  # bytes of address space of the child
BUG, TIMEOUT, CRASH, OUTSIDE = 70, "hung", "crashed", "wrote outside"
LOG = "child.log"
WRONG = (BUG, TIMEOUT, CRASH, OUTSIDE)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1 << 50, 1 << 80, 10**400, 1.5, 1e308, "", "x", "12", "nan", "..", "/etc/passwd", "a\0b",
    "\ud800", "\udcff", "\x1b[31m", "n" * 5000, [], {}, [None], [[1]], {"a": 1}, [1 << 50], [-1],
)  # fmt: skip
NAMES = (".npy", "..", "../x.npy", "a\x1b[2J.npy", "x", "d/", "x.txt", "n" * 3000 + ".npy", "input_ids.npy")
Files = dict[str, bytes]
Damage = Callable[[random.Random, Files, Path], list[list[str]]]


class HungError(BaseException):
    """The time limit of one command; not an Exception, so that no handler takes it for an error of the command."""


def honest_files(folder: Path) -> Files:
    """An exported folder, its report, and arrays, made by the commands themselves."""
    with _silent():
        assert run(["export", "builtin:small", "-o", str(folder / "out")]) == 0
        here = Path.cwd()
        os.chdir(folder)
        try:
            arguments = ["--against", "builtin:small", "--shape", "1x3", "-o", "report.json"]
            assert run(["validate", "out", *arguments]) == 0
        finally:
            os.chdir(here)
    from safetensors.numpy import save

    ids, x = {"input_ids": np.arange(3).reshape(1, 3)}, {"x": np.ones((2, 8), np.float32)}
    files = {f"out/{path.name}": path.read_bytes() for path in (folder / "out").iterdir()}
    return {**files, "report.json": (folder / "report.json").read_bytes(), "ids.npz": _npz(ids), "x.npz": _npz(x),
            "ids.safetensors": save(ids)}  # fmt: skip


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


# Damage -----------------------------------------------------------------------------------------------------------


def _bytes(chance: random.Random, data: bytes) -> bytes:
    content = bytearray(data)
    if chance.random() < 0.25:
        return bytes(content[: chance.randrange(len(content))])
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from _places(inner, (*place, key))


def _json(chance: random.Random, data: bytes) -> bytes:
    """JSON with one to three values of other types, with a deep nesting, or with damaged bytes."""
    kind = chance.random()
    if kind < 0.2:
        return _bytes(chance, data)
    content = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        short = [place for place in _places(content) if len(place) <= chance.randint(1, 6)]
        if not short:
            break
        place = chance.choice(short)
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        if chance.random() < 0.15:
            del inner[place[-1]]
        else:
            inner[place[-1]] = copy.deepcopy(chance.choice(VALUES))
    text = json.dumps(content)
    if kind < 0.3:
        depth = chance.choice((50, 99, 500, 100_000))
        text = text.replace("[]", "[" * depth + "]" * depth, 1)
    return text.encode()


def _zip(chance: random.Random, data: bytes) -> bytes:
    """An archive with other names, members, headers or sizes."""
    if chance.random() < 0.4:
        return _bytes(chance, data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            content = old.read(info)
            if chance.random() < 0.5:
                content = chance.choice((_bytes(chance, content), _header(chance) + content[-24:], b"\0" * (1 << 24)))
            new.writestr(chance.choice((info.filename, info.filename, *NAMES)), content)
    return buffer.getvalue()


def _header(chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    shape = tuple(chance.choice((-1, 0, 1, 3, 1 << 40, 1 << 62, 1 << 70)) for _ in range(chance.randrange(5)))
    descr = chance.choice(("<f4", "|O", "<i8", "|V2", "|S5", "<U3", "<c8", "|b1", ">f8", "<f2"))
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr, "fortran_order": chance.random() < 0.5, "shape": shape}
    )
    return buffer.getvalue()


def _tensors(chance: random.Random, data: bytes) -> bytes:
    """A .safetensors file with another header."""
    if chance.random() < 0.4:
        return _bytes(chance, data)
    size = int.from_bytes(data[:8], "little")
    header = _json(chance, data[8 : 8 + size])
    length = chance.choice((len(header), len(header), len(header), 1 << 62, 0))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def _report(chance: random.Random, files: Files, folder: Path) -> list[list[str]]:
    (folder / "damaged.json").write_bytes(_json(chance, files["report.json"]))
    return [["compare", "report.json", "damaged.json"], ["compare", "damaged.json", "report.json", "--json"],
            ["validate", "--replay", "damaged.json", "-o", "again.json"]]  # fmt: skip


def _manifest(chance: random.Random, files: Files, folder: Path) -> list[list[str]]:
    (folder / "out" / "manifest.json").write_bytes(_json(chance, files["out/manifest.json"]))
    return [["inspect", "out"], ["run", "out", "--inputs", "ids.npz", "-o", "y.npz"],
            ["validate", "out", "--against", "builtin:small", "--outputs-only", "--shape", "1x3"]]  # fmt: skip


def _arrays(name: str, change: Callable[[random.Random, bytes], bytes]) -> Damage:
    def damage(chance: random.Random, files: Files, folder: Path) -> list[list[str]]:
        path = f"damaged{Path(name).suffix}"
        (folder / path).write_bytes(change(chance, files[name]))
        return [["compare", name, path], ["compare", path, path, "--json"],
                ["run", "out", "--inputs", path, "-o", "y.npz"]]  # fmt: skip

    return damage


def _graph(chance: random.Random, files: Files, folder: Path) -> list[list[str]]:
    model = chance.choice(sound_models())
    if chance.random() < 0.3:
        dims = chance.choice(model.graph.input).type.tensor_type.shape.dim
        if dims:
            chance.choice(dims).dim_value = chance.choice((1 << 40, 1 << 50, 1 << 62, -(1 << 40), 0))
    if chance.random() < 0.1:
        chance.choice(model.graph.node).name = "NAME"
    data = damaged(chance, model)
    (folder / "damaged.onnx").write_bytes(data.replace(b"NAME", b"\xff\xfe\xfd\xfc"))
    target = chance.choice(("primitives", "standard", "ort", "plugin"))
    return [["inspect", "damaged.onnx", "--json"], ["rewrite", "damaged.onnx", "-o", "new", "--target", target],
            ["run", "damaged.onnx", "--inputs", "x.npz", "-o", "y.npz"],
            ["validate", "damaged.onnx", "--against", "builtin:small", "--outputs-only"]]  # fmt: skip


def _config(chance: random.Random, files: Files, folder: Path) -> list[list[str]]:
    (folder / "model").mkdir()
    config = {"format": "rmsnorm_deploy.decoder/1", "width": 8, "layers": [], "model_type": "llama", "vocab_size": 8}
    (folder / "model" / "config.json").write_bytes(_json(chance, json.dumps(config).encode()))
    return [["inspect", "model"], ["validate", "out", "--against", "model"]]


KINDS: dict[str, Damage] = {
    "report": _report,
    "manifest": _manifest,
    "npz": _arrays("ids.npz", _zip),
    "safetensors": _arrays("ids.safetensors", _tensors),
    "onnx": _graph,
    "config": _config,
}


# Runs -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _silent() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def _hang(number: int, frame: FrameType | None) -> None:
    raise HungError


def _in_child(seed: int, first: int, count: int, root: Path, files: Files, limit: int, pipe: Connection) -> None:
    """Run cases from `first` on, and send each result: number, kind, command, exit code, last line of the output."""
    import resource

    os.environ["HF_HUB_OFFLINE"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _hang)
    with (root.parent / LOG).open("w") as log:  # native libraries write to the descriptors
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for number in range(first, count):
        kind = list(KINDS)[number % len(KINDS)]
        pipe.send((number, kind, ["prepare"], None, ""))  # a fault of this module is not one of the last command
        folder = root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        os.chdir(folder)
        for arguments in KINDS[kind](random.Random(f"{seed}/{number}"), files, folder):
            pipe.send((number, kind, arguments, None, ""))
            signal.alarm(limit)
            try:
                with _silent() as text:
                    code: int | str = run(arguments)
            except HungError:
                code = TIMEOUT
            finally:
                signal.alarm(0)
            if {path.name for path in root.iterdir()} != {"case"}:
                code = OUTSIDE
            lines = text.getvalue().strip().splitlines() or [""]
            pipe.send((number, kind, arguments, code, next((t for t in lines if t.startswith("error:")), lines[-1])))
    pipe.send(None)


class Outcomes:
    """The number of runs by kind, command and exit code, and the wrong runs."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[int | str]] = defaultdict(Counter)
        self.wrong: list[str] = []

    def __str__(self) -> str:
        codes = sorted({code for counts in self.counts.values() for code in counts}, key=str)
        lines = [f"{'file':12} {'command':10}" + "".join(f"{code!s:>8}" for code in codes)]
        for (kind, command), counts in sorted(self.counts.items()):
            lines.append(f"{kind:12} {command:10}" + "".join(f"{counts[code]:>8}" for code in codes))
        return "\n".join([*lines, *self.wrong])


def fuzz(seed: int, count: int, out: Path, limit: int) -> Outcomes:
    """Run `count` cases; a child that ended is replaced, and continues with the next case."""
    outcomes = Outcomes()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="damaged-") as place:
        honest = Path(place) / "honest"
        honest.mkdir()
        files = honest_files(honest)
        root = Path(place) / "runs"
        root.mkdir()
        number = 0
        while number < count:
            ours, theirs = context.Pipe(duplex=False)
            arguments = (seed, number, count, root, files, limit, theirs)
            child = context.Process(target=_in_child, args=arguments)
            child.start()
            theirs.close()
            running: tuple[int, str, list[str]] | None = None
            done = False
            while not done:
                ready = ours.poll(4 * limit + 60)  # a native call does not see the alarm
                try:
                    message = ours.recv() if ready else ()
                except EOFError:
                    message = ()
                if message is None:
                    number, done = count, True
                elif message == ():
                    child.kill()
                    if running is not None:
                        _note(
                            outcomes, *running, CRASH if ready else TIMEOUT, _tail(root.parent / LOG), root, out, seed
                        )
                    number, done = (number if running is None else running[0]) + 1, True
                elif message[3] is None:
                    running = message[:3]
                else:
                    _note(outcomes, *message, root, out, seed)
            child.join()
            for path in root.iterdir():
                if path.name != "case":  # written by a wrong run
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return outcomes


def _tail(log: Path) -> str:
    """The end of what the child wrote: the message of a native library that ended it."""
    return log.read_text(errors="replace")[-300:] if log.exists() else ""


def _note(
    outcomes: Outcomes, number: int, kind: str, arguments: list[str], code: int | str, last: str, root: Path, out: Path,
    seed: int,
) -> None:  # fmt: skip
    outcomes.counts[kind, arguments[0]][code] += 1
    if code in WRONG:
        kept = out / f"{kind}-{seed}-{number}"
        if not kept.exists() and (root / "case").is_dir():
            shutil.copytree(root / "case", kept)
        outcomes.wrong.append(f"WRONG {code}: rmsnorm {' '.join(arguments)} in {kept}: {last[:300]!a}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.damaged_files", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=30, help="seconds for each command")
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="folder for the files of wrong runs")
    given = parser.parse_args()
    outcomes = fuzz(given.seed, given.count, given.out.absolute(), given.limit)
    print(outcomes)
    return 1 if outcomes.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
