"""The nodes of a captured graph that are not ONNX operators: one for each norm, and one for each attention."""

from __future__ import annotations

from typing import Final

CAPTURE_DOMAIN: Final = "rmsnorm_deploy.capture"
# Its inputs are x, weight, bias, gate; its attributes the spec as JSON, the path of the module and the widths.
NORM_OP: Final = "Norm"
# Its inputs are query, key, value, bias, sink, as in `AttentionSpec`; its attributes the spec as JSON, the path, and
# the numbers of heads of the query, and of the key and the value.
ATTENTION_OP: Final = "Attention"
