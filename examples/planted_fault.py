"""Change one weight of an exported file and let `bisect` find the norm that it belongs to."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

import rmsnorm_deploy as rd

MODEL = "builtin:small"


def plant_fault(path: Path, name: str) -> None:
    """Multiply one element of an initializer by 1.5."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values[3] *= np.float32(1.5)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)


def main() -> int:
    """Return 0 if the fault is found where it was planted."""
    with tempfile.TemporaryDirectory() as temporary:
        exported = rd.export_model(MODEL, Path(temporary) / "out", target="standard")
        assert rd.validate(exported.folder, MODEL).verdict == "pass"
        site = exported.manifest["sites"][1]
        plant_fault(exported.folder / "model.onnx", f"{site['path']}.weight")
        report = rd.bisect(exported.folder, MODEL)
    print(report)
    print(f"planted in {site['path']}, found in {', '.join(culprit.name for culprit in report.culprits)}")
    return 0 if [culprit.name for culprit in report.culprits] == [site["path"]] else 1


if __name__ == "__main__":
    sys.exit(main())
