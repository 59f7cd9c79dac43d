"""Write .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from rmsnorm_deploy.export.onnx_io.atomic_files import new_file
from rmsnorm_deploy.export.onnx_io.owned_files import NPZ_MARK, is_own_report

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.runners.base import Array


def write_npz(path: Path, arrays: dict[str, Array]) -> list[str]:
    """Write arrays to an .npz file, completely or not at all; bfloat16, which .npz does not support, becomes float32.

    Returns:
        The names of the arrays that were widened from bfloat16.

    Raises:
        UsageError: the file cannot be written.
    """
    import numpy as np

    widened = [name for name, array in arrays.items() if array.dtype.name == "bfloat16"]
    # Written entry by entry, because numpy.savez does not accept an array named `file`.
    with new_file(path, is_own_report) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.comment = NPZ_MARK
        for name, array in arrays.items():
            plain = array.astype(np.float32) if name in widened else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, plain, allow_pickle=False)
    return widened
