"""Read the report of a validation from its file (`read_report`), and the schemas of reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...models.errors import UsageError
from ...models.regular_files import read_json

VALIDATE_SCHEMA = "rmsnorm_deploy.validate/7"
BISECT_SCHEMA = "rmsnorm_deploy.bisect/6"


def read_report(path: Path) -> dict[str, Any]:
    """Read a report in the format of `ValidationReport.to_dict`.

    Raises:
        UsageError: the file does not exist, is not a report, has another version, or a field has another type.
    """
    content = read_json(path, "Write a report with: rmsnorm validate --json")
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (VALIDATE_SCHEMA, BISECT_SCHEMA):
        raise UsageError(
            f"{path}: expected the schema {VALIDATE_SCHEMA} or {BISECT_SCHEMA}, got {schema!r}. Write the report again "
            "with this version."
        )
    from ...export.onnx_io.manifest_fields import checked
    from .report_fields import ReportFields

    checked(path, content, ReportFields, "Write the report again.")
    return dict(content)
