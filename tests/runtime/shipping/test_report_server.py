"""The server of a recipe's results: its pages, what it refuses, and that it leaves nothing open."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from rmsnorm_deploy.models.errors import UsageError
from tests.helpers.interface.shipped_sample import sample_row, ship_sample, write_report

pytest.importorskip("jinja2")

from rmsnorm_deploy.runtime.shipping.report_server import ReportServer


@pytest.fixture
def output(tmp_path: Path) -> Path:
    output = tmp_path / "dist"
    for day, limit in ((1, 8.0), (2, 4.0)):
        write_report(output, "first", limit=limit)
        ship_sample(output, [sample_row(output, "first")], f"2026-11-2{day}T08:15:00+00:00")
    (output / "secret.txt").write_text("secret")
    (output / "first" / "model").mkdir()
    (output / "first" / "model" / "model.onnx").write_text("secret")
    (tmp_path / "outside.json").write_text("secret")
    return output


@pytest.fixture
def server(output: Path) -> Iterator[ReportServer]:
    server = ReportServer(output, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join(10)
    assert not thread.is_alive()


def _ask(server: ReportServer, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(server.address, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


def _text(server: ReportServer, path: str) -> str:
    answer = _ask(server, path)
    assert answer.status == 200, path
    return answer.read().decode()


def test_pages_and_reports(server: ReportServer, output: Path) -> None:
    page = _text(server, "/")
    assert "<h1>" in page
    assert '<a href="first/report.json">' in page
    assert _text(server, "/summary.html") == page
    for name in ("summary.json", "junit.xml", "history.jsonl", "first/report.json", "first/report.html"):
        assert _text(server, f"/{name}") == (output / name).read_text()
    answer = _ask(server, "/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


def test_a_head_has_the_length_alone(server: ReportServer) -> None:
    answer = _ask(server, "/summary.json", "HEAD")
    assert (answer.status, answer.read()) == (200, b"")
    assert int(answer.headers["Content-Length"]) == len(_text(server, "/summary.json"))


def test_the_page_is_made_anew(server: ReportServer, output: Path) -> None:
    assert "third" not in _text(server, "/")
    summary = json.loads((output / "summary.json").read_text())
    row = sample_row(output, "third", status="not run")
    row["steps"][1].update(status="not run", result=None)
    summary.update(verdict="fail", created="2026-11-23T08:15:00+00:00", rows=[*summary["rows"], row])
    (output / "summary.json").write_text(json.dumps(summary))
    page = _text(server, "/")
    assert "Not complete" in page
    assert ">third<" in page
    (output / "summary.json").unlink()
    answer = _ask(server, "/")
    assert (answer.status, "expected a folder with summary.json" in answer.read().decode()) == (404, True)


def test_two_runs_are_compared(server: ReportServer) -> None:
    page = _text(server, "/drift?from=1&to=2")
    assert "Run 1 and run 2" in page
    assert "44.9 %" in page
    assert "89.9 %" in page
    assert "× 2" in page
    for query in ("", "?from=1", "?from=0&to=1", "?from=1&to=3", "?from=1&to=-1", "?from=²&to=1", "?from=1&to=<b>"):
        answer = http.client.HTTPConnection(server.address, timeout=10)
        answer.request("GET", "/drift" + query.replace("²", "%C2%B2"))
        found = answer.getresponse()
        assert found.status == 404, query
        assert "expected the number of a run, 1 to 2" in found.read().decode()
        assert found.headers["Content-Type"].startswith("text/plain")


_ELSEWHERE = [
    "/secret.txt", "/first", "/first/", "/first/row.json", "/first/model/model.onnx", "/../outside.json",
    "/%2e%2e/outside.json", "/first/../secret.txt", "/first/..%2fsecret.txt", "/..%2foutside.json", "//etc/passwd",
    "/first%2freport.json%00", "/first/report.json%00", "/second/report.json", "/./summary.json", "/FIRST/report.json",
    "//[", "/%5b/report.json", "http://[/summary.json", "/first\\report.json", "/linked/report.json",
    "/row-link/report.json", "/first/report.before.json", "/model/report.json", "/..%2freport.json",
]  # fmt: skip


def test_nothing_else_is_sent(server: ReportServer, output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text())
    summary["rows"] += [sample_row(output, name) for name in ("linked", "row-link", "..", "model")]
    (output / "summary.json").write_text(json.dumps(summary))
    (output / "linked").mkdir()
    (output / "linked" / "report.json").symlink_to(output.parent / "outside.json")
    (output / "row-link").symlink_to(output / "linked", target_is_directory=True)
    (output.parent / "report.json").write_text("secret")
    answers = {path: _raw(server, path) for path in [*_ELSEWHERE, "/first/report.json"]}
    assert answers.pop("/first/report.json").startswith(b"HTTP/1.1 200 OK\r\n")
    assert [path for path, found in answers.items() if not found.startswith(b"HTTP/1.1 404 Not Found\r\n")] == []
    assert [path for path, found in answers.items() if found.endswith(b"secret") or b"root:" in found] == []


def _raw(server: ReportServer, path: str) -> bytes:
    """What is answered to a path exactly as it is given."""
    with socket.create_connection(server.address.split(":"), timeout=10) as raw:  # type: ignore[arg-type]
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found = b""
        while piece := raw.recv(1 << 16):
            found += piece
        return found


def test_links_in_place_of_the_files_are_not_followed(server: ReportServer, output: Path) -> None:
    (output / "junit.xml").unlink()
    (output / "junit.xml").symlink_to(output.parent / "outside.json")
    assert _ask(server, "/junit.xml").status == 404
    (output / "junit.xml").unlink()
    os.mkfifo(output / "junit.xml")
    assert _ask(server, "/junit.xml").status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_is_changed(server: ReportServer, output: Path, method: str) -> None:
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    answer = _ask(server, "/summary.json", method, **{"Content-Length": "4"})
    assert (answer.status, answer.headers["Allow"], answer.headers["Connection"]) == (405, "GET, HEAD", "close")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_the_content_of_a_request_is_not_the_next_one(server: ReportServer) -> None:
    answer = _ask(server, "/summary.json", **{"Content-Length": "40"})
    assert (answer.status, answer.headers["Connection"]) == (200, "close")


@pytest.mark.parametrize(("host", "status"), [("localhost:1", 200), ("[::1]", 200), ("evil.example", 403), ("a[", 403)])
def test_other_names_of_this_machine_are_refused(server: ReportServer, host: str, status: int) -> None:
    assert _ask(server, "/", Host=host).status == status


def test_a_bug_is_not_shown(server: ReportServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: str, host: str | None) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(server, "get", fail)
    answer = _ask(server, "/")
    assert answer.status == HTTPStatus.INTERNAL_SERVER_ERROR
    assert answer.read() == b"the server failed; its log has the reason\n"


def test_an_open_connection_does_not_keep_it(output: Path) -> None:
    server = ReportServer(output, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    with socket.create_connection(server.address.split(":"), timeout=10):  # type: ignore[arg-type]
        assert "Drift" in _text(server, "/")
        server.stop()
        thread.join(5)
        assert not thread.is_alive()


def test_a_folder_without_results(tmp_path: Path, output: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a folder with summary.json, got none there"):
        ReportServer(tmp_path)
    (output / "summary.json").write_text('{"schema": "rmsnorm_deploy.ship/1", "rows": [{"row": 3}]}')
    with pytest.raises(UsageError, match=r"summary.json: .*rows.0.row: expected"):
        ReportServer(output)
