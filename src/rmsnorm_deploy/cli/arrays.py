"""Reading and writing .npz files."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rmsnorm_deploy.models.errors import UsageError

if TYPE_CHECKING:
    from rmsnorm_deploy.runtime.runner import Array


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name.

    numpy writes bfloat16 arrays (of ml_dtypes) without their dtype, as two bytes per element; these are read back as
    bfloat16.

    Raises:
        UsageError: there is no such file, it is no .npz file, or it holds Python objects.
    """
    import ml_dtypes
    import numpy as np

    if not path.is_file():
        raise UsageError(f"{path}: there is no such file.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy and zipfile raise many kinds; all mean that this is no archive of arrays
        raise UsageError(
            f"{path}: not an .npz file of plain arrays ({error}). Make one with numpy.savez(path, name=array)."
        ) from error
    return {n: a.view(ml_dtypes.bfloat16) if a.dtype.str == "|V2" else a for n, a in arrays.items()}


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
