"""The models of the mutation suite, each exported once for each target that is asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.from_torch.export_model import prepare
from rmsnorm_deploy.export.from_torch.save import PreparedModel, SaveOptions, save
from rmsnorm_deploy.export.lowering.attention_table import AttentionMode
from rmsnorm_deploy.models.builtin.checkpoint import addition
from rmsnorm_deploy.models.outliers import inject_outliers
from tests.helpers.models.families import build
from tests.helpers.norms.norm_zoo import Biased, Weighted, hub_class, randomized

from .witnesses import Witnesses

TARGETS = ("primitives", "standard", "ort", "plugin")
IN_PLACE = "in place"
_NODES: dict[str, AttentionMode] = {"nodes": "node", "nodes past": "node", IN_PLACE: "in-place"}
WIDTH, GROUP = 32, 16
_OUTLIERS = (2, 50.0, 0)  # channels, factor, seed


class Assorted(nn.Module):
    """Norms that the decoders do not have: a bias, groups, gates before and after, equal widths, several epsilons.

    Takes x `[batch, sequence, WIDTH]` and returns two outputs of that shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.biased = Biased(WIDTH)
        self.query, self.key = Weighted(WIDTH), Weighted(WIDTH)
        self.grouped = hub_class("mamba2", "MambaRMSNormGated")(WIDTH, GROUP)
        self.after = hub_class("falcon_h1", "FalconH1RMSNormGated")(WIDTH, n_groups=WIDTH // GROUP)
        self.final = nn.RMSNorm(WIDTH, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        linears = self.linears
        h = x + linears[0](self.biased(x))
        q, k = self.query(linears[1](h)), self.key(linears[2](h))
        h = h + linears[3](q * torch.sigmoid(k))
        h = h + self.grouped(linears[4](h), linears[5](h))
        h = h + self.after(linears[6](h), linears[7](h))
        return self.final(h), h


def assorted() -> nn.Module:
    """`Assorted` with random weights that roughly preserve the size of the values."""
    model = randomized(Assorted(), seed=5)
    with torch.no_grad():
        for parameter in model.get_submodule("linears").parameters():
            parameter.mul_(0.3)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to export.

    Attributes:
        model: `addition` (the trained checkpoint), `assorted`, or a family of tests/helpers/models/families.py;
            `NAME w40` has a sliding window of 40 tokens, which is longer than most inputs.
        dtype: `float32` or `float16`.
        variant: `plain`, `past` (with the KV cache), `outliers` (outlier channels), or `redrawn` (other random
            weights); `nodes`, `nodes past` and `in place` have their attentions in nodes, the last two with the cache.
    """

    model: str
    dtype: str = "float32"
    variant: str = "plain"

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.model if self.variant == "plain" else f"{self.model} {self.variant}"

    def build(self) -> nn.Module:
        """The PyTorch model in its dtype, in eval mode."""
        made = {"addition": addition, "assorted": assorted}.get(self.model)
        family, _, window = self.model.partition(" w")
        model = made() if made is not None else build(family, **({"sliding_window": int(window)} if window else {}))
        if self.variant == "redrawn":
            _redraw(model)
        elif self.variant == "outliers":
            inject_outliers(model, *_OUTLIERS)
        return model.to(getattr(torch, self.dtype)).eval()


class Exports:
    """Exported folders under one folder, and their models; existing exports are reused."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.model = functools.cache(self._model)
        self.prepared = functools.cache(self._prepared)
        self.witnesses = functools.cache(self._witnesses)

    def folder(self, subject: Subject, target: str) -> Path:
        """The exported folder of a model for a target."""
        place = self.work / f"{subject.model.replace(' ', '_')}-{subject.variant}-{subject.dtype}" / target
        if not place.is_dir():
            mode: AttentionMode = "in-place" if subject.variant == IN_PLACE else "node"
            save(self.prepared(subject), place, target, SaveOptions(attention=mode))
        return place

    def _prepared(self, subject: Subject) -> PreparedModel:
        x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
        inputs = {"x": x.to(getattr(torch, subject.dtype))} if subject.model == "assorted" else None
        # Most faults are put into the operators of the models' own functions.
        mode: AttentionMode = _NODES.get(subject.variant, "decomposed")
        with_past = subject.variant in ("past", "nodes past", IN_PLACE)
        return prepare(self.model(subject), inputs=inputs, with_past=with_past, attention=mode)

    def _model(self, subject: Subject) -> nn.Module:
        return subject.build()

    def _witnesses(self, subject: Subject, target: str) -> Witnesses:
        """The inputs on which a fault may show, with the outputs of the fault-free file."""
        return Witnesses(self.folder(subject, target), self.model(subject))


def _redraw(model: nn.Module) -> None:
    """Other weights of the same distribution: each parameter's values in another order."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
