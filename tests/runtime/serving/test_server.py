"""A server of KServe's protocol, asked by Triton's own client, and by requests that are not of the protocol."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmsnorm_deploy import export_model, package_model
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.loading import load_model
from rmsnorm_deploy.runtime.serving.server import Server, serve_folder
from tests.helpers.models.factory_file import small_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("served"), "served_models")


@pytest.fixture(scope="module")
def server(source: str) -> Iterator[Server]:
    """A package for this server, on a port that is free."""
    folder = Path(source.partition(":")[0]).parent
    export_model(source, folder / "exported", target="ort")
    package_model(folder / "exported", "ort-server", folder / "package", name="served")
    with serve_folder(folder / "package", port=0) as running:
        thread = threading.Thread(target=running.run)
        thread.start()
        yield running
        running.stop()
        thread.join(10)
        assert not thread.is_alive()


def _tokens(rows: int, length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 12, (rows, length))


@pytest.fixture(scope="module")
def net(source: str) -> torch.nn.Module:
    return load_model(source).model


def _expected(net: torch.nn.Module, tokens: Any) -> Any:
    return net(torch.tensor(tokens)).detach().numpy()


@pytest.mark.parametrize("binary", [True, False])
def test_the_client_of_triton_gets_the_numbers_of_pytorch(net: torch.nn.Module, server: Server, binary: bool) -> None:
    client = pytest.importorskip("tritonclient.http")
    with client.InferenceServerClient(server.address) as triton:
        assert triton.is_server_live()
        assert triton.is_server_ready()
        assert triton.is_model_ready("served")
        about = triton.get_model_metadata("served")
        assert about["inputs"] == [{"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}]
        name = about["outputs"][0]["name"]
        tokens = _tokens(2, 5)
        given = client.InferInput("input_ids", [2, 5], "INT64")
        given.set_data_from_numpy(tokens, binary_data=binary)
        wanted = [client.InferRequestedOutput(name, binary_data=binary)]
        for outputs in (wanted, None):
            found = triton.infer("served", [given], outputs=outputs, request_id="7")
            np.testing.assert_allclose(found.as_numpy(name), _expected(net, tokens), rtol=0, atol=2e-6)
            assert found.get_response()["id"] == "7"


def test_requests_side_by_side_get_their_own_answers(net: torch.nn.Module, server: Server) -> None:
    client = pytest.importorskip("tritonclient.http")

    def ask(seed: int) -> bool:
        tokens = _tokens(1 + seed % 3, 2 + seed % 5, seed)
        with client.InferenceServerClient(server.address) as triton:
            given = client.InferInput("input_ids", list(tokens.shape), "INT64")
            given.set_data_from_numpy(tokens)
            found = triton.infer("served", [given])
            name = found.get_response()["outputs"][0]["name"]
            return bool(np.allclose(found.as_numpy(name), _expected(net, tokens), rtol=0, atol=2e-6))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def _post(server: Server, body: bytes | str, headers: dict[str, str] | None = None, path: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.address, timeout=10)
    connection.request("POST", path or "/v2/models/served/infer", body, headers or {})
    found = connection.getresponse()
    status, content = found.status, found.read().decode()
    connection.close()
    return status, json.loads(content).get("error", "")


def _body(**changes: Any) -> str:
    row = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [1, 2], **changes}
    return json.dumps({"inputs": [{key: value for key, value in row.items() if value is not None}]})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "expected JSON, got"),
        ("[]", "expected a JSON object with a list of inputs"),
        ("[" * 100000, "expected JSON, got"),
        (_body(name=3), "inputs: expected objects with a name"),
        (_body(shape=[1, -2]), "input input_ids: shape: expected a list of sizes, got [1, -2]"),
        (_body(shape=[True, 2]), "shape: expected a list of sizes"),
        (_body(shape=[1, 3]), "expected 3 elements of int64 for shape [1, 3], got"),
        (_body(datatype="BYTES"), "datatype: expected one of BOOL"),
        (_body(data=["a", "b"]), "expected 2 elements of int64"),
        (_body(data=[1.5, 2]), "expected 2 elements of int64"),
        (_body(data=[1 << 80, 2]), "expected 2 elements of int64"),
        (
            _body(datatype="INT8", data=[1, 300]),
            "expected 2 elements of int8 for shape [1, 2], got: numbers beyond int8",
        ),
        (_body(data=None), "data: expected a list, got NoneType"),
        (_body(name="tokens"), "missing: input_ids; unexpected: tokens"),
        (_body(data=[1, 99]), ""),
        (_body(parameters={"binary_data_size": 16}), "expected 16 bytes for shape [1, 2], got 0"),
        (json.dumps({**json.loads(_body()), "outputs": [{"name": "other"}]}), "outputs: expected some of"),
        (json.dumps({**json.loads(_body()), "outputs": [3]}), "outputs: expected a list of objects with a name"),
    ],
)
def test_requests_that_are_wrong(server: Server, body: str, message: str) -> None:
    status, found = _post(server, body)
    assert status == 400
    assert message in found
    assert _post(server, _body())[0] == 200  # and it goes on


def test_bytes_that_are_wrong(server: Server) -> None:
    head = _body(data=None, parameters={"binary_data_size": 16}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    assert _post(server, head + np.array([1, 2]).tobytes(), length)[0] == 200
    assert _post(server, head + b"x" * 17, length) == (400, "expected no bytes after those of the inputs, got 1.")
    assert "expected a number of at most" in _post(server, head, {"Inference-Header-Content-Length": "99999"})[1]
    assert "expected a number of at most" in _post(server, head, {"Inference-Header-Content-Length": "-1"})[1]


def test_paths_and_models_that_do_not_exist(server: Server) -> None:
    for path in ("/v2/models/other/infer", "/v2/models/served/versions/2/infer", "/v2", "/v2/models/served/generate"):
        status, message = _post(server, _body(), path=path)
        assert (status, bool(message)) == (404, True)
    assert _post(server, _body(), path="/v2/models/served/versions/1/infer")[0] == 200
    connection = http.client.HTTPConnection(server.address, timeout=10)
    connection.request("GET", "/v1")
    assert connection.getresponse().status == 404
    connection.close()


def test_a_request_that_is_too_large(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "largest", 20)
    assert "expected a request of at most 20 bytes" in _post(server, _body())[1]


def test_a_bug_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(server._runner, "run", fail)
    assert _post(server, _body()) == (500, "the server failed; its log has the reason.")


def test_an_address_that_is_in_use(server: Server, source: str) -> None:
    folder = Path(source.partition(":")[0]).parent / "package"
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(UsageError, match=r"cannot listen there: .*--port"), serve_folder(folder, port=port):
        pass


def test_numbers_that_json_does_not_have(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"logits": np.array([[np.inf, np.nan]], np.float32)}
    monkeypatch.setattr(server._runner, "run", lambda feeds: results)
    assert "infinities or NaN, which JSON does not" in _post(server, _body())[1]


def test_the_end_waits_for_answers_and_not_for_connections(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(source.partition(":")[0]).parent / "package"
    with serve_folder(folder, port=0) as running:
        began, free = threading.Event(), threading.Event()
        run = running._runner.run

        def slow(feeds: Any) -> Any:
            began.set()
            free.wait(10)
            return run(feeds)

        monkeypatch.setattr(running._runner, "run", slow)
        thread = threading.Thread(target=running.run)
        thread.start()
        idle = http.client.HTTPConnection(running.address, timeout=10)
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()  # and the connection stays
        found: list[int] = []
        asking = threading.Thread(target=lambda: found.append(_post(running, _body())[0]))
        asking.start()
        began.wait(10)
        running.stop()
        thread.join(0.3)
        assert thread.is_alive()
        free.set()
        thread.join(5)
        asking.join(5)
        assert (thread.is_alive(), found) == (False, [200])
        idle.close()
