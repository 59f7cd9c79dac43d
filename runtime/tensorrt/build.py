"""Build a TensorRT engine from an exported folder or an .onnx file, and prove what runs its norms."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...export.files import sha256
from ...export.manifest import versions
from ...models import errors
from ...models.errors import EnvironmentMissingError, MismatchError, RmsnormDeployError, UnsupportedError, UsageError
from ...plugins.tensorrt import library
from ..exported import Exported, open_exported
from . import worker
from .api import check_installed, cuda_device, flavor_of, library_folders, link_libraries, resolve_architectures
from .cache import EngineCache, engine_key
from .network import NetworkFile, read_network
from .options import BuildOptions
from .profiles import Profile, make_profiles

SCHEMA: Final = "rmsnorm_deploy.engine/1"
# The first line of every log, by which it is known as ours.
LOG_HEADER: Final = "# rmsnorm build"
_POLL_SECONDS: Final = 0.1
# Keys of a model's config that tell how many positions it has.
_LIMITS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a build is.

    Attributes:
        phase: what is being done, in TensorRT's own words while it builds.
        step: steps of the phase that are done, where it has any.
        steps: how many it has.
    """

    phase: str
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class PluginUse:
    """Which plugins a build registers.

    Attributes:
        kind: `library`, `python`, or `none`.
        library: the C++ library's file.
        reason: why, for people.
    """

    kind: str
    library: Path | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON, with the library's hash."""
        place = self.library
        return {
            "kind": self.kind,
            "library": None if place is None else str(place),
            "sha256": None if place is None else sha256(place),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine.

    Attributes:
        path: its file.
        record: what stands in the JSON file beside it: norms, profiles, versions, hashes.
        from_cache: whether it was there already.
    """

    path: Path
    record: dict[str, Any]
    from_cache: bool = False

    @property
    def log(self) -> Path:
        """TensorRT's messages."""
        return _log_of(self.path)

    @property
    def record_file(self) -> Path:
        """The JSON file."""
        return _record_of(self.path)


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Everything that is decided before TensorRT runs.

    Attributes:
        source: what was asked for.
        network: the file that is built.
        options: as given.
        architectures: what the engine is for.
        profiles: its optimization profiles.
        plugin: which plugins are registered.
    """

    source: Exported
    network: NetworkFile
    options: BuildOptions
    architectures: tuple[int, ...]
    profiles: list[Profile]
    plugin: PluginUse


def build_engine(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: BuildOptions | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **choices: Any,
) -> Engine:
    """Build an engine.

    Args:
        source: an exported folder, or an .onnx file.
        output: the engine's file. Beside it come `OUTPUT.json`, the record, and `OUTPUT.log`, TensorRT's messages. An
            earlier engine of ours there is replaced, anything else is refused.
        options: how to build; or its fields as further arguments, such as `runtime="rtx"`.
        cache: a folder of engines that were built before; an equal one is copied from there, a new one is put there.
        progress: called as the build goes on.

    Returns:
        The engine with its record. Nothing but the log is left where the build fails.

    Raises:
        UsageError: the file, a profile or the output is wrong.
        UnsupportedError: TensorRT or the plugin cannot do the model; the message names node and cause.
        EnvironmentMissingError: TensorRT or a GPU is missing.
        MismatchError: a norm that belongs to the plugin is run by something else.
        RmsnormDeployError: the builder failed; the message holds the end of its log.
    """
    options = options or BuildOptions(**choices)
    tell = progress or (lambda _: None)
    place = Path(output).expanduser().absolute()
    _check_place(place)
    check_installed(options.runtime)
    tell(Progress("reading the model"))
    with plan_build(source, options) as plan:
        _check_not_input(place, plan)
        return _built(plan, place, None if cache is None else EngineCache(cache), tell)


@contextmanager
def plan_build(source: str | os.PathLike[str], options: BuildOptions, elsewhere: bool = False) -> Iterator[BuildPlan]:
    """Decide everything that can be decided without TensorRT. The plan's file may vanish at the end of the block.

    Args:
        source: an exported folder, or an .onnx file.
        options: how to build.
        elsewhere: plan a build on another machine: the GPU and the plugin need not be here.

    Raises:
        UsageError, UnsupportedError, EnvironmentMissingError: as `build_engine`.
    """
    exported = open_exported(Path(source))
    architectures = resolve_architectures(options.runtime, options.architectures, elsewhere)
    with contextlib.ExitStack() as stack:
        network = read_network(exported.model, options.float64_as_float32)
        if options.norm == "plugin" and not network.plugin_nodes:
            if elsewhere:
                raise UsageError(
                    f"{exported.model}: no norm of it is the plugin's yet. Make a file whose norms are, and name that: "
                    "rmsnorm rewrite --target plugin"
                )
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rmsnorm-build-")))
            network = _with_plugins(exported, folder / "model", options)
        longest = _longest(exported)
        profiles = make_profiles(network.inputs, options.profiles, longest)
        # A library that will be there is not asked for here.
        plugin = choose_plugin(dataclasses.replace(options, plugin="auto") if elsewhere else options, network)
        yield BuildPlan(exported, network, options, architectures, profiles, plugin)


def choose_plugin(options: BuildOptions, network: NetworkFile) -> PluginUse:
    """The one place that decides between the C++ library and the plugins in Python.

    Raises:
        EnvironmentMissingError: the library was asked for and is not there.
        UnsupportedError: every norm is to run natively, and the file has nothing but the plugin for it.
    """
    if options.norm == "native" and network.plugin_nodes and not network.functions:
        raise UnsupportedError(
            f"{network.path}: its norms are the plugin's and the file has no local functions, so --norm native cannot "
            "build it. Export it for the target standard or primitives."
        )
    if options.norm == "native" or not network.plugin_nodes:
        return PluginUse(
            "none", None, "no norm of the file is the plugin's" if not network.plugin_nodes else "--norm native"
        )
    if options.plugin == "python":
        return PluginUse("python", None, "--plugin python")
    named = options.plugin_library
    place = Path(named).expanduser().absolute() if named is not None else library.find_library()
    if place is not None and not place.is_file():
        raise UsageError(f"--plugin-library: there is no {place}. Make one with: rmsnorm plugin build")
    if place is not None:
        return PluginUse("library", place, "the library is there" if named is None else "--plugin-library")
    if options.plugin == "library":
        raise EnvironmentMissingError(
            f"the plugin's library is not there: expected {library.default_folder() / library.LIBRARY_NAME}, or the "
            f"file that {library.LIBRARY_VARIABLE} names. Make it with: rmsnorm plugin build"
        )
    return PluginUse(
        "python", None, "the library is not there (rmsnorm plugin build makes it); the engine needs Python to run"
    )


def _with_plugins(exported: Exported, folder: Path, options: BuildOptions) -> NetworkFile:
    """The file with its norms given to the plugin, as `rmsnorm rewrite --target plugin` would write it."""
    from ..rewriting import rewrite_model

    rewritten = rewrite_model(exported.model, folder, target="plugin", verify=False)
    network = read_network(rewritten.model, options.float64_as_float32)
    if not network.plugin_nodes:
        raise UnsupportedError(f"{exported.model}: no norm was found that the plugin could run.")
    return network


def _longest(exported: Exported) -> int | None:
    """How many positions the model has, by the config beside it."""
    file = (exported.folder or exported.model.parent) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for content in (config, config.get("text_config") if isinstance(config, dict) else None):
        if not isinstance(content, dict):
            continue
        for key in _LIMITS:
            if isinstance(content.get(key), int) and content[key] > 0:
                return int(content[key])
    return None


# Running --------------------------------------------------------------------------------------------------------


def _built(plan: BuildPlan, place: Path, cache: EngineCache | None, tell: Callable[[Progress], None]) -> Engine:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {place.parent}: {error.strerror or error}.") from error
    try:
        if cache is None:
            record, cached = _made(plan, folder, place, tell), False
        else:
            record, cached = _cached(plan, folder, place, cache, tell)
        record |= {"engine": place.name, "log": _log_of(place).name}
        _move(folder, place, record)
        return Engine(place, record, cached)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made(plan: BuildPlan, folder: Path, place: Path, tell: Callable[[Progress], None]) -> dict[str, Any]:
    """Build the engine in `folder`; its record."""
    try:
        result = run_worker(request_of(plan), folder, plan.options, tell)
        _check_norms(result["norms"], plan)
    except RmsnormDeployError as error:
        _keep_log(folder / worker.LOG, place)
        raise type(error)(f"{error} (log: {_log_of(place)})") from error
    return _record(plan, folder / worker.ENGINE, result)


def _cached(
    plan: BuildPlan, folder: Path, place: Path, cache: EngineCache, tell: Callable[[Progress], None]
) -> tuple[dict[str, Any], bool]:
    """Take the engine from the cache, or build it and put it there; its record, and whether it was there."""
    tell(Progress("looking into the cache"))
    with cache.entry(engine_key(plan)) as entry:
        found = entry.read(folder)
        if found is not None:
            return found, True
        record = _made(plan, folder, place, tell)
        entry.write(folder, record)
        return record, False


def request_of(plan: BuildPlan) -> dict[str, Any]:
    """What the worker is asked to do."""
    network = plan.network
    return {
        "model": str(network.path.absolute()),
        "shown": str(plan.source.model),
        "options": plan.options.to_dict(),
        "architectures": list(plan.architectures),
        "profiles": [profile.to_dict() for profile in plan.profiles],
        "plugin": {
            "kind": plan.plugin.kind,
            "library": None if plan.plugin.library is None else str(plan.plugin.library),
        },
        "plugin_nodes": network.plugin_nodes,
        "norms": [
            {"path": n.path, "form": n.form, "node": n.node, "nodes": sorted(n.nodes), "is_plugin": n.is_plugin}
            for n in network.norms
        ],
        "events": None,
    }


def run_worker(
    request: dict[str, Any], folder: Path, options: BuildOptions, tell: Callable[[Progress], None]
) -> dict[str, Any]:
    """Run one request in a process of its own.

    Args:
        request: see `request_of`.
        folder: a new folder for the request, the log and the answer.
        options: for the runtime and the memory limit.
        tell: called as the build goes on.

    Raises:
        RmsnormDeployError: what the worker reports, or how it ended.
    """
    links = folder / "lib"
    links.mkdir()
    link_libraries(options.runtime, links)
    reading, writing = os.pipe()
    request = {**request, "events": writing, "parent": os.getpid()}
    (folder / worker.REQUEST).write_text(json.dumps(request), encoding="utf-8")
    log = folder / worker.LOG
    log.write_text(f"{LOG_HEADER} {request['shown']}\n", encoding="utf-8")
    command = [sys.executable, "-m", "rmsnorm_deploy.runtime.tensorrt.worker", str(folder)]
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(writing,),
                start_new_session=True, env=_environment(request, options.runtime, links),
            )  # fmt: skip
    finally:
        os.close(writing)
    listener = threading.Thread(target=_listen, args=(reading, tell), daemon=True)
    listener.start()
    try:
        over = _wait(process, options.memory_limit)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        listener.join()
    return _answer(folder, process.returncode, over, options)


def _environment(request: dict[str, Any], runtime: str, links: Path) -> dict[str, str]:
    places = [str(links), *map(str, library_folders(runtime)), os.environ.get("LD_LIBRARY_PATH", "")]
    found = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(place for place in places if place),
        "PYTHONUNBUFFERED": "1",
        library.ARCHITECTURES_VARIABLE: ",".join(map(str, request["architectures"])),
    }
    nvrtc = library.find_nvrtc()
    if nvrtc is not None:
        found.setdefault(library.NVRTC_VARIABLE, str(nvrtc))
    return found


def _listen(reading: int, tell: Callable[[Progress], None]) -> None:
    with os.fdopen(reading, encoding="utf-8") as events:
        for line in events:
            with contextlib.suppress(ValueError, TypeError):
                tell(Progress(**json.loads(line)))


def _wait(process: subprocess.Popen[bytes], limit: int | None) -> int | None:
    """Wait for the worker; the MiB that it took where that was too much, and it was ended."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
            return None
        taken = _resident(process.pid) if limit is not None else 0
        if limit is not None and taken > limit:
            process.kill()
            return taken


def _resident(pid: int) -> int:
    """MiB of memory that a process has."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def _answer(folder: Path, code: int, over: int | None, options: BuildOptions) -> dict[str, Any]:
    title = flavor_of(options.runtime).title
    if over is not None:
        raise RmsnormDeployError(
            f"{title}'s builder had {over} MiB of memory, and --memory-limit is {options.memory_limit}; it was ended."
        )
    try:
        result: dict[str, Any] = json.loads((folder / worker.RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RmsnormDeployError(f"{title}'s builder {_ending(code)}: {_last_lines(folder / worker.LOG)}") from None
    if "error" in result:
        kind = getattr(errors, result["error"]["kind"], RmsnormDeployError)
        raise kind(result["error"]["message"])
    if code:
        raise RmsnormDeployError(f"{title}'s builder {_ending(code)} after it had made the engine.")
    return result


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    return " | ".join(line[:300] for line in lines[-5:]) or "its log is empty"


def _check_norms(rows: list[dict[str, Any]], plan: BuildPlan) -> None:
    """Every norm that was given to the plugin must be run by it in the engine too."""
    if plan.plugin.kind == "none":
        return
    wanted = {norm.path for norm in plan.network.norms if norm.is_plugin}
    lost = [row for row in rows if row["path"] in wanted and not row["plugin"]]
    if lost:
        row = lost[0]
        raise MismatchError(
            f"{len(lost)} of {len(wanted)} norms that belong to the plugin are run by something else in the engine; "
            f"the first is {row['path']}, run by {row['layer'] or 'no layer that names it'}."
        )


# Files ----------------------------------------------------------------------------------------------------------


def _record_of(place: Path) -> Path:
    return place.with_name(place.name + ".json")


def _log_of(place: Path) -> Path:
    return place.with_name(place.name + ".log")


def _record(plan: BuildPlan, engine: Path, result: dict[str, Any]) -> dict[str, Any]:
    network, device = plan.network, cuda_device()
    flavor = flavor_of(plan.options.runtime)
    return {
        "schema": SCHEMA,
        "engine": None,  # name of the file, and of the log below: where they end up
        "bytes": engine.stat().st_size,
        "sha256": sha256(engine),
        "runtime": {"name": plan.options.runtime, "title": flavor.title, "version": result["version"]},
        "architectures": [f"sm_{number}" for number in plan.architectures],
        "gpu": None if device is None else device[0],
        "model": {"path": str(plan.source.model), "sha256": sha256(plan.source.model)},
        "norm": plan.options.norm,
        "plugin": plan.plugin.to_dict(),
        "plugin_layers": result["plugin_layers"],
        "norms": result["norms"],
        "layer_source": result["layer_source"],
        "kernels": result["kernels"],
        "inputs": [{"name": given.name, "dims": list(given.dims)} for given in network.inputs],
        "profiles": [profile.to_dict() for profile in plan.profiles],
        "options": plan.options.to_dict(),
        "warnings": result["warnings"],
        "seconds": {"parse": result["parse_seconds"], "build": result["build_seconds"]},
        "versions": versions(),
        "log": None,
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _move(folder: Path, place: Path, record: dict[str, Any]) -> None:
    """Put the three files in place; the record, which knows the engine's hash, comes last."""
    written = folder / "record.json"
    written.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    try:
        with _alone(place.parent):
            (folder / worker.LOG).replace(_log_of(place))
            (folder / worker.ENGINE).replace(place)
            written.replace(_record_of(place))
    except OSError as error:
        raise UsageError(f"writing {place} failed: {error.strerror or error}.") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other build put files into the folder meanwhile: three files of one build belong together."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _keep_log(log: Path, place: Path) -> None:
    with contextlib.suppress(OSError):
        log.replace(_log_of(place))


def _check_place(place: Path) -> None:
    """Make sure that nothing is replaced which an earlier build did not write.

    Raises:
        UsageError: something else is there.
    """
    if place.name in ("", ".", "..") or place.is_dir():
        raise UsageError(f"-o: expected the engine's file, such as model.engine, got the directory {place}.")
    record, log = _record_of(place), _log_of(place)
    ours = read_record(place) is not None
    for file in (place, record):
        if (file.exists() or file.is_symlink()) and (not ours or file.is_symlink() or not file.is_file()):
            raise UsageError(f"{file} exists and is not an engine that rmsnorm built; name another file.")
    if log.exists() or log.is_symlink():
        try:
            known = (
                log.is_file() and not log.is_symlink() and log.open("rb").read(len(LOG_HEADER)) == LOG_HEADER.encode()
            )
        except OSError:
            known = False
        if not known:
            raise UsageError(f"{log} exists and is not the log of a build; name another engine.")


def _check_not_input(place: Path, plan: BuildPlan) -> None:
    inputs = {plan.source.model.resolve(), *(file.resolve() for file in plan.network.external_files)}
    for file in (place, _record_of(place), _log_of(place)):
        if file.resolve() in inputs:
            raise UsageError(f"{file} is a file of the model; name another engine.")


def read_record(place: Path) -> dict[str, Any] | None:
    """The record beside an engine; None where there is none of ours."""
    file = _record_of(place)
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError):
        return None
    if isinstance(content, dict) and content.get("schema") == SCHEMA and content.get("engine") == place.name:
        return content
    return None
