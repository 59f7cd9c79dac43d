"""Saving and loading decoders (a config and safetensors weights), and the shipped checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UsageError, few
from ..regular_files import read_json
from .decoder import Decoder, DecoderConfig

FORMAT = "rmsnorm_deploy.decoder"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CHECKPOINTS = Path(__file__).parent / "checkpoints"


def addition() -> Decoder:
    """The shipped float32 checkpoint that adds two three-digit numbers; see `addition_task`.

    Raises:
        UsageError: the checkpoint is missing from the installation, or is damaged.
    """
    return load_decoder(CHECKPOINTS / "addition")


def save_decoder(model: Decoder, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors` into a folder, which is created if it does not exist.

    Both files are complete under a temporary name before either is renamed; the config is renamed last. On an error
    the files of an earlier save are unchanged, and no temporary file remains.

    Args:
        model: a decoder on any device, with parameters of one dtype.
        folder: the folder to write to.

    Raises:
        UsageError: the folder cannot be created or written to, or holds another model.
    """
    config = json.dumps({"format": FORMAT, **model.config.to_dict()}, indent=2) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    contents = {WEIGHTS_NAME: safetensors.torch.save(tensors, {"format": "pt"}), CONFIG_NAME: config.encode()}
    target = Path(folder)
    temporary = {name: target / f".{name}.{os.getpid()}.tmp" for name in contents}
    _check_replaceable(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            os.replace(path, target / name)
    except OSError as error:
        raise UsageError(
            f"cannot write the decoder to {target}: {error.strerror or error}; choose a folder that is writable."
        ) from error
    finally:
        if target.is_dir():
            for path in temporary.values():
                path.unlink(missing_ok=True)


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace a config or weights that `save_decoder` did not write."""
    there = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (folder / name).exists() or (folder / name).is_symlink()]
    if not there:
        return
    try:
        values = read_json(folder / CONFIG_NAME, "")
    except UsageError:
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UsageError(f"{folder} holds {' and '.join(there)} of another model; choose another folder.")


def load_decoder(folder: str | os.PathLike[str]) -> Decoder:
    """The decoder written by `save_decoder`, on the CPU, in the dtype it was saved in and in evaluation mode.

    Args:
        folder: a folder with `config.json` and `model.safetensors`.

    Raises:
        UsageError: the folder or a file is missing, is not a decoder's, or does not fit the config.
    """
    source = Path(folder)
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder; give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (source / name).is_file():
            raise UsageError(f"{source} has no file {name}; save the decoder again.")
    config = _read_config(source / CONFIG_NAME)
    with torch.device("meta"):  # the parameters are replaced by those of the file
        model = Decoder(config)
    tensors = _read_weights(source / WEIGHTS_NAME)
    _check_weights(source / WEIGHTS_NAME, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _read_config(path: Path) -> DecoderConfig:
    values = read_json(path, "Save the decoder again.")
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        raise UsageError(f'{path}: expected "format" {FORMAT!r}, got {found!r}; give a folder written by save_decoder.')
    try:
        return DecoderConfig.from_dict(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as safetensors ({error}); save the decoder again.") from error


def _check_weights(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those of the config; the message names at most three of each kind."""
    problems = []
    for what, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            problems.append(f"{what} tensors: {few(sorted(names))}")
    misshaped = [
        f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if misshaped:
        problems.append(f"misshaped tensors: {few(misshaped)}")
    dtypes = {tensor.dtype for tensor in found.values()}
    if len(dtypes) > 1 or any(not dtype.is_floating_point for dtype in dtypes):
        problems.append(f"expected one floating dtype, got {', '.join(sorted(map(str, dtypes)))}")
    if problems:
        raise UsageError(f"{path} does not fit its {CONFIG_NAME}: {'; '.join(problems)}. Save the decoder again.")
