"""Every command by its name, in the order in which help lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rmsnorm_deploy.cli.bisect import bisect
from rmsnorm_deploy.cli.build import build
from rmsnorm_deploy.cli.compare import compare
from rmsnorm_deploy.cli.demo import demo
from rmsnorm_deploy.cli.doctor import doctor
from rmsnorm_deploy.cli.export import export
from rmsnorm_deploy.cli.generate import generate
from rmsnorm_deploy.cli.inspect import inspect
from rmsnorm_deploy.cli.rewrite import rewrite
from rmsnorm_deploy.cli.run import run
from rmsnorm_deploy.cli.targets import targets
from rmsnorm_deploy.cli.validate import validate

COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "export": export,
    "rewrite": rewrite,
    "build": build,
    "validate": validate,
    "bisect": bisect,
    "compare": compare,
    "run": run,
    "generate": generate,
    "targets": targets,
    "doctor": doctor,
    "demo": demo,
}
