"""The service on Ray Serve, over HTTP: concurrent clients, lost replicas, promotions under load, the OpenAPI description."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from places import free_port
from serving_set import MILL, PRESS, Plant, make_plant
from waiting import wait_for

from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Registry
from focus_ray.client import AsyncClient, Client, Inspected, ServiceError
from focus_ray.serving.settings import parse_settings
from focus_ray.serving.source import version_key

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture(scope="module")
def url(ray_cluster: None, plant: Plant) -> Iterator[str]:
    from focus_ray.serving.launch import running

    pool = {"num_cpus": 0.5, "scaling": {"min_replicas": 2, "max_replicas": 2}}
    settings = parse_settings(
        {
            "registry": plant.registry,
            "tokens": plant.tokens,
            "refresh_s": 0.2,
            "ingress_num_cpus": 0.1,
            "pool": pool,
            "pins": [{"name": "boards", "team": PRESS, "categories": ["board"], "pool": {"num_cpus": 0.5}}],
            "limits": {"max_body_mb": 2},
        }
    )
    with running(settings, port=free_port()) as at:
        yield at


def test_many_clients_get_correct_answers_and_share_batches(url: str, plant: Plant) -> None:
    expected = {
        category: Inspector.load(plant.bundles[category], "cpu").inspect(plant.images) for category in ("gear", "board")
    }

    async def ask(client: AsyncClient, number: int) -> tuple[str, int, Inspected]:
        category, image = ("gear", "board")[number % 2], number % len(plant.images)
        return category, image, await client.inspect(PRESS, category, [plant.images[image]])

    async def ask_all() -> list[tuple[str, int, Inspected]]:
        async with AsyncClient(url, plant.press) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    for category, image, answer in asyncio.run(ask_all()):
        inspection = expected[category][image]
        # squares: the memory contains the training images, so their squared distances are rounding errors
        assert answer.findings[0].score ** 2 == pytest.approx(
            inspection.score**2, rel=2e-4, abs=1e-4 * inspection.threshold**2
        )
        assert answer.version == "v0001"


def test_the_client_distinguishes_errors_and_returns_maps_and_pictures(url: str, plant: Plant) -> None:
    with Client(url, plant.press) as client:
        answer = client.inspect(PRESS, "gear", [plant.images[0], b"no image"], include_map=True)
        assert answer.findings[0].map_png is not None
        assert answer.findings[1].error is not None
        assert client.picture(PRESS, "gear", plant.images[0], "overlay").startswith(b"\x89PNG")
        assert client.get("/v1/press")["categories"] == ["board", "gear"]
        with pytest.raises(ServiceError, match=r"404 not-found: .*'gear'.*'mill'"):
            client.inspect(MILL, "gear", plant.images[:1])
        with pytest.raises(ServiceError, match=r"422 image-not-an-image: .*\(request [0-9a-f-]+\)"):
            client.inspect(PRESS, "gear", [b"no image"])
    with (
        Client(url, "frs_wrong") as client,
        pytest.raises(ServiceError, match="401 unauthorised"),
    ):
        client.get("/v1")
    closed = f"http://127.0.0.1:{free_port()}"
    with (
        Client(closed, retries=1) as client,
        pytest.raises(ServiceError, match="cannot be reached"),
    ):
        client.get("/v1")


@pytest.mark.cluster
def test_a_pinned_category_is_loaded_before_its_first_request(ray_cluster: None, plant: Plant) -> None:
    from focus_ray.serving.app import ScorerReplica

    version = Registry(plant.registry).resolve(PRESS, "board")
    replica = ScorerReplica.func_or_class({}, "cpu", [version])  # type: ignore[attr-defined]
    assert replica._scorer.models.loaded_keys == []
    asyncio.run(replica.check_health())  # what Serve awaits before it sends a request
    assert replica._scorer.models.loaded_keys == [version_key(version)]


class Load:
    """Clients that inspect gears until the context ends."""

    def __init__(self, url: str, plant: Plant, clients: int = 6) -> None:
        self.url, self.plant, self.clients = url, plant, clients
        self.answers: list[Inspected] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.failure: BaseException | None = None

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        async def send_requests(client: AsyncClient) -> None:
            while not self._stop.is_set():
                self.answers.append(await client.inspect(PRESS, "gear", self.plant.images[:1]))

        async with AsyncClient(self.url, self.plant.press, retries=10) as client:
            try:
                await asyncio.gather(*(send_requests(client) for _ in range(self.clients)))
            except BaseException as error:
                self.failure = error

    def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
        num_expected = len(self.answers) + count

        def have_arrived() -> bool:
            assert self.failure is None, self.failure
            return len(self.answers) >= num_expected

        wait_for(have_arrived, timeout_s, f"{num_expected} answers", 0.02)


def replica_pids(name: str) -> list[int]:
    """Returns the process ids of the replicas of a deployment, whose title contains its name."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        is_of_this_test = os.environ["RAY_TMPDIR"].encode() in environment
        if is_of_this_test and title.startswith("ray::ServeReplica") and f":{name}" in title:
            pids.append(int(folder.name))
    return pids


@pytest.mark.cluster
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")
@pytest.mark.parametrize("name", ["scorer", "ingress"])
def test_a_replica_killed_under_load_loses_no_answer(url: str, plant: Plant, name: str) -> None:
    expected = Inspector.load(plant.bundles["gear"], "cpu").inspect(plant.images[:1])[0]
    with Load(url, plant) as load:
        load.wait_for(20)
        pids = replica_pids(name)
        assert pids, "no replica was found"
        os.kill(pids[0], signal.SIGKILL)
        load.wait_for(60)
    assert load.failure is None
    for answer in load.answers:
        finding = answer.findings[0]
        assert finding.score**2 == pytest.approx(expected.score**2, rel=2e-4, abs=1e-4 * expected.threshold**2)


@pytest.mark.cluster
def test_promotions_and_rollbacks_under_load_fail_no_request_and_are_logged(url: str, plant: Plant) -> None:
    registry = Registry(plant.registry)
    second = registry.publish(plant.bundles["gear"], PRESS)  # latest moves, and latest is what answers
    hashes = {version.name: version.sha256 for version in registry.versions(PRESS, "gear")}

    def answers(load: Load, version: str) -> bool:
        return any(answer.version == version for answer in load.answers[-6:])

    with Load(url, plant) as load:
        for version in (second.name, "v0001", second.name, "v0001"):
            registry.promote(PRESS, "gear", version, "latest")
            wait_for(lambda version=version: answers(load, version), 30, f"{version} answers", 0.02)  # type: ignore[misc]
    assert load.failure is None
    assert {answer.version for answer in load.answers} == {"v0001", second.name}
    assert all(hashes[answer.version] == answer.sha256 for answer in load.answers)


@pytest.mark.slow
def test_prometheus_gets_metrics_of_requests_batches_and_p_values(url: str, plant: Plant) -> None:
    import ray

    with Client(url, plant.press) as client:
        client.inspect(PRESS, "gear", plant.images)
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    metric_names = ("requests_total", "batch_images_count", "p_value_bucket", "stage_milliseconds_bucket", "models")
    text = ""

    def all_are_there() -> bool:
        nonlocal text
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        return all(re.search(rf"^ray_focus_ray_{name}\{{", text, re.M) for name in metric_names)

    wait_for(all_are_there, 60, f"all of {metric_names} exported", 1.0)
    assert re.search(r'^ray_focus_ray_images_total\{[^}]*category="gear"', text, re.M)


def test_malformed_requests_over_http_get_problems_and_the_service_continues(url: str, plant: Plant) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    token = f"Authorization: Bearer {plant.press}".encode()
    raw = [
        b"GET /v1/press/../../etc/passwd HTTP/1.1\r\nHost: x\r\n" + token + b"\r\n\r\n",
        b"POST /v1/press/gear/inspect HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99999999999\r\n"
        + token
        + b"\r\n\r\n",
        b"POST /v1/press/gear/inspect HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
    ]
    for request in raw:
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            try:
                connection.sendall(request)
                answer = connection.recv(65536)
            except ConnectionError:  # closed while it was still being sent
                continue
            assert re.match(rb"HTTP/1.1 4\d\d", answer) or answer == b"", answer[:200]
    many = httpx.post(
        f"{url}/v1/press/gear/inspect",
        content=iter([b"x" * 2**20] * 3),
        headers={"content-type": "image/png", "authorization": f"Bearer {plant.press}"},
        timeout=30,
    )
    assert (many.status_code, many.headers["content-type"]) == (413, "application/problem+json")
    with Client(url, plant.press) as client:
        assert client.inspect(PRESS, "gear", plant.images[:1]).version


@pytest.mark.cluster
def test_the_service_fits_its_openapi_description(url: str, plant: Plant) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: list[int] = []

    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def check_one(case: Any) -> None:
            response = case.call(base_url=url, headers={"Authorization": f"Bearer {plant.press}"})
            seen.append(response.status_code)
            case.validate_response(response, checks=checks)

        check_one()
    assert len(seen) > 100
    assert 200 in seen


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted_and_exits_with_0(plant: Plant, tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, "RAY_TMPDIR": tempfile.mkdtemp(prefix="fr-", dir="/tmp")}
    command = [
        sys.executable,
        "-m",
        "focus_ray.cli",
        "serve",
        plant.registry,
        f"tokens={plant.tokens}",
        f"--port={port}",
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        with Client(f"http://127.0.0.1:{port}", plant.press, retries=60) as client:
            assert client.inspect(PRESS, "gear", plant.images[:1]).version
        process.send_signal(signal.SIGINT)
        _, output = process.communicate(timeout=120)
        assert process.returncode == 0, output[-2000:]
        assert "stopping: requests under way are finished first" in output
    finally:
        process.kill()
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)
