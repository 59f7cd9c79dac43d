"""Writing .npz files."""

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
    """Refuse an output file before any work is done for it.

    Raises:
        UsageError: its folder does not exist, or it is a folder itself.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.absolute().parent}.")


def write_npz(path: Path, arrays: dict[str, Array]) -> list[str]:
    """Write arrays to an .npz file, whole or not at all; bfloat16, which the format lacks, is written as float32.

    Returns:
        The names of the arrays that were widened from bfloat16.

    Raises:
        UsageError: the file cannot be written.
    """
    import numpy as np

    widened = [name for name, array in arrays.items() if array.dtype.name == "bfloat16"]
    partial = path.absolute().with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        # Written entry by entry: numpy.savez takes no array called `file`.
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
