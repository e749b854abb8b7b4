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
from typing import Any

import httpx
import pytest
from nginx_proxy import CONFIGURATION, Proxy, nginx_program, read_until_closed, running_proxy
from places import free_port
from waiting import wait_for

from focus_ray.serving.settings import Limits

TOKEN = f"frs_{'0' * 12}_{'a' * 43}"
OTHER_TOKEN = f"frs_{'1' * 12}_{'b' * 43}"
INSPECT = "/v1/press/gear/inspect"
SLOW_TIMEOUT_S = 10  # of headers, and of pauses in a body


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


class Service:
    """An ASGI application: /v1 says whether a token is in force; every other path notes the request and its body's bytes."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.tokens_ready = True

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            return
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        body = 0
        message: dict[str, Any] = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += len(message.get("body", b""))
        status = 200
        if scope["path"] == "/v1":
            is_valid = headers.get("authorization") in (f"Bearer {TOKEN}", f"Bearer {OTHER_TOKEN}")
            status = 503 if not self.tokens_ready else 200 if is_valid else 401
        else:
            self.requests.append({"path": scope["path"], "body": body, "headers": headers})
        answer_headers = [(b"content-type", b"text/plain")] + [(b"www-authenticate", b"Bearer")] * (status == 401)
        await send({"type": "http.response.start", "status": status, "headers": answer_headers})
        await send({"type": "http.response.body", "body": b"the service"})


@pytest.fixture(scope="module")
def service_and_port() -> Iterator[tuple[Service, int]]:
    import uvicorn

    service, port = Service(), free_port()
    server = uvicorn.Server(uvicorn.Config(service, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    wait_for(lambda: server.started, 10.0, "the service answers")
    yield service, port
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def proxy(service_and_port: tuple[Service, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with running_proxy(tmp_path_factory.mktemp("proxy"), f"127.0.0.1:{service_and_port[1]}") as running:
        yield running


@pytest.fixture
def service(service_and_port: tuple[Service, int]) -> Service:
    service_and_port[0].requests.clear()
    return service_and_port[0]


@pytest.fixture
def client(proxy: Proxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=proxy.url, verify=proxy.tls(), timeout=30) as client:
        yield client


def check_problem(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert (document["type"], document["status"]) == (f"urn:focus-ray:{code}", status)
    assert document["request_id"] == response.headers["x-request-id"]


def read_answer(connection: socket.socket) -> bytes:
    """Head and problem document of an answer, within 5 s: before any timeout of the proxy."""
    data = b""
    connection.settimeout(5.0)
    while not data.endswith(b'"}'):
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    return data


def test_a_body_arrives_complete_and_with_the_address_of_the_client(client: httpx.Client, service: Service) -> None:
    headers = {**bearer(), "x-forwarded-for": "10.9.9.9", "x-request-id": "line-3.17"}
    answer = client.post(INSPECT, content=b"x" * 200_000, headers=headers)
    assert (answer.status_code, answer.text) == (200, "the service")
    (request,) = service.requests
    assert (request["path"], request["body"]) == (INSPECT, 200_000)
    assert request["headers"]["x-forwarded-for"] == "127.0.0.1"
    assert request["headers"]["x-forwarded-proto"] == "https"
    assert request["headers"]["x-request-id"] == "line-3.17"
    assert request["headers"]["host"].startswith("127.0.0.1:")


def test_plain_http_is_refused(proxy: Proxy, service: Service) -> None:
    check_problem(httpx.get(f"http://127.0.0.1:{proxy.port}/", timeout=10), 400, "bad-request")
    assert service.requests == []


def test_old_tls_is_refused(proxy: Proxy) -> None:
    context = proxy.tls()
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, bearer(f"frs_{'2' * 12}_{'c' * 43}")])
@pytest.mark.parametrize("path", [INSPECT, "/v1/press/gear/aliases/production/rollback"])
def test_a_body_without_a_valid_token_is_never_read(
    proxy: Proxy, service: Service, headers: dict[str, str], path: str
) -> None:
    with proxy.connect() as connection:
        lines = [f"POST {path} HTTP/1.1", "Host: plant", "Transfer-Encoding: chunked"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        connection.sendall("\r\n".join([*lines, "", "10\r\n"]).encode())  # and then nothing
        answer = read_answer(connection)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"urn:focus-ray:unauthorised" in answer
    assert answer.lower().count(b"www-authenticate: bearer") == 1
    assert service.requests == []


def test_the_service_that_cannot_check_tokens_is_unavailable(client: httpx.Client, service: Service) -> None:
    service.tokens_ready = False
    try:
        answer = client.post(INSPECT, content=b"x", headers=bearer())
    finally:
        service.tokens_ready = True
    check_problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "1"


def test_a_chunked_body_beyond_the_limit_never_reaches_the_service(client: httpx.Client, service: Service) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield bytes(2**20)

    check_problem(client.post(INSPECT, content=pieces(), headers=bearer()), 413, "too-large")
    assert service.requests == []


def test_a_body_with_a_too_large_content_length_is_refused_immediately(proxy: Proxy, service: Service) -> None:
    with proxy.connect() as connection:
        lines = [
            f"POST {INSPECT} HTTP/1.1",
            "Host: plant",
            f"Content-Length: {2**40}",
            f"Authorization: Bearer {TOKEN}",
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        assert read_answer(connection).startswith(b"HTTP/1.1 413 ")
    assert service.requests == []


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/openapi.json"])
def test_paths_without_bodies_refuse_a_body(client: httpx.Client, service: Service, path: str) -> None:
    check_problem(client.request("GET", path, content=iter([b"x"])), 413, "too-large")
    assert service.requests == []
    assert client.get(path).status_code == 200


def test_a_large_header_is_refused_with_431(client: httpx.Client, service: Service) -> None:
    check_problem(client.get("/", headers={"x-large": "x" * 9000}), 431, "headers-too-large")
    check_problem(client.get("/", headers={f"x-large-{n}": "x" * 7000 for n in range(6)}), 431, "headers-too-large")
    assert client.get("/" + "x" * 9000).status_code == 414
    assert service.requests == []


def test_an_endless_header_is_refused(proxy: Proxy, service: Service) -> None:
    sent = 0
    with proxy.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: plant\r\nX-Large: ")
        try:
            for _ in range(64):
                connection.sendall(b"x" * 2**20)
                sent += 2**20
        except OSError:
            pass
    assert sent < 64 * 2**20
    assert service.requests == []


@pytest.fixture(scope="module")
def slow_clients(proxy: Proxy, service_and_port: tuple[Service, int]) -> dict[str, list[float]]:
    """Seconds until the proxy closed the connections of each kind of slow client, all at once; one that stays is an error."""

    def silent(connection: socket.socket) -> None:
        read_until_closed(connection, SLOW_TIMEOUT_S + 5)

    def dripping(connection: socket.socket) -> None:
        deadline = time.monotonic() + SLOW_TIMEOUT_S + 5
        while time.monotonic() < deadline:
            try:
                connection.sendall(b"x")
            except OSError:
                return
            time.sleep(0.2)
        raise TimeoutError("the proxy takes a header that drips without end")

    head = b"GET / HTTP/1.1\r\nHost: plant\r\nX-Slow: "
    post = f"POST {INSPECT} HTTP/1.1\r\nHost: plant\r\nContent-Length: 1000\r\nAuthorization: Bearer {TOKEN}\r\n\r\nx"
    clients = {
        "no TLS": (60, False, b"", silent),
        "no header": (10, True, b"", silent),
        "half a header": (40, True, head, silent),
        "a header that drips": (2, True, head, dripping),
        "half a body": (8, True, post.encode(), silent),
    }

    def attack(kind: str) -> float:
        _, tls, first_bytes, behave = clients[kind]
        start = time.monotonic()
        plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=30)
        with proxy.tls().wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain as connection:
            connection.sendall(first_bytes)
            behave(connection)
        return time.monotonic() - start

    kinds = [kind for kind, (count, *_) in clients.items() for _ in range(count)]
    service_and_port[0].requests.clear()
    with ThreadPoolExecutor(len(kinds)) as pool:
        times_s = list(pool.map(attack, kinds))
    assert service_and_port[0].requests == []
    return {kind: [seconds for k, seconds in zip(kinds, times_s, strict=True) if k == kind] for kind in clients}


@pytest.mark.parametrize("kind", ["no TLS", "no header", "half a header", "a header that drips", "half a body"])
def test_a_connection_of_a_slow_client_is_closed_in_time(slow_clients: dict[str, list[float]], kind: str) -> None:
    assert max(slow_clients[kind]) < SLOW_TIMEOUT_S + 5


def test_the_connections_of_one_address_are_limited(proxy: Proxy) -> None:
    connections = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(160)]

    def closed(connection: socket.socket) -> bool:
        connection.settimeout(0.01)
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    wait_for(lambda: sum(map(closed, connections)) >= 32, 5.0, "connections beyond 128 are closed at once")
    other = socket.create_connection(("127.0.0.1", proxy.port), timeout=10, source_address=("127.0.0.2", 0))
    with proxy.tls().wrap_socket(other, server_hostname="127.0.0.1") as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: plant\r\nConnection: close\r\n\r\n")
        assert read_until_closed(connection, 10.0).startswith(b"HTTP/1.1 200 ")
    for connection in connections:
        connection.close()


def test_a_flood_by_one_token_gets_429_while_another_token_is_answered(client: httpx.Client, service: Service) -> None:
    answers = [client.get("/v1/press", headers=bearer()) for _ in range(250)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    check_problem(refused[0], 429, "too-many-requests")
    assert refused[0].headers["retry-after"] == "1"
    assert client.get("/v1/press", headers=bearer(OTHER_TOKEN)).status_code == 200
    assert len(service.requests) == 251 - len(refused)


def test_a_flood_without_a_token_gets_429_by_its_address(proxy: Proxy, service: Service) -> None:
    def ask(_: int) -> list[int]:
        flooding = httpx.HTTPTransport(verify=proxy.tls(), local_address="127.0.0.3")
        with httpx.Client(base_url=proxy.url, transport=flooding) as client:
            return [client.get("/healthz").status_code for _ in range(300)]

    with ThreadPoolExecutor(4) as pool:
        statuses = [status for part in pool.map(ask, range(4)) for status in part]
    assert 429 in statuses
    with httpx.Client(base_url=proxy.url, verify=proxy.tls()) as client:
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "path", ["/-/routes", "/-/healthz", "//-/routes", "/%2D/routes", "/x/../-/routes", "/-%2Froutes"]
)
def test_the_paths_of_serve_are_hidden(proxy: Proxy, service: Service, path: str) -> None:
    with proxy.connect() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: plant\r\nConnection: close\r\n\r\n".encode())
        answer = read_until_closed(connection, 10.0)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"urn:focus-ray:not-found" in answer
    assert service.requests == []


def test_no_answer_names_the_version_of_the_proxy(client: httpx.Client) -> None:
    for answer in (client.get("/"), client.get("/-/routes")):
        assert answer.headers["server"] == "nginx"


def test_a_stopped_service_gives_a_problem_document(tmp_path_factory: pytest.TempPathFactory) -> None:
    with (
        running_proxy(tmp_path_factory.mktemp("gone"), f"127.0.0.1:{free_port()}") as proxy,
        httpx.Client(base_url=proxy.url, verify=proxy.tls()) as client,
    ):
        check_problem(client.get("/healthz"), 502, "bad-gateway")
        check_problem(client.post(INSPECT, content=b"x", headers=bearer()), 503, "unavailable")


def setting(name: str, unit: str) -> int:
    """The number of a setting of the shipped configuration."""
    (value,) = re.findall(rf"^\s*{name} (\d+){unit};", CONFIGURATION.read_text(), flags=re.MULTILINE)
    return int(value)


def test_sizes_and_times_fit_those_of_the_service() -> None:
    limits = Limits()
    assert limits.max_body_mb < setting("client_max_body_size", "m") <= limits.max_body_mb + 1
    request_timeout_s = limits.timeout_s + 30  # of Serve: focus_ray/serving/launch.py
    assert setting("proxy_read_timeout", "s") > request_timeout_s
    assert setting("proxy_timeout", "s") > setting("proxy_read_timeout", "s")
    assert setting("client_header_timeout", "s") == setting("client_body_timeout", "s") == SLOW_TIMEOUT_S
    assert limits.body_timeout_s > SLOW_TIMEOUT_S


def test_the_program_of_the_tests_is_nginx() -> None:
    assert nginx_program().endswith("nginx")
