"""Upload an exported folder or a package to the hub, with a card (`push_folder`)."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...export.onnx_io.manifest import read_manifest
from ...export.onnx_io.owned_files import MANIFEST, sha256
from ...models.errors import EnvironmentMissingError, RmsnormDeployError, UsageError
from ...models.hub.download import is_offline, refusal
from ...models.hub.options import TOKEN_VARIABLE, HubOptions, is_revision, token_of, without_token
from .contents import check_files
from .model_card import FILE as CARD
from .model_card import MARK, model_card
from .reports import REPORT, report_on

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MAIN = "main"
_LISTED = 3
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Push:
    """What was uploaded, or would be.

    Attributes:
        folder: the folder.
        repository: the hub name.
        revision: the branch.
        files: the files of the repository that are written, with their size in bytes.
        card: the text of README.md; None where it stays as it is.
        validated: the verdict of the validation report; None without one.
        commit: the commit that was made; None for a dry run.
        url: the address of that commit.
        notes: remarks for the user.
    """

    folder: Path
    repository: str
    revision: str
    files: dict[str, int]
    card: str | None
    validated: str | None
    commit: str | None = None
    url: str | None = None
    notes: list[str] = field(default_factory=list)


def push_folder(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    report: str | os.PathLike[str] | None = None,
    hub: HubOptions | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Push:
    """Upload the files that a folder's manifest lists, the manifest and a card, in one commit.

    A README.md that is in the folder is the card; else one is written from the manifest and the report. One that the
    repository has, and that this package did not write, stays as it is.

    Args:
        folder: an exported folder or a package; every file must be as it was written.
        repository: a hub name, owner/model; it is created if there is none.
        private: create it private; refused for one that exists and is public.
        revision: the branch, which is created from the main one if there is none; None is the main one.
        message: of the commit.
        report: a JSON report of `validate` on this folder; that of a package if None.
        hub: the token's file.
        dry_run: upload nothing, and ask the hub nothing.
        progress: called with a line of text at each step.

    Raises:
        UsageError: an argument is wrong, a file was changed, the report is of another model, or the hub refuses; the
            message has its reason.
        UnsupportedError: the weights of the model are not in the folder.
        EnvironmentMissingError: huggingface_hub or a token is missing, or the hub cannot be reached.
    """
    place, options = Path(folder).expanduser(), hub or HubOptions()
    say = progress or (lambda _: None)
    _check_names(repository, revision)
    _check_installed()
    manifest = read_manifest(place)
    say(f"comparing the files of {place}")
    check_files(place, manifest)
    content = _report(place, manifest, None if report is None else Path(report))
    notes = _notes(manifest)
    files = {name: place / name for name in sorted({*manifest["files"], MANIFEST})}
    card = None
    if (place / CARD).is_file():
        files[CARD] = place / CARD
    else:
        card = model_card(repository, manifest, content)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if card is not None:
        sizes[CARD] = len(card.encode())
    verdict = None if content is None else content["verdict"]
    if content is None:
        notes.append("no validation report is in it; add one with --report, from rmsnorm validate --json")
    planned = Push(place, repository, revision or _MAIN, sizes, card, verdict, notes=notes)
    if dry_run:
        return planned
    return _upload(planned, files, manifest, private, message, options, say)


def _check_names(repository: str, revision: str | None) -> None:
    if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository:
        raise UsageError(f"repository: expected a hub name (owner/model), got {repository!r}.")
    if revision is not None and not is_revision(revision):
        raise UsageError(f"revision: expected a branch, got {revision!r}.")


def _check_installed() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise EnvironmentMissingError(
            'pushing requires huggingface_hub. Install it with: pip install "rmsnorm-deploy[hf]"'
        ) from error


def _report(folder: Path, manifest: Mapping[str, Any], path: Path | None) -> dict[str, Any] | None:
    """The report of a validation of this model, with any verdict; None without one."""
    if path is None and REPORT not in manifest["files"]:
        return None
    return report_on(path or folder / REPORT, {row.get("sha256") for row in manifest["files"].values()}, folder)


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    source = manifest.get("source")
    if isinstance(source, str) and os.path.isabs(source.partition(":")[0]):
        return [f"{MANIFEST} names a path of this machine: {source}"]
    return []


def _upload(
    planned: Push,
    files: Mapping[str, Path],
    manifest: Mapping[str, Any],
    private: bool,
    message: str | None,
    options: HubOptions,
    say: Progress,
) -> Push:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=_token(options))
    name, branch = planned.repository, planned.revision
    with _refusals(planned, options):
        say(f"opening {name}")
        api.create_repo(name, private=True if private else None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UsageError(
                f"{name}: expected a private repository, got a public one that exists already. Choose another name, or "
                "make it private on the hub."
            )
        if branch != _MAIN:
            api.create_branch(name, branch=branch, exist_ok=True)
        card, notes = planned.card, [*planned.notes]
        sources: dict[str, Any] = dict(files)
        if CARD not in manifest["files"] and not _may_replace_card(api, name, branch):
            sources.pop(CARD, None)
            card = None
            notes.append(f"{CARD} of {name} was not written by this command and stays as it is")
        elif card is not None:
            sources[CARD] = card.encode()
        operations = [CommitOperationAdd(path, _sent(source)) for path, source in sources.items()]
        say(f"uploading {len(operations)} files to {name}")
        api.preupload_lfs_files(name, additions=operations, revision=branch, free_memory=False)
        _check_unchanged(planned.folder, manifest)
        commit = api.create_commit(
            name, operations=operations, commit_message=message or _message(manifest), revision=branch
        )
    sizes = {path: planned.files[path] for path in sources}
    return Push(
        planned.folder, name, branch, sizes, card, planned.validated, commit.oid, str(commit.commit_url), notes
    )  # fmt: skip


def _sent(source: Path | bytes) -> str | bytes:
    return source if isinstance(source, bytes) else os.path.realpath(source)


def _token(options: HubOptions) -> str:
    from huggingface_hub import get_token

    if is_offline(options):
        raise UsageError("offline: expected a network for a push, got HF_HUB_OFFLINE=1. Unset it.")
    token = token_of(options) or get_token()
    if not token:
        raise EnvironmentMissingError(
            f"pushing requires a token of the hub that may write: set {TOKEN_VARIABLE}, log in with hf auth login, or "
            "give --token-file FILE."
        )
    return token


def _may_replace_card(api: Any, name: str, branch: str) -> bool:
    """Whether the repository has no README.md, or one that this package wrote."""
    if not api.file_exists(name, CARD, revision=branch):
        return True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(api.hf_hub_download(name, CARD, revision=branch, cache_dir=folder))
        return MARK in path.read_text(encoding="utf-8", errors="replace")


def _check_unchanged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the files again after the large ones were sent: what is committed is what was verified."""
    for name, row in manifest["files"].items():
        path = folder / name
        if row.get("sha256") is not None and sha256(path) != row["sha256"]:
            raise UsageError(f"{path}: it was changed during the upload. Nothing was committed; push again.")


def _message(manifest: Mapping[str, Any]) -> str:
    server = (manifest.get("package") or {}).get("for")
    kind = f" for {server}" if server else ""
    return f"Upload of rmsnorm-deploy: {manifest.get('target', 'model')}, {manifest.get('dtype', 'its dtype')}{kind}"


@contextmanager
def _refusals(planned: Push, options: HubOptions) -> Iterator[None]:
    """Turn what the hub's client raises to errors with the server's reason, and without a token."""
    from huggingface_hub import errors

    try:
        yield
    except RmsnormDeployError:
        raise
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{planned.repository}: expected an existing branch, got {planned.revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(f"{planned.repository}: {refusal(error, options)}") from None  # whose message may have a token
    except errors.HfHubHTTPError as error:
        reason = error.server_message or str(error)
        code = error.response.status_code
        raise UsageError(
            f"{planned.repository}: the hub refuses the upload ({code}): {_short(reason, options)}"
        ) from None  # whose message may have a token
    except Exception as error:  # the network's own kinds, which differ between versions of the client
        raise EnvironmentMissingError(
            f"{planned.repository}: the upload failed ({type(error).__name__}: {_short(error, options)}). Push again: "
            "a commit is made completely or not at all."
        ) from None  # whose message may have a token


def _short(error: object, options: HubOptions) -> str:
    return without_token(" ".join(str(error).split())[:300], options)
