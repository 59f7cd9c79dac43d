"""Run a server until SIGTERM or an interrupt ends it (`run_until_stopped`)."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any


def run_until_stopped(server: Any) -> None:
    """Run a server; SIGTERM and an interrupt end it once what is being answered is sent."""

    def stop(number: int, frame: Any) -> None:
        threading.Thread(target=server.stop).start()  # in the server's own thread it would wait for itself

    sys.stdout.flush()  # a pipe would get the address at the end alone
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    server.run()
