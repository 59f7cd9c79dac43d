"""The task of the shipped checkpoint: adding two numbers, written as text, one character per token.

A problem reads `012+345=` and its answer `0357`. The model writes the answer's digits last first (`7530`), because a
sum is computed from the right: then every digit needs only the carry of the one written before it. `solve` turns the
digits round again, so that people only ever see answers the right way round.

Needs numpy only: any runtime that maps token ids to logits can be asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

Ids = npt.NDArray[np.int64]
Step = Callable[[Ids], npt.NDArray[Any]]
"""Token ids int64 [batch, seq] to floating logits [batch, seq, vocab]."""

VOCABULARY = "0123456789+="
DIGITS = 3
ANSWER_DIGITS = DIGITS + 1
LIMIT = 10**DIGITS
"""Both numbers are at least 0 and below this."""

_IDS = {character: index for index, character in enumerate(VOCABULARY)}
_HELD_OUT_ONE_IN = 10
_PROMPT = re.compile(rf"[0-9]{{{DIGITS}}}\+[0-9]{{{DIGITS}}}=")

# How a manifest names the tokenizer of this task.
TOKENIZER = "rmsnorm_deploy.addition"


@dataclass(frozen=True, slots=True)
class Problem:
    """One sum of two numbers of at most three digits each.

    Attributes:
        left: the first number, 0 to 999.
        right: the second number, 0 to 999.
    """

    left: int
    right: int

    def __post_init__(self) -> None:
        if not (0 <= self.left < LIMIT and 0 <= self.right < LIMIT):
            raise UsageError(f"{self.left} + {self.right} is out of range; both numbers must be 0 to {LIMIT - 1}.")

    @property
    def prompt(self) -> str:
        """What the model is given, such as `012+345=`."""
        return f"{self.left:0{DIGITS}d}+{self.right:0{DIGITS}d}="

    @property
    def answer(self) -> str:
        """The sum as people write it, padded with zeros, such as `0357`."""
        return f"{self.left + self.right:0{ANSWER_DIGITS}d}"


@dataclass(frozen=True, slots=True)
class TaskAccuracy:
    """How many problems were answered without a single wrong digit.

    Attributes:
        correct: problems whose whole answer is right.
        total: problems asked, at least 1.
    """

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """correct / total, 0 to 1."""
        return self.correct / self.total


def encode(texts: Sequence[str]) -> Ids:
    """Token ids of texts of one length, int64 [batch, seq].

    Raises:
        UsageError: there is no text, they differ in length, or a character is not in the vocabulary.
    """
    if not texts:
        raise UsageError("there is no text to encode; give at least one.")
    for text in texts:
        if len(text) != len(texts[0]):
            raise UsageError(f"{text!r} and {texts[0]!r} differ in length; a batch has one length.")
        unknown = sorted(set(text) - _IDS.keys())
        if unknown:
            raise UsageError(f"{text!r} has {', '.join(map(repr, unknown))}; the vocabulary is {VOCABULARY!r}.")
    return np.array([[_IDS[character] for character in text] for text in texts], dtype=np.int64)


def decode(ids: Ids) -> list[str]:
    """The texts of token ids [batch, seq], the inverse of `encode`.

    Raises:
        UsageError: the ids are not of two dims or not in the vocabulary.
    """
    if ids.ndim != 2:
        raise UsageError(f"token ids have shape {list(ids.shape)}; they must be [batch, seq].")
    if ids.size and not (ids.min() >= 0 and ids.max() < len(VOCABULARY)):
        raise UsageError(f"token ids run from {ids.min()} to {ids.max()}; they must be 0 to {len(VOCABULARY) - 1}.")
    return ["".join(VOCABULARY[index] for index in row) for row in ids]


def held_out(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which problems are kept from training, bool in the shape of the two arrays of numbers.

    One in ten is, by a fixed hash (multiplication by an odd constant near 2³² / golden ratio; Knuth, The Art of
    Computer Programming, vol. 3, 6.4) of the unordered pair: a + b and b + a are on the same side, or training on one
    would give the other away.
    """
    pair = (np.minimum(left, right) * LIMIT + np.maximum(left, right)).astype(np.uint64)
    mixed = (pair * np.uint64(2_654_435_769)) & np.uint64(0xFFFF_FFFF)
    return (mixed >> np.uint64(12)) % np.uint64(_HELD_OUT_ONE_IN) == 0


def draw(rng: np.random.Generator, count: int, *, test: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The two numbers of `count` random problems, each int64 [count]; held-out ones if `test`, else all others.

    They are drawn evenly and independently, so that a problem may come twice.
    """
    numbers = np.empty((2, 0), dtype=np.int64)
    while numbers.shape[1] < count:
        drawn = rng.integers(0, LIMIT, size=(2, max(count, 64)))
        numbers = np.concatenate((numbers, drawn[:, held_out(drawn[0], drawn[1]) == test]), axis=1)
    return numbers[0, :count], numbers[1, :count]


def problems(count: int, seed: int = 0) -> list[Problem]:
    """Held-out problems, none of which occurs in training; the same arguments give the same list.

    Args:
        count: how many, at least 1.
        seed: of the drawing.

    Raises:
        UsageError: count is below 1.
    """
    if count < 1:
        raise UsageError(f"{count} problems were asked for; ask for at least 1.")
    left, right = draw(np.random.default_rng(seed), count, test=True)
    return [Problem(int(a), int(b)) for a, b in zip(left, right, strict=True)]


def solve(step: Step, prompts: Sequence[str]) -> list[str]:
    """Answers by greedy decoding, the right way round; four calls of `step`, each one token longer.

    Args:
        step: the model, see `Step`; the logits of the last position are read.
        prompts: such as `012+345=`, all in one batch.

    Returns:
        One text of four characters per prompt, such as `0357`. A bad model may answer with `+` or `=`.

    Raises:
        UsageError: a prompt is no problem, or `step` gives something else than logits.
    """
    for prompt in prompts:
        if not _PROMPT.fullmatch(prompt):
            raise UsageError(f"{prompt!r} is no problem; write two numbers of {DIGITS} digits, such as '012+345='.")
    ids = encode(prompts)
    for _ in range(ANSWER_DIGITS):
        logits = np.asarray(step(ids))
        expected = (*ids.shape, len(VOCABULARY))
        if logits.shape != expected:
            raise UsageError(f"the model gave shape {list(logits.shape)} for logits; {list(expected)} was expected.")
        token = logits[:, -1].astype(np.float32).argmax(axis=-1)
        ids = np.concatenate((ids, token[:, None].astype(np.int64)), axis=1)
    return [written[::-1] for written in decode(ids[:, -ANSWER_DIGITS:])]


def accuracy(step: Step, asked: Sequence[Problem], batch_size: int = 256) -> TaskAccuracy:
    """Exact match: the share of problems whose every digit is right.

    Args:
        step: the model, see `Step`.
        asked: at least one problem, as from `problems`.
        batch_size: problems per call of `step`; the last batch may be smaller.

    Raises:
        UsageError: there is no problem, batch_size is below 1, or `step` gives something else than logits.
    """
    if not asked:
        raise UsageError("there is no problem to solve; give at least one.")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1.")
    correct = 0
    for batch in _batches(asked, batch_size):
        answers = solve(step, [problem.prompt for problem in batch])
        correct += sum(given == problem.answer for given, problem in zip(answers, batch, strict=True))
    return TaskAccuracy(correct, len(asked))


def torch_step(model: torch.nn.Module) -> Step:
    """A PyTorch model as a `Step`, without gradients, on the device of its parameters; the logits come as float32."""
    import torch

    device = next(model.parameters()).device

    def step(ids: Ids) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(ids).to(device)).float().cpu().numpy()

    return step


def _batches(items: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
