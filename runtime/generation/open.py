"""Open the decoder of an exported folder or of an engine (`open_decoder`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...models.errors import UnsupportedError
from ..engines.api import ORT
from ..inputs.exported import component_folders, open_exported
from ..inputs.tokenizer import end_tokens
from ..runners.base import Runner
from ..tensorrt.on_demand import open_model
from .decoder import Decoder, TextDecoder
from .parts import open_parts


@dataclass(frozen=True, slots=True)
class OpenDecoder:
    """A decoder that can generate.

    Attributes:
        decoder: gives the logits of the next tokens.
        runner: computes them.
        folder: holds the tokenizer and the model's settings; None for a file without a folder of an export.
        ends: token ids that end a text.
    """

    decoder: Decoder
    runner: Runner
    folder: Path | None
    ends: frozenset[int]


@contextmanager
def open_decoder(folder: str | Path, provider: str = "cpu", runner: str | None = None) -> Iterator[OpenDecoder]:
    """Open an exported folder of a decoder, or of several models with one, or an engine.

    Args:
        folder: of the export, or the engine.
        provider: ONNX Runtime's execution provider.
        runner: `ort`, `tensorrt` or `rtx`; see `open_model`. A model of several parts runs in ONNX Runtime.

    Raises:
        UnsupportedError: the model is not a decoder, or the runner cannot run it.
        UsageError: the folder is not an export, or lacks what generation needs.
    """
    place = Path(folder).expanduser()
    parts = component_folders(place)
    if parts:
        if runner not in (None, ORT):
            raise UnsupportedError(f"{folder} holds several models, which run in ONNX Runtime only; omit --runner.")
        with open_parts(place, parts, provider) as (decoder, opened):
            yield OpenDecoder(decoder, opened, place, frozenset(end_tokens(place)))
        return
    exported = open_exported(place)
    ends = frozenset(end_tokens(exported.folder) | set(exported.end_tokens))
    with open_model(exported, runner, provider) as model:
        yield OpenDecoder(TextDecoder(model, exported), model, exported.folder, ends)
