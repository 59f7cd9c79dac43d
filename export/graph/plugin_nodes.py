"""Which nodes are the custom operators of the plugin contract."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from ...plugins import contract

# The domains in which a file may have the contract's operators.
PLUGIN_DOMAINS: Final = (contract.DOMAIN, contract.ORT_DOMAIN)


def is_plugin_node(node: ir.Node) -> bool:
    """Whether a node is one of the contract's operators. ONNX Runtime's domain holds the plugins of others too."""
    if node.op_type not in contract.INPUTS or node.domain not in PLUGIN_DOMAINS:
        return False
    if node.domain == contract.DOMAIN:
        return True
    space = node.attributes.get("plugin_namespace")
    if space is None or space.type != ir.AttributeType.STRING or space.is_ref():
        return False
    return space.as_string() == contract.PLUGIN_NAMESPACE
