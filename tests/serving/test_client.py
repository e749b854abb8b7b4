"""Both clients against a real server that says what it was told to: they send alike, wait alike, and give up alike."""

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
class Script:
    """Statuses to answer with, the last one for ever; and the requests that came."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    media_type: str = "text/plain"
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script.asked.append(self.path)
            status = script.statuses.pop(0) if len(script.statuses) > 1 else script.statuses[0]
            body = b"{}" if status == 200 else b'{"type": "x:no", "status": 500, "detail": "d", "request_id": "r"}'
            self.send_response(status)
            self.send_header("content-type", script.media_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield script
    server.shutdown()
    server.server_close()
    thread.join()


def ask(url: str, retries: int) -> Any:
    with Client(url, retries=retries) as client:
        return client.get("/v1")


def ask_async(url: str, retries: int) -> Any:
    async def run() -> Any:
        async with AsyncClient(url, retries=retries) as client:
            return await client.get("/v1")

    return asyncio.run(run())


both = pytest.mark.parametrize("ask", [ask, ask_async], ids=["sync", "async"])
Ask = Callable[[str, int], Any]


@both
def test_what_may_succeed_later_is_sent_again(script: Script, ask: Ask) -> None:
    script.statuses = [503, 500, 429, 200]  # the 500 has no problem document: of a proxy
    assert ask(script.url, 3) == {}
    assert len(script.asked) == 4


@both
def test_after_its_retries_a_client_gives_up(script: Script, ask: Ask) -> None:
    script.statuses = [503]
    with pytest.raises(ServiceError, match="503") as caught:
        ask(script.url, 2)
    assert (len(script.asked), caught.value.status) == (3, 503)


@both
def test_what_the_service_itself_says_no_to_is_not_sent_again(script: Script, ask: Ask) -> None:
    script.statuses, script.media_type = [500], "application/problem+json"
    with pytest.raises(ServiceError, match=r"500 no: d \(request r\)") as caught:
        ask(script.url, 5)
    assert (len(script.asked), caught.value.code) == (1, "no")


@both
def test_where_nobody_listens_it_is_said_after_the_retries(ask: Ask) -> None:
    with pytest.raises(ServiceError, match="cannot be reached") as caught:
        ask("http://127.0.0.1:9", 1)
    assert caught.value.status == 0
