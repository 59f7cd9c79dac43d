"""Give the weights of a model outlier channels, as trained checkpoints have them and random weights do not.

In the residual stream of a trained transformer a few channels are 10 to 1000 times larger than the rest (Dettmers et
al. 2022, arXiv:2208.07339; Sun et al. 2024, arXiv:2402.17762), and the norms' weights are small there. A model with
random weights has none, so it does not show errors that only such channels cause.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dtypes import torch_name
from .errors import UsageError
from .recognition.find_norms import find_norms
from .recognition.site import Site

# The key of the manifest under which an export records the injection.
RECORD = "outliers"
_TEXT = re.compile(r"([1-9]\d*)x(\d+(?:\.\d*)?(?:e[+-]?\d+)?)")


@dataclass(frozen=True, slots=True)
class OutlierReport:
    """What `inject_outliers` changed.

    Attributes:
        channels: number of channels.
        factor: factor by which the embeddings were multiplied there.
        seed: seed of the choice of channels.
        width: the hidden size.
        indices: the channels, in ascending order.
        embeddings: paths of the embeddings that were changed.
        norms: paths of the norms whose weight was changed.
    """

    channels: int
    factor: float
    seed: int
    width: int
    indices: tuple[int, ...]
    embeddings: tuple[str, ...]
    norms: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        return {
            **self.record()[RECORD],
            "width": self.width,
            "indices": list(self.indices),
            "embeddings": list(self.embeddings),
            "norms": list(self.norms),
        }

    def record(self) -> dict[str, dict[str, Any]]:
        """The manifest's field from which `apply_recorded` repeats the injection on another copy of the model."""
        return {RECORD: {"channels": self.channels, "factor": self.factor, "seed": self.seed}}


def parse_outliers(text: str) -> tuple[int, float]:
    """The number of channels and the factor in a text such as `4x50`.

    Raises:
        UsageError: the text is not two numbers separated by x.
    """
    match = _TEXT.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"outliers: expected a number of channels and a factor, such as 4x50, got {text!r}.")
    return int(match[1]), float(match[2])


def inject_outliers(model: nn.Module, channels: int, factor: float, seed: int) -> OutlierReport:
    """Give the residual stream of `model` outlier channels, in place.

    The hidden size is the most common width among the recognized norms with a weight. In the chosen channels every
    embedding of that width is multiplied by `factor`, and the effective scale of every norm of that width (the weight,
    or 1 + weight) is divided by sqrt(factor), because trained norms have small weights in such channels. A tensor that
    several modules share is changed once, and no dtype changes.

    Args:
        model: any module with token embeddings; its weights are changed.
        channels: number of channels, at least 1 and at most the hidden size.
        factor: factor of the embeddings, above 1.
        seed: seed of the choice of channels; equal seeds choose equal channels.

    Returns:
        The channels, embeddings and norms that were changed.

    Raises:
        UsageError: an argument is out of range, there is no embedding or no norm with a weight to change, or a value
            would overflow its dtype. The model is unchanged then.
    """
    if not (math.isfinite(factor) and factor > 1):
        raise UsageError(f"factor of the outliers: expected a finite number above 1, such as 50, got {factor:g}.")
    sites = [site for site in find_norms(model).sites if site.weight is not None and site.spec.trailing_dims == 1]
    width = _hidden_size(model, sites)
    if not 1 <= channels <= width:
        raise UsageError(f"number of outlier channels: expected 1 to {width}, the hidden size, got {channels}.")
    norms = [site for site in sites if site.width == (width,)]
    embeddings = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == width
    }
    if not embeddings:
        raise UsageError(
            f"{type(model).__name__} has no embedding of its hidden size {width}, so there is no residual stream to "
            "give outlier channels to."
        )
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:channels].sort().values
    changed: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for path, embedding in embeddings.items():
            _plan(changed, f"{path}.weight", embedding.weight, chosen, 0.0, factor)
        for site in norms:
            weight = getattr(model.get_submodule(site.path), site.weight or "")
            _plan(changed, site.parameters[0], weight, chosen, site.spec.scale_offset, 1 / math.sqrt(factor))
        for tensor, values in changed.values():
            tensor[..., chosen.to(tensor.device)] = values
    indices = tuple(int(index) for index in chosen)
    return OutlierReport(
        channels, float(factor), seed, width, indices, tuple(embeddings), tuple(site.path for site in norms)
    )


def apply_recorded(model: nn.Module, manifest: Mapping[str, Any]) -> bool:
    """Inject the outlier channels that an export recorded in its manifest, in place.

    Args:
        model: the model that was exported, without outlier channels.
        manifest: manifest of the exported folder; empty for a single file.

    Returns:
        Whether the manifest records any.

    Raises:
        UsageError: the record is damaged, or does not fit the model.
    """
    record = manifest.get(RECORD)
    if record is None:
        return False
    try:
        channels, factor, seed = int(record["channels"]), float(record["factor"]), int(record["seed"])
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"{RECORD!r} in the manifest: expected channels, factor and seed, got {str(record)[:80]}. Export again."
        ) from error
    inject_outliers(model, channels, factor, seed)
    return True


def _hidden_size(model: nn.Module, sites: list[Site]) -> int:
    widths = Counter(site.width[0] for site in sites if site.width is not None)
    if not widths:
        raise UsageError(
            f"{type(model).__name__} has no recognized norm with a weight, so its hidden size is unknown and outlier "
            "channels cannot be injected. List the recognized norms with: rmsnorm inspect"
        )
    # Of two equally common widths the wider one: the other is the size of an attention head.
    return max(widths, key=lambda width: (widths[width], width))


def _plan(
    changed: dict[int, tuple[Tensor, Tensor]], name: str, tensor: Tensor, chosen: Tensor, offset: float, factor: float
) -> None:
    """Record the new values of one tensor's channels: `(old + offset) * factor - offset`, each tensor once."""
    if id(tensor) in changed:
        return
    if tensor.is_meta:
        raise UsageError(f"{name} is on the meta device and holds no values; load the weights first.")
    old = tensor[..., chosen.to(tensor.device)]
    new = ((old.double() + offset) * factor - offset).to(tensor.dtype)
    if bool((old.isfinite() & ~new.isfinite()).any()):
        raise UsageError(
            f"{name}: a factor of {factor:g} takes {float(old.abs().max()):.3g} beyond the range of "
            f"{torch_name(tensor.dtype)}; choose a smaller factor or a wider dtype."
        )
    changed[id(tensor)] = (tensor, new)
