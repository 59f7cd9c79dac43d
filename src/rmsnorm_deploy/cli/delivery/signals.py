"""End a server on SIGTERM or an interrupt (`stop_on_signals`)."""

from __future__ import annotations

import signal
import threading
from typing import Any


def stop_on_signals(server: Any) -> None:
    """Let SIGTERM and an interrupt end the server once what is being answered is sent."""

    def stop(number: int, frame: Any) -> None:
        threading.Thread(target=server.stop).start()  # in the server's own thread it would wait for itself

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
