"""Run a model in ONNX Runtime (`OrtRunner`), with an error if a requested provider is not used."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ...export.graph.cache_names import is_past
from ...export.graph.requirements import in_place_names, required_version
from ...export.graph.sizes import limits_in
from ...export.onnx_io.atomic_files import new_file
from ...export.onnx_io.read_model import ModelFile, read_model
from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from ...models.versions import older, too_old
from .base import Array, ClosesOnExit, TensorInfo, check_feeds, describe_feeds
from .ort_assignment import (
    COMPILING,
    RECORD,
    NodeRun,
    norm_assignment,
    norms_in,
    optimized_nodes,
    profiled_nodes,
    recorded_nodes,
)
from .ort_binding import Binding
from .ort_decoding import OrtDecoding
from .ort_errors import cause_of, load_error
from .ort_graph import file_record, has_large_weights, op_counts
from .providers import chosen_providers, open_session, with_plugin_library
from .threads import default_threads

if TYPE_CHECKING:
    from onnx import ModelProto

# onnxruntime's names of the element types that this runner supports, and numpy's.
_DTYPES = {
    "float": "float32",
    "double": "float64",
    **{name: name for name in ("float16", "bfloat16", "bool")},
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_BFLOAT16 = 16  # TensorProto.BFLOAT16, a number that the ONNX format fixes

_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_OPTIONS = (
    "graph_optimization_level",
    "intra_op_num_threads",
    "inter_op_num_threads",
    "optimized_model_path",
    "repack_weights",
    "profile_norms",
)
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_NO_PREPACKING = "session.disable_prepacking"
_SILENT = 4  # log fatal messages only: every error is raised as an exception as well


def import_onnxruntime() -> ModuleType:
    """Import onnxruntime.

    Raises:
        EnvironmentMissingError: it is not installed, or it cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentMissingError(
            f'onnxruntime cannot be imported ({error}). Install it with: pip install "rmsnorm-deploy[cpu]", '
            "or [gpu] for CUDA and TensorRT."
        ) from error
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        if problem := too_old(distribution):
            raise EnvironmentMissingError(problem)
    return onnxruntime


def _refuse_older(ort: ModuleType, wanted: str | None, where: str) -> None:
    if wanted is not None and older(ort.__version__, wanted):
        raise EnvironmentMissingError(
            f"{where}: expected onnxruntime {wanted} or later, got {ort.__version__}, which computes an operator of "
            "the file otherwise, or does not have it. Install a later one, or export with --attention decomposed."
        )


class OrtRunner(ClosesOnExit):
    """Runs an ONNX model in ONNX Runtime.

    Args:
        source: path of an ONNX file, or the bytes of one.
        providers: execution providers in order of preference, such as `cpu`, `cuda`, `tensorrt` or their full names,
            with options as in `cuda:use_tf32=0`; None is the CPU provider. Nodes that none of them supports run on the
            CPU provider.
        provider_options: options by the name of the provider.
        session_options: `graph_optimization_level` (disabled, basic, extended, all), `intra_op_num_threads`,
            `inter_op_num_threads`, `optimized_model_path` (the file for the optimized graph), and `repack_weights`
            (default True: kernels get a copy of the weights in their own layout; if False, a large file opens faster
            and takes less memory, and runs slower), and `profile_norms` (default False: profile the first run, for
            the operators that compute each norm, see `norm_assignment`).
        io_binding: run through the session's IO binding, which places the inputs on the device before the run; the
            results are the same.
        weights_folder: folder of the external data of a model given as bytes; None if it has none.

    Raises:
        UsageError: the model or its external data cannot be read, onnxruntime finds it invalid, or an option or
            provider name is unknown.
        UnsupportedError: an op has no kernel for its dtype, or an input or output is not a tensor of numbers.
        EnvironmentMissingError: onnxruntime is not installed or older than the file requires, or a provider is not
            available or not used.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        providers: Sequence[str] | None = None,
        provider_options: Mapping[str, Mapping[str, Any]] | None = None,
        session_options: Mapping[str, Any] | None = None,
        io_binding: bool = False,
        weights_folder: Path | None = None,
    ) -> None:
        ort = import_onnxruntime()
        self._provider_options = chosen_providers(ort, providers, provider_options)
        self._providers = list(self._provider_options)
        self._session_options = dict(session_options or {})
        self._io_binding = io_binding
        self._weights_folder = weights_folder
        file = read_model(source, weights_folder)
        self._where, self._path, self._external_files = file.where, file.path, file.external_files
        metadata = {row.key: row.value for row in file.model.metadata_props}
        _refuse_older(ort, required_version(metadata, "onnxruntime", file.where), file.where)
        self._provider_options = with_plugin_library(self._provider_options, file.model, file.where)
        self._norms = norms_in(file.model)
        self._profiling = bool(self._norms and self._session_options.get("profile_norms"))
        self._nodes: list[NodeRun] | None = None
        self._session: Any = self._open(ort, file, source)
        open_rank = {v.name for v in file.model.graph.input if not v.type.tensor_type.HasField("shape")}
        self._inputs = _infos(self._session.get_inputs(), self._where, open_rank)
        self._outputs = _infos(self._session.get_outputs(), self._where, set())
        self._limits = limits_in(metadata, self._where)
        self._in_place = in_place_names(metadata, self._where)
        self._files: dict[str, Any] | None = None

    def close(self) -> None:
        """Release the session and its memory."""
        if self._session is not None and self._profiling:
            self._end_profile(self._session)
        self._session = None

    def inputs(self) -> list[TensorInfo]:
        """The model's inputs, without initializers."""
        return list(self._inputs)

    def outputs(self) -> list[TensorInfo]:
        """The model's outputs; an output of unknown rank is listed with rank 0."""
        return list(self._outputs)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run one inference; see `Runner.run`.

        Args:
            feeds: an array for every input.
            outputs: names of the outputs to compute; None is all of them.

        Raises:
            UsageError: the feeds do not match the inputs, or onnxruntime fails on them.
            UnsupportedError: a kernel does not support these feeds.
        """
        names = [info.name for info in self._outputs] if outputs is None else list(outputs)
        return {name: _to_array(value) for name, value in zip(names, self._computed(feeds, {}, names), strict=True)}

    def decoding(self) -> OrtDecoding:
        """The steps of a decoder whose cache stays in ONNX Runtime's values."""
        session, compute = self._opened(), self._computed
        if self._in_place and not any(is_past(info.name) for info in self._inputs if info.name not in self._in_place):
            compute = partial(self._computed, binding=Binding(session))
        return OrtDecoding(compute, _view, _to_value, [info.name for info in self._outputs], self._in_place)

    def _computed(
        self,
        feeds: Mapping[str, Array],
        own: Mapping[str, Any],
        names: Sequence[str],
        targets: Mapping[str, Any] | None = None,
        binding: Binding | None = None,
    ) -> list[Any]:
        """The outputs as OrtValues, for arrays, and for OrtValues of an earlier run in place of some inputs.

        Outputs with a target are written into the memory of that OrtValue, and are not among the results. With a
        binding of earlier runs, the results are valid until its next run.
        """
        session = self._opened()
        given = [info for info in self._inputs if info.name not in own]
        check_feeds(given, feeds, self._where, self._limits)
        values = {**{info.name: _to_value(feeds[info.name]) for info in given}, **own}
        try:
            results = (
                (binding or Binding(session)).run(values, names, targets or {})
                if self._io_binding or targets
                else session.run_with_ort_values(list(names), values)
            )
        except Exception as error:
            kind = UnsupportedError if type(error).__name__ == "NotImplemented" else UsageError
            raise kind(f"{self._where}: onnxruntime failed on {describe_feeds(feeds)}: {cause_of(error)}") from error
        if self._profiling:
            self._end_profile(session)
        return list(results)

    def norm_assignment(self) -> list[dict[str, Any]]:
        """The execution provider of each norm of the file, and the operators that compute it; see `norm_assignment`.

        The operators come from the profile of the first run with the session option `profile_norms`, and otherwise from
        the optimized graph, for which a file up to 1 GiB is opened a second time, unless a provider compiles it.
        """
        session = self._opened()
        if not self._norms:
            return []
        if self._nodes is None:
            self._nodes = self._optimized(session)
        return norm_assignment(self._norms, recorded_nodes(session), self._nodes)

    def provenance(self) -> dict[str, Any]:
        """Versions, requested and used providers, options, the providers of the norms, and the hash of every file.

        Raises:
            UsageError: the runner is closed.
        """
        import onnx

        session = self._opened()
        if self._files is None:
            self._files = {
                "model": None if self._path is None else file_record(self._path),
                "external_data": [file_record(file) for file in self._external_files],
            }
        return {
            "runner": "onnxruntime",
            "onnxruntime": import_onnxruntime().__version__,
            "onnx": onnx.__version__,
            "providers_asked": list(self._providers),
            "providers_used": list(session.get_providers()),
            "provider_options": session.get_provider_options(),
            "session_options": {k: v if isinstance(v, int) else str(v) for k, v in self._session_options.items()},
            "io_binding": self._io_binding,
            "norms": self.norm_assignment(),
            **self._files,
        }

    def _opened(self) -> Any:
        if self._session is None:
            raise UsageError(f"{self._where}: the runner is closed.")
        return self._session

    def _end_profile(self, session: Any) -> None:
        """Read the profile of the run that has ended; later runs are not profiled."""
        self._profiling = False
        profile = Path(session.end_profiling())
        self._nodes = profiled_nodes(profile)
        profile.unlink()
        profile.parent.rmdir()

    def _optimized(self, session: Any) -> list[NodeRun]:
        """The nodes of the optimized graph; none if it would take long to make."""
        if self._path is None or has_large_weights([self._path, *self._external_files]):
            return []
        if any(name in COMPILING for name in session.get_providers()):
            return []
        level = str(self._session_options.get("graph_optimization_level", "all"))
        try:
            return optimized_nodes(_optimized_graph(self._path, self._providers, level, self._provider_options))
        except RmsnormDeployError:
            return []

    def _open(self, ort: ModuleType, file: ModelFile, source: str | os.PathLike[str] | bytes) -> Any:
        path = source if isinstance(source, bytes) else _utf8(source, self._where)
        with _session_options(ort, self._session_options, file) as options:
            if self._norms:
                options.add_session_config_entry(RECORD, "1")
            if self._profiling:
                options.enable_profiling = True
                options.profile_file_prefix = str(Path(tempfile.mkdtemp(prefix="rmsnorm-")) / "profile")
            if self._weights_folder is not None:
                options.add_session_config_entry(_WEIGHTS_FOLDER, _utf8(self._weights_folder, self._where))
            try:
                session = open_session(ort, path, options, self._provider_options)
            except RmsnormDeployError:
                raise
            except Exception as error:
                raise load_error(error, ort, file, self._providers) from error
        used = session.get_providers()
        unused = [name for name in self._providers if name not in used]
        if unused:
            raise EnvironmentMissingError(
                f"{file.where}: onnxruntime fell back from {', '.join(unused)} to {', '.join(used)}. The libraries "
                f"(CUDA, cuDNN, TensorRT) could not be loaded in the versions that onnxruntime {ort.__version__} "
                "was built for; install those versions, or choose another provider."
            )
        return session


def optimized_op_counts(
    path: str | os.PathLike[str], providers: Sequence[str] | None = None, level: str = "all"
) -> Counter[str]:
    """Count the ops in the graph that onnxruntime optimized, to see which norms it fused.

    External data are not copied: the optimized graph, in a temporary folder, refers to them.

    Args:
        path: an ONNX file.
        providers: see `OrtRunner`.
        level: graph optimization level, see `OrtRunner`.

    Returns:
        Counts by `Op` in the default domain and `domain::Op` elsewhere.

    Raises:
        RmsnormDeployError: as in `OrtRunner`.
    """
    return op_counts(_optimized_graph(path, providers, level))


def _optimized_graph(
    path: str | os.PathLike[str],
    providers: Sequence[str] | None,
    level: str,
    provider_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModelProto:
    import onnx

    with tempfile.TemporaryDirectory(prefix="rmsnorm-") as folder:
        target = Path(folder) / "optimized.onnx"
        options = {"graph_optimization_level": level, "optimized_model_path": target, "repack_weights": False}
        OrtRunner(path, providers=providers, provider_options=provider_options, session_options=options).close()
        return onnx.load(target, load_external_data=False)


@contextmanager
def _session_options(ort: ModuleType, wanted: Mapping[str, Any], file: ModelFile) -> Iterator[Any]:
    """Session options; the optimized model is renamed to its final name after the session has been created."""
    unknown = [name for name in wanted if name not in _OPTIONS]
    if unknown:
        raise UsageError(f"unknown session_options {', '.join(unknown)}: expected {', '.join(_OPTIONS)}.")
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    level = wanted.get("graph_optimization_level", "all")
    if level not in _LEVELS:
        raise UsageError(f"graph_optimization_level: expected one of {', '.join(_LEVELS)}, got {level!r}.")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
    for name in ("intra_op_num_threads", "inter_op_num_threads"):
        threads = wanted.get(name, default_threads() if name == "intra_op_num_threads" else 0)
        if not isinstance(threads, int) or threads < 0:
            raise UsageError(f"{name}: expected an integer of at least 0 (0: one per core), got {threads!r}.")
        setattr(options, name, threads)
    if not wanted.get("repack_weights", True):
        options.add_session_config_entry(_NO_PREPACKING, "1")
    if "optimized_model_path" not in wanted:
        yield options
        return
    target = Path(wanted["optimized_model_path"])
    if file.path is not None and target.resolve() == file.path.resolve():
        raise UsageError(f"optimized_model_path {target} is the model itself; give another name.")
    with new_file(target) as partial:
        options.optimized_model_filepath = str(partial)
        yield options


def _infos(arguments: Sequence[Any], where: str, open_rank: set[str]) -> list[TensorInfo]:
    infos = []
    for argument in arguments:
        match = re.fullmatch(r"tensor\((\w+)\)", argument.type)
        dtype = _DTYPES.get(match.group(1)) if match else None
        if dtype is None:
            raise UnsupportedError(
                f"{where}: {argument.name}: expected a tensor of one of {', '.join(_DTYPES.values())}, "
                f"got {argument.type}."
            )
        shape = None if argument.name in open_rank else tuple(argument.shape)
        infos.append(TensorInfo(argument.name, dtype, shape))
    return infos


def _to_value(array: Array) -> Any:
    """An OrtValue over the array's memory; bfloat16 is passed as raw bits, because onnxruntime's numpy API lacks it."""
    import onnxruntime

    array = np.asarray(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _to_array(value: Any) -> Array:
    """A copy of an OrtValue; runs return every output in host memory."""
    return _view(value).copy()


def _view(value: Any) -> Array:
    """An array of an OrtValue in host memory, if possible over its memory; the value must live longer."""
    if value.element_type() != _BFLOAT16:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, ml_dtypes.bfloat16)
    # Neither numpy() nor DLPack supports bfloat16, so its bits are read from memory.
    memory = (ctypes.c_uint16 * (value.tensor_size_in_bytes() // 2)).from_address(value.data_ptr())
    return np.frombuffer(memory, np.uint16).view(ml_dtypes.bfloat16).reshape(shape)


def _utf8(path: str | os.PathLike[str], where: str) -> str:
    """A path as ONNX Runtime reads it, in UTF-8, also where the locale is another, such as POSIX."""
    try:
        return os.fsencode(path).decode()
    except UnicodeError as error:
        raise UsageError(
            f"{where}: expected a path in UTF-8, which ONNX Runtime requires. Rename the file or its folder."
        ) from error
