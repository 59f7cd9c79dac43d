"""The task of the shipped checkpoint: adding two numbers, written as text, one character per token.

A problem is `012+345=` and its answer is `0357`. The model generates the digits of the answer in reverse (`7530`): a
sum is computed from the right, so each digit needs only the carry of the digit generated before it. `solve` reverses
them back.

Needs only NumPy: any runtime that maps token ids to logits can be evaluated.
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
        """The model's input, such as `012+345=`."""
        return f"{self.left:0{DIGITS}d}+{self.right:0{DIGITS}d}="

    @property
    def answer(self) -> str:
        """The sum in the usual order of digits, padded with zeros, such as `0357`."""
        return f"{self.left + self.right:0{ANSWER_DIGITS}d}"


@dataclass(frozen=True, slots=True)
class TaskAccuracy:
    """How many problems were answered with every digit right.

    Attributes:
        correct: problems whose whole answer is right.
        total: number of problems, at least 1.
    """

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """correct / total, 0 to 1."""
        return self.correct / self.total


def encode(texts: Sequence[str]) -> Ids:
    """Token ids of texts of equal length, int64 [batch, seq].

    Raises:
        UsageError: there is no text, the texts differ in length, or a character is not in the vocabulary.
    """
    if not texts:
        raise UsageError("there is no text to encode; give at least one.")
    for text in texts:
        if len(text) != len(texts[0]):
            raise UsageError(f"{text!r} and {texts[0]!r} differ in length; expected texts of equal length.")
        unknown = sorted(set(text) - _IDS.keys())
        if unknown:
            raise UsageError(f"{text!r} has {', '.join(map(repr, unknown))}; the vocabulary is {VOCABULARY!r}.")
    return np.array([[_IDS[character] for character in text] for text in texts], dtype=np.int64)


def decode(ids: Ids) -> list[str]:
    """The texts of token ids [batch, seq], the inverse of `encode`.

    Raises:
        UsageError: the ids do not have two dims, or are not in the vocabulary.
    """
    if ids.ndim != 2:
        raise UsageError(f"token ids: expected shape [batch, seq], got {list(ids.shape)}.")
    if ids.size and not (ids.min() >= 0 and ids.max() < len(VOCABULARY)):
        raise UsageError(f"token ids: expected 0 to {len(VOCABULARY) - 1}, got {ids.min()} to {ids.max()}.")
    return ["".join(VOCABULARY[index] for index in row) for row in ids]


def held_out(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which problems are held out of training, bool in the shape of the two arrays of numbers.

    One in ten is held out, by a fixed hash of the unordered pair (multiplication by an odd constant near 2³² / golden
    ratio; Knuth, The Art of Computer Programming, vol. 3, 6.4): a + b and b + a are both held out or both trained on,
    because training on one would leak the other.
    """
    pair = (np.minimum(left, right) * LIMIT + np.maximum(left, right)).astype(np.uint64)
    mixed = (pair * np.uint64(2_654_435_769)) & np.uint64(0xFFFF_FFFF)
    return (mixed >> np.uint64(12)) % np.uint64(_HELD_OUT_ONE_IN) == 0


def draw(rng: np.random.Generator, count: int, *, test: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The two numbers of `count` random problems, each int64 [count]; held-out ones if `test`, else the others.

    They are drawn uniformly and independently, so a problem may occur twice.
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
        seed: seed of the random numbers.

    Raises:
        UsageError: count is below 1.
    """
    if count < 1:
        raise UsageError(f"count: expected at least 1 problem, got {count}.")
    left, right = draw(np.random.default_rng(seed), count, test=True)
    return [Problem(int(a), int(b)) for a, b in zip(left, right, strict=True)]


def solve(step: Step, prompts: Sequence[str]) -> list[str]:
    """Answers by greedy decoding, in the usual order of digits; calls `step` four times, each time one token longer.

    Args:
        step: the model, see `Step`; the logits of the last position are read.
        prompts: such as `012+345=`, all in one batch.

    Returns:
        One text of four characters per prompt, such as `0357`. A bad model may answer with `+` or `=`.

    Raises:
        UsageError: a prompt is not a problem, or `step` does not return logits.
    """
    for prompt in prompts:
        if not _PROMPT.fullmatch(prompt):
            raise UsageError(f"prompt: expected two numbers of {DIGITS} digits, such as '012+345=', got {prompt!r}.")
    ids = encode(prompts)
    for _ in range(ANSWER_DIGITS):
        logits = np.asarray(step(ids))
        expected = (*ids.shape, len(VOCABULARY))
        if logits.shape != expected:
            raise UsageError(f"logits of the model: expected shape {list(expected)}, got {list(logits.shape)}.")
        token = logits[:, -1].astype(np.float32).argmax(axis=-1)
        ids = np.concatenate((ids, token[:, None].astype(np.int64)), axis=1)
    return [written[::-1] for written in decode(ids[:, -ANSWER_DIGITS:])]


def accuracy(step: Step, asked: Sequence[Problem], batch_size: int = 256) -> TaskAccuracy:
    """Exact match: how many problems are answered with every digit right.

    Args:
        step: the model, see `Step`.
        asked: the problems, at least one; see `problems`.
        batch_size: problems per call of `step`; the last batch may be smaller.

    Raises:
        UsageError: there is no problem, batch_size is below 1, or `step` does not return logits.
    """
    if not asked:
        raise UsageError("there is no problem to solve; give at least one.")
    if batch_size < 1:
        raise UsageError(f"batch_size: expected at least 1, got {batch_size}.")
    correct = 0
    for batch in _batches(asked, batch_size):
        answers = solve(step, [problem.prompt for problem in batch])
        correct += sum(given == problem.answer for given, problem in zip(answers, batch, strict=True))
    return TaskAccuracy(correct, len(asked))


def torch_step(model: torch.nn.Module) -> Step:
    """A PyTorch model as a `Step`, without gradients, on the device of its parameters; the logits are float32."""
    import torch

    device = next(model.parameters()).device

    def step(ids: Ids) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(ids).to(device)).float().cpu().numpy()

    return step


def _batches(items: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
