"""Read the report of a validation from its file (`read_report`), and the schemas of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...models.errors import UsageError

VALIDATE_SCHEMA = "rmsnorm_deploy.validate/4"
VERDICTS = ("pass", "fail", "cannot be judged")
BISECT_SCHEMA = "rmsnorm_deploy.bisect/3"


def read_report(path: Path) -> dict[str, Any]:
    """Read a report in the format of `ValidationReport.to_dict`.

    Raises:
        UsageError: the file does not exist, is not a report, or has another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON report ({error}). Write one with: rmsnorm validate --json") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (VALIDATE_SCHEMA, BISECT_SCHEMA):
        raise UsageError(
            f"{path}: expected the schema {VALIDATE_SCHEMA} or {BISECT_SCHEMA}, got {schema!r}. Write the report again "
            "with this version."
        )
    return dict(content)
