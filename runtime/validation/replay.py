"""Read the options of a validation from its report, to run it again (`read_replay`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import UsageError
from ...models.loading import names_python
from ..report.report_file import read_report
from .options import ValidationOptions

# The settings of a report that are not fields of `ValidationOptions`.
SIDES = ("candidate", "against")


@dataclass(frozen=True, slots=True)
class Replay:
    """The arguments of a validation, as its report contains them.

    Attributes:
        candidate: an exported folder, an .onnx file, or a PyTorch model as for `load_model`.
        against: the PyTorch model, as for `load_model`.
        options: all other arguments.
        report: the report itself.
    """

    candidate: str
    against: str
    options: ValidationOptions
    report: dict[str, Any]

    def code(self) -> dict[str, str]:
        """The settings that name Python code, which running them would execute, by setting."""
        named = {"candidate": self.candidate, "against": self.against, "inputs": self.options.inputs}
        return {setting: source for setting, source in named.items() if source and names_python(source)}


def read_replay(path: Path) -> Replay:
    """Read the arguments of a validation from its report.

    Raises:
        UsageError: the file does not exist, it is not a report of this version, or its settings cannot be run again.
    """
    from pydantic import TypeAdapter, ValidationError

    report = read_report(path)
    settings = report.get("settings")
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: expected settings, got {settings!r}. Run the validation again.")
    sides = [settings.get(name) for name in SIDES]
    if not all(isinstance(side, str) for side in sides):
        raise UsageError(
            f"{path}: it does not name both sides (candidate {sides[0]!r}, against {sides[1]!r}), because a model, "
            "a runner or the inputs were given as Python objects. Run the validation again."
        )
    fields = {name: value for name, value in settings.items() if name not in SIDES}
    try:
        options = TypeAdapter(ValidationOptions).validate_json(json.dumps(fields))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UsageError(f"{path}: its settings cannot be run again: {problems}. Run a new validation.") from error
    except UsageError as error:
        raise UsageError(f"{path}: its settings cannot be run again: {error}") from error
    return Replay(str(sides[0]), str(sides[1]), options, report)
