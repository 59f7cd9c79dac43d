"""The real TensorRT 11.4 bindings on a machine with no GPU: its lean runtime and three tiny libraries.

The bindings want libraries that build and parse, which are gigabytes. The lean runtime (44 MB) has the plugin registry
and everything else that can be used without a GPU; the builder and the parser come back empty. Only a process of its
own may import this: `run_with` starts one, and nothing here is on the path of the tests or of a user.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

REQUIREMENTS: Final = Path(__file__).parents[2] / "tensorrt-lean.txt"
# Where `make install` puts the wheels.
FOLDER: Final = Path(sys.prefix) / "tensorrt-lean"
NEEDS: Final = f"needs gcc, x86-64 Linux, and the wheels of tests/{REQUIREMENTS.name} in {FOLDER} or from PyPI (45 MB)"
BINDINGS, LIBRARIES, RUNTIME = "tensorrt_bindings", "tensorrt_lean_libs", "libnvinfer_lean.so"
_MAJOR: Final = "11"
_INSTALL_SECONDS: Final = 300
_RUN_SECONDS: Final = 120
# Every symbol that the bindings import and the lean runtime does not have.
SOURCES: Final = {
    "libnvinfer.so": (
        "void *createInferBuilder_INTERNAL(void) { return 0; }\n"
        "void *createInferRefitter_INTERNAL(void) { return 0; }\n"
        "void *getBuilderPluginRegistry(void) { return 0; }\n"
    ),
    "libnvinfer_plugin.so": "int initLibNvInferPlugins(void) { return 1; }\n",
    "libnvonnxparser.so": (
        "void *createNvOnnxParser_INTERNAL(void) { return 0; }\n"
        "void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }\n"
        "int getNvOnnxParserVersion(void) { return 110400; }\n"
    ),
}


def pinned_version() -> str:
    """The version that both requirements name."""
    (version,) = set(re.findall(r"^tensorrt-[\w-]+==([\w.]+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE))
    return version


def lean_rig(folder: Path) -> Path | None:
    """Make `folder` one that can be put on a process's path for `import tensorrt_bindings`.

    Wheels that are there are used; else pip brings them. Several processes may ask at once.

    Returns:
        The folder, or None where the wheels or gcc cannot be had: see `NEEDS`.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("gcc") is None:
        return None
    if _has_wheels(folder) and _has_libraries(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _has_wheels(folder) and not _install(folder):
            return None
        make_libraries(folder)
    return folder


def make_libraries(folder: Path, major: str = _MAJOR) -> None:
    """Make the libraries that the bindings of this major version want, beside bindings and lean runtime in `folder`."""
    for name, source in SOURCES.items():
        if not (folder / BINDINGS / f"{name}.{major}").exists():
            _compile(folder, name, source, major)


def _has_libraries(folder: Path) -> bool:
    return all((folder / BINDINGS / f"{name}.{_MAJOR}").exists() for name in SOURCES)


def _has_wheels(folder: Path) -> bool:
    version = pinned_version()
    records = [
        folder / f"{name}-{version}.dist-info" / "RECORD"
        for name in ("tensorrt_lean_cu13_libs", "tensorrt_cu13_bindings")
    ]
    return all(
        path.is_file()
        for path in (*records, folder / BINDINGS / "tensorrt.so", folder / LIBRARIES / f"{RUNTIME}.{_MAJOR}")
    )


def _install(folder: Path) -> bool:
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--only-binary", ":all:", "--require-hashes", "--upgrade"),
        *("--target", str(folder), "--requirement", str(REQUIREMENTS)),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_INSTALL_SECONDS)
    except (subprocess.SubprocessError, OSError):
        return False
    return _has_wheels(folder)


def _compile(folder: Path, name: str, source: str, major: str) -> None:
    """The first of the libraries brings the lean runtime, which has everything else that the bindings look for."""
    brings = [
        "-Wl,--no-as-needed",
        str(folder / LIBRARIES / f"{RUNTIME}.{major}"),
        f"-Wl,-rpath,$ORIGIN/../{LIBRARIES}",
    ]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file, made = Path(scratch) / "shim.c", Path(scratch) / name
        file.write_text(source, encoding="utf-8")
        command = ["gcc", "-shared", "-fPIC", "-o", str(made), f"-Wl,-soname,{name}.{major}", str(file)]
        subprocess.run([*command, *(brings if name == "libnvinfer.so" else [])], check=True, capture_output=True)
        made.rename(folder / BINDINGS / f"{name}.{major}")


def run_with(module: str, task: str, rig: Path | None = None, script: str = __file__) -> dict[str, Any]:
    """What a process of its own finds out about a TensorRT.

    Args:
        module: `tensorrt_bindings` (with the rig) or `tensorrt_rtx`.
        task: a name of the script's `TASKS`.
        rig: what `lean_rig` gave.
        script: the file that the process runs.
    """
    environment = {**os.environ, "PYTHONPATH": str(rig) if rig is not None else ""}
    done = subprocess.run(
        [sys.executable, "-P", script, module, task],
        capture_output=True,
        text=True,
        env=environment,
        timeout=_RUN_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module}, {task}: ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# From here on: what runs in the process of its own.


def describe(trt: Any) -> dict[str, Any]:
    """Every name of the module, every member of its classes, and what is known of each without calling it."""
    names = {name: _described(getattr(trt, name)) for name in dir(trt)}
    for name, row in names.items():
        if row["kind"] == "class":
            row["members"] = {
                member: _described(getattr(getattr(trt, name), member)) for member in dir(getattr(trt, name))
            }
    return {"version": trt.__version__, "names": names}


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, type):
        kind = "class"
    elif isinstance(value, property):
        kind = "property"
    else:
        kind = "method" if callable(value) else "value"
    row: dict[str, Any] = {"kind": kind, "doc": value.__doc__ if kind == "method" else None}
    if kind == "property":
        row["settable"] = value.fset is not None
    if kind == "value" and hasattr(type(value), "__members__"):
        row["number"] = int(value)
    return row


def exercise_creators(trt: Any) -> dict[str, Any]:
    """Our Python creators in this TensorRT's own registry: what they answer, as JSON."""
    import numpy as np

    from rmsnorm_deploy.models.errors import RmsnormDeployError, UsageError
    from rmsnorm_deploy.plugins import contract
    from rmsnorm_deploy.plugins.tensorrt.creators import Plugins

    plugins = Plugins(trt, (86,), without_kernels=True)
    plugins.register()
    registry = trt.get_plugin_registry()
    keys = [[c.name, c.plugin_version, c.plugin_namespace] for c in registry.all_creators]
    refusals = []
    try:
        plugins.register()
    except RmsnormDeployError as error:
        refusals.append(str(error))

    # The collection holds addresses only: fields and arrays have to outlive it.
    values = {
        "epsilon": 1e-5, "scale_offset": 1.0, "scale_type": contract.ONNX_TYPES["float16"],
        "quant_type": contract.QUANT_TYPES["float8_e4m3"],
    }  # fmt: skip
    kinds = {name: kind for attributes in contract.OPERATOR_ATTRIBUTES.values() for name, kind in attributes.items()}
    arrays = {
        name: np.array([values[name]], np.float32 if kind == "FLOAT" else np.int32) for name, kind in kinds.items()
    }
    fields = {
        name: trt.PluginField(name, array, getattr(trt.PluginFieldType, contract.FIELD_TYPES[kinds[name]]))
        for name, array in arrays.items()
    }
    operators = {}
    collections = []
    for name, inputs in contract.INPUTS.items():
        collection = trt.PluginFieldCollection([fields[field] for field in contract.OPERATOR_ATTRIBUTES[name]])
        collections.append(collection)
        creator = registry.get_creator(name, contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE)
        built = creator.create_plugin("layers.0/norm", collection, trt.TensorRTPhase.BUILD)
        try:
            creator.create_plugin(name, collection, trt.TensorRTPhase.RUNTIME)
        except UsageError as error:
            refusals.append(str(error))
        without = _field_rows(built.get_fields_to_serialize())
        built.kernels = bytes(range(256))
        serialized = built.get_fields_to_serialize()
        loaded = creator.create_plugin(name, serialized, trt.TensorRTPhase.RUNTIME)
        copy = loaded.clone()
        operators[name] = {
            "field_names": [[field.name, field.type.name] for field in creator.field_names],
            "values": built.values,
            "output_dtypes": [dtype.name for dtype in built.get_output_data_types([trt.bfloat16] * len(inputs))],
            "outputs": built.num_outputs,
            "identity": [built.plugin_name, built.plugin_version, built.plugin_namespace],
            "is_its_own_capability": [
                built.get_capability_interface(kind) is built
                for kind in (
                    trt.PluginCapabilityType.CORE,
                    trt.PluginCapabilityType.BUILD,
                    trt.PluginCapabilityType.RUNTIME,
                )
            ],
            "fields_without_kernels": without,
            "fields": _field_rows(serialized),
            "loaded": [loaded.values, list(loaded.kernels)],
            "copy": [copy is loaded, type(copy) is type(loaded), copy.values, list(copy.kernels), copy.plugin_name],
            "formats": _formats(trt, built, len(inputs)),
        }
    return {
        "keys": keys,
        "elsewhere": [
            registry.get_creator("RMSNorm", *place) is not None
            for place in ((contract.PLUGIN_VERSION, ""), ("2", contract.PLUGIN_NAMESPACE))
        ],
        "refusals": refusals,
        "problems": plugins.problems,
        "operators": operators,
    }


def _field_rows(fields: Any) -> list[list[Any]]:
    import numpy as np

    return [[field.name, field.type.name, np.asarray(field.data).tolist()] for field in fields]


def _formats(trt: Any, plugin: Any, inputs: int) -> dict[str, bool]:
    """What the plugin says to dtypes and formats of x, and of the tensor after it where x is float16."""

    def described(dtype: Any, format: Any = trt.TensorFormat.LINEAR) -> Any:
        dynamic = trt.DynamicPluginTensorDesc()
        inner = dynamic.desc
        inner.type, inner.format, inner.dims = dtype, format, trt.Dims([2, 8])
        dynamic.desc = inner
        return dynamic

    dtypes = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16, "int8": trt.int8}
    half = described(trt.float16)
    answers = {
        f"x {name}": plugin.supports_format_combination(0, [described(dtype)], inputs) for name, dtype in dtypes.items()
    }
    answers |= {
        f"other {name}": plugin.supports_format_combination(1, [half, described(dtype)], inputs)
        for name, dtype in dtypes.items()
    }
    return answers | {
        "x CHW32": plugin.supports_format_combination(0, [described(trt.float16, trt.TensorFormat.CHW32)], inputs)
    }


TASKS: Final = {"describe": describe, "exercise_creators": exercise_creators}

if __name__ == "__main__":
    import importlib

    print(json.dumps(TASKS[sys.argv[2]](importlib.import_module(sys.argv[1]))), flush=True)
