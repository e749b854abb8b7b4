"""Attacks on a live service, mostly through the shipped front proxy: other teams are answered, and memory stays small."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPSConnection

import httpx
import pytest
from costly_images import jpeg_of_scans, make_bombs, many_pages, rgba
from nginx_proxy import SLOW_TIMEOUT_S, NginxProxy, read_until_closed, run_proxy
from places import free_port
from s3_server import running_server
from service_load import (
    NOISE_S,
    MemoryMonitor,
    RequestProbe,
    compare_waiting_times,
    find_serve_processes,
    run_serve_command,
)
from serving_set import INSPECT, MILL, PRESS, TwoTeams, bearer_header, create_settings
from waiting import wait_for

from focus_ray.bundle.registry import Registry
from focus_ray.serving.tokens import create_token, revoke_token

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

MIB = 2**20
MAX_GROWTH_MB = 64  # of all processes of Serve and their children together
ALIAS = f"/v1/{PRESS}/gear/aliases/production"
BODY_PATHS = [
    ("POST", INSPECT),
    ("POST", f"{ALIAS}/rollback"),
    ("PUT", ALIAS),
    ("POST", f"/v1/{PRESS}/gear/versions/v0001/thresholds"),
]


@dataclass(frozen=True)
class AttackedService:
    """A live service of two teams, and the proxy before it."""

    plant: TwoTeams
    proxy: NginxProxy

    def client(self, token: str | None = None) -> httpx.Client:
        """An HTTP client through the proxy."""
        headers = {} if token is None else bearer_header(token)
        return httpx.Client(
            base_url=self.proxy.url, verify=self.proxy.create_tls_context(), headers=headers, timeout=60
        )

    def probe(self) -> RequestProbe:
        """A client of team mill, who inspects one image after another; a refusal fails the test."""
        client, image_type = self.client(self.plant.mill), {"content-type": "image/png"}

        def inspect() -> None:
            answer = client.post(f"/v1/{MILL}/gear/inspect", content=self.plant.images[0], headers=image_type)
            assert answer.status_code == 200, answer.text

        return RequestProbe(inspect)


@pytest.fixture(scope="module")
def target(ray_cluster: None, plant: TwoTeams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedService]:
    from focus_ray.serving.launch import run_service

    port = free_port()
    settings = create_settings(
        plant, refresh_s=0.2, ingress_num_cpus=0.1, ingress={"max_replicas": 1}, pool={"num_cpus": 0.5}
    )
    place = f"127.0.0.1:{port}"
    with run_service(settings, port=port), run_proxy(tmp_path_factory.mktemp("proxy"), place) as proxy:
        target = AttackedService(plant, proxy)
        with target.probe() as probe:
            probe.wait_for(20)  # the model is loaded, and the decoders run
        yield target


def test_the_service_answers_through_the_proxy(target: AttackedService) -> None:
    processes = list(find_serve_processes().values())
    assert processes.count(True) >= 3  # Serve's proxy, a replica that receives requests, one that scores
    assert processes.count(False) >= 2  # decoders
    with target.client(target.plant.press) as client:
        assert client.get("/readyz").status_code == 200
        assert client.get("/").headers["content-type"].startswith("text/html")
        assert client.get("/v1").json()["teams"] == [PRESS]
        files = [("images", ("a.png", image, "image/png")) for image in target.plant.images[:3]]
        assert len(client.post(INSPECT, files=files).json()["results"]) == 3


@pytest.mark.parametrize(("method", "path"), BODY_PATHS)
def test_a_large_body_without_a_token_is_refused_and_costs_no_memory(
    target: AttackedService, method: str, path: str
) -> None:
    pieces = (bytes(MIB) for _ in range(2 * MAX_GROWTH_MB))  # chunked: no length is announced
    with target.client() as client, MemoryMonitor() as memory, target.probe():
        try:
            answer = client.request(method, path, content=pieces, headers={"content-type": "application/json"})
        except httpx.WriteError:  # the connection was closed before the answer could be read
            pass
        else:
            assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json")
    assert memory.growth_mb < MAX_GROWTH_MB


@pytest.mark.parametrize("has_token", [False, True])
def test_stalled_bodies_are_cut_while_another_team_is_answered(target: AttackedService, has_token: bool) -> None:
    def stall(method_and_path: tuple[str, str]) -> float:
        lines = [f"{' '.join(method_and_path)} HTTP/1.1", "Host: plant", "Content-Type: application/json"]
        lines += ["Content-Length: 3000", *([f"Authorization: Bearer {target.plant.press_admin}"] if has_token else [])]
        with target.proxy.connect() as connection:
            connection.sendall("\r\n".join([*lines, "", '{"ref":']).encode())
            start = time.monotonic()
            read_until_closed(connection, SLOW_TIMEOUT_S + 10)
            return time.monotonic() - start

    with ThreadPoolExecutor(len(BODY_PATHS)) as pool, target.probe():
        times_s = list(pool.map(stall, BODY_PATHS))
    assert max(times_s) < SLOW_TIMEOUT_S + 5


def test_another_team_waits_less_than_twice_as_long_during_a_flood_without_tokens(target: AttackedService) -> None:
    statuses: Counter[int] = Counter()

    def flood(stop: threading.Event) -> None:
        tls, source = target.proxy.create_tls_context(), ("127.0.0.2", 0)
        with closing(HTTPSConnection("127.0.0.1", target.proxy.port, context=tls, source_address=source)) as connection:
            while not stop.wait(0.002):
                connection.request("POST", INSPECT, b"x" * 1000)
                answer = connection.getresponse()
                answer.read()
                statuses[answer.status] += 1

    quiet_s, busy_s = compare_waiting_times(target.probe().request, flood)
    assert statuses.keys() <= {401, 429}
    assert busy_s < max(2 * quiet_s, NOISE_S)


def test_tiff_bombs_take_no_more_memory_than_an_honest_image_while_another_team_is_answered(
    target: AttackedService,
) -> None:
    bombs = {**make_bombs(), "many pages": many_pages(50_000)}
    honest = rgba(1024, bytes(1024 * 1024 * 8), compression=1)  # as large a file as the largest bomb
    assert max(map(len, bombs.values())) <= len(honest) + 4096
    with target.client(target.plant.press) as client, target.probe():

        def send(image: bytes) -> int:
            return client.post(INSPECT, content=image, headers={"content-type": "image/tiff"}, timeout=5).status_code

        with MemoryMonitor() as honest_memory:
            assert send(honest) == 200
        with MemoryMonitor() as memory:
            statuses = {name: send(image) for name, image in bombs.items()}
    assert set(statuses.values()) == {422}, statuses
    assert memory.growth_mb < honest_memory.growth_mb + MAX_GROWTH_MB


def test_another_team_waits_less_than_twice_as_long_while_slow_images_are_sent(target: AttackedService) -> None:
    bombs = {"many scans": jpeg_of_scans(64, 16_000), "a second of decoding": jpeg_of_scans(3000, 100)}
    statuses: Counter[tuple[str, int]] = Counter()

    def send(stop: threading.Event) -> None:
        with target.client(target.plant.press) as client:
            while not stop.is_set():
                for name, image in bombs.items():
                    answer = client.post(INSPECT, content=image, headers={"content-type": "image/jpeg"})
                    statuses[name, answer.status_code] += 1

    quiet_s, busy_s = compare_waiting_times(target.probe().request, send)
    assert statuses["many scans", 422]
    assert statuses.keys() <= {("many scans", 422), ("a second of decoding", 200), ("a second of decoding", 422)}
    assert busy_s < max(2 * quiet_s, NOISE_S)


@contextmanager
def pause_process(process_id: int) -> Iterator[None]:
    """Stops a process, which then takes connections and never answers, until the context ends."""
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


@pytest.mark.s3
def test_storage_that_stops_answering_stops_neither_loaded_models_nor_readiness_nor_revocation(
    tmp_path_factory: pytest.TempPathFactory, plant: TwoTeams, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tmp_path_factory) as (storage, server):
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        place = server.new_uri()
        registry, tokens = f"{place}/registry", f"{place}/tokens.yaml"
        Registry(registry).publish(plant.bundles["gear"], PRESS)
        token, record = create_token(tokens, PRESS, ["inspect", "read"])
        with (
            run_serve_command(registry, f"tokens={tokens}", "refresh_s=0.5") as url,
            httpx.Client(base_url=url, headers=plant.image_headers(token), timeout=60) as client,
        ):

            def inspect(category: str = "gear") -> tuple[int, float]:
                answer = client.post(f"/v1/{PRESS}/{category}/inspect", content=plant.images[0])
                return answer.status_code, answer.elapsed.total_seconds()

            assert inspect()[0] == 200
            with pause_process(storage.pid), ThreadPoolExecutor(10) as pool:
                time.sleep(2)  # several refreshes now hang
                unknown = [pool.submit(inspect, f"unknown{number}") for number in range(4)]
                answers = [pool.submit(inspect) for _ in range(40)]
                statuses, waits_s = zip(*(answer.result() for answer in answers), strict=True)
                assert client.get("/readyz", timeout=2).status_code == 200
                assert {answer.result()[0] for answer in unknown} == {503}
            assert set(statuses) == {200}
            assert max(waits_s) < 2
            revoke_token(tokens, record.id)
            wait_for(lambda: client.get("/v1").status_code == 401, 60, "the revoked token is refused")
