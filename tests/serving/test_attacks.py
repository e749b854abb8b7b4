"""Attacks on a live service, mostly through the shipped front proxy: other teams are answered, and memory stays small."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path

import httpx
import pytest
from costly_images import jpeg_of_scans, make_bombs, many_pages, rgba
from nginx_proxy import Proxy, read_until_closed, running_proxy
from places import free_port
from s3_server import running_server
from service_load import NOISE_S, MemoryWatch, Probe, compare_waits, find_serve_processes, running_command
from serving_set import MILL, PRESS, Plant, make_plant, name_data_set
from waiting import wait_for

from focus_ray.bundle.registry import Registry
from focus_ray.serving.tokens import create_token, revoke_token

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

MIB = 2**20
SLOW_REQUEST_TIMEOUT_S = 10  # client_header_timeout and client_body_timeout of serve/nginx.conf
MAX_GROWTH_MB = 64  # of all processes of Serve and their children together
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

    folder, port = tmp_path_factory.mktemp("plant"), free_port()
    plant = make_plant(folder)
    for team in (PRESS, MILL):
        shutil.copytree(plant.data, folder / "data" / team)
        name_data_set(
            Path(plant.registry), team, str(folder / "data" / MILL)
        )  # for press, the data set of another team
    settings = parse_settings(
        {
            "registry": plant.registry,
            "tokens": plant.tokens,
            "refresh_s": 0.2,
            "ingress_num_cpus": 0.1,
            "together": False,
            "pool": {"num_cpus": 0.5},
            "examples": {team: [str(folder / "data" / team)] for team in (PRESS, MILL)},
        }
    )
    with (
        running(settings, port=port),
        running_proxy(tmp_path_factory.mktemp("proxy"), f"127.0.0.1:{port}") as proxy,
    ):
        target = Target(plant, proxy, port)
        with target.probe() as probe:
            probe.wait_for(20)  # the model is loaded, and the decoders run
        yield target


def test_the_service_answers_through_the_proxy(target: Target) -> None:
    processes = list(find_serve_processes().values())
    assert processes.count(True) >= 3  # Serve's proxy, a replica that takes requests in, one that scores
    assert processes.count(False) >= 2  # decoders
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
    pieces = (bytes(MIB) for _ in range(2 * MAX_GROWTH_MB))  # chunked: no length is announced
    with target.client() as client, MemoryWatch() as memory, target.probe():
        try:
            answer = client.request(method, path, content=pieces, headers={"content-type": "application/json"})
        except httpx.WriteError:  # the connection was closed before the answer could be read
            pass
        else:
            assert answer.status_code == 401, answer.text
            assert answer.headers["content-type"] == "application/problem+json"
    assert memory.growth_mb < MAX_GROWTH_MB


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
    with ThreadPoolExecutor(len(connections)) as pool, MemoryWatch() as memory, target.probe() as probe:
        list(pool.map(lambda connection: read_until_closed(connection, SLOW_REQUEST_TIMEOUT_S + 5), connections))
    for connection in connections:
        connection.close()
    assert len(probe.times_s) > 10
    assert memory.growth_mb < MAX_GROWTH_MB


def test_a_header_without_end_costs_no_memory(target: Target) -> None:
    num_sent = 0
    with MemoryWatch() as memory, target.probe(), target.proxy.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: plant\r\nX-Large: ")
        try:
            for _ in range(2 * MAX_GROWTH_MB):
                connection.sendall(b"x" * MIB)
                num_sent += MIB
        except OSError:
            pass
    assert num_sent < MAX_GROWTH_MB * MIB
    assert memory.growth_mb < MAX_GROWTH_MB


def test_another_team_waits_less_than_twice_as_long_during_a_flood_without_tokens(target: Target) -> None:
    statuses: Counter[int] = Counter()

    def flood(stop: threading.Event) -> None:
        connection = HTTPSConnection(
            "127.0.0.1", target.proxy.port, context=target.proxy.tls(), source_address=("127.0.0.2", 0)
        )
        with closing(connection):
            while not stop.wait(0.002):
                connection.request("POST", INSPECT, b"x" * 1000)
                answer = connection.getresponse()
                answer.read()
                statuses[answer.status] += 1

    quiet_s, busy_s = compare_waits(target.probe().request, flood)
    print(dict(statuses))
    assert statuses.keys() <= {401, 429}
    assert busy_s < max(2 * quiet_s, NOISE_S)


def test_tiff_bombs_take_no_more_memory_than_an_honest_image_while_another_team_is_answered(target: Target) -> None:
    bombs = {**make_bombs(), "many pages": many_pages(50_000)}
    honest = rgba(1024, bytes(1024 * 1024 * 8), compression=1)  # as large a file as the largest bomb
    assert max(map(len, bombs.values())) <= len(honest) + 4096
    with target.client(target.plant.press) as client, target.probe():

        def send(image: bytes) -> int:
            return client.post(INSPECT, content=image, headers={"content-type": "image/tiff"}, timeout=5).status_code

        with MemoryWatch() as honest_memory:
            assert send(honest) == 200
        with MemoryWatch() as memory:
            statuses = {name: send(image) for name, image in bombs.items()}
    print(
        f"memory grew by {honest_memory.growth_mb:.0f} MiB with an image, by {memory.growth_mb:.0f} MiB with the bombs"
    )
    assert set(statuses.values()) == {422}, statuses
    assert memory.growth_mb < honest_memory.growth_mb + MAX_GROWTH_MB


def test_another_team_waits_less_than_twice_as_long_while_slow_images_are_sent(target: Target) -> None:
    bombs = {"many scans": jpeg_of_scans(64, 16_000), "a second of decoding": jpeg_of_scans(3000, 100)}
    statuses: Counter[tuple[str, int]] = Counter()

    def send(stop: threading.Event) -> None:
        with target.client(target.plant.press) as client:
            while not stop.is_set():
                for name, image in bombs.items():
                    answer = client.post(INSPECT, content=image, headers={"content-type": "image/jpeg"})
                    statuses[name, answer.status_code] += 1

    quiet_s, busy_s = compare_waits(target.probe().request, send)
    print(dict(statuses))
    assert statuses["many scans", 422]
    assert statuses.keys() <= {("many scans", 422), ("a second of decoding", 200), ("a second of decoding", 422)}
    assert busy_s < max(2 * quiet_s, NOISE_S)


def test_a_manifest_that_names_another_team_s_data_set_shows_none_of_its_images(target: Target) -> None:
    with target.client(target.plant.mill) as client:
        answer = client.get(f"/v1/{MILL}/gear/examples/0")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    with target.client(target.plant.press) as client:
        assert client.get(f"/v1/{PRESS}/gear").status_code == 200
        answer = client.get(f"/v1/{PRESS}/gear/examples/0")
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


@contextmanager
def stopped(process_id: int) -> Iterator[None]:
    """Stops a process, which then takes connections and never answers, until the context ends."""
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


@pytest.mark.s3
def test_storage_that_stops_answering_stops_neither_loaded_models_nor_readiness_nor_revocation(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tmp_path_factory) as (storage, server):
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        plant, place = make_plant(tmp_path), server.new_uri()
        registry, tokens = f"{place}/registry", f"{place}/tokens.yaml"
        Registry(registry).publish(plant.bundles["gear"], PRESS)
        token, record = create_token(tokens, PRESS, ["inspect", "read"])
        headers = plant.headers(token)
        with (
            running_command(registry, f"tokens={tokens}", "refresh_s=0.5") as url,
            httpx.Client(base_url=url, headers=headers, timeout=60) as client,
        ):

            def inspect(category: str = "gear") -> tuple[int, float]:
                answer = client.post(f"/v1/{PRESS}/{category}/inspect", content=plant.images[0])
                return answer.status_code, answer.elapsed.total_seconds()

            assert inspect()[0] == 200
            with stopped(storage.pid), ThreadPoolExecutor(10) as pool:
                time.sleep(2)  # several refreshes now hang
                unknown = [pool.submit(inspect, f"unknown{number}") for number in range(4)]
                answers = [pool.submit(inspect) for _ in range(40)]
                statuses, waits_s = zip(*(answer.result() for answer in answers), strict=True)
                ready = client.get("/readyz")
                unknown_answers = [answer.result() for answer in unknown]
            print(
                f"storage stopped: {len(waits_s)} waits of at most {max(waits_s):.2f} s; unknown names {unknown_answers}"
            )
            assert set(statuses) == {200}
            assert max(waits_s) < 2
            assert (ready.status_code, ready.elapsed.total_seconds() < 2) == (200, True)
            assert {status for status, _ in unknown_answers} == {503}
            assert max(wait_s for _, wait_s in unknown_answers) < 15
            revoke_token(tokens, record.id)
            wait_for(lambda: client.get("/v1").status_code == 401, 5, "the revoked token is refused")


def test_a_service_without_tokens_answers_its_own_page_and_no_other_site(tmp_path: Path) -> None:
    plant = make_plant(tmp_path)
    changes = [path for path in BODY_PATHS if path[1] != INSPECT]
    with running_command(plant.registry) as url, httpx.Client(base_url=url, timeout=60) as client:

        def inspect(headers: dict[str, str]) -> int:
            image_type = {"content-type": "image/png"}
            return client.post(INSPECT, content=plant.images[0], headers={**image_type, **headers}).status_code

        same_origin = {"origin": url, "sec-fetch-site": "same-origin"}
        assert client.get("/", headers={"sec-fetch-site": "none"}).status_code == 200
        assert client.get("/v1", headers=same_origin).json()["scopes"] == ["inspect", "read"]
        assert inspect(same_origin) == inspect({}) == 200
        for method, path in changes:
            assert client.request(method, path, json={"version": "v0001"}, headers=same_origin).status_code == 403
        for headers, status in (
            ({"origin": "https://attacker.example", "sec-fetch-site": "cross-site"}, 403),
            ({"origin": "https://attacker.example"}, 403),
            ({"sec-fetch-site": "same-site"}, 403),
            ({"host": "attacker.example", "origin": "http://attacker.example", "sec-fetch-site": "same-origin"}, 421),
            ({"host": "attacker.example:8000"}, 421),
        ):
            assert inspect(headers) == status, headers
            for method, path in [("GET", "/v1"), ("GET", f"/v1/{PRESS}/gear"), *changes]:
                assert client.request(method, path, headers=headers).status_code == status, (headers, path)
