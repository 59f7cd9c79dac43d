"""Build a TensorRT engine from an exported folder or an .onnx file (`build_engine`), and check what runs its norms."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...export.onnx_io.manifest import versions
from ...export.onnx_io.owned_files import sha256
from ...models.errors import MismatchError, RmsnormDeployError
from ..engines.api import check_installed, cuda_device, flavor_of
from ..engines.engine_file import SCHEMA, record_of
from ..inputs.tokenizer import end_tokens
from ..tensorrt import worker
from .cache import EngineCache, engine_key
from .engine_files import check_not_input, check_place, keep_log, log_of, move_into_place, partial_folder
from .options import BuildOptions
from .plan import BuildPlan, plan_build, request_of
from .process import Progress, run_worker


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine.

    Attributes:
        path: its file.
        record: the content of the JSON file beside it: norms, profiles, versions, hashes.
        from_cache: whether it was copied from the cache.
    """

    path: Path
    record: dict[str, Any]
    from_cache: bool = False

    @property
    def log(self) -> Path:
        """The file of TensorRT's messages."""
        return log_of(self.path)

    @property
    def record_file(self) -> Path:
        """The JSON file of the record."""
        return record_of(self.path)


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
        output: the engine's file. `OUTPUT.json`, the record, and `OUTPUT.log`, TensorRT's messages, are written beside
            it. An earlier engine of this package there is replaced; any other file is an error.
        options: the options of the build; or its fields as further arguments, such as `runtime="rtx"`.
        cache: a folder of earlier engines; an equal engine is copied from there, a new one is added.
        progress: called during the build.

    Returns:
        The engine with its record. If the build fails, only the log is left.

    Raises:
        UsageError: the file, a profile or the output is wrong.
        UnsupportedError: TensorRT or the plugin does not support the model; the message names node and cause.
        EnvironmentMissingError: TensorRT or a GPU is missing.
        MismatchError: a norm of the plugin is run by another layer in the engine.
        RmsnormDeployError: the builder failed; the message contains the end of its log.
    """
    options = options or BuildOptions(**choices)
    tell = progress or (lambda _: None)
    place = Path(output).expanduser().absolute()
    check_place(place)
    check_installed(options.runtime)
    tell(Progress("reading the model"))
    with plan_build(source, options) as plan:
        check_not_input(place, (plan.source.model, *plan.network.external_files))
        return _built(plan, place, None if cache is None else EngineCache(cache), tell)


def _built(plan: BuildPlan, place: Path, cache: EngineCache | None, tell: Callable[[Progress], None]) -> Engine:
    with partial_folder(place) as folder:
        if cache is None:
            record, cached = _made(plan, folder, place, tell), False
        else:
            record, cached = _cached(plan, folder, place, cache, tell)
        record |= {"engine": place.name, "log": log_of(place).name, "model": _model_record(plan)}
        move_into_place(folder, place, record)
        return Engine(place, record, cached)


def _made(plan: BuildPlan, folder: Path, place: Path, tell: Callable[[Progress], None]) -> dict[str, Any]:
    """Build the engine in `folder`, and return its record."""
    try:
        result = run_worker(request_of(plan), folder, plan.options, tell)
        _check_norms(result["norms"], plan)
    except RmsnormDeployError as error:
        keep_log(folder / worker.LOG, place)
        raise type(error)(f"{error} (log: {log_of(place)})") from error
    return _record(plan, folder / worker.ENGINE, result)


def _cached(
    plan: BuildPlan, folder: Path, place: Path, cache: EngineCache, tell: Callable[[Progress], None]
) -> tuple[dict[str, Any], bool]:
    """Copy the engine from the cache, or build and add it; returns its record, and whether it was in the cache."""
    tell(Progress("looking up the cache"))
    with cache.entry(engine_key(plan)) as entry:
        found = entry.read(folder)
        if found is not None:
            return found, True
        record = _made(plan, folder, place, tell)
        entry.write(folder, record)
        return record, False


def _check_norms(rows: list[dict[str, Any]], plan: BuildPlan) -> None:
    """Check that the plugin runs every norm of the plugin in the engine too."""
    if plan.plugin.kind == "none":
        return
    wanted = {norm.path for norm in plan.network.norms if norm.is_plugin}
    lost = [row for row in rows if row["path"] in wanted and not row["plugin"]]
    if lost:
        row = lost[0]
        raise MismatchError(
            f"expected the plugin to run {len(wanted)} norms in the engine, but {len(lost)} are run by other layers; "
            f"the first is {row['path']}, run by {row['layer'] or 'no layer that names it'}."
        )


def _model_record(plan: BuildPlan) -> dict[str, Any]:
    """The model that was built, with what running and validating the engine has to know of it."""
    source = plan.source
    return {
        "path": str(source.model.absolute()),
        "sha256": sha256(source.model),
        "folder": None if source.folder is None else str(source.folder.absolute()),
        "manifest": source.manifest,
        "end_tokens": sorted(end_tokens(source.folder)),
    }


def _record(plan: BuildPlan, engine: Path, result: dict[str, Any]) -> dict[str, Any]:
    network, device = plan.network, cuda_device()
    flavor = flavor_of(plan.options.runtime)
    return {
        "schema": SCHEMA,
        "engine": None,  # the file names of the engine and of the log below are set when they are final
        "bytes": engine.stat().st_size,
        "sha256": sha256(engine),
        "runtime": {"name": plan.options.runtime, "title": flavor.title, "version": result["version"]},
        "architectures": [f"sm_{number}" for number in plan.architectures],
        "gpu": None if device is None else device[0],
        "model": None,  # as the names of the files
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
