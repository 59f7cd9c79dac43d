"""The command line starts quickly, and without the heavy libraries."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

# `rmsnorm --help`, and `import rmsnorm_deploy`.
SECONDS, IMPORT_SECONDS = 0.5, 0.2
HEAVY = ("torch", "onnxruntime", "onnx", "onnx_ir", "transformers", "numpy", "ml_dtypes", "rich")

_HELP = "import sys; sys.argv = ['rmsnorm', '--help']; from rmsnorm_deploy.cli import main; main()"
_IMPORT = "import rmsnorm_deploy; rmsnorm_deploy.NormSpec; rmsnorm_deploy.UsageError"


@pytest.mark.parametrize(
    ("code", "seconds"),
    [(_HELP, SECONDS), (_IMPORT, IMPORT_SECONDS), ("import rmsnorm_deploy.cli; rmsnorm_deploy.cli.app", SECONDS)],
)
def test_starts_quickly(code: str, seconds: float) -> None:
    times = []
    for _ in range(3):
        start = _seconds_of_children()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(_seconds_of_children() - start)
    assert min(times) < seconds


def _seconds_of_children() -> float:
    """Processor time: what the machine does besides does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("code", [_HELP, _IMPORT, _HELP.replace("--help", "targets")])
def test_imports_nothing_heavy(code: str) -> None:
    report = f"import atexit, sys; atexit.register(lambda: print(*[m for m in {HEAVY!r} if m in sys.modules], end='|'))"
    answer = subprocess.run([sys.executable, "-c", f"{report}\n{code}"], check=True, capture_output=True, text=True)
    assert answer.stdout.endswith("\n|") or answer.stdout == "|", answer.stdout.splitlines()[-1]


def test_every_public_name_exists() -> None:
    import rmsnorm_deploy

    for name in rmsnorm_deploy.__all__:
        assert getattr(getattr(rmsnorm_deploy, name), "__name__", name) == name
    assert rmsnorm_deploy.TARGETS == ("primitives", "standard", "ort", "plugin")
    with pytest.raises(AttributeError, match="nosuch"):
        _ = rmsnorm_deploy.nosuch
