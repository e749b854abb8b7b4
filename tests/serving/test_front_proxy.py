"""The front proxy, serve/nginx.conf, as real nginx in front of a small ASGI service that notes what reaches it."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
import uvicorn
from nginx_proxy import CONFIGURATION, SLOW_TIMEOUT_S, NginxProxy, read_until_closed, run_proxy
from places import free_port
from serving_set import INSPECT, bearer_header
from waiting import wait_for

from focus_ray.serving.limits import BODY_TIMEOUT_S
from focus_ray.serving.settings import RequestLimits

TOKEN, OTHER_TOKEN = f"frs_{'0' * 12}_{'a' * 43}", f"frs_{'1' * 12}_{'b' * 43}"
SHORT_TIMEOUT_S = 3  # instead of SLOW_TIMEOUT_S
LIMIT_S = 40  # less than nginx's own timeouts of 60 s, and enough for a slow machine
MIB = 2**20


class RecordingService:
    """An ASGI application: /v1 says whether a token is in force; every other path notes the request and its body's bytes."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.tokens_ready = True

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        body, message, status = 0, {"more_body": True}, 200
        while message.get("more_body"):
            message = await receive()
            body += len(message.get("body", b""))
        if scope["path"] == "/v1":
            is_valid = headers.get("authorization") in (f"Bearer {TOKEN}", f"Bearer {OTHER_TOKEN}")
            status = 503 if not self.tokens_ready else 200 if is_valid else 401
        else:
            self.requests.append({"path": scope["path"], "body": body, "headers": headers})
        answer_headers = [(b"content-type", b"text/plain")] + [(b"www-authenticate", b"Bearer")] * (status == 401)
        await send({"type": "http.response.start", "status": status, "headers": answer_headers})
        await send({"type": "http.response.body", "body": b"the service"})


@pytest.fixture(scope="module")
def service_and_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RecordingService, NginxProxy]]:
    service, port = RecordingService(), free_port()
    server = uvicorn.Server(uvicorn.Config(service, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    wait_for(lambda: server.started, 60.0, "the service answers")
    with run_proxy(tmp_path_factory.mktemp("proxy"), f"127.0.0.1:{port}", SHORT_TIMEOUT_S) as proxy:
        yield service, proxy
    server.should_exit = True
    thread.join()


@pytest.fixture
def proxy(service_and_proxy: tuple[RecordingService, NginxProxy]) -> NginxProxy:
    return service_and_proxy[1]


@pytest.fixture
def service(service_and_proxy: tuple[RecordingService, NginxProxy]) -> RecordingService:
    service_and_proxy[0].requests.clear()
    return service_and_proxy[0]


@pytest.fixture
def client(proxy: NginxProxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=proxy.url, verify=proxy.create_tls_context(), timeout=60) as client:
        yield client


def check_problem(response: httpx.Response, status: int, code: str) -> None:
    document = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, document["status"], document["type"]) == (status, status, f"urn:focus-ray:{code}")
    assert document["request_id"] == response.headers["x-request-id"]


def send_raw_request(proxy: NginxProxy, *lines: str, body: str = "") -> bytes:
    """Sends a head and the start of a body, and then nothing. Returns: the answer, which comes before the proxy's timeouts."""
    data = b""
    with proxy.connect() as connection:
        connection.sendall("\r\n".join([*lines, "Host: plant", "", body]).encode())
        connection.settimeout(60.0)
        while not data.endswith(b'"}'):  # the end of a problem document
            piece = connection.recv(65536)
            assert piece, data
            data += piece
    return data


def test_a_body_arrives_complete_and_with_the_address_of_the_client(
    client: httpx.Client, service: RecordingService
) -> None:
    headers = {**bearer_header(TOKEN), "x-forwarded-for": "10.9.9.9", "x-request-id": "line-3.17"}
    assert client.post(INSPECT, content=b"x" * 200_000, headers=headers).text == "the service"
    (request,) = service.requests
    assert (request["path"], request["body"]) == (INSPECT, 200_000)
    expected = {"x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "https", "x-request-id": "line-3.17"}
    assert request["headers"].items() >= expected.items()
    assert request["headers"]["host"].startswith("127.0.0.1:")


def test_plain_http_and_old_tls_are_refused(proxy: NginxProxy, service: RecordingService) -> None:
    check_problem(httpx.get(f"http://127.0.0.1:{proxy.port}/", timeout=60), 400, "bad-request")
    context = proxy.create_tls_context()
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")
    assert service.requests == []


@pytest.mark.parametrize("token", [None, "wrong", f"frs_{'2' * 12}_{'c' * 43}"])
@pytest.mark.parametrize("path", [INSPECT, "/v1/press/gear/aliases/production/rollback"])
def test_a_body_without_a_valid_token_is_never_read(
    proxy: NginxProxy, service: RecordingService, token: str | None, path: str
) -> None:
    authorization = [] if token is None else [f"Authorization: Bearer {token}"]
    answer = send_raw_request(
        proxy, f"POST {path} HTTP/1.1", "Transfer-Encoding: chunked", *authorization, body="10\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"urn:focus-ray:unauthorised" in answer
    assert answer.lower().count(b"www-authenticate: bearer") == 1
    assert service.requests == []


def test_the_service_that_cannot_check_tokens_is_unavailable(
    client: httpx.Client, service: RecordingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "tokens_ready", False)
    answer = client.post(INSPECT, content=b"x", headers=bearer_header(TOKEN))
    check_problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "1"


def test_a_body_beyond_the_limit_never_reaches_the_service(
    client: httpx.Client, proxy: NginxProxy, service: RecordingService
) -> None:
    pieces = (bytes(MIB) for _ in range(40))
    check_problem(client.post(INSPECT, content=pieces, headers=bearer_header(TOKEN)), 413, "too-large")
    announced = send_raw_request(
        proxy, f"POST {INSPECT} HTTP/1.1", f"Content-Length: {2**40}", f"Authorization: Bearer {TOKEN}"
    )
    assert announced.startswith(b"HTTP/1.1 413 ")
    assert service.requests == []


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/openapi.json"])
def test_paths_without_bodies_refuse_a_body(client: httpx.Client, service: RecordingService, path: str) -> None:
    check_problem(client.request("GET", path, content=iter([b"x"])), 413, "too-large")
    assert service.requests == []
    assert client.get(path).status_code == 200


def test_large_and_endless_headers_are_refused(
    client: httpx.Client, proxy: NginxProxy, service: RecordingService
) -> None:
    check_problem(client.get("/", headers={"x-large": "x" * 9000}), 431, "headers-too-large")
    check_problem(client.get("/", headers={f"x-large-{n}": "x" * 7000 for n in range(6)}), 431, "headers-too-large")
    assert client.get("/" + "x" * 9000).status_code == 414
    with proxy.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: plant\r\nX-Large: ")
        with pytest.raises(OSError, match=r".+"):  # the proxy closes the connection
            connection.sendall(b"x" * (64 * MIB))
    assert service.requests == []


def test_connections_of_slow_clients_are_closed_in_time(proxy: NginxProxy, service: RecordingService) -> None:
    head = b"GET / HTTP/1.1\r\nHost: plant\r\nX-Slow: "
    post = f"POST {INSPECT} HTTP/1.1\r\nHost: plant\r\nContent-Length: 1000\r\nAuthorization: Bearer {TOKEN}\r\n\r\nx"

    def attack(has_tls: bool, first_bytes: bytes, drips: bool) -> None:
        plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=60)
        with (
            proxy.create_tls_context().wrap_socket(plain, server_hostname="127.0.0.1")
            if has_tls
            else plain as connection
        ):
            connection.sendall(first_bytes)
            if drips:
                with suppress(ConnectionError, ssl.SSLError):
                    for _ in range(5 * LIMIT_S):
                        connection.sendall(b"x")
                        time.sleep(0.2)
            read_until_closed(connection, LIMIT_S)

    clients = [(False, b"", False)] * 60 + [(True, b"", False)] * 10 + [(True, head, False)] * 40
    clients += [(True, head, True)] * 2 + [(True, post.encode(), False)] * 8
    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(lambda client: attack(*client), clients))
    assert service.requests == []


def test_the_connections_of_one_address_are_limited(proxy: NginxProxy) -> None:
    connections = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(160)]

    def is_closed(connection: socket.socket) -> bool:
        connection.settimeout(0.01)
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    wait_for(lambda: sum(map(is_closed, connections)) >= 32, 60.0, "connections beyond 128 are closed at once")
    other = socket.create_connection(("127.0.0.1", proxy.port), timeout=60, source_address=("127.0.0.2", 0))
    with proxy.create_tls_context().wrap_socket(other, server_hostname="127.0.0.1") as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: plant\r\nConnection: close\r\n\r\n")
        assert read_until_closed(connection, 60.0).startswith(b"HTTP/1.1 200 ")
    for connection in connections:
        connection.close()


def test_a_flood_by_one_token_gets_429_while_another_token_is_answered(
    client: httpx.Client, service: RecordingService
) -> None:
    with ThreadPoolExecutor(8) as threads:  # a single sender is too slow on a busy machine
        answers = list(threads.map(lambda _: client.get("/v1/press", headers=bearer_header(TOKEN)), range(500)))
    refused = [answer for answer in answers if answer.status_code == 429]
    check_problem(refused[0], 429, "too-many-requests")
    assert refused[0].headers["retry-after"] == "1"
    assert client.get("/v1/press", headers=bearer_header(OTHER_TOKEN)).status_code == 200
    assert len(service.requests) == 501 - len(refused)


def test_a_flood_without_a_token_gets_429_by_its_address(
    client: httpx.Client, proxy: NginxProxy, service: RecordingService
) -> None:
    def ask(_: int) -> list[int]:
        flooding = httpx.HTTPTransport(verify=proxy.create_tls_context(), local_address="127.0.0.3")
        with httpx.Client(base_url=proxy.url, transport=flooding) as flooder:
            return [flooder.get("/healthz").status_code for _ in range(300)]

    with ThreadPoolExecutor(4) as pool:
        assert any(429 in statuses for statuses in pool.map(ask, range(4)))
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "path", ["/-/routes", "/-/healthz", "//-/routes", "/%2D/routes", "/x/../-/routes", "/-%2Froutes"]
)
def test_the_paths_of_serve_are_hidden(proxy: NginxProxy, service: RecordingService, path: str) -> None:
    answer = send_raw_request(proxy, f"GET {path} HTTP/1.1", "Connection: close")
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"urn:focus-ray:not-found" in answer
    assert b"\r\nServer: nginx\r\n" in answer  # without its version
    assert service.requests == []


def test_a_stopped_service_gives_a_problem_document(tmp_path_factory: pytest.TempPathFactory) -> None:
    with (
        run_proxy(tmp_path_factory.mktemp("gone"), f"127.0.0.1:{free_port()}") as proxy,
        httpx.Client(base_url=proxy.url, verify=proxy.create_tls_context()) as client,
    ):
        check_problem(client.get("/healthz"), 502, "bad-gateway")
        check_problem(client.post(INSPECT, content=b"x", headers=bearer_header(TOKEN)), 503, "unavailable")


def test_sizes_and_times_fit_those_of_the_service() -> None:
    values = re.findall(r"^\s*(\w+) (\d+)(?:m|s);", CONFIGURATION.read_text(), flags=re.MULTILINE)
    sizes_and_times, limits = {name: int(value) for name, value in values}, RequestLimits()
    assert limits.max_body_mb < sizes_and_times["client_max_body_size"] <= limits.max_body_mb + 1
    request_timeout_s = limits.timeout_s + 30  # of Serve: focus_ray/serving/launch.py
    assert request_timeout_s < sizes_and_times["proxy_read_timeout"] < sizes_and_times["proxy_timeout"]
    for name in ("client_header_timeout", "client_body_timeout"):
        assert sizes_and_times[name] == SLOW_TIMEOUT_S < BODY_TIMEOUT_S
