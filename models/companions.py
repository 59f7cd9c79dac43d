"""The config and tokenizer files that belong to a model, and where they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

COMPANIONS: Final = (
    "config.json", "generation_config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip


def companion_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The config and tokenizer files in a model's folder.

    A link is followed only to a file in the folder itself or, in the hub's cache, in the same repository's `blobs`.

    Returns:
        The files, and a note for the user on each file that is not taken.
    """
    found, notes = [], []
    allowed = [Path(os.path.realpath(folder))]
    if allowed[0].parent.name == "snapshots":
        allowed.append(allowed[0].parent.parent / "blobs")
    allowed += [inner.parent.parent / "blobs" for inner in allowed[0].parents if _is_snapshot(inner)]
    for name in COMPANIONS:
        file = folder / name
        real = Path(os.path.realpath(file))
        if not file.is_file():
            continue
        if any(place in real.parents for place in allowed):
            found.append(file)
        else:
            notes.append(f"{name} was not copied, because it is a link that leads out of {folder}")
    return found, notes


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is a commit of a repository in the hub's cache."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def saved_weights(folder: Path) -> list[Path]:
    """The files with weights in a folder, safetensors or pickled, whether a checkpoint names them or not."""
    return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
