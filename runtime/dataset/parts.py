"""The parts of a data set (`plan_parts`): some rows of a file each, with a file of its own for the result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import UsageError

SUFFIX = ".parquet"
# The field of a file's metadata in which a result says of which run it is, and of which part.
MARK = b"rmsnorm_deploy.part"
_PART = re.compile(r"part-(\d{6,})\.parquet")


@dataclass(frozen=True, slots=True)
class Part:
    """Some consecutive rows of a file.

    Attributes:
        number: of the part, from 0.
        file: the file, absolute.
        start: its first row in the file.
        rows: the number of its rows.
    """

    number: int
    file: str
    start: int
    rows: int

    @property
    def name(self) -> str:
        """The name of its result's file."""
        return f"part-{self.number:06d}{SUFFIX}"

    def mark(self, key: str) -> bytes:
        """What its result has in its metadata, in a run of this key."""
        return f"{key}:{self.number}:{self.rows}".encode()


def dataset_files(source: Path) -> list[Path]:
    """The Parquet files of a data set, absolute and in the order of their names.

    Raises:
        UsageError: there are none.
    """
    place = source.expanduser()
    if place.is_dir():
        files = sorted(path for path in place.rglob(f"*{SUFFIX}") if path.is_file() and not path.name.startswith("."))
        if not files:
            raise UsageError(f"{source}: expected files {SUFFIX} in the folder, got none.")
        return [path.absolute() for path in files]
    if not place.is_file():
        raise UsageError(f"{source}: expected a Parquet file, or a folder of them, got no such file.")
    return [place.absolute()]


def plan_parts(files: list[Path], most: int) -> tuple[list[Part], Any]:
    """The parts of files, in order.

    Args:
        files: Parquet files of one schema.
        most: the most rows of a part.

    Returns:
        The parts, and the schema of Arrow.

    Raises:
        UsageError: a file is not Parquet, or has other columns than the first.
    """
    parts: list[Part] = []
    first: Any = None
    for path in files:
        with opened(path) as file:
            schema = file.schema_arrow.remove_metadata()
            if first is None:
                first = schema
            elif not schema.equals(first):
                raise UsageError(f"{path}: expected the columns of {files[0]}, got {_difference(first, schema)}.")
            total = file.metadata.num_rows
        for start in range(0, total, most):
            parts.append(Part(len(parts), str(path), start, min(most, total - start)))
    return parts, first


def opened(path: Path) -> Any:
    """A Parquet file, opened.

    Raises:
        UsageError: it is not one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: expected a Parquet file, got one that cannot be read: {first}") from error


def read_part(part: Part) -> Any:
    """The rows of a part, as a table of Arrow; only the row groups that hold them are read."""
    import pyarrow as pa

    with opened(Path(part.file)) as file:
        groups: list[int] = []
        before, seen = 0, 0
        for number in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(number).num_rows
            if seen + size > part.start and seen < part.start + part.rows:
                before = seen if not groups else before
                groups.append(number)
            seen += size
        table = file.read_row_groups(groups) if groups else file.schema_arrow.empty_table()
    found: pa.Table = table.slice(part.start - before, part.rows)
    if found.num_rows != part.rows:
        raise UsageError(f"{part.file}: expected at least {part.start + part.rows} rows, got fewer; did it change?")
    return found


def is_written(part: Part, folder: Path, key: str) -> bool:
    """Whether the result of a part is there, as a run of this key wrote it.

    Raises:
        UsageError: a file of this name is there that the run did not write.
    """
    path = folder / part.name
    if not path.exists():
        return False
    with opened(path) as file:
        found = (file.schema_arrow.metadata or {}).get(MARK)
        if found == part.mark(key) and file.metadata.num_rows == part.rows:
            return True
    raise UsageError(f"{path}: expected the result of this run, got another file. Choose another folder with -o.")


def foreign_parts(folder: Path, parts: list[Part]) -> Iterator[Path]:
    """Files of a folder that are named as results, and are of no part."""
    known = {part.name for part in parts}
    for path in sorted(folder.glob(f"part-*{SUFFIX}")):
        if _PART.fullmatch(path.name) and path.name not in known:
            yield path


def _difference(first: Any, schema: Any) -> str:
    names, others = list(first.names), list(schema.names)
    if names != others:
        return ", ".join(others)
    return ", ".join(f"{field.name}: {field.type}" for field in schema if not field.equals(first.field(field.name)))
