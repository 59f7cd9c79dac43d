"""The config and tokenizer files that belong to a model, and where they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

COMPANIONS: Final = (
    "config.json", "generation_config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip


def folder_of(model: nn.Module) -> tuple[Path | None, str]:
    """The folder of config and tokenizer files of a module that transformers' `from_pretrained` loaded.

    Returns:
        The folder, and an empty text; or None and, where the module names a checkpoint whose files could not be had,
        the reason.
    """
    name = getattr(model, "name_or_path", "")
    if not isinstance(name, str) or not name:
        return None, ""
    return folder_named(name)


def folder_named(name: str) -> tuple[Path | None, str]:
    """The same for a local folder or a hub name, whose files are downloaded unless they are in the cache."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser(), ""
    if name.startswith((".", "/", "~")):
        return None, f"there are no config and tokenizer files: {name} is not a folder any more"
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(COMPANIONS))), ""
    except Exception as error:  # the hub's client raises many kinds, requests' among them
        first = " ".join(str(error).split())[:200]
        return None, f"config and tokenizer files of {name} could not be downloaded: {type(error).__name__}: {first}"
