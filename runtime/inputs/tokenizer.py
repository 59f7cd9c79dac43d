"""Load tokenizers (`load_tokenizer`): from an exported folder, a model's folder, the hub, or the addition task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...models.builtin import addition_task as addition
from ...models.errors import EnvironmentMissingError, UsageError
from ...models.hub.options import hub_keywords, hub_options, without_token
from ...models.regular_files import read_json

ADDITION_MODEL = "builtin:addition"
_FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """The token ids of a text; at least one, and at most `most`, beyond which the text is cut off.

        Raises:
            UsageError: the text has no tokens, or it contains characters that the tokenizer does not support.
        """
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of the messages of a chat, up to where the model's answer begins.

        Args:
            messages: with the keys `role` and `content`.

        Raises:
            UsageError: the tokenizer has no chat template, or the template rejects the messages.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...

    @property
    def of_transformers(self) -> Any:
        """The tokenizer of transformers, or None."""
        ...


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains a tokenizer, or an export whose manifest names the addition task's tokenizer."""
    return _is_addition(folder) or any((folder / name).is_file() for name in _FILES)


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load a tokenizer.

    Args:
        source: a folder that contains one, a hub name, or `builtin:addition`.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        UsageError: there is no tokenizer, or transformers cannot read it.
        EnvironmentMissingError: transformers is not installed.
    """
    folder = Path(source).expanduser()
    if str(source) == ADDITION_MODEL or _is_addition(folder):
        return _AdditionTokenizer()
    if folder.exists() and not has_tokenizer(folder):
        raise UsageError(f"{source} contains no tokenizer ({' or '.join(_FILES)}); name a folder that contains one.")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise EnvironmentMissingError(
            'loading a tokenizer requires transformers. Install it with: pip install "rmsnorm-deploy[hf]"'
        ) from error
    name = str(folder) if folder.exists() else str(source)
    hub = hub_options(name)
    given = {} if folder.exists() else hub_keywords(hub)
    try:
        return _HubTokenizer(AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **given))
    except Exception as error:  # transformers raises many kinds; all mean that there is no tokenizer of this name
        first = " ".join(without_token(str(error), hub).split())[:300]
        raise UsageError(f"transformers could not load the tokenizer of {source}: {first}") from error


def token_ids(prompt: Iterable[Any]) -> list[int]:
    """The ids of a prompt as Python integers.

    Raises:
        UsageError: the prompt is empty.
    """
    ids = [int(token) for token in prompt]
    if not ids:
        raise UsageError("the prompt is empty; give at least one token.")
    return ids


def _is_addition(folder: Path) -> bool:
    try:
        manifest = read_json(folder / "manifest.json", "")
    except UsageError:
        return False
    return isinstance(manifest, dict) and manifest.get("tokenizer") == addition.TOKENIZER


class _AdditionTokenizer:
    """The tokenizer of the addition task: one token per character."""

    of_transformers = None

    def encode(self, text: str, most: int | None = None) -> list[int]:
        return token_ids(addition.encode([text])[0])[:most]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        raise UsageError("the tokenizer of the addition task has no chat template; give a prompt without --chat.")

    def decode(self, ids: list[int]) -> str:
        return addition.decode(np.array([ids], np.int64))[0]


class _HubTokenizer:
    """A tokenizer that transformers loaded."""

    def __init__(self, tokenizer: Any) -> None:
        self.of_transformers = tokenizer

    def encode(self, text: str, most: int | None = None) -> list[int]:
        cut = {} if most is None else {"truncation": True, "max_length": most}
        return token_ids(self.of_transformers(text, **cut)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not getattr(self.of_transformers, "chat_template", None):
            raise UsageError("the tokenizer has no chat template; give a prompt without --chat.")
        try:
            text = self.of_transformers.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise errors of jinja2 and of their own
            raise UsageError(f"the chat template rejects the messages: {' '.join(str(error).split())[:300]}") from error
        # The template has written the special tokens.
        return token_ids(self.of_transformers(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self.of_transformers.decode(ids, skip_special_tokens=True))


def end_tokens(folder: Path | None) -> set[int]:
    """End-of-sequence ids of a folder, from generation_config.json or else config.json.

    Raises:
        UsageError: the file states something else.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name if folder is not None else None
        if path is None or not path.is_file():
            continue
        config = read_json(path, "Export the model again.")
        end = config.get("eos_token_id") if isinstance(config, dict) else None
        if end is not None:
            ids = end if isinstance(end, list) else [end]
            if not all(isinstance(number, int) for number in ids):
                raise UsageError(f"{path}: eos_token_id: expected a token id or a list of them, got {str(end)[:80]}.")
            return set(ids)
    return set()
