"""The files of a package that this package's own server runs (`server_texts`)."""

from __future__ import annotations

from ...models.errors import EnvironmentMissingError
from ...models.versions import installed_version

SCRIPT = "serve.sh"
REQUIREMENTS = "requirements.txt"


def server_texts() -> dict[str, str]:
    """A script that serves the folder it is in, and the packages that it needs there.

    Raises:
        EnvironmentMissingError: ONNX Runtime is not installed here, so that no version is known to run the model.
    """
    found = [(name, version) for name in ("onnxruntime", "onnxruntime-gpu") if (version := installed_version(name))]
    if not found:
        raise EnvironmentMissingError("ONNX Runtime is not installed. Install it: pip install 'rmsnorm-deploy[cpu]'")
    name, version = found[0]
    lines = [
        "#!/bin/sh",
        "# Serves this folder's model over HTTP; further options of rmsnorm serve are passed on, such as --port 9000.",
        'here="$(cd "$(dirname "$0")" && pwd)" || exit 1',
        'rmsnorm verify "$here" --quiet || exit 1',
        'exec rmsnorm serve "$here" "$@"',
    ]
    own = f"rmsnorm-deploy=={installed_version('rmsnorm-deploy')}"
    return {SCRIPT: "\n".join(lines) + "\n", REQUIREMENTS: f"{own}\n{name}=={version}\n"}
