"""Both clients retry, wait and give up in the same way, with a real server that answers with given status codes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from focus_ray.client import AsyncClient, Client, ServiceError


@dataclass
class ScriptedServer:
    """The behaviour of the server.

    Attributes:
        url: address of the server.
        statuses: status codes of the next answers; the last code is repeated.
        media_type: content type of the answers.
        requested_paths: paths of the received requests.
    """

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    media_type: str = "text/plain"
    requested_paths: list[str] = field(default_factory=list)


@pytest.fixture
def scripted_server() -> Iterator[ScriptedServer]:
    scripted_server = ScriptedServer()

    class ScriptHandler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scripted_server.requested_paths.append(self.path)
            status = (
                scripted_server.statuses.pop(0) if len(scripted_server.statuses) > 1 else scripted_server.statuses[0]
            )
            body = b"{}" if status == 200 else b'{"type": "x:no", "status": 500, "detail": "d", "request_id": "r"}'
            self.send_response(status)
            self.send_header("content-type", scripted_server.media_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), ScriptHandler)
    scripted_server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield scripted_server
    server.shutdown()
    server.server_close()
    thread.join()


def request_json(url: str, retries: int) -> Any:
    with Client(url, retries=retries) as client:
        return client.get("/v1")


def request_async(url: str, retries: int) -> Any:
    async def run() -> Any:
        async with AsyncClient(url, retries=retries) as client:
            return await client.get("/v1")

    return asyncio.run(run())


with_both_clients = pytest.mark.parametrize("request_json", [request_json, request_async], ids=["sync", "async"])
RequestFunction = Callable[[str, int], Any]


@with_both_clients
def test_temporary_failures_are_retried(scripted_server: ScriptedServer, request_json: RequestFunction) -> None:
    scripted_server.statuses = [503, 500, 429, 200]  # the 500 has no problem document, so it comes from a proxy
    assert request_json(scripted_server.url, 3) == {}
    assert len(scripted_server.requested_paths) == 4


@with_both_clients
def test_a_client_gives_up_after_its_retries(scripted_server: ScriptedServer, request_json: RequestFunction) -> None:
    scripted_server.statuses = [503]
    with pytest.raises(ServiceError, match="503") as error:
        request_json(scripted_server.url, 2)
    assert (len(scripted_server.requested_paths), error.value.status) == (3, 503)


@with_both_clients
def test_a_refusal_of_the_service_is_not_retried(
    scripted_server: ScriptedServer, request_json: RequestFunction
) -> None:
    scripted_server.statuses, scripted_server.media_type = [500], "application/problem+json"
    with pytest.raises(ServiceError, match=r"500 no: d \(request r\)") as error:
        request_json(scripted_server.url, 5)
    assert (len(scripted_server.requested_paths), error.value.code) == (1, "no")


@with_both_clients
def test_an_unreachable_service_is_reported_after_the_retries(request_json: RequestFunction) -> None:
    with pytest.raises(ServiceError, match="cannot be reached") as error:
        request_json("http://127.0.0.1:9", 1)
    assert error.value.status == 0
