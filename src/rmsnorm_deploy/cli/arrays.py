"""Write .npz files, and check that an output file can be written."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rmsnorm_deploy.models.errors import UsageError

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.runners.base import Array


def check_writable(path: Path) -> None:
    """Refuse an invalid path of an output file before any work is done.

    Raises:
        UsageError: its folder does not exist, or the path is a folder.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file name.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist.")


def write_npz(path: Path, arrays: dict[str, Array]) -> list[str]:
    """Write arrays to an .npz file, completely or not at all; bfloat16, which .npz does not support, becomes float32.

    Returns:
        The names of the arrays that were widened from bfloat16.

    Raises:
        UsageError: the file cannot be written.
    """
    import numpy as np

    widened = [name for name, array in arrays.items() if array.dtype.name == "bfloat16"]
    partial = path.absolute().with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        # Written entry by entry, because numpy.savez does not accept an array named `file`.
        with zipfile.ZipFile(partial, "w") as archive:
            for name, array in arrays.items():
                plain = array.astype(np.float32) if name in widened else array
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, plain, allow_pickle=False)
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"writing {path} failed: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return widened
