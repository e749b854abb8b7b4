"""The registry, tokens and images that the tests of the service share, and services, clients and servers that use them."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from waiting import wait_for

from focus_ray.bundle.bundle import MANIFEST, compute_manifest_hash
from focus_ray.bundle.registry import Registry
from focus_ray.data.read import read_rows
from focus_ray.detect.inspection import Inspection
from focus_ray.serving.api import create_api
from focus_ray.serving.metrics import METRICS, MetricsRecorder
from focus_ray.serving.scorer import ImageScorer
from focus_ray.serving.service import InspectionService
from focus_ray.serving.settings import ServiceSettings, parse_service_settings
from focus_ray.serving.tokens import create_token

PRESS, MILL = "press", "mill"
INSPECT = f"/v1/{PRESS}/gear/inspect"


@dataclass(frozen=True)
class TwoTeams:
    """A registry with small models of two teams, and a token of each kind.

    Team press has the categories gear and board. Team mill has only gear.
    """

    registry: str
    bundles: dict[str, str]
    data: str
    tokens: str
    press: str
    press_inspect_only: str
    press_admin: str
    mill: str
    images: list[bytes]

    def image_headers(self, token: str) -> dict[str, str]:
        return {**bearer_header(token), "content-type": "image/png"}

    def copy_registry(self, folder: Path) -> TwoTeams:
        """Copies the registry, for a test that changes it."""
        return replace(self, registry=str(shutil.copytree(self.registry, folder)))


def bearer_header(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def create_test_data(folder: Path, data: str, bundles: dict[str, str]) -> TwoTeams:
    """Publishes the bundles of gear and board, which learnt from the data set, and creates the tokens."""
    registry = Registry(folder / "registry")
    for category in ("gear", "board"):
        registry.publish(bundles[category], PRESS, aliases=["production"])
    registry.publish(bundles["gear"], MILL)
    tokens = str(folder / "tokens.yaml")
    return TwoTeams(
        registry=registry.root,
        bundles=bundles,
        data=data,
        tokens=tokens,
        press=create_token(tokens, PRESS, ["inspect", "read"])[0],
        press_inspect_only=create_token(tokens, PRESS, ["inspect"])[0],
        press_admin=create_token(tokens, PRESS, ["admin", "read", "inspect"])[0],
        mill=create_token(tokens, MILL, ["inspect", "read"])[0],
        images=[row["image"] for row in read_rows(data, "gear", range(8), ("image",))],
    )


def replace_data_set_uri(registry: Path | str, team: str, uri: object) -> None:
    """Writes another data set into the published manifest of a team's gear, as whoever may write its folder can."""
    folder = Path(registry) / team / "gear"
    manifest_file, record_file = folder / "v0001" / MANIFEST, folder / "_published" / "v0001.json"
    manifest = json.loads(manifest_file.read_text())
    manifest["data"]["uri"] = uri
    manifest["sha256"] = compute_manifest_hash(manifest)
    manifest_file.write_text(json.dumps(manifest))
    record_file.write_text(json.dumps({**json.loads(record_file.read_text()), "sha256": manifest["sha256"]}))


def create_settings(plant: TwoTeams, **changes: Any) -> ServiceSettings:
    return parse_service_settings({"registry": plant.registry, "tokens": plant.tokens, "refresh_s": 0.05, **changes})


def create_open_settings(plant: TwoTeams) -> ServiceSettings:
    return parse_service_settings({"registry": plant.registry, "open_to_all": True})


def check_score(score: float, inspection: Inspection) -> None:
    """Compares squares: the memory contains the training images, so their squared distances are rounding errors."""
    assert score**2 == pytest.approx(inspection.score**2, rel=2e-4, abs=1e-4 * inspection.threshold**2)


class RecordedMetrics(MetricsRecorder):
    """Stores the recorded metrics as (name, value, tags)."""

    def __init__(self) -> None:
        self.records: list[tuple[str, float, dict[str, str]]] = []

    def record(self, name: str, value: float = 1, **tags: str) -> None:
        assert set(tags) == set(METRICS[name].tags)
        self.records.append((name, value, tags))

    def get_values(self, name: str) -> list[float]:
        return [value for recorded, value, _ in self.records if recorded == name]

    def sum_by_tag(self, name: str, tag: str) -> Counter[str]:
        """Returns the sum of the values of a metric for each value of a tag."""
        sums: Counter[str] = Counter()
        for recorded, value, tags in self.records:
            if recorded == name:
                sums[tags[tag]] += int(value)
        return sums


def create_service(
    settings: ServiceSettings, metrics: MetricsRecorder | None = None, source: Any = None
) -> InspectionService:
    return InspectionService(settings, ImageScorer(settings.pool, "cpu", metrics), metrics, source)


def create_client(service: InspectionService | ServiceSettings) -> TestClient:
    """A client of a service without a server, at the only address at which a service without tokens answers."""
    if isinstance(service, ServiceSettings):
        service = create_service(service)
    return TestClient(create_api(service), base_url="http://127.0.0.1", raise_server_exceptions=False)


@contextmanager
def run_server(service: InspectionService) -> Iterator[str]:
    """Runs a server on 127.0.0.1 until the context ends, and yields its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_api(service), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started, 60, "the server listens", 0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
