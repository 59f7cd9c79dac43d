"""`cpp/contract.h`: the contract as the C++ sources read it, written from `plugins/contract.py`.

`python -m rmsnorm_deploy.plugins.tensorrt.header` writes it again after a change of the contract.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from ...plugins import contract
from ..kernel.norm_kernel import WIDEST

PLACE: Final = Path(__file__).parent / "cpp" / "contract.h"


def contract_digest() -> str:
    """Twelve characters that change with the contract: a library says which one it was built for."""
    content = [
        contract.PLUGIN_NAMESPACE, contract.PLUGIN_VERSION, contract.INPUTS, contract.OUTPUTS,
        contract.OPERATOR_ATTRIBUTES, contract.KERNELS_FIELD, contract.SCALE_OFFSETS, contract.ONNX_TYPES,
        contract.QUANT_TYPES, WIDEST,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def contract_header() -> str:
    """The header's text."""
    operators = "\n".join(
        f'    {{"{name}", {len(inputs)}, {len(contract.OUTPUTS[name])}, {_bool("residual" in inputs)}, '
        f"{_bool(name in contract.UNQUANTIZED)}}},"
        for name, inputs in contract.INPUTS.items()
    )
    names = dict.fromkeys(name for attributes in contract.OPERATOR_ATTRIBUTES.values() for name in attributes)
    attributes = "\n".join(f'constexpr char {name}[] = "{name}";' for name in (*names, contract.KERNELS_FIELD))
    return f"""// Written by plugins/tensorrt/header.py from plugins/contract.py; change that, and write this again.
#pragma once

namespace rmsnorm_deploy::contract {{

constexpr char name_space[] = "{contract.PLUGIN_NAMESPACE}";
constexpr char version[] = "{contract.PLUGIN_VERSION}";
// Changes with the contract; see header.py.
constexpr char digest[] = "{contract_digest()}";

// Fields: the attributes of a node, and the compiled kernels that only engines have.
{attributes}

constexpr int widest = {WIDEST};

struct Operator {{
  const char* name;
  int inputs, outputs;
  bool adds;       // x and residual are added first, and the sum is the second output
  bool quantized;  // the first output is quantized by y_scale, the last input, to quant_type
}};

constexpr Operator operators[] = {{
{operators}
}};

}}  // namespace rmsnorm_deploy::contract
"""


def _bool(value: bool) -> str:
    return str(value).lower()


if __name__ == "__main__":
    PLACE.write_text(contract_header(), encoding="utf-8")
