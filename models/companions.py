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

    Where the module names a checkpoint of the hub, these files are downloaded, unless they are in the cache.

    Returns:
        The folder, and an empty text; or None and, where the module names a checkpoint whose files are not available,
        the reason.
    """
    name = getattr(model, "name_or_path", "")
    if not isinstance(name, str) or not name:
        return None, ""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser(), ""
    if name.startswith((".", "/", "~")):
        return None, f"config and tokenizer files were not copied: the folder {name} does not exist"
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(COMPANIONS))), ""
    except Exception as error:  # the hub's client raises many kinds, requests' among them
        first = " ".join(str(error).split())[:200]
        return None, f"config and tokenizer files of {name} could not be downloaded: {type(error).__name__}: {first}"
