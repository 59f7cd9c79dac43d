"""Every name of TensorRT's Python API that our code uses, against the real bindings of both products.

The names are read from our sources: chains that begin at the module (`trt.LayerType.PLUGIN_V3`), what is asked of the
API's objects, the arguments of calls, and the methods that our classes override. The full TensorRT is the 11.4 of
`helpers/tensorrt/lean_tensorrt.py`; it and TensorRT-RTX are looked at in processes of their own.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from rmsnorm_deploy.plugins import contract
from rmsnorm_deploy.runtime.engines import messages
from rmsnorm_deploy.runtime.engines.api import FLAVORS, RUNTIMES, flavor_of, is_installed, version_of
from tests.helpers.tensorrt import lean_tensorrt, stand_in

ROOT: Final = Path(__file__).parents[3]
ENGINES: Final = "runtime/engines"
FOLDERS: Final = ("runtime/tensorrt", "runtime/engines", "plugins/tensorrt")
WORKER, API, CREATORS = "runtime/tensorrt/worker.py", "runtime/engines/api.py", "plugins/tensorrt/creators.py"
QUICK: Final = "plugins/tensorrt/quick.py"
TENSORS, OPENING = "runtime/engines/io_tensors.py", "runtime/engines/open_engine.py"
CONTEXT, REGISTERING = "runtime/engines/context.py", "runtime/engines/plugin_creators.py"
MESSAGES, MEMORY = "runtime/engines/messages.py", "runtime/engines/output_memory.py"

# What one product has and the other does not, by design: (class or module name, member), and why.
RTX_ONLY: Final = {
    ("ComputeCapability", None): "RTX builds without a GPU; api.py sets its targets for it alone",
    ("IBuilderConfig", "num_compute_capabilities"): "as above",
    ("IBuilderConfig", "set_compute_capability"): "as above",
    ("EngineValidity", None): "RTX says before it opens an engine whether it can run it; api.py asks it alone",
    ("Runtime", "get_engine_validity"): "as above",
    ("CudaGraphStrategy", None): "RTX has CUDA graphs of its own; api.py has them for it alone",
    ("IRuntimeConfig", "cuda_graph_strategy"): "as above",
}
# What the oldest TensorRT does not have yet: (class, member), and why it is not asked there.
NEWER: Final = {
    ("ICudaEngine", "get_aliased_input_tensor"): "io_tensors.py asks whether it is there",
    ("ICudaEngine", "create_runtime_config"): "api.py uses it for the CUDA graphs of RTX alone",
}
# Names that our sources put together: (class, how the source writes the name), and what the names can be.
COMPUTED: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("NetworkDefinitionCreationFlag", "'STRONGLY_TYPED'"): ("STRONGLY_TYPED",),
    ("BuilderFlag", "name"): ("REFIT", "VERSION_COMPATIBLE"),
    ("ComputeCapability", "f'SM{architecture}'"): ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    ("PluginFieldType", "contract.FIELD_TYPES[kind]"): ("FLOAT32", "INT32"),
}
# What our sources call the API's objects. `x[]` is an element of x, `f()` what f returns.
OBJECTS: Final[dict[str, dict[str, str]]] = {
    WORKER: {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "parser": "OnnxParser",
        "error": "ParserError",
        "self.trt.get_plugin_registry()": "IPluginRegistry",
        "layer": "ILayer",
        "layer.get_output()": "ITensor",
        "network.get_input()": "ITensor",
        "inputs[]": "ITensor",
        "tensor": "ITensor",
        "x": "ITensor",
        "scale": "ITensor",
        "y_scale": "ITensor",
        "runtime": "Runtime",
        "cache": "ITimingCache",
        "engine": "ICudaEngine",
        "inspector": "EngineInspector",
    },
    API: {
        "builder": "Builder",
        "config": "IBuilderConfig",
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "runtime_config": "IRuntimeConfig",
    },
    TENSORS: {"engine": "ICudaEngine"},
    OPENING: {"runtime": "Runtime"},
    CONTEXT: {"context": "IExecutionContext", "self._context": "IExecutionContext"},
    REGISTERING: {"registry": "IPluginRegistry", "creator": "IPluginCreatorV3One"},
    MESSAGES: {},
    MEMORY: {},
    CREATORS: {
        "registry": "IPluginRegistry",
        "creator": "IPluginCreatorV3One",
        "field": "PluginField",
        "inputs[]": "DynamicPluginTensorDesc",
        "tensors[]": "DynamicPluginTensorDesc",
        "described": "PluginTensorDesc",
        "first": "PluginTensorDesc",
        "input_desc[]": "PluginTensorDesc",
    },
    QUICK: {"registry": "IPluginRegistry"},
}
# Objects that are not the API's, and of which something is asked that the API has a name like. Those of
# `tensorrt.plugin`, which is written in Python, are used as they are in `tests/plugins/tensorrt/test_quick.py`.
OURS: Final = {
    WORKER: {"self", "api", "file"}, API: {"self", "name", "major", "minor"}, CREATORS: {"self"},
    QUICK: {"self", "compiled", "trtp", "x", "tensor", "launch"},
    TENSORS: {"tensor", "self", "torch"}, OPENING: {"self", "file"},
    CONTEXT: {"opened", "opened.api", "found", "found.device", "device.place", "tensor", "output", "torch"},
    REGISTERING: set(), MESSAGES: {"self"}, MEMORY: {"self", "self.tensor", "held[]"},
}  # fmt: skip
# Methods that classes of ours add to the API's.
OWN_METHODS: Final = {("Monitor", "report"), ("OutputAllocator", "memory_of"), ("OutputAllocator", "result")}
# Methods to override that the bindings do not list, by their number of arguments: NVIDIA's documentation of 11.4.
UNLISTED: Final = {
    ("IOutputAllocator", "reallocate_output"): 4, ("IOutputAllocator", "reallocate_output_async"): 5,
    ("IOutputAllocator", "notify_shape"): 2,
}  # fmt: skip
# The properties that a plugin and its creator have to set themselves.
STATE: Final = {
    "Plugin": {"plugin_name", "plugin_version", "plugin_namespace", "num_outputs"},
    "Creator": {"name", "plugin_version", "plugin_namespace", "field_names"},
}
# Attributes of every Python value or object.
_PLAIN: Final = {
    name for kind in (str, bytes, list, dict, set, tuple, Path, Exception, type, np.ndarray) for name in dir(kind)
} - {"data", "shape", "dtype"}


@dataclass(frozen=True, slots=True)
class Use:
    """One use of the API: a name of the module, or a member of one of its classes.

    Attributes:
        owner: the class, or the module's name itself.
        member: None for the module's name.
        positional: arguments by position of a call; None where it is not called.
        keywords: its named arguments.
        stored: whether it is assigned.
        place: file and line.
    """

    owner: str
    member: str | None
    positional: int | None
    keywords: tuple[str, ...]
    stored: bool
    place: str


def sources() -> dict[str, ast.Module]:
    """Our modules that may use the API, by their path from the root."""
    files = itertools.chain.from_iterable(sorted((ROOT / folder).glob("*.py")) for folder in FOLDERS)
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def chain_of(node: ast.expr) -> list[str] | None:
    """`self.trt.LayerType.REDUCE` as `[LayerType, REDUCE]`; None for what does not begin at the module."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    names = [node.id, *parts]
    return names[names.index("trt") + 1 :] if "trt" in names else None


def base_of(node: ast.expr) -> str:
    """An expression as the keys of `OBJECTS` write it."""
    if isinstance(node, ast.Subscript):
        return f"{ast.unparse(node.value)}[]"
    return f"{ast.unparse(node.func)}()" if isinstance(node, ast.Call) else ast.unparse(node)


def uses_of(tree: ast.AST, file: str, objects: Mapping[str, str]) -> Iterator[tuple[Use, str | None]]:
    """Every use of the API in a module, each with the key of `objects` by which it was known."""
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        call = calls.get(id(node))
        arguments: tuple[int | None, tuple[str, ...]] = (None, ())
        if call is not None:
            assert not any(isinstance(argument, ast.Starred) for argument in call.args), ast.unparse(call)
            arguments = (len(call.args), tuple(str(keyword.arg) for keyword in call.keywords))
        rest = (*arguments, isinstance(node.ctx, ast.Store), f"{file}:{node.lineno}")
        chain = chain_of(node)
        base = base_of(node.value)
        if chain:
            owner, *member = chain
            assert len(member) <= 1, f"{file}:{node.lineno}: {ast.unparse(node)}: teach this test longer chains"
            yield Use(owner, member[0] if member else None, *rest), None
        elif chain is None and base in objects:
            yield Use(objects[base], node.attr, *rest), base


def all_uses() -> list[Use]:
    return [use for file, tree in sources().items() for use, _ in uses_of(tree, file, OBJECTS.get(file, {}))]


def signatures(name: str, doc: str | None) -> list[list[tuple[str, bool]]]:
    """The parameters of each overload in pybind's docstring, without self: their names, and whether they may miss."""
    found = []
    for line in (doc or "").splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line)
        if match is None:
            continue
        depth, parts = 0, [""]
        for letter in match[1]:
            depth += (letter in "[(<") - (letter in "])>")
            if letter == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += letter
        rows = [(part.split(":")[0].strip(), " = " in part) for part in parts if part.strip()]
        found.append([row for row in rows if row[0] != "self"])
    return found


def accepts(parameters: list[tuple[str, bool]], positional: int, keywords: tuple[str, ...]) -> bool:
    """Whether a call fits one overload."""
    named = parameters[positional:]
    return (
        positional <= len(parameters)
        and set(keywords) <= {name for name, _ in named}
        and all(optional or name in keywords for name, optional in named)
    )


def problem(use: Use, names: Mapping[str, Any]) -> str | None:
    """What is wrong with a use in one product; None where it is right."""
    shown = f"{use.place}: {use.owner}{'' if use.member is None else f'.{use.member}'}"
    row = names.get(use.owner)
    if row is not None and use.member is not None:
        row = row.get("members", {}).get(use.member)
    if row is None:
        return f"{shown} is missing"
    kind = row["kind"]
    if use.positional is not None:
        if kind == "class" and use.member is None:
            doc, called = row["members"]["__init__"]["doc"], "__init__"
        elif kind == "method":
            doc, called = row["doc"], use.member or use.owner
        else:
            return f"{shown} is called, and is a {kind}"
        overloads = signatures(called, doc)
        if not any(accepts(overload, use.positional, use.keywords) for overload in overloads):
            return f"{shown} is called with {use.positional} arguments and {list(use.keywords)}; it takes {overloads}"
    elif kind == "method":
        return f"{shown} is a method, and is not called"
    elif use.stored and not row.get("settable"):
        return f"{shown} is assigned, and is a {kind} that cannot be"
    return None


def is_by_design(use: Use, product: str) -> bool:
    return product != "rtx" and bool({(use.owner, use.member), (use.owner, None)} & set(RTX_ONLY))


def ask(product: str, task: str) -> dict[str, Any]:
    """What `helpers/tensorrt/lean_tensorrt.py` finds out about a product."""
    if product == "rtx":
        if not is_installed("rtx"):
            pytest.skip(f"needs TensorRT-RTX: {FLAVORS['rtx'].install}")
        return lean_tensorrt.run_with(FLAVORS["rtx"].module, task)
    rig = lean_tensorrt.lean_rig(lean_tensorrt.FOLDER)
    if rig is None:
        pytest.skip(lean_tensorrt.NEEDS)
    return lean_tensorrt.run_with(lean_tensorrt.BINDINGS, task, rig)


@pytest.fixture(scope="module", params=RUNTIMES)
def product(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def described(product: str) -> dict[str, Any]:
    return ask(product, "describe")


@pytest.fixture(scope="module")
def names(described: dict[str, Any]) -> dict[str, Any]:
    return described["names"]


@pytest.fixture(scope="module")
def answers(product: str) -> dict[str, Any]:
    return ask(product, "exercise_creators")


# Names


def test_the_versions_are_those_that_the_project_names(product: str, described: dict[str, Any]) -> None:
    found = described["version"]
    assert version_of(found) >= flavor_of(product).oldest
    assert product != "tensorrt" or found == lean_tensorrt.pinned_version()


def test_every_use_is_of_a_name_that_is_there(product: str, names: dict[str, Any]) -> None:
    problems = [problem(use, names) for use in all_uses() if not is_by_design(use, product)]
    assert [text for text in problems if text] == []


@pytest.mark.parametrize(("owner", "member"), RTX_ONLY)
def test_what_one_product_lacks_by_design_is_really_missing(
    owner: str, member: str | None, product: str, names: dict[str, Any]
) -> None:
    use = Use(owner, member, None, (), False, "")
    assert (problem(use, names) is not None and "is missing" in str(problem(use, names))) == (product == "tensorrt")
    assert any((found.owner, found.member) in ((owner, member), (owner, None)) for found in all_uses())


@pytest.mark.parametrize(("owner", "written"), COMPUTED)
def test_names_that_are_put_together_are_there(owner: str, written: str, product: str, names: dict[str, Any]) -> None:
    for member in COMPUTED[owner, written]:
        use = Use(owner, member, None, (), False, written)
        assert is_by_design(use, product) or problem(use, names) is None


def test_the_table_of_names_that_are_put_together_is_that_of_the_sources() -> None:
    found, flags = set(), set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            chain = chain_of(node.args[0]) if ast.unparse(node.func) == "getattr" else None
            if chain:
                found.add((chain[0], ast.unparse(node.args[1])))
            if ast.unparse(node.func).endswith("api.set_flag"):
                flags.add(ast.literal_eval(node.args[1]))
    assert found == set(COMPUTED)
    assert flags == set(COMPUTED["BuilderFlag", "name"])
    kinds = {contract.FIELD_TYPES[kind] for kind in contract.KERNEL_ATTRIBUTES.values()}
    assert kinds == set(COMPUTED["PluginFieldType", "contract.FIELD_TYPES[kind]"])
    architectures = {f"SM{number}" for number in FLAVORS["rtx"].architectures}
    assert architectures == set(COMPUTED["ComputeCapability", "f'SM{architecture}'"])


def test_the_logger_counts_severities_as_the_api_does(names: dict[str, Any]) -> None:
    numbers = {
        word: names["ILogger"]["members"][word.upper().replace(" ", "_")]["number"] for word in messages.SEVERITIES
    }
    assert numbers == {word: number for number, word in enumerate(messages.SEVERITIES)}
    assert (numbers["warning"], numbers["verbose"]) == (messages.WARNING, messages.VERBOSE)


# The classes that we derive


def derived_classes() -> list[tuple[str, ast.ClassDef, list[str]]]:
    """Our classes whose bases are the API's."""
    rows = []
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                chains = [chain_of(base) for base in node.bases]
                bases = [chain[0] for chain in chains if chain]
                rows += [(file, node, bases)] if bases else []
    return rows


def override_problems(node: ast.ClassDef, bases: list[str], names: Mapping[str, Any]) -> list[str]:
    """Public methods of a class that its bases do not have, or have with other arguments."""
    known = {member: row for base in bases for member, row in names[base]["members"].items()}
    problems = []
    for method in (part for part in node.body if isinstance(part, ast.FunctionDef)):
        if method.name.startswith("_") or (node.name, method.name) in OWN_METHODS:
            continue
        overloads = signatures(method.name, known.get(method.name, {}).get("doc"))
        unlisted = [UNLISTED[base, method.name] for base in bases if (base, method.name) in UNLISTED]
        if unlisted == [len(method.args.args) - 1] and not overloads:
            continue
        if [len(overload) for overload in overloads] != [len(method.args.args) - 1]:
            problems.append(f"{node.name}.{method.name}: {len(method.args.args) - 1} arguments; the API: {overloads}")
    return problems


def test_what_our_classes_override_is_the_apis(names: dict[str, Any]) -> None:
    classes = derived_classes()
    assert {node.name for _, node, _ in classes} == {"Plugin", "Creator", "Logger", "Monitor", "OutputAllocator"}
    assert [text for _, node, bases in classes for text in override_problems(node, bases, names)] == []


def test_every_method_of_an_interface_is_overridden(names: dict[str, Any]) -> None:
    by_name = {node.name: node for _, node, _ in derived_classes()}
    wanted = {
        "Plugin": ("IPluginV3", "IPluginV3OneBuild", "IPluginV3OneRuntime"),
        "Creator": ("IPluginCreatorV3One",),
        "Logger": ("ILogger",),
        "Monitor": ("IProgressMonitor",),
    }
    for name, bases in wanted.items():
        written = {part.name for part in by_name[name].body if isinstance(part, ast.FunctionDef)}
        documented = {
            member
            for base in bases
            for member, row in names[base]["members"].items()
            if row["kind"] == "method" and not member.startswith("_")
        }
        # `destroy` has a default, which drops the reference.
        assert documented - written <= {"destroy"}, name


@pytest.mark.parametrize("name", STATE)
def test_the_properties_that_a_plugin_has_to_set_are_set(name: str, names: dict[str, Any]) -> None:
    ((_, node, bases),) = [row for row in derived_classes() if row[1].name == name]
    assigned = {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self"
    }
    assert assigned >= STATE[name]
    known = {member: row for base in bases for member, row in names[base]["members"].items()}
    for member in assigned & set(known):
        assert known[member]["kind"] == "property", member
        assert known[member]["settable"], member
    assert set(known) >= STATE[name]


# The stand-in of the runtime: it answers as the bindings do, to the calls that they have

STAND_IN: Final = (stand_in.Runtime, stand_in.ICudaEngine, stand_in.IExecutionContext, stand_in.IRuntimeConfig)
ENUMERATIONS: Final = (
    stand_in.TensorIOMode, stand_in.TensorLocation, stand_in.DataType, stand_in.EngineValidity,
    stand_in.CudaGraphStrategy,
)  # fmt: skip
# What the stand-in has for itself.
OWN: Final = {"fails"}


@pytest.mark.parametrize("kind", STAND_IN, ids=lambda kind: kind.__name__)
def test_the_stand_in_has_the_signatures_of_the_bindings(kind: type, product: str, names: dict[str, Any]) -> None:
    members = names[kind.__name__]["members"]
    checked = 0
    for name, value in vars(kind).items():
        if (
            name.startswith("_")
            or name in OWN
            or (product, (kind.__name__, name)) in {("tensorrt", k) for k in RTX_ONLY}
        ):
            continue
        if isinstance(value, property):
            assert members[name]["kind"] == "property", name
        else:
            overloads = [[row[0] for row in overload] for overload in signatures(name, members[name]["doc"])]
            assert list(inspect.signature(value).parameters)[1:] in overloads, (name, overloads)
        checked += 1
    assert checked or kind is stand_in.IRuntimeConfig


@pytest.mark.parametrize("kind", ENUMERATIONS, ids=lambda kind: kind.__name__)
def test_the_stand_in_has_the_members_of_the_bindings(kind: Any, product: str, names: dict[str, Any]) -> None:
    if (kind.__name__, None) in RTX_ONLY and product != "rtx":
        assert kind.__name__ not in names
        return
    assert {member.name for member in kind} <= set(names[kind.__name__]["members"])


def test_the_stand_in_has_every_call_of_ours() -> None:
    """What `runtime/engines` asks of the bindings' objects is what the stand-in answers."""
    by_name = {kind.__name__: kind for kind in STAND_IN}
    asked = {(use.owner, use.member) for use in all_uses() if use.owner in by_name and use.place.startswith(ENGINES)}
    assert len(asked) > 18
    missing = [(owner, member) for owner, member in asked if member and member not in dir(by_name[owner])]
    assert set(missing) <= {("IRuntimeConfig", "cuda_graph_strategy")}  # set when it is made


# The collector itself


def test_the_collector_finds_what_is_there() -> None:
    uses = all_uses()
    found = {(use.owner, use.member) for use in uses}
    assert found >= {
        ("OnnxParser", None),
        ("OnnxParser", "parse"),
        ("ProfilingVerbosity", "DETAILED"),
        ("LayerType", "PLUGIN_V3"),
        ("get_plugin_registry", None),
        ("IPluginRegistry", "register_creator"),
        ("IPluginRegistry", "all_creators"),
        ("IOptimizationProfile", "set_shape"),
        ("IBuilderConfig", "progress_monitor"),
        ("PluginField", "data"),
        ("PluginTensorDesc", "dims"),
        ("ITensor", "is_shape_tensor"),
        ("__version__", None),
        ("ComputeCapability", None),
    }
    calls = {(use.owner, use.member, use.positional, use.keywords) for use in uses if use.positional is not None}
    assert calls >= {
        ("IOptimizationProfile", "set_shape", 4, ()),
        ("IBuilderConfig", "set_timing_cache", 1, ("ignore_mismatch",)),
        ("IPluginRegistry", "get_creator", 3, ()),
        ("PluginField", None, 3, ()),
        ("OnnxParser", None, 2, ()),
    }
    assert {use.member for use in uses if use.stored} == {
        "num_compute_capabilities",
        "profiling_verbosity",
        "progress_monitor",
        "cuda_graph_strategy",
    }


def test_every_row_of_the_table_of_objects_is_used() -> None:
    trees = sources()
    for file, objects in OBJECTS.items():
        assert {key for _, key in uses_of(trees[file], file, objects)} - {None} == set(objects), file


def test_no_object_is_forgotten(names: dict[str, Any]) -> None:
    """What only the API's objects have is asked of objects that the tables know."""
    members = {
        member
        for row in names.values()
        for member, known in row.get("members", {}).items()
        if known["kind"] in ("method", "property") and not member.startswith("_")
    } - _PLAIN
    assert len(members) > 400
    for file, tree in sources().items():
        if file not in OBJECTS:
            assert list(uses_of(tree, file, {})) == [], f"{file} uses the API: give it a row in OBJECTS"
            continue
        asked = {
            base_of(node.value): f"{file}:{node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in members and chain_of(node) is None
        }
        unknown = set(asked) - set(OBJECTS[file]) - OURS[file]
        assert [asked[base] for base in unknown] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("trt.LayerType.PLUGIN_V4", "LayerType.PLUGIN_V4 is missing"),
        ("self.trt.OnnxParsers", "OnnxParsers is missing"),
        ("owner.trt.float15", "float15 is missing"),
        ("network.get_layers", "INetworkDefinition.get_layers is missing"),
        ("layer.get_output(0).kind", "ITensor.kind is missing"),
        ("inputs[0].rank", "ITensor.rank is missing"),
        ("error.desc", "ParserError.desc is a method, and is not called"),
        ("network.num_layers()", "INetworkDefinition.num_layers is called, and is a property"),
        ("inspector.num_layers = 1", "EngineInspector.num_layers is missing"),
        ("parser.num_errors = 1", "OnnxParser.num_errors is assigned, and is a property that cannot be"),
        ("profile.set_shape(a, b, c)", "IOptimizationProfile.set_shape is called with 3 arguments"),
        ("profile.set_shape(a, b, c, maximum=d)", "called with 3 arguments and ['maximum']"),
        ("profile.set_shape(a, b, c, d, e)", "IOptimizationProfile.set_shape is called with 5 arguments"),
        ("config.set_timing_cache(a)", "IBuilderConfig.set_timing_cache is called with 1 arguments"),
        ("trt.OnnxParser(network)", "OnnxParser is called with 1 arguments"),
        ("trt.get_plugin_registry(1)", "get_plugin_registry is called with 1 arguments"),
    ],
)
def test_a_wrong_use_is_reported(source: str, expected: str, names: dict[str, Any]) -> None:
    found = [problem(use, names) for use, _ in uses_of(ast.parse(source), "here", OBJECTS[WORKER])]
    reported = [text for text in found if text]
    assert len(reported) == 1
    assert expected in reported[0]
    assert reported[0].startswith("here:1: ")


def test_a_wrong_override_is_reported(names: dict[str, Any]) -> None:
    (node,) = ast.parse(
        "class Plugin:\n def clones(self): ...\n def clone(self, deep): ...\n def destroy(self): ..."
    ).body
    assert isinstance(node, ast.ClassDef)
    problems = override_problems(node, ["IPluginV3"], names)
    assert [text.split(":")[0] for text in problems] == ["Plugin.clones", "Plugin.clone"]


def test_signatures_are_read_from_pybinds_docstrings() -> None:
    doc = (
        "f(*args, **kwargs)\nOverloaded function.\n\n1. f(self: m.C, name: m.Text = '') -> None\n\n"
        "2. f(self: m.C, name: m.Text, data: dict[str, int], type: m.T = <T.UNKNOWN: 8>) -> None\n\nf(x) is told.\n"
    )
    assert signatures("f", doc) == [[("name", True)], [("name", False), ("data", False), ("type", True)]]
    assert signatures("g", doc) == signatures("f", None) == []


# Our creators in the products' own registries


def test_the_creators_are_registered_once(answers: dict[str, Any]) -> None:
    ours = [[name, contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE] for name in contract.INPUTS]
    assert [key for key in answers["keys"] if key[2] == contract.PLUGIN_NAMESPACE] == ours
    assert answers["elsewhere"] == [False, False]
    assert answers["refusals"] == [
        f"TensorRT's registry refused {contract.RMS_NORM}: another creator of namespace {contract.PLUGIN_NAMESPACE}, "
        f"version {contract.PLUGIN_VERSION} is registered already.",
        *answers["problems"],
    ]
    assert answers["problems"] == [
        f"{name}: field {contract.KERNELS_FIELD} is missing, so the engine has no kernel." for name in contract.INPUTS
    ]


@pytest.mark.parametrize("name", contract.INPUTS)
def test_a_plugin_is_made_serialized_and_made_again(name: str, answers: dict[str, Any]) -> None:
    row = answers["operators"][name]
    kinds = [[field, contract.FIELD_TYPES[kind]] for field, kind in contract.OPERATOR_ATTRIBUTES[name].items()]
    values, kernels = row["values"], list(range(256))
    assert row["field_names"] == kinds
    assert values["epsilon"] == pytest.approx(1e-5, rel=2**-23)
    assert math.isfinite(values["epsilon"])
    assert (values["scale_offset"], values["scale_type"]) == (1.0, contract.ONNX_TYPES["float16"])
    assert values.get("quant_type") == (contract.QUANT_TYPES["float8_e4m3"] if name in contract.UNQUANTIZED else None)
    assert row["identity"] == [name, contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE]
    assert row["is_its_own_capability"] == [True, True, True]
    plain = [[field, kind, [values[field]]] for field, kind in kinds]
    assert row["fields_without_kernels"] == plain
    signed = np.array(kernels, np.uint8).view(np.int8).tolist()
    assert row["fields"] == [*plain, [contract.KERNELS_FIELD, "INT8", signed]]
    assert row["loaded"] == [values, kernels]
    assert row["copy"] == [False, True, values, kernels, name]


@pytest.mark.parametrize("name", contract.INPUTS)
def test_a_plugin_answers_for_dtypes_and_formats(name: str, answers: dict[str, Any]) -> None:
    row = answers["operators"][name]
    assert row["outputs"] == len(contract.OUTPUTS[name])
    first = "FP8" if name in contract.UNQUANTIZED else "BF16"
    assert row["output_dtypes"] == [first, "BF16"][: len(contract.OUTPUTS[name])]
    # scale_type is FLOAT16: x of no other dtype, and every tensor has x's.
    dtypes = ("float32", "float16", "bfloat16", "int8")
    expected = {f"{place} {dtype}": dtype == "float16" for place in ("x", "other") for dtype in dtypes}
    assert row["formats"] == {**expected, "x CHW32": False}
