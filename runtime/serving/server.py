"""Answer requests of KServe's protocol for one model (`Server`): health, metadata and inference over HTTP."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ...models.errors import RmsnormDeployError, UsageError, explained
from ...models.versions import installed_version
from ..inputs.exported import open_exported
from ..inputs.synthetic import cast_feeds
from ..runners.base import Runner
from ..tensorrt.on_demand import open_model
from .http_server import Handler, HttpServer
from .protocol import HEADER_LENGTH, answer, metadata, parse_request

LARGEST = 1 << 30
VERSION = "1"
_log = logging.getLogger(__name__)


class Server(HttpServer):
    """A server of one model, which answers until `stop`.

    Requests are read and written side by side; the model runs at most `concurrency` of them at a time.

    Args:
        runner: the model, which stays open while the server runs.
        name: of the model.
        host: the address to listen on.
        port: the port; 0 for any that is free.
        concurrency: the most runs of the model at a time.
        largest: the most bytes of a request.

    Raises:
        UsageError: the address is in use, or is not one of this machine.
    """

    def __init__(
        self, runner: Runner, name: str, host: str = "127.0.0.1", port: int = 8000, *, concurrency: int = 1,
        largest: int = LARGEST,
    ) -> None:  # fmt: skip
        self.name, self.largest = name, largest
        self._runner, self._places = runner, threading.BoundedSemaphore(concurrency)
        self._about = metadata(name, VERSION, runner.inputs(), runner.outputs())
        super().__init__(host, port, _Handler)

    def get(self, path: str) -> tuple[HTTPStatus, dict[str, Any] | None]:
        """The answer to a question about the server or the model; None for an empty body."""
        parts = [part for part in path.split("?")[0].split("/") if part]
        match parts:
            case ["v2"]:
                about = {"name": "rmsnorm-deploy", "version": installed_version("rmsnorm-deploy")}
                return HTTPStatus.OK, {**about, "extensions": ["binary_tensor_data"]}
            case ["v2", "health", "live" | "ready"]:
                return HTTPStatus.OK, None
            case ["v2", "models", name, *rest]:
                self._check_model(name, rest[:2] if rest[:1] == ["versions"] else [])
                match rest[2:] if rest[:1] == ["versions"] else rest:
                    case []:
                        return HTTPStatus.OK, self._about
                    case ["ready"]:
                        return HTTPStatus.OK, None
        raise _NotFoundError(f"{path[:200]}: expected a path of KServe's protocol, version 2.")

    def infer(self, path: str, body: bytes, header_length: str | None) -> tuple[bytes, int | None]:
        """The answer to a request to run the model; see `protocol.answer`."""
        parts = [part for part in path.split("?")[0].split("/") if part]
        match parts:
            case ["v2", "models", name, *rest] if rest[-1:] == ["infer"] and len(rest) in (1, 3):
                self._check_model(name, rest[:-1])
            case _:
                raise _NotFoundError(f"{path[:200]}: expected /v2/models/{self.name}/infer.")
        request = parse_request(body, header_length)
        with self._places:
            results = self._runner.run(cast_feeds(request.feeds, self._runner.inputs()))
        return answer(request, results, self.name, VERSION)

    def _check_model(self, name: str, version: list[str]) -> None:
        if name != self.name or version not in ([], ["versions", VERSION]):
            what = name if not version else f"{name}, {' '.join(version)}"
            raise _NotFoundError(f"expected the model {self.name}, version {VERSION}, got {what[:200]}.")


class _NotFoundError(UsageError):
    """A path or a model that this server does not have."""


class _Handler(Handler):
    @property
    def _model(self) -> Server:
        assert isinstance(self.server.owner, Server)
        return self.server.owner

    def respond(self) -> None:
        """See `Handler.respond`."""
        match self.command:
            case "GET":
                with self._errors():
                    status, content = self._model.get(self.path)
                    self._send(status, b"" if content is None else json.dumps(content).encode())
            case "POST":
                with self._errors():
                    body = self._body()
                    answered, length = self._model.infer(self.path, body, self.headers.get(HEADER_LENGTH))
                    self._send(HTTPStatus.OK, answered, length)
            case _:
                self.send_error(HTTPStatus.NOT_IMPLEMENTED)

    def _body(self) -> bytes:
        length, most = self.headers.get("Content-Length", ""), self._model.largest
        if not length.isdecimal():
            self.close_connection = True
            raise UsageError("Content-Length: expected the number of bytes of the request, got none.")
        if int(length) > most:
            self.close_connection = True
            raise UsageError(f"expected a request of at most {most} bytes, got {int(length)}.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            raise UsageError(f"expected {length} bytes, got {len(body)}.")
        return body

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Answer an error with its message; one that was not raised on purpose is logged, and not shown."""
        try:
            yield
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            status = HTTPStatus.NOT_FOUND if isinstance(error, _NotFoundError) else HTTPStatus.BAD_REQUEST
            message = explained(error)[1]
            if not isinstance(error, RmsnormDeployError):
                _log.exception("a request failed")
                status, message = HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log has the reason."
            with contextlib.suppress(ConnectionError, TimeoutError):
                self._send(status, json.dumps({"error": message}).encode())

    def _send(self, status: HTTPStatus, body: bytes, json_length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if json_length is None else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        if json_length is not None:
            self.send_header(HEADER_LENGTH, str(json_length))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve_folder(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    runner: str | None = None,
    provider: str = "cpu",
    concurrency: int = 1,
) -> Iterator[Server]:
    """A server of an exported folder, a package, an .onnx file or an engine, which is closed when the block ends.

    Args:
        path: what is served.
        name: of the model; None is the package's, else the folder's or the file's.
        host: the address to listen on.
        port: the port; 0 for any that is free.
        runner: see `open_model`.
        provider: see `open_model`.
        concurrency: the most runs of the model at a time.

    Raises:
        UsageError: the model cannot be opened, or the address is in use.
    """
    exported = open_exported(Path(path))
    packaged = (exported.manifest.get("package") or {}).get("name")
    place = exported.folder if exported.folder is not None and not exported.is_engine else exported.model
    chosen = name or packaged or place.resolve().name.removesuffix(".onnx")
    with open_model(exported, runner, provider) as opened:
        server = Server(opened, chosen, host, port, concurrency=concurrency)
        yield server
