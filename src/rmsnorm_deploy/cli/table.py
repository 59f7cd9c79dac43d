"""Every command by its name, in the order in which help lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rmsnorm_deploy.cli.commands.bisect import bisect
from rmsnorm_deploy.cli.commands.build import build
from rmsnorm_deploy.cli.commands.compare import compare
from rmsnorm_deploy.cli.commands.demo import demo
from rmsnorm_deploy.cli.commands.doctor import doctor
from rmsnorm_deploy.cli.commands.export import export
from rmsnorm_deploy.cli.commands.generate import generate
from rmsnorm_deploy.cli.commands.inspect import inspect
from rmsnorm_deploy.cli.commands.rewrite import rewrite
from rmsnorm_deploy.cli.commands.run import run
from rmsnorm_deploy.cli.commands.targets import targets
from rmsnorm_deploy.cli.commands.validate import validate
from rmsnorm_deploy.cli.delivery.init import init
from rmsnorm_deploy.cli.delivery.package import package
from rmsnorm_deploy.cli.delivery.push import push
from rmsnorm_deploy.cli.delivery.serve import serve
from rmsnorm_deploy.cli.delivery.serve_report import serve_report
from rmsnorm_deploy.cli.delivery.ship import ship
from rmsnorm_deploy.cli.delivery.verify import verify

COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "export": export,
    "rewrite": rewrite,
    "build": build,
    "package": package,
    "verify": verify,
    "push": push,
    "init": init,
    "ship": ship,
    "serve-report": serve_report,
    "validate": validate,
    "bisect": bisect,
    "compare": compare,
    "run": run,
    "serve": serve,
    "generate": generate,
    "targets": targets,
    "doctor": doctor,
    "demo": demo,
}
