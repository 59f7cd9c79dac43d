"""Training of the variants on the addition task: losses, gradients, accuracy, and the range of activations."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.builtin import train_addition as recipe
from rmsnorm_deploy.models.builtin.addition_task import accuracy, encode, problems, torch_step
from rmsnorm_deploy.models.builtin.decoder import Decoder

from .times import rotated
from .variants import CONFIG, VARIANTS, PostNormBlock, Variant, build, norms_of

WINDOW = 10  # steps over which a loss is averaged
OBSERVED = 512  # held-out problems with which the range of activations is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How the variants are trained.

    Attributes:
        steps: optimizer steps of each training.
        high_steps: optimizer steps of each training at the high rate.
        seeds: trainings of each variant; the seeds are 0, 1, ...
        problems: held-out sums that are asked.
        high: the high rate, in peak rates of the addition checkpoint's recipe.
        clip: the largest norm of a gradient; larger ones are scaled to it, except at the high rate.
        threshold: steps with a larger norm of the gradient are counted.
    """

    steps: int = 400
    high_steps: int = 60
    seeds: int = 3
    problems: int = 1000
    high: float = 30.0
    clip: float = 1.0
    threshold: float = 1.0

    @property
    def marks(self) -> list[int]:
        """The steps at which losses are shown: an eighth, a quarter, a half and the whole."""
        return [max(1, self.steps // part) for part in (8, 4, 2, 1)]

    @property
    def high_rate(self) -> float:
        """The learning rate of the second training."""
        return recipe.PEAK_LEARNING_RATE * self.high


@dataclass(frozen=True, slots=True)
class Training:
    """What one training showed: the loss and the norm of the gradient (before clipping) of every step that ran.

    It ends early at a loss that is not finite, which is the last one.
    """

    losses: list[float]
    gradients: list[float]

    def loss_at(self, step: int) -> float:
        """The mean of the `WINDOW` losses that end with `step`, counted from 1; inf if training ended by then."""
        if step > len(self.losses) or not math.isfinite(self.losses[step - 1]):
            return math.inf
        return statistics.fmean(self.losses[max(0, step - WINDOW) : step])

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.losses[-1])


def train(model: Decoder, seed: int, rates: Iterable[float], clip: float | None = None) -> Training:
    """Train in place as the addition checkpoint was, with one step for each of `rates`.

    The recipe's own loop is not used: it stops with an error at a loss that is not finite, and keeps no gradients.

    Args:
        model: the decoder.
        seed: seed of the problems.
        rates: the learning rate of each step.
        clip: the largest norm of a step's gradient; None leaves gradients as they are.
    """
    model.train()
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=recipe.WEIGHT_DECAY)
    losses: list[float] = []
    gradients: list[float] = []
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = recipe.answer_loss(model, recipe.training_batch(rng, recipe.BATCH_SIZE))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        gradient = nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])
        gradients.append(gradient.item())
        if clip is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), clip, gradient)
        optimizer.step()
    model.eval()
    return Training(losses, gradients)


def largest_of(values: Iterable[float]) -> float:
    """The largest value; NaN counts as inf."""
    return max(math.inf if math.isnan(value) else value for value in values)


def observe(model: Decoder, ids: Tensor) -> dict[str, float]:
    """The largest values of a forward pass in float32.

    Returns:
        `residual stream`: of what a block takes or returns, or the final norm takes; `norm input`: of what a norm
        takes; `square`, `sum of squares`, `mean of squares`: of what it computes from x, or for LayerNorm from
        x - mean(x); `sum`: of abs(sum(x)), which LayerNorm alone needs.
    """
    largest: dict[str, float] = defaultdict(float)

    def keep(name: str, values: Tensor) -> None:
        largest[name] = largest_of([largest[name], values.abs().max().item()])

    def at_norm(module: nn.Module, taken: tuple[Tensor, ...]) -> None:
        x = taken[0]
        keep("norm input", x)
        if isinstance(module, nn.LayerNorm):
            keep("sum", x.sum(-1))
            x = x - x.mean(-1, keepdim=True)
        squares = x.square()
        keep("square", squares)
        keep("sum of squares", squares.sum(-1))
        keep("mean of squares", squares.mean(-1))

    def at_block(_: nn.Module, taken: tuple[Tensor, ...], returned: Tensor) -> None:
        keep("residual stream", taken[0])
        keep("residual stream", returned)

    def at_second_norm(_: nn.Module, taken: tuple[Tensor, ...]) -> None:
        keep("residual stream", taken[0])  # before the block, this is the stream between attention and MLP

    hooks = [norm.register_forward_pre_hook(at_norm) for _, norm in norms_of(model)]
    hooks += [block.register_forward_hook(at_block) for block in model.layers]
    hooks += [
        block.mlp_norm.register_forward_pre_hook(at_second_norm)
        for block in model.layers
        if not isinstance(block, PostNormBlock)
    ]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(largest)


def train_all(options: TrainingOptions) -> tuple[dict[Variant, list[dict[str, Any]]], dict[Variant, Decoder]]:
    """Every variant with every seed, in rotating order: a row for each, and the models of the first seed."""
    rows: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    models = {}
    for seed in range(options.seeds):
        asked = problems(options.problems, seed)
        ids = torch.from_numpy(encode([one.prompt + one.answer[::-1] for one in asked[:OBSERVED]]))[:, :-1]
        for variant in rotated(VARIANTS, seed):
            start = time.perf_counter()
            model = build(variant, CONFIG, seed)
            untrained = observe(model, ids)
            usual = [recipe.learning_rate(step, options.steps) for step in range(options.steps)]
            normal = train(model, seed, usual, options.clip)
            high = train(build(variant, CONFIG, seed), seed, [options.high_rate] * options.high_steps)
            row = {
                "accuracy": accuracy(torch_step(model), asked).fraction,
                "losses": [normal.loss_at(mark) for mark in options.marks],
                "largest gradient": largest_of(normal.gradients),
                "steps above": sum(gradient > options.threshold for gradient in normal.gradients),
                "high finite": high.is_finite,
                "high loss": high.loss_at(len(high.losses)),
                "high largest loss": largest_of(high.losses),
                "high largest gradient": largest_of(high.gradients),
                "observed": observe(model, ids),
                "untrained": untrained,
            }
            rows[variant].append(row)
            if seed == 0:
                models[variant] = model
            line = f"  {variant}, seed {seed}: accuracy {row['accuracy']:.2%}, {time.perf_counter() - start:.0f} s"
            print(line, file=sys.stderr, flush=True)
    return rows, models
