"""Attacks on a live service behind the shipped front proxy: it keeps answering others, and neither it nor Serve grows."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
from nginx_proxy import Proxy, read_until_closed, running_proxy
from places import free_port
from service_load import Probe, idle_quantile_s, memory_growth_mb, serve_memory_mb
from serving_set import MILL, PRESS, Plant, make_plant

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

MIB = 2**20
SLOW_REQUEST_TIMEOUT_S = 10  # client_header_timeout and client_body_timeout of serve/nginx.conf
NOISE_S = 0.2  # a shared machine delays a single request by as much without any attack
ROLLBACK = f"/v1/{PRESS}/gear/aliases/production/rollback"
ALIAS = f"/v1/{PRESS}/gear/aliases/production"
THRESHOLDS = f"/v1/{PRESS}/gear/versions/v0001/thresholds"
INSPECT = f"/v1/{PRESS}/gear/inspect"
BODY_PATHS = [("POST", INSPECT), ("POST", ROLLBACK), ("PUT", ALIAS), ("POST", THRESHOLDS)]


@dataclass(frozen=True)
class Target:
    """A live service of two teams, the proxy before it, and the port of Serve itself."""

    plant: Plant
    proxy: Proxy
    serve_port: int

    def client(self, token: str | None = None) -> httpx.Client:
        """An HTTP client through the proxy."""
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.proxy.url, verify=self.proxy.tls(), headers=headers, timeout=60)

    def probe(self) -> Probe:
        """A client of team mill, who inspects one image after another; a refusal fails the test."""
        client = self.client(self.plant.mill)

        def inspect() -> None:
            answer = client.post(
                f"/v1/{MILL}/gear/inspect", content=self.plant.images[0], headers={"content-type": "image/png"}
            )
            assert answer.status_code == 200, answer.text

        return Probe(inspect)


@pytest.fixture(scope="module")
def target(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    from focus_ray.serving.launch import running
    from focus_ray.serving.settings import parse_settings

    plant, port = make_plant(tmp_path_factory.mktemp("plant")), free_port()
    settings = parse_settings(
        {
            "registry": plant.registry,
            "tokens": plant.tokens,
            "refresh_s": 0.2,
            "ingress_num_cpus": 0.1,
            "together": False,
            "pool": {"num_cpus": 0.5},
        }
    )
    with (
        running(settings, port=port),
        running_proxy(tmp_path_factory.mktemp("proxy"), f"127.0.0.1:{port}") as proxy,
    ):
        target = Target(plant, proxy, port)
        idle_quantile_s(target.probe().request, duration_s=1.0)  # the model is loaded
        yield target


def test_the_service_answers_through_the_proxy(target: Target) -> None:
    before = serve_memory_mb()
    assert len(before) >= 3, before  # Serve's proxy, a replica that takes requests in, one that scores
    with target.client() as client:
        assert client.get("/readyz").status_code == 200
        assert client.get("/").headers["content-type"].startswith("text/html")
    with target.client(target.plant.press) as client:
        assert client.get("/v1").json()["teams"] == [PRESS]
        files = [("images", ("a.png", image, "image/png")) for image in target.plant.images[:3]]
        answer = client.post(INSPECT, files=files)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["results"]) == 3


@pytest.mark.parametrize(("method", "path"), BODY_PATHS)
def test_a_large_body_without_a_token_is_refused_and_costs_no_memory(target: Target, method: str, path: str) -> None:
    before = serve_memory_mb()
    pieces = (bytes(MIB) for _ in range(64))  # chunked: no length is announced
    with target.client() as client, target.probe():
        try:
            answer = client.request(method, path, content=pieces, headers={"content-type": "application/json"})
        except httpx.WriteError:  # the connection was closed before the answer could be read
            pass
        else:
            assert answer.status_code == 401, answer.text
            assert answer.headers["content-type"] == "application/problem+json"
    assert memory_growth_mb(before) < 24


@pytest.mark.parametrize(("method", "path"), BODY_PATHS)
def test_malformed_json_without_a_token_is_a_missing_token(target: Target, method: str, path: str) -> None:
    with target.client() as client:
        answer = client.request(method, path, content=b'{"ref":', headers={"content-type": "application/json"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("token", [False, True])
def test_stalled_bodies_are_cut_while_another_team_is_answered(target: Target, token: bool) -> None:
    def stall(method_and_path: tuple[str, str]) -> float:
        method, path = method_and_path
        lines = [f"{method} {path} HTTP/1.1", "Host: plant", "Content-Type: application/json", "Content-Length: 3000"]
        if token:
            lines.append(f"Authorization: Bearer {target.plant.press_admin}")
        with target.proxy.connect() as connection:
            connection.sendall("\r\n".join([*lines, "", '{"ref":']).encode())
            start = time.monotonic()
            read_until_closed(connection, SLOW_REQUEST_TIMEOUT_S + 10)
            return time.monotonic() - start

    with ThreadPoolExecutor(len(BODY_PATHS)) as pool, target.probe():
        times_s = list(pool.map(stall, BODY_PATHS))
    assert max(times_s) < SLOW_REQUEST_TIMEOUT_S + 5


def test_unfinished_headers_are_closed_while_another_team_is_answered(target: Target) -> None:
    connections = []
    for number in range(200):
        try:
            connection = socket.create_connection(
                ("127.0.0.1", target.proxy.port), timeout=30, source_address=("127.0.0.2", 0)
            )
            if number % 2:
                connection = target.proxy.tls().wrap_socket(connection, server_hostname="127.0.0.1")
                connection.sendall(b"GET / HTTP/1.1\r\nHost: plant\r\nX-Slow: ")
        except OSError:  # closed at once: an address has 128 connections at most
            continue
        connections.append(connection)
    assert len(connections) >= 100
    before = serve_memory_mb()
    with ThreadPoolExecutor(len(connections)) as pool, target.probe() as probe:
        list(pool.map(lambda connection: read_until_closed(connection, SLOW_REQUEST_TIMEOUT_S + 5), connections))
    for connection in connections:
        connection.close()
    assert len(probe.times_s) > 10
    assert memory_growth_mb(before) < 24


def test_a_header_without_end_costs_no_memory(target: Target) -> None:
    before, num_sent = serve_memory_mb(), 0
    with target.probe(), target.proxy.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: plant\r\nX-Large: ")
        try:
            for _ in range(64):
                connection.sendall(b"x" * MIB)
                num_sent += MIB
        except OSError:
            pass
    assert num_sent < 64 * MIB
    assert memory_growth_mb(before) < 24


def test_another_team_waits_less_than_twice_as_long_during_a_flood_without_tokens(target: Target) -> None:
    idle_s = idle_quantile_s(target.probe().request)

    def flood(_: int) -> int:
        transport = httpx.HTTPTransport(verify=target.proxy.tls(), local_address="127.0.0.2")
        with httpx.Client(base_url=target.proxy.url, transport=transport) as client:
            deadline, num_requests = time.monotonic() + 4, 0
            while time.monotonic() < deadline:
                client.post(INSPECT, content=b"x" * 1000)
                num_requests += 1
                time.sleep(0.002)
        return num_requests

    with ThreadPoolExecutor(2) as pool, target.probe() as probe:
        num_requests = sum(pool.map(flood, range(2)))
    busy_s = probe.quantile_s(0.99)
    print(f"p99 idle {idle_s:.3f} s, under {num_requests} requests {busy_s:.3f} s")
    assert busy_s < max(2 * idle_s, NOISE_S)
