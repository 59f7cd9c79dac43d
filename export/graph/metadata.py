"""Names in an exported file: the metadata keys of a norm, this package's constants, and the KV cache."""

from __future__ import annotations

from typing import Final, Literal

# Whether a norm is alone, or has a residual add in front of it whose sum is used elsewhere too.
Form = Literal["plain", "residual_add"]

METADATA_PREFIX: Final = "rmsnorm_deploy."
PATH_KEY: Final = METADATA_PREFIX + "path"
SPEC_KEY: Final = METADATA_PREFIX + "spec"
TARGET_KEY: Final = METADATA_PREFIX + "target"
FORM_KEY: Final = METADATA_PREFIX + "form"
# On the main node: names of the values that go into and come out of the whole norm, or attention, as JSON.
VALUES_KEY: Final = METADATA_PREFIX + "values"
# On the nodes of a norm that export found in the graph, not as a module: where it was found, and the names of its
# weight and bias in the PyTorch model, as JSON.
FOUND_KEY: Final = METADATA_PREFIX + "found"
IN_GRAPH: Final = "graph"
PARAMETERS_KEY: Final = METADATA_PREFIX + "parameters"
# On the main node of an attention: the path of its module and its spec, as JSON.
ATTENTION_KEY: Final = METADATA_PREFIX + "attention"
# On an operator that computes a rotary embedding: how many of the channels it rotates, as JSON.
ROTARY_KEY: Final = METADATA_PREFIX + "rotary"
# On the model: the sizes of dynamic dims that the graph is valid for, as JSON.
SIZES_KEY: Final = METADATA_PREFIX + "sizes"
# On the model: the lowest version of each runtime that computes it right, as JSON.
REQUIRES_KEY: Final = METADATA_PREFIX + "requires"
# The start of the names of constants that are scales of ones, made for operators that require a scale.
ONES: Final = METADATA_PREFIX + "ones"
# A KV cache's tensors, as runtimes and servers expect them: `past_key_values.N.key` goes in, `present.N.key` comes out;
# and the same with `value`.
PAST: Final = "past_key_values."
PRESENT: Final = "present."
