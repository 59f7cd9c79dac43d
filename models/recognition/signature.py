"""How many inputs a module's forward takes."""

from __future__ import annotations

import inspect

from torch import nn


class NotANormError(Exception):
    """The module does not normalize its input, so it is not reported."""


def second_input(module: nn.Module) -> tuple[bool, bool]:
    """Whether `forward` accepts, and whether it requires, a second positional input.

    Raises:
        NotANormError: it requires more than two inputs, or takes none.
    """
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError) as error:
        raise NotANormError from error
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if (
        not positional
        or len(required) > 2
        or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    ):
        raise NotANormError
    return len(positional) >= 2, len(required) == 2
