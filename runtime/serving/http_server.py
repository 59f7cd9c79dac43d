"""What servers over HTTP have in common: listening, answering side by side, and coming to an end (`HttpServer`)."""

from __future__ import annotations

import logging
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
        waits: whether `run` ends only when all connections have, also those on which nothing comes.

    Raises:
        UsageError: the address is in use, or is not one of this machine.
    """

    def __init__(self, host: str, port: int, handler: type[Handler], *, waits: bool = True) -> None:
        try:
            self._http = _Http((host, port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{host}:{port}: cannot listen there: {reason}. Choose another with --port.") from error
        self._http.owner = self
        self._http.daemon_threads, self._http.block_on_close = not waits, waits

    @property
    def address(self) -> str:
        """HOST:PORT, where it listens."""
        host, port = self._http.server_address[:2]
        return f"{host if isinstance(host, str) else host.decode()}:{port}"

    def run(self) -> None:
        """Answer requests until `stop` is called from another thread, or an interrupt."""
        try:
            self._http.serve_forever(poll_interval=0.2)
        finally:
            self._http.server_close()  # waits for what is being answered

    def stop(self) -> None:
        """End `run`, once what is being answered is sent."""
        self._http.shutdown()


class _Http(ThreadingHTTPServer):
    request_queue_size = 128
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
        self.respond()

    def do_HEAD(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def do_DELETE(self) -> None:
        self.respond()

    def log_message(self, format: str, *args: Any) -> None:
        """One line for each request, to the log rather than to stderr."""
        _log.info("%s %s", self.address_string(), format % args)
