"""The files of a checkpoint of the hub, in the cache: those that are read, and no others (`open_checkpoint`)."""

from __future__ import annotations

import inspect
import json
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..companions import COMPANIONS
from ..errors import EnvironmentMissingError, UsageError, few
from ..weights.checkpoint import INDEX, PICKLED, SINGLE
from .options import (
    TOKEN_VARIABLE,
    HubOptions,
    HubSource,
    download_progress,
    hub_keywords,
    hub_options,
    is_commit,
    without_token,
)

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"
_LISTED = 3


def is_offline(options: HubOptions) -> bool:
    """Whether only the cache is read."""
    from huggingface_hub import constants

    return options.offline or bool(constants.HF_HUB_OFFLINE)


def open_checkpoint(name: str, options: HubOptions) -> HubSource:
    """Download the config and the safetensors files of a checkpoint, unless they are in the cache.

    Of a branch that moves meanwhile, all files are those of one commit.

    Args:
        name: a hub name.
        options: how.

    Raises:
        UsageError: the hub has no such model or revision, or does not let this token read it; or, offline, the cache
            lacks a file.
        EnvironmentMissingError: the hub cannot be reached, and the cache lacks a file.
    """
    config = _file(name, CONFIG, options)
    if config is None:
        raise UsageError(f"{_where(name, options)}: expected a {CONFIG}, got none. {_SUBFOLDER}")
    commit = _commit(config)
    source = HubSource(name, options.revision, commit, config.parent, replace(options, revision=commit))
    _file(name, "generation_config.json", source.options, needed=False)
    single = _file(name, SINGLE, source.options, needed=False)
    index = None if single is not None else _file(name, INDEX, source.options, needed=False)
    if index is not None:
        _shards(index, source)
    elif single is None and not any((source.folder / file).is_file() for file in PICKLED):
        _file(name, SINGLE, source.options)  # says so where it is not known whether there is one
    return source


_SUBFOLDER = "If the model is in a folder of the repository, name it: --subfolder DIR (HubOptions(subfolder=...))."


def _shards(index: Path, source: HubSource) -> None:
    """Download the files that an index names; `weight_files_of` says what is wrong with an index."""
    try:
        names = dict.fromkeys(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    own = [name for name in names if Path(name).name == name]
    absent = [name for name in own if _file(source.name, name, source.options) is None]
    if absent:
        raise UsageError(
            f"{_where(source.name, source.options)}: expected the files that {INDEX} names, got none of the name "
            f"{few(absent, _LISTED)}."
        )


def _commit(path: Path) -> str:
    """The commit of a file in the cache."""
    return next((folder.name for folder in path.parents if folder.parent.name == "snapshots"), "")


def companions_of(source: HubSource) -> tuple[Path, str]:
    """The folder with the config and tokenizer files of a checkpoint, which are downloaded unless they are there.

    Returns:
        The folder, and an empty text, or the reason why some may be missing.
    """
    _, problem = _download_companions(source.name, source.options)
    return source.folder, problem


def companions_of_module(model: nn.Module) -> tuple[Path | None, str]:
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
    return _download_companions(name, replace(hub_options(name), subfolder=None))


def _download_companions(name: str, options: HubOptions) -> tuple[Path | None, str]:
    """The folder of a repository in the cache; or None, and why its files could not be downloaded."""
    from huggingface_hub import snapshot_download

    keywords = hub_keywords(options)
    inner = keywords.pop("subfolder", None)
    patterns = [f"{inner.strip('/')}/{file}" if inner else file for file in COMPANIONS]
    try:
        with _quiet_logs():
            return Path(snapshot_download(name, allow_patterns=patterns, **keywords)), ""
    except Exception as error:  # the hub's client raises many kinds
        reason = f"{type(error).__name__}: {_short(error, options)}"
        return None, f"config and tokenizer files of {name} could not be downloaded: {reason}"


def _file(name: str, file: str, options: HubOptions, *, needed: bool = True) -> Path | None:
    """A file of a repository, in the cache.

    Returns:
        None if the repository does not have it; if it is not `needed`, also if that is not known.
    """
    from huggingface_hub import errors, hf_hub_download

    keywords = hub_keywords(options)
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        keywords["tqdm_class"] = type("_DownloadOfFile", (_Download,), {"file": file})
    try:
        with _quiet_logs():
            return Path(hf_hub_download(name, file, **keywords))
    except errors.LocalEntryNotFoundError as error:
        if not needed:
            return None
        if is_offline(options):
            raise _missing(name, file, options) from error
        raise _unreachable(name, file, options, error.__cause__ or error) from error
    except errors.EntryNotFoundError:
        return None
    except errors.RevisionNotFoundError as error:
        wanted = "expected an existing branch, tag or commit"
        raise UsageError(f"{_where(name, options)}: {wanted}, got {options.revision!r}.") from error
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise UsageError(f"{_where(name, options)}: {refusal(error, options)}") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{name!r}: expected a hub name (owner/model), got another text.") from error
    except errors.HfHubHTTPError as error:
        raise UsageError(f"{_where(name, options)}: the hub refuses {file}: {_short(error, options)}") from None


def refusal(error: BaseException, options: HubOptions) -> str:
    """The reason that a server gave for not showing a repository, and what to do."""
    reason = getattr(error, "server_message", None) or str(error)
    code = getattr(getattr(error, "response", None), "status_code", "")
    return (
        f"the hub has no such repository, or this token must not use it ({code}: {_short(reason, options)}). Check the "
        f"name; for a private or gated repository set {TOKEN_VARIABLE}, or give --token-file FILE."
    )


def _unreachable(name: str, file: str, options: HubOptions, error: BaseException) -> EnvironmentMissingError:
    from huggingface_hub import constants

    return EnvironmentMissingError(
        f"{_where(name, options)}: {constants.ENDPOINT} cannot be reached "
        f"({type(error).__name__}: {_short(error, options)}), and {file} is not in the cache {_cache(name, options)}. "
        "Try again, or name a local folder."
    )


def _missing(name: str, file: str, options: HubOptions) -> UsageError:
    """What is missing in the cache, and how to get it."""
    inside = f"{options.subfolder.strip('/')}/{file}" if options.subfolder else file
    command = ["hf", "download", name]
    command += ["--revision", options.revision] if options.revision else []
    command += ["--cache-dir", str(options.cache_dir)] if options.cache_dir else []
    command += ["--include", f"{options.subfolder.strip('/')}/*"] if options.subfolder else []
    return UsageError(
        f"{_where(name, options)}: offline: expected {inside} in the cache {_cache(name, options)}, got none; download "
        f"it with a network: {shlex.join(command)}"
    )


def _cache(name: str, options: HubOptions) -> str:
    """The folder of a repository in the cache."""
    from huggingface_hub import constants

    base = constants.HF_HUB_CACHE if options.cache_dir is None else options.cache_dir.expanduser()
    return str(Path(base).absolute() / f"models--{name.replace('/', '--')}")


def _where(name: str, options: HubOptions) -> str:
    revision = options.revision or ""
    shown = f" at {revision[:12] if is_commit(revision) else revision}" if revision else ""
    return f"the hub name {name!r}{shown}"


def _short(error: object, options: HubOptions) -> str:
    return without_token(" ".join(str(error).split())[:300], options)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep the client's warnings, such as that on a retry, off the screen: errors say the same."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Download:
    """What huggingface_hub takes for a progress bar: it passes lines to the function of `showing_downloads`."""

    file = ""

    def __init__(self, *_: Any, total: float | None = None, initial: float = 0, **__: Any) -> None:
        self.total, self.n = total, initial
        self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, count: float | None = 1) -> None:
        """Add a number of bytes."""
        self.n += count or 0
        self._show()

    def close(self) -> None:
        """The end of the download."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def _show(self) -> None:
        progress = download_progress()
        if progress is not None:
            of = f" of {self.total / 1e6:.1f}" if self.total else ""
            progress(f"downloading {self.file} ({self.n / 1e6:.1f}{of} MB)")
