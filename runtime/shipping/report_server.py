"""Show the results of a recipe over HTTP (`ReportServer`): read only, and nothing but the pages and reports.

The summary and the comparisons are made anew for each request, so that a run that goes on can be followed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

from ...models.errors import RmsnormDeployError, UsageError
from ...models.regular_files import LARGEST_JSON, read_bytes
from ..engines.api import RUNNERS
from ..serving.http_server import Handler, HttpServer
from .history import HISTORY, own_file, read_history
from .row_record import report_name
from .summary import JUNIT, PAGE, SUMMARY, page, read_summary

_log = logging.getLogger(__name__)
_JSON, _PAGE, _TEXT = "application/json", "text/html; charset=utf-8", "text/plain; charset=utf-8"
# What is sent of the folder, and of that of a row.
_FILES = {SUMMARY: _JSON, JUNIT: "application/xml", HISTORY: "application/x-ndjson"}
_ROW_FILES = {
    report_name(runner, suffix): kind for runner in RUNNERS for suffix, kind in ((".json", _JSON), (".html", _PAGE))
}
_PORT = re.compile(r":\d*$")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}


class Answer(NamedTuple):
    """An answer: its status, the type of its content, and the content."""

    status: HTTPStatus
    kind: str
    content: bytes


class ReportServer(HttpServer):
    """A server of the results of a recipe, which answers until `stop`.

    Args:
        folder: the folder of the results, which has a summary.
        host: the address to listen on.
        port: the port; 0 for any that is free.

    Raises:
        UsageError: the folder has no summary, or the address is in use.
        EnvironmentMissingError: jinja2 is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 8000) -> None:
        from ..report.html import environment

        environment()
        self.folder = Path(folder).expanduser().absolute()
        read_summary(self.folder)
        super().__init__(host, port, _Handler)
        self._is_local = _is_loopback(self.address.rpartition(":")[0])

    def get(self, target: str, host: str | None = None) -> Answer:
        """The answer to a request.

        Args:
            target: the path that is asked for, with its query.
            host: the server's name as the request gives it. A server on a loopback address answers to names of this
                machine alone, so that no page of another site can read it by a name that leads here.
        """
        if self._is_local and host is not None and not _is_loopback(_PORT.sub("", host).strip("[]")):
            return _message(HTTPStatus.FORBIDDEN, f"expected localhost or 127.0.0.1 as the host, got {host[:200]!r}")
        given, _, query = target.partition("?")
        path = unquote(given, errors="replace")
        match path.removeprefix("/").split("/"):
            case [name] if name in ("", PAGE):
                return _page(page(read_summary(self.folder), self.folder, is_served=True))
            case ["drift"]:
                return self._drift(parse_qs(query))
            case [name] if name in _FILES:
                return self._file(_FILES[name], name)
            case [row, name] if name in _ROW_FILES and self._is_row(row):
                return self._file(_ROW_FILES[name], row, name)
        return _not_found(path)

    def _drift(self, query: dict[str, list[str]]) -> Answer:
        from ..report.summary_page import render_drift

        runs, _ = read_history(self.folder)
        numbers = []
        for name in ("from", "to"):
            (text,) = query.get(name, [""])[:1]
            if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= len(runs)):
                what = f"{name}: expected the number of a run, 1 to {len(runs)}, got {text[:40]!r}"
                return _message(HTTPStatus.NOT_FOUND, what)
            numbers.append(int(text))
        return _page(render_drift([run.model_dump() for run in runs], *numbers))

    def _is_row(self, name: str) -> bool:
        return any(row["row"] == name for row in read_summary(self.folder)["rows"])

    def _file(self, kind: str, *parts: str) -> Answer:
        path = own_file(self.folder, *parts)
        if path is None:
            return _not_found("/".join(parts))
        return Answer(HTTPStatus.OK, kind, read_bytes(path, LARGEST_JSON))


def _page(text: str) -> Answer:
    return Answer(HTTPStatus.OK, _PAGE, text.encode())


def _message(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, _TEXT, f"{text}\n".encode(errors="replace"))


def _not_found(path: str) -> Answer:
    return _message(HTTPStatus.NOT_FOUND, f"{path[:200]}: expected the summary, or a report that it links to")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(Handler):
    def respond(self) -> None:
        """See `Handler.respond`."""
        if self.command not in ("GET", "HEAD"):
            self.close_connection = True
            text = f"expected GET or HEAD, got {self.command}: nothing is changed here"
            self._send(_message(HTTPStatus.METHOD_NOT_ALLOWED, text))
            return
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the content, which no one reads, is not the next request
        server = self.server.owner
        assert isinstance(server, ReportServer)
        try:
            answer = server.get(self.path, self.headers.get("Host"))
        except RmsnormDeployError as error:
            gone = isinstance(error, UsageError)
            status = HTTPStatus.NOT_FOUND if gone else HTTPStatus.INTERNAL_SERVER_ERROR
            answer = _message(status, str(error))
        except Exception:
            _log.exception("a request failed")
            answer = _message(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log has the reason")
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        headers = {**_HEADERS, "Content-Type": answer.kind, "Content-Length": str(len(answer.content))}
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        if self.close_connection:
            headers["Connection"] = "close"
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(answer.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.content)
