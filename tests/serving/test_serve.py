"""The service on Ray Serve, over HTTP: concurrent clients, lost replicas, promotions under load, the OpenAPI description."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from places import free_port
from service_load import RequestProbe, run_serve_command
from serving_set import MILL, PRESS, TwoTeams, check_score, create_settings
from waiting import wait_for

from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Registry
from focus_ray.client import AsyncClient, Client, InspectionResult, ServiceError
from focus_ray.serving.settings import ScoringPool
from focus_ray.serving.source import get_version_key

pytestmark = pytest.mark.ray


@dataclass
class LiveService:
    """A live service with a scoring replica for all categories except boards, and one for boards."""

    plant: TwoTeams
    url: str

    def client(self, retries: int = 10) -> Client:
        return Client(self.url, self.plant.press, retries=retries)


@pytest.fixture(scope="module")
def service(ray_cluster: None, plant: TwoTeams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    from focus_ray.serving.launch import run_service

    own_plant = plant.copy_registry(tmp_path_factory.mktemp("own") / "registry")
    settings = create_settings(
        own_plant,
        refresh_s=0.2,
        ingress_num_cpus=0.1,
        pool={"num_cpus": 0.5},
        pins=[{"name": "boards", "team": PRESS, "categories": ["board"], "pool": {"num_cpus": 0.5}}],
    )
    with run_service(settings, port=free_port()) as url:
        yield LiveService(own_plant, url)


def test_many_clients_get_correct_answers(service: LiveService) -> None:
    plant = service.plant
    expected = {name: Inspector.load(bundle, "cpu").inspect(plant.images) for name, bundle in plant.bundles.items()}

    async def ask_all() -> None:
        async def ask(number: int) -> None:
            category, image = ("gear", "board")[number % 2], number % len(plant.images)
            answer = await client.inspect(PRESS, category, [plant.images[image]])
            assert answer.version == "v0001"
            check_score(answer.findings[0].score, expected[category][image])

        async with AsyncClient(service.url, plant.press) as client:
            await asyncio.gather(*(ask(number) for number in range(32)))

    asyncio.run(ask_all())


def test_the_client_distinguishes_errors_and_returns_maps_and_pictures(service: LiveService) -> None:
    images = service.plant.images
    with service.client() as client:
        answer = client.inspect(PRESS, "gear", [images[0], b"no image"], include_map=True)
        assert answer.findings[0].map_png is not None
        assert answer.findings[1].error is not None
        assert client.picture(PRESS, "gear", images[0], "overlay").startswith(b"\x89PNG")
        assert client.get("/v1/press")["categories"] == ["board", "gear"]
        with pytest.raises(ServiceError, match=r"404 not-found: .*'gear'.*'mill'"):
            client.inspect(MILL, "gear", images[:1])
        with pytest.raises(ServiceError, match=r"422 image-not-an-image: .*\(request [0-9a-f-]+\)"):
            client.inspect(PRESS, "gear", [b"no image"])
    for url, token, message in (
        (service.url, "frs_wrong", "401 unauthorised"),
        (f"http://127.0.0.1:{free_port()}", service.plant.press, "cannot be reached"),
    ):
        with Client(url, token, retries=1) as client, pytest.raises(ServiceError, match=message):
            client.get("/v1")


@pytest.mark.cluster
def test_a_pinned_category_is_loaded_before_its_first_request(ray_cluster: None, plant: TwoTeams) -> None:
    from focus_ray.serving.app import ScorerReplica

    version = Registry(plant.registry).resolve(PRESS, "board")
    replica = ScorerReplica.func_or_class(ScoringPool(), "cpu", [version])  # type: ignore[attr-defined]
    assert replica._scorer.models.loaded_keys == []
    asyncio.run(replica.check_health())  # what Serve awaits before it sends a request
    assert replica._scorer.models.loaded_keys == [get_version_key(version)]


@pytest.mark.cluster
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of this machine works")
def test_serve_replaces_a_replica_whose_gpu_fails(service: LiveService, tmp_path: Path) -> None:
    from ray import serve

    from focus_ray.serving.app import ScorerReplica

    failing_pid = tmp_path / "failing_pid"

    class BreakableReplica(ScorerReplica.func_or_class):  # type: ignore[misc, name-defined, attr-defined]
        async def check_health(self) -> None:
            if failing_pid.exists() and int(failing_pid.read_text()) == os.getpid():
                self._scorer.device = "cuda"  # this machine has no GPU, so the next computation fails
            await super().check_health()

        def get_pid(self) -> int:
            return os.getpid()

    deployment = serve.deployment(BreakableReplica, health_check_period_s=0.1).bind(ScoringPool(), "cpu")
    handle = serve.run(deployment, name="breakable", route_prefix=None)

    def get_pid() -> int:
        try:
            return int(handle.get_pid.remote().result(timeout_s=10))
        except Exception:  # the replica is being replaced
            return first_pid

    try:
        first_pid = int(handle.get_pid.remote().result())
        failing_pid.write_text(str(first_pid))
        wait_for(lambda: get_pid() != first_pid, 120, "another replica answers", 0.5)
    finally:
        serve.delete("breakable")


@dataclass
class ConcurrentLoad:
    """The answers to three clients that inspect gears."""

    answers: list[InspectionResult] = field(default_factory=list)

    def wait_for(self, count: int) -> None:
        num_expected = len(self.answers) + count
        wait_for(lambda: len(self.answers) >= num_expected, 120, f"{num_expected} answers", 0.02)


@contextmanager
def run_concurrent_load(service: LiveService) -> Iterator[ConcurrentLoad]:
    """Sends requests until the context ends. Raises: ServiceError: a request failed."""
    under_load = ConcurrentLoad()
    with service.client() as client:

        def inspect() -> None:
            under_load.answers.append(client.inspect(PRESS, "gear", service.plant.images[:1]))

        with RequestProbe(inspect, 0.0), RequestProbe(inspect, 0.0), RequestProbe(inspect, 0.0):
            yield under_load


def find_replica_pids(name: str) -> list[int]:
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
def test_a_replica_killed_under_load_loses_no_answer(service: LiveService, name: str) -> None:
    (expected,) = Inspector.load(service.plant.bundles["gear"], "cpu").inspect(service.plant.images[:1])
    with run_concurrent_load(service) as under_load:
        under_load.wait_for(20)
        os.kill(find_replica_pids(name)[0], signal.SIGKILL)
        under_load.wait_for(60)
    for answer in under_load.answers:
        check_score(answer.findings[0].score, expected)


@pytest.mark.cluster
def test_promotions_and_rollbacks_under_load_fail_no_request(service: LiveService) -> None:
    registry = Registry(service.plant.registry)
    second = registry.publish(service.plant.bundles["gear"], PRESS)  # latest moves, and latest is what answers
    hashes = {version.name: version.sha256 for version in registry.list_versions(PRESS, "gear")}
    with run_concurrent_load(service) as under_load:
        for version in (second.name, "v0001", second.name, "v0001"):
            registry.promote(PRESS, "gear", version, "latest")
            under_load.answers.clear()

            def is_answering(version: str = version) -> bool:
                return any(answer.version == version for answer in under_load.answers)

            wait_for(is_answering, 60, f"{version} answers", 0.02)
            assert all(hashes[answer.version] == answer.sha256 for answer in list(under_load.answers))


@pytest.mark.slow
def test_prometheus_gets_metrics_of_requests_batches_and_p_values(service: LiveService) -> None:
    import ray

    with service.client() as client:
        client.inspect(PRESS, "gear", service.plant.images)
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    names = ("requests_total", "batch_images_count", "p_value_bucket", "stage_milliseconds_bucket", "models", "images")

    def has_all_metrics() -> bool:
        text = urllib.request.urlopen(address, timeout=60).read().decode()
        return all(re.search(rf"^ray_focus_ray_{name}", text, re.MULTILINE) for name in names)

    wait_for(has_all_metrics, 60, f"all of {names} are exported", 1.0)


@pytest.mark.cluster
def test_the_service_fits_its_openapi_description(service: LiveService) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema: Any = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    statuses: list[int] = []
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    headers = {"Authorization": f"Bearer {service.plant.press}"}
    for result in schema.get_all_operations():

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=result.ok().as_strategy())
        def check_operation(case: Any) -> None:
            response = case.call(base_url=service.url, headers=headers)
            statuses.append(response.status_code)
            case.validate_response(response, checks=checks)

        check_operation()
    assert len(statuses) > 100
    assert 200 in statuses


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted_and_exits_with_0(plant: TwoTeams) -> None:
    with run_serve_command(plant.registry, f"tokens={plant.tokens}") as url, Client(url, plant.press) as client:
        assert client.inspect(PRESS, "gear", plant.images[:1]).version
