"""Train the addition checkpoint: `python -m rmsnorm_deploy.models.builtin.train_addition --output DIR`.

This takes minutes on two CPU cores. The same arguments on the same machine give the same checkpoint, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RmsnormDeployError, UsageError
from .addition_task import ANSWER_DIGITS, VOCABULARY, Problem, accuracy, draw, encode, problems, torch_step
from .checkpoint import save_decoder
from .decoder import Decoder, DecoderConfig, random_decoder

CONFIG = DecoderConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=256,
    norm="llama",
    task="addition",
)
STEPS = 1500
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
REPORT_EVERY = 100
TEST_PROBLEMS = 5000
# Fixed, because the number of threads determines the order of sums, and thus the last bits of the weights.
THREADS = 2

Report = Callable[[str], None]


def learning_rate(step: int, steps: int) -> float:
    """The learning rate at `step`, 0 to steps - 1: linear warm-up, then a cosine decay to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def training_batch(rng: np.random.Generator, size: int) -> Tensor:
    """Problems with their answers, last digit first, as int64 [size, seq]; none is a held-out problem."""
    left, right = draw(rng, size, test=False)
    drawn = [Problem(int(a), int(b)) for a, b in zip(left, right, strict=True)]
    return torch.from_numpy(encode([problem.prompt + problem.answer[::-1] for problem in drawn]))


def answer_loss(model: Decoder, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the answer's digits; the digits of the prompt are random.

    Args:
        model: the decoder.
        ids: int64 [batch, seq], see `training_batch`.

    Returns:
        A scalar with a gradient.
    """
    logits = model(ids[:, :-1])[:, -ANSWER_DIGITS:]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, -ANSWER_DIGITS:].flatten())


def train(steps: int = STEPS, seed: int = 0, report: Report = lambda line: None) -> tuple[Decoder, list[float]]:
    """Train a fresh decoder in float32 with AdamW.

    Args:
        steps: optimizer steps, at least 1.
        seed: seed of the weights and of the problems.
        report: called with a line of text every `REPORT_EVERY` steps.

    Returns:
        The model in evaluation mode, and the loss of every step.

    Raises:
        UsageError: steps is below 1.
        RmsnormDeployError: the loss is no longer finite.
    """
    if steps < 1:
        raise UsageError(f"--steps: expected at least 1, got {steps}.")
    model = random_decoder(CONFIG, seed, norm_spread=0.0).train()
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    losses: list[float] = []
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = answer_loss(model, training_batch(rng, BATCH_SIZE))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RmsnormDeployError(f"the loss is {losses[-1]} at step {step + 1}; train with another --seed.")
        if (step + 1) % REPORT_EVERY == 0:
            report(f"step {step + 1}/{steps}: loss {losses[-1]:.5f}, {time.monotonic() - start:.0f} s")
    return model.eval(), losses


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: train, evaluate on held-out problems, save. Progress goes to stderr.

    Returns:
        The exit code: 0, or that of the error that was printed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rmsnorm_deploy.models.builtin.train_addition", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and problems (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        _train_and_save(options.output, options.steps, options.seed)
    except RmsnormDeployError as error:
        _to_stderr(f"error: {error}")
        return error.exit_code
    return 0


def _train_and_save(output: Path, steps: int, seed: int) -> None:
    if output.exists() and not output.is_dir():  # fail before training, not after it
        raise UsageError(f"--output {output} is a file; give a folder.")
    model, _ = train(steps, seed, _to_stderr)
    result = accuracy(torch_step(model), problems(TEST_PROBLEMS, seed))
    _to_stderr(f"held-out problems solved: {result.correct} of {result.total} ({result.fraction:.2%})")
    save_decoder(model, output)
    _to_stderr(f"saved {sum(p.numel() for p in model.parameters())} parameters to {output}")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    sys.exit(main())
