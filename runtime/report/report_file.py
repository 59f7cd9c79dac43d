"""Reports of validations as files: the versions that are written, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...models.errors import UsageError

VALIDATE_SCHEMA = "rmsnorm_deploy.validate/3"
BISECT_SCHEMA = "rmsnorm_deploy.bisect/2"


def read_report(path: Path) -> dict[str, Any]:
    """A report from its file, as `ValidationReport.to_dict` wrote it.

    Raises:
        UsageError: there is no such file, it is no report, or one of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON report ({error}). Make one with: rmsnorm validate --json") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (VALIDATE_SCHEMA, BISECT_SCHEMA):
        raise UsageError(
            f"{path}: its schema is {schema!r}; this version reads {VALIDATE_SCHEMA} and {BISECT_SCHEMA}. Write the "
            "report again with this version."
        )
    return dict(content)
