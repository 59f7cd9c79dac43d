"""How builds end: interrupted, killed, crashed, or two at once. Nothing is left behind, and the log is kept."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from rmsnorm_deploy.models.errors import RmsnormDeployError, UsageError
from rmsnorm_deploy.runtime.tensorrt.build import build_engine
from rmsnorm_deploy.runtime.tensorrt.engine_files import read_record
from rmsnorm_deploy.runtime.tensorrt.process import LOG_HEADER, Progress
from tests.helpers.tensorrt.tensorrt_models import rms_norm_model

pytest.importorskip("tensorrt_rtx", reason="needs the builder: pip install 'rmsnorm-deploy[rtx]'")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

# Every architecture and profile is compiled by itself, so that this takes long enough.
ARCHITECTURES = (80, 86, 89, 120, 121)
LAYERS, WIDTH = 96, 128
PROFILES = ("rows:1,1,8", "rows:1,16,64", "rows:1,128,512")
PATIENCE = 60.0


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose build takes several seconds."""
    folder = tmp_path_factory.mktemp("slow")
    generator = np.random.default_rng(0)
    nodes, weights = [], [numpy_helper.from_array(np.array([-1]), "axes")]
    value = "x"
    for layer in range(LAYERS):
        # Widths of its own for each layer: equal kernels are compiled once.
        inner = WIDTH + 8 * layer
        for name, shape in (("u", (WIDTH, inner)), ("w", (inner, WIDTH))):
            weights.append(numpy_helper.from_array(generator.normal(size=shape).astype("f4"), f"{name}{layer}"))
        steps = [
            ("MatMul", [value, f"u{layer}"], "m"), ("Mul", [f"m{layer}", f"m{layer}"], "s"),
            ("ReduceMean", [f"s{layer}", "axes"], "a"), ("Sqrt", [f"a{layer}"], "r"),
            ("Div", [f"m{layer}", f"r{layer}"], "d"), ("Softmax", [f"d{layer}"], "p"),
            ("MatMul", [f"p{layer}", f"w{layer}"], "o"), ("Add", [value, f"o{layer}"], "y"),
        ]  # fmt: skip
        nodes += [helper.make_node(op, given, [f"{made}{layer}"], f"{made}{layer}") for op, given, made in steps]
        value = f"y{layer}"
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "slow",
        [tensor("x", TensorProto.FLOAT, ["rows", WIDTH])],
        [tensor(value, TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def processes_with(text: str) -> list[int]:
    """Processes that have this text on their command line, zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def workers_of(place: Path) -> list[int]:
    return processes_with(f"{place.parent}/.{place.name}.partial-")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited for {what}")


@contextmanager
def building(source: Path, place: Path) -> Iterator[subprocess.Popen[str]]:
    """`rmsnorm build` in the middle of TensorRT's builder."""
    command = [sys.executable, "-m", "rmsnorm_deploy", "build", str(source), "-o", str(place), "--json"]
    command += [f"--arch={','.join(map(str, ARCHITECTURES))}", *(f"--profile={text}" for text in PROFILES)]
    process = subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "RMSNORM_PROGRESS": "1"},
    )
    try:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line.strip())
            if len(seen) > 1 and seen[-2] == "... parsing":  # the builder's first phase
                break
        assert "... parsing" in seen[:-1], seen
        assert process.poll() is None
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_nothing(number: signal.Signals, code: int, slow: Path, tmp_path: Path) -> None:
    place = tmp_path / "m.engine"
    with building(slow, place) as process:
        assert len(workers_of(place)) == 1
        sent = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert time.monotonic() - sent < 10
    assert json.loads(out)["error"] == {
        "kind": "Interrupted", "exit_code": code,
        "message": {130: "interrupted", 143: "terminated"}[code] + "; no incomplete files were left behind.",
    }  # fmt: skip
    assert "Traceback" not in err
    assert workers_of(place) == []
    assert list(tmp_path.iterdir()) == []


def test_the_worker_ends_with_its_parent(slow: Path, tmp_path: Path) -> None:
    place = tmp_path / "m.engine"
    with building(slow, place) as process:
        assert len(workers_of(place)) == 1
        process.kill()
        process.wait(PATIENCE)
        wait_until(lambda: not workers_of(place), "the worker's end", 10)
    assert not place.exists()
    assert not Path(f"{place}.json").exists()


@pytest.mark.parametrize(("number", "hint"), [
    (signal.SIGKILL, "was terminated by SIGKILL (out of memory?)"), (signal.SIGSEGV, "was terminated by SIGSEGV"),
])  # fmt: skip
def test_a_worker_that_is_killed(number: signal.Signals, hint: str, slow: Path, tmp_path: Path) -> None:
    place = tmp_path / "m.engine"
    with building(slow, place) as process:
        (worker,) = workers_of(place)
        os.kill(worker, number)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    error = json.loads(out)["error"]
    assert error["kind"] == "RmsnormDeployError"
    assert error["message"].startswith(f"TensorRT-RTX's builder {hint}: ")
    assert error["message"].endswith(f"(log: {place}.log)")
    assert f"error: {error['message']}" in err
    assert [file.name for file in tmp_path.iterdir()] == ["m.engine.log"]
    assert Path(f"{place}.log").read_text().startswith(f"{LOG_HEADER} {slow}\n")


def test_a_failed_build_leaves_the_earlier_engine(files: Any, slow: Path, tmp_path: Path) -> None:
    place = tmp_path / "m.engine"
    before = build_engine(files.matmul(), place, architectures=(89,)).record

    def kill(progress: Progress) -> None:
        if progress.phase == "parsing":
            for worker in workers_of(place):
                os.kill(worker, signal.SIGKILL)

    with pytest.raises(RmsnormDeployError, match="was terminated by SIGKILL"):
        build_engine(slow, place, architectures=(89,), progress=kill)
    assert read_record(place) == before
    assert hashlib.sha256(place.read_bytes()).hexdigest() == before["sha256"]
    # the next build takes the failed one's log for ours
    assert build_engine(files.matmul(), place, architectures=(89,)).record["engine"] == "m.engine"


def test_progress_that_raises_ends_nothing_but_the_build(slow: Path, tmp_path: Path) -> None:
    place = tmp_path / "m.engine"

    def stop(progress: Progress) -> None:
        if progress.phase == "reading the model":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(slow, place, architectures=(89,), progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_two_builds_of_one_engine(files: Any, tmp_path: Path) -> None:
    place = tmp_path / "m.engine"
    sources = [files.matmul(name="first.onnx"), files.primitives(name="second.onnx")]
    records: list[dict[str, Any]] = []

    def build(source: Path) -> None:
        records.append(build_engine(source, place, architectures=(89,)).record)

    threads = [threading.Thread(target=build, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert {record["model"]["path"] for record in records} == set(map(str, sources))
    kept = read_record(place)
    assert kept in records
    assert kept is not None
    assert kept["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest()
    assert kept["model"]["path"] in Path(f"{place}.log").read_text().splitlines()[0]
    assert sorted(file.name for file in tmp_path.glob("*engine*")) == ["m.engine", "m.engine.json", "m.engine.log"]
    assert list(tmp_path.glob(".*")) == []


def test_what_a_killed_build_left_goes_with_the_next(tmp_path: Path) -> None:
    """Only folders that hold a build's files and nothing else, of a process that is gone."""
    source = rms_norm_model(tmp_path / "model.onnx")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    place = tmp_path / "out" / "m.engine"
    folders = {name: place.parent / f".m.engine.partial-{name}" for name in ("left", "alive", "strange", "other")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        request = {"parent": os.getpid() if name == "alive" else ended.pid}
        (folder / "request.json").write_text(json.dumps(request))
        (folder / "build.log").write_text("begun")
    (folders["strange"] / "notes.txt").write_text("mine")
    (folders["other"] / "request.json").write_text("[]")
    build_engine(source, place, architectures=(89,), plugin="python")
    assert {name: folder.exists() for name, folder in folders.items()} == {
        "left": False, "alive": True, "strange": True, "other": True,
    }  # fmt: skip
    assert sorted(file.name for file in place.parent.iterdir() if file.is_file()) == [
        "m.engine", "m.engine.json", "m.engine.log",
    ]  # fmt: skip


def test_what_a_receiver_of_progress_raises_ends_the_build(tmp_path: Path) -> None:
    source = rms_norm_model(tmp_path / "model.onnx")
    seen: list[Progress] = []

    def refuse(progress: Progress) -> None:
        seen.append(progress)
        if progress.phase == "parsing":
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        build_engine(source, tmp_path / "m.engine", architectures=(89,), plugin="python", progress=refuse)
    assert seen[-1].phase == "parsing"
    assert not (tmp_path / "m.engine").exists()
    assert not list(tmp_path.glob(".m.engine.partial-*"))


def test_an_engine_that_was_replaced_by_something_else_is_kept(tmp_path: Path) -> None:
    source = rms_norm_model(tmp_path / "model.onnx")
    place = tmp_path / "m.engine"
    build_engine(source, place, architectures=(89,), plugin="python")
    place.write_bytes(b"somebody else's")
    with pytest.raises(UsageError, match=r"m\.engine is not the engine that m\.engine\.json describes"):
        build_engine(source, place, architectures=(89,), plugin="python")
    assert place.read_bytes() == b"somebody else's"
