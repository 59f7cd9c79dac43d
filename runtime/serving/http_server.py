"""What servers over HTTP have in common: listening, answering side by side, and coming to an end (`HttpServer`)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ...models.errors import UsageError

_SECONDS = 60
_log = logging.getLogger(__name__)


class HttpServer:
    """A server that answers until `stop`.

    Args:
        host: the address to listen on.
        port: the port; 0 for any that is free.
        handler: answers the requests of a connection; its `server.owner` is this object.


    Raises:
        UsageError: the address is in use, or is not one of this machine.
    """

    def __init__(self, host: str, port: int, handler: type[Handler]) -> None:
        try:
            self._http = _Http((host, port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{host}:{port}: cannot listen there: {reason}. Choose another with --port.") from error
        self._http.owner = self
        self._answering, self._changed = 0, threading.Condition()

    @property
    def address(self) -> str:
        """HOST:PORT, where it listens."""
        host, port = self._http.server_address[:2]
        return f"{host if isinstance(host, str) else host.decode()}:{port}"

    def run(self) -> None:
        """Answer requests until `stop` is called from another thread, or an interrupt.

        It ends once what is being answered is sent; connections on which nothing comes are not waited for.
        """
        try:
            self._http.serve_forever(poll_interval=0.2)
        finally:
            self._http.server_close()
            with self._changed:
                self._changed.wait_for(lambda: not self._answering, timeout=_SECONDS)

    def stop(self) -> None:
        """End `run`, once what is being answered is sent."""
        self._http.shutdown()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While a request is answered, for which the end of `run` waits."""
        with self._changed:
            self._answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()


class _Http(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads, block_on_close = True, False
    owner: HttpServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that its client broke goes to the log rather than to stderr."""
        _log.info("a connection from %s ended", client_address, exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection, each of which `respond` answers."""

    protocol_version = "HTTP/1.1"
    server_version = "rmsnorm-deploy"
    sys_version = ""
    timeout = _SECONDS  # of a connection on which nothing comes
    server: _Http

    def respond(self) -> None:
        """Answer a request of one of the methods below; its name is `self.command`."""
        raise NotImplementedError

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        with self.server.owner.answering():
            self.respond()

    def log_message(self, format: str, *args: Any) -> None:
        """One line for each request, to the log rather than to stderr."""
        _log.info("%s %s", self.address_string(), format % args)
