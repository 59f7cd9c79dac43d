"""Texts of a data set as the inputs of a model (`tokenizer_of`, `token_cells`, `per_token`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...models.errors import UsageError
from ..inputs.cases import PER_TOKEN
from ..inputs.exported import Exported
from ..inputs.tokenizer import Tokenizer, has_tokenizer
from ..runners.base import Array, TensorInfo

TOKENS = "input_ids"


def tokenizer_of(schema: Any, column: str, given: str | None, exported: Exported) -> str | None:
    """The tokenizer of the column of `input_ids`; None if it holds tokens already.

    Args:
        schema: of Arrow, of the data set.
        column: the column of `input_ids`.
        given: a folder or a hub name; None for the tokenizer of the export.
        exported: the model.

    Raises:
        UsageError: the column holds texts and there is no tokenizer, or a tokenizer was given and it does not.
    """
    kind = schema.field(column).type if column in schema.names else None
    if kind is None or not _is_text(kind):
        if given is not None:
            got = f"no column {column!r}" if kind is None else f"{kind} in the column {column!r}"
            raise UsageError(f"tokenizer: expected texts in a column for {TOKENS}, got {got}.")
        return None
    if given is not None:
        folder = Path(given).expanduser()
        return str(folder.absolute()) if folder.exists() else given
    if exported.folder is None or not has_tokenizer(exported.folder):
        raise UsageError(
            f"column {column}: expected a tokenizer for its texts, got none in {exported.folder or exported.model}. "
            "Name one with --tokenizer, or write tokens into the data set."
        )
    return str(exported.folder.absolute())


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind in _views())


def _views() -> list[Any]:
    """The type of texts that older versions of pyarrow do not have."""
    import pyarrow as pa

    return [pa.string_view()] if hasattr(pa, "string_view") else []


def token_cells(column: Any, name: str, tokenizer: Tokenizer, most: int | None, first: int = 0) -> list[Array]:
    """The tokens of each text, of rank 1.

    Args:
        column: a chunked array of texts.
        name: of the column, for messages.
        tokenizer: with the special tokens that it adds to a text.
        most: the most tokens of a text, the rest of which is cut off; None for all.
        first: the number of the first row, for messages.

    Raises:
        UsageError: a text is missing, or has no tokens.
    """
    found = []
    for number, text in enumerate(column.to_pylist(), first):
        if text is None:
            raise UsageError(f"column {name}: expected a text everywhere, got none in row {number}.")
        try:
            found.append(np.array(tokenizer.encode(text, most), np.int64))
        except UsageError as error:
            raise UsageError(f"column {name}: the text in row {number}: {error}") from error
    return found


def per_token(tokens: Array, feeds: Mapping[str, Array], inputs: Sequence[TensorInfo]) -> dict[str, Array]:
    """The inputs with one element for each token that are not given: nothing is padded, and positions count from 0.

    Args:
        tokens: the tokens, of shape (batch, length).
        feeds: the inputs that are given.
        inputs: those of the model.
    """
    made = {
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.broadcast_to(np.arange(tokens.shape[-1], dtype=tokens.dtype), tokens.shape),
        "token_type_ids": np.zeros_like(tokens),
    }
    names = [info.name for info in inputs if info.name in PER_TOKEN and info.name not in feeds]
    return {name: made[name] for name in names}
