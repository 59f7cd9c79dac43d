"""One concept has one word, in American spelling: the words that were given up are in no file but the changelog."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = {"CHANGELOG.md", "LICENSE", "tests/test_words.py"}
# What is written instead, and the pattern of what is not.
WORDS = {
    "baseline": r"yardstick",
    "segment": r"\bstretch(es)?\b",
    "activation store": r"\btapes?\b",
    "residual_add": r"form[`\"' ]*(==|is|=)[`\"' ]*\badd\b",
    "find_norms": r"recognise",
    "recognize, normalize, quantize, optimize": r"(recogn|normal|quant|optim|random|initial)is(e|ed|es|ing|ation)\b",
    "color, center, behavior": r"colour|\bcentre|behaviour|neighbour|favour",
    "X is not a Y": r"\b(this|it|x|that) (is|are) no (?!longer|further|better|larger|smaller|more|less)[a-z]",
    "number of the call": r"how-manieth",
}


def _texts() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and name not in SKIPPED and (ROOT / name).is_file()]


@pytest.mark.parametrize("word", WORDS)
def test_what_was_given_up_is_nowhere(word: str) -> None:
    pattern = re.compile(WORDS[word], re.IGNORECASE)
    found = []
    for name in _texts():
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, OSError):
            continue  # weights
        found += [
            f"{name}:{number}: {line.strip()[:80]}" for number, line in enumerate(lines, 1) if pattern.search(line)
        ]
    assert found == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("baseline", "yardstick_error"), ("segment", "a stretch of nodes"), ("find_norms", "recognise(model)"),
        ("X is not a Y", "this is no model"), ("color, center, behavior", "text-align: centre"),
    ],
)  # fmt: skip
def test_the_patterns_find_what_they_are_for(word: str, line: str) -> None:
    assert re.search(WORDS[word], line)
    assert not re.search(WORDS[word], word)
