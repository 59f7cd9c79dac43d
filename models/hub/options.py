"""How models are read from the hub (`HubOptions`), for one call or until a context ends (`using_hub`).

A token is never a field, an argument or a part of a message: it is read when it is sent (`token_of`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UsageError
from ..regular_files import read_bytes

TOKEN_VARIABLE = "HF_TOKEN"
_LARGEST_TOKEN = 4096
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """How a model with a hub name is read.

    Attributes:
        revision: a branch, a tag or a commit; None is the hub's default branch.
        subfolder: the folder of the checkpoint in its repository.
        cache_dir: the cache; None is that of huggingface_hub (`HF_HUB_CACHE`).
        token_file: a file whose first line is the token; None is the environment variable `HF_TOKEN`, or the login of
            `hf auth login`.
        offline: read the cache alone, as `HF_HUB_OFFLINE=1` does.
    """

    revision: str | None = None
    subfolder: str | None = None
    cache_dir: Path | None = None
    token_file: Path | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True)
class HubSource:
    """A checkpoint of the hub in the cache.

    Attributes:
        name: the hub name.
        revision: the revision that was asked for; None for the default branch.
        commit: the commit that it was then.
        folder: the checkpoint's folder in the cache.
        options: the options with that commit as their revision.
    """

    name: str
    revision: str | None
    commit: str
    folder: Path
    options: HubOptions

    def to_dict(self) -> dict[str, Any]:
        """What a manifest says of it, as JSON values."""
        return {
            "name": self.name, "revision": self.revision, "subfolder": self.options.subfolder, "commit": self.commit,
        }  # fmt: skip


Progress = Callable[[str], None]
_progress: ContextVar[Progress | None] = ContextVar("download_progress", default=None)
_current: ContextVar[tuple[HubOptions, str | None]] = ContextVar("hub_options", default=(HubOptions(), None))


@contextmanager
def using_hub(options: HubOptions, model: str | None = None) -> Iterator[None]:
    """Read models and tokenizers of the hub with these options, while the context is open.

    Args:
        options: the options.
        model: the only name for which `revision` and `subfolder` hold; None for every name.

    Raises:
        UsageError: see `check_hub`.
    """
    check_hub(options)
    token = _current.set((options, model))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def showing_downloads(progress: Progress | None) -> Iterator[None]:
    """Call a function with a line of text on each download, while the context is open; None shows nothing."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def download_progress() -> Progress | None:
    """The function of the innermost open context of `showing_downloads`."""
    return _progress.get()


def hub_options(name: str) -> HubOptions:
    """The options of the innermost open context of `using_hub` that hold for a hub name."""
    options, model = _current.get()
    return options if model in (None, name) else replace(options, revision=None, subfolder=None)


def recorded_options(source: str, recorded: Any) -> HubOptions:
    """The options for a model that was exported before: the exported commit, unless another revision is asked for.

    Args:
        source: the model's name.
        recorded: what the manifest says of the hub; None if nothing.
    """
    options = hub_options(source)
    if not isinstance(recorded, dict) or recorded.get("name") != source or options.revision is not None:
        return options
    return replace(
        options, revision=recorded.get("commit"), subfolder=options.subfolder or recorded.get("subfolder")
    )  # fmt: skip


def check_hub(options: HubOptions) -> None:
    """Check the options before slow work.

    Raises:
        UsageError: a revision or subfolder is no such name, or there is no token in the file.
    """
    if options.revision is not None and not is_revision(options.revision):
        raise UsageError(f"revision: expected a branch, a tag or a commit, got {options.revision!r}.")
    if options.subfolder is not None and not is_subfolder(options.subfolder):
        raise UsageError(f"subfolder: expected a relative path in the repository, got {options.subfolder!r}.")
    token_of(options)


def is_revision(text: str) -> bool:
    """Whether a text can be a branch, a tag or a commit."""
    return bool(re.fullmatch(r"[^\s\x00-\x1f~^:?*\[\\]{1,250}", text)) and ".." not in text and text[0] not in "/-"


def is_subfolder(text: str) -> bool:
    """Whether a text can be a folder in a repository."""
    parts = PurePosixPath(text).parts
    return bool(parts) and "\\" not in text and text.isprintable() and not {"..", "/", "~"} & {parts[0], *parts}


def is_commit(text: str) -> bool:
    """Whether a text is a whole commit, which never changes."""
    return _COMMIT.fullmatch(text) is not None


def token_of(options: HubOptions) -> str | None:
    """The token in the file of the options; None without such a file.

    Raises:
        UsageError: the file cannot be read, or its first line is no token.
    """
    if options.token_file is None:
        return None
    path = options.token_file.expanduser()
    lines = read_bytes(path, _LARGEST_TOKEN).decode("utf-8", "replace").split("\n")
    token = lines[0].strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{path}: expected a token of the hub in the first line, got something else.")
    return token


def hub_keywords(options: HubOptions) -> dict[str, Any]:
    """The options that were given, as arguments of the functions of huggingface_hub and transformers."""
    found: dict[str, Any] = {
        "revision": options.revision,
        "subfolder": options.subfolder,
        "cache_dir": None if options.cache_dir is None else str(options.cache_dir.expanduser()),
        "token": token_of(options),
        "local_files_only": options.offline or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def without_token(text: str, options: HubOptions) -> str:
    """A text, such as a server's message, in which a token that was sent is replaced."""
    tokens = [os.environ.get(TOKEN_VARIABLE), *_tokens_of_files(options)]
    for token in filter(None, (token and token.strip() for token in tokens)):
        text = text.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)


def _tokens_of_files(options: HubOptions) -> Iterator[str | None]:
    """The tokens in the file of the options and in that of a login; files that are gone have none."""
    with suppress(UsageError):
        yield token_of(options)
    with suppress(ImportError, OSError, ValueError):
        from huggingface_hub import constants

        yield Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8")
