"""Find the layer of an engine that runs each norm, and its precision (`norm_layers`).

If the engine can be opened, TensorRT's inspector lists its layers. Without a GPU it cannot be opened, but the builder's
detailed log lists the same layers during the build (measured with TensorRT-RTX 1.7): one message that begins with
`Layers:` and has a line for each layer. Both name the ONNX nodes of each layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from .network import FileNorm

Source = Literal["inspector", "builder log"]
LOG_BEGINS: Final = "Layers:"
# Layer types that TensorRT gives to plugins: RTX's log, and the inspector of 10 and later.
_PLUGIN_TYPES: Final = ("custom_layer", "PluginV3")
_FIELD = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*?)\], Constants: ")
_TAIL = re.compile(r"TacticName: (?P<tactic>[^,]*), StreamId: \d+, Metadata: (?P<metadata>.*)$")
_DTYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_WORDS: Final = {"Half": "float16", "Float": "float32", "BFloat16": "bfloat16", "BF16": "bfloat16", "FP16": "float16",
                 "FP32": "float32"}  # fmt: skip
# The name of a generated kernel contains its operations: these belong to the statistics of a norm.
_STATISTICS = re.compile(r"Mean|ReduceSum|Norm|Sqrt")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's name of the layer.
        kind: TensorRT's layer type, such as `kgen`, `gemm`, `custom_layer`.
        dtypes: dtypes of its inputs, without repetition.
        tactic: name of the kernel, or empty.
        nodes: names of its ONNX nodes.
    """

    name: str
    kind: str
    dtypes: tuple[str, ...]
    tactic: str
    nodes: frozenset[str]

    @property
    def is_plugin(self) -> bool:
        """Whether a plugin runs here."""
        return self.kind in _PLUGIN_TYPES


@dataclass(frozen=True, slots=True)
class NormDtypes:
    """Dtypes of a norm's result and of its statistics in the network; None if unknown."""

    result: str | None
    statistics: str | None


@dataclass(frozen=True, slots=True)
class NormLayer:
    """The layer that runs one norm in an engine.

    Attributes:
        path: path of the norm's module.
        form: `plain`, or `residual_add`.
        layer: the layer that computes its statistics; None if no layer names it.
        kind: that layer's type.
        plugin: whether the layer is the plugin of this package.
        precision: dtype of its result in the network; None if unknown.
        statistics: dtype of its statistics in the network; None if unknown.
        others: number of other layers that run a part of it.
    """

    path: str
    form: str
    layer: str | None
    kind: str | None
    plugin: bool
    precision: str | None
    statistics: str | None
    others: int

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def layers_of_log(message: str) -> list[Layer]:
    """The layers in the builder's message that begins with `Layers:`; layers are repeated for each profile."""
    found: dict[str, Layer] = {}
    for line in message.splitlines():
        head, tail = _FIELD.match(line), _TAIL.search(line)
        if head is None or tail is None:
            continue
        dtypes = _dtypes(_DTYPE.findall(head["inputs"]))
        layer = Layer(head["name"], head["type"], dtypes, tail["tactic"], nodes_of(tail["metadata"]))
        found.setdefault(layer.name, layer)
    return list(found.values())


def layers_of_inspector(text: str) -> list[Layer]:
    """The layers in the JSON of the engine inspector, for an engine built with detailed profiling verbosity."""
    found = []
    for row in json.loads(text).get("Layers", []):
        if not isinstance(row, dict):  # an engine without details lists names only
            found.append(Layer(str(row), "", (), "", frozenset()))
            continue
        words = re.findall(r"\w+", " ".join(str(given.get("Format/Datatype", "")) for given in row.get("Inputs", [])))
        found.append(
            Layer(
                str(row.get("Name", "")),
                str(row.get("LayerType", "")),
                _dtypes(word for word in words if word in _WORDS),
                str(row.get("TacticName", "")),
                nodes_of(str(row.get("Metadata", ""))),
            )
        )
    return found


def norm_layers(
    norms: Sequence[FileNorm], layers: Sequence[Layer], dtypes: Mapping[str, NormDtypes]
) -> list[NormLayer]:
    """The layer that runs each norm.

    Args:
        norms: norms of the file.
        layers: layers of the engine.
        dtypes: dtypes of each norm in the network, by path.
    """
    by_node: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    return [_norm_layer(norm, by_node, dtypes.get(norm.path, NormDtypes(None, None))) for norm in norms]


def _norm_layer(norm: FileNorm, by_node: Mapping[str, list[Layer]], dtypes: NormDtypes) -> NormLayer:
    found = {layer.name: layer for node in norm.nodes for layer in by_node.get(node, ())}
    main = max(found.values(), key=lambda layer: _rank(layer, norm), default=None)
    name, kind = (None, None) if main is None else (main.name, main.kind)
    plugin = main is not None and main.is_plugin and norm.is_plugin
    others = max(len(found) - 1, 0)
    return NormLayer(norm.path, norm.form, name, kind, plugin, dtypes.result, dtypes.statistics, others)


def _rank(layer: Layer, norm: FileNorm) -> tuple[bool, bool, int]:
    return (layer.is_plugin, bool(_STATISTICS.search(layer.name)), len(layer.nodes & norm.nodes))


def nodes_of(metadata: str) -> frozenset[str]:
    """The ONNX nodes in a layer's metadata; a node of a local function is listed as `node | caller (Operator)`."""
    found = set()
    for entry in _NODE.findall(metadata):
        for part in entry.split(" | "):
            found.add(re.sub(r" \([^()]*\)$", "", part))
    return frozenset(found)


def _dtypes(words: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_WORDS.get(word, word.lower()) for word in words))
