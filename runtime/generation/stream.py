"""Give each piece of a generated text to a function as soon as it is known (`stream_to`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..inputs.tokenizer import Tokenizer

# What a tokenizer writes for bytes that are not a whole character yet.
_UNFINISHED = "�"


class _Stream:
    """A streamer of transformers: `put` is called with the prompt, then with each new token."""

    def __init__(self, give: Callable[[str], None], tokenizer: Tokenizer) -> None:
        self._give, self._tokenizer = give, tokenizer
        self._ids: list[int] = []
        self._is_prompt = True
        self._first = self._given = 0  # the first token that is decoded, and how many tokens have been given

    def put(self, value: Any) -> None:
        """Take tokens."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids.extend(value.flatten().tolist())
        self._give_new(until=_UNFINISHED)

    def end(self) -> None:
        """The text has ended."""
        self._give_new()

    def _give_new(self, until: str | None = None) -> None:
        """Give the text of the new tokens, unless it ends like this.

        A few tokens before them are decoded with them, because a tokenizer may drop a space at the start of a text.
        """
        before = self._tokenizer.decode(self._ids[self._first : self._given])
        text = self._tokenizer.decode(self._ids[self._first :])
        if len(text) > len(before) and (until is None or not text.endswith(until)):
            self._give(text[len(before) :])
            self._first, self._given = self._given, len(self._ids)


def stream_to(give: Callable[[str], None], tokenizer: Tokenizer) -> Any:
    """A streamer of transformers that calls a function with each piece of the new text.

    Args:
        give: is called with each piece; together they are the whole text.
        tokenizer: of the model.
    """
    return _Stream(give, tokenizer)
