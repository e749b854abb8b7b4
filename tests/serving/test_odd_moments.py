"""Rare faults: a bundle that is replaced during reading, missing models, scores that are not finite, shadows that hang."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from serving_set import INSPECT, PRESS, TwoTeams, create_client, create_service, create_settings
from torch import nn

from focus_ray.bundle import bundle as bundle_module
from focus_ray.bundle.bundle import read_bundle, read_manifest, read_statistics, write_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Registry
from focus_ray.errors import ScoreError
from focus_ray.serving.models import SharedBackbones, iterate_non_backbone_tensors
from focus_ray.serving.scorer import ScoringRequest


def test_a_bundle_replaced_during_reading_is_read_completely_anew(
    plant: TwoTeams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, statistics = read_bundle(plant.bundles["gear"]), read_statistics(plant.bundles["gear"])
    read_file = bundle_module._read_verified_bytes

    def write() -> None:
        next(source.detector.net.backbone.parameters()).data.mul_(1.01)  # other tensors, so other files
        statistics.moments.mean.add_(0.01)
        write_bundle(
            tmp_path,
            config=source.config,
            category="gear",
            detector=source.detector,
            statistics=statistics,
            calibration=source.calibration,
            data=source.manifest["data"],
            metrics={},
        )

    def read_late(*arguments: Any) -> bytes:
        monkeypatch.setattr(bundle_module, "_read_verified_bytes", read_file)
        write()  # another process publishes just now
        return read_file(*arguments)

    write()
    monkeypatch.setattr(bundle_module, "_read_verified_bytes", read_late)
    bundle = read_bundle(tmp_path)
    assert bundle.version == read_manifest(tmp_path)["sha256"]
    monkeypatch.setattr(bundle_module, "_read_verified_bytes", read_late)
    assert torch.equal(read_statistics(tmp_path).moments.mean, statistics.moments.mean)


def test_a_service_without_models_is_not_ready_and_a_ready_service_looks_for_no_model(
    plant: TwoTeams, tmp_path: Path
) -> None:
    with create_client(create_settings(plant, registry=str(tmp_path / "regisrty"))) as client:
        assert client.get("/readyz").status_code == 503
    service: Any = create_service(create_settings(plant))
    calls: list[str] = []
    teams = service.source.list_teams
    service.source.list_teams = lambda: calls.append("teams") or teams()
    with create_client(service) as client:
        assert [client.get("/readyz").status_code for _ in range(5)] == [200] * 5
    assert calls == ["teams"]


def test_a_score_that_is_not_finite_is_a_500(plant: TwoTeams, monkeypatch: pytest.MonkeyPatch) -> None:
    inspector = Inspector.load(plant.bundles["gear"], "cpu")
    for score, value in ((float("nan"), np.nan), (1.0, np.inf)):
        with pytest.raises(ScoreError, match=r"'gear'.*version"):
            inspector.compare_with_thresholds(score, np.full((4, 4), value, np.float32), 4, 4)
    compare = Inspector.compare_with_thresholds
    monkeypatch.setattr(
        Inspector, "compare_with_thresholds", lambda self, score, *arguments: compare(self, float("nan"), *arguments)
    )
    with create_client(create_settings(plant)) as client:
        answer = client.post(INSPECT, content=plant.images[0], headers=plant.image_headers(plant.press))
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:focus-ray:no-score")


def test_a_hanging_shadow_is_cancelled(plant: TwoTeams, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for alias in ("production", "candidate"):
        registry.publish(plant.bundles["gear"], PRESS, aliases=[alias])
    route = {"team": PRESS, "category": "gear", "ref": "production", "shadow": "candidate"}
    settings = create_settings(plant, registry=str(tmp_path), routes=[route], limits={"timeout_s": 2.0})
    service: Any = create_service(settings)
    inspect = service.backend.inspect_images

    async def hang_for_the_shadow(request: ScoringRequest) -> Any:
        if request.version.name == "v0002":
            await asyncio.sleep(3600)
        return await inspect(request)

    async def run() -> None:
        service.backend.inspect_images = hang_for_the_shadow
        await service.backend.warm_up_model(registry.resolve(PRESS, "gear", "production"))
        await service.inspect_images(PRESS, "gear", None, plant.images[:1], "json", False, "request")
        assert len(service._shadow_tasks) == 1
        await asyncio.wait(set(service._shadow_tasks), timeout=60)
        await asyncio.sleep(0)
        assert not service._shadow_tasks
        await service.close()

    asyncio.run(run())


def test_shared_backbones_can_be_counted_while_loaders_add_some() -> None:
    backbones, stop = SharedBackbones(), threading.Event()

    def load() -> None:
        detectors: list[Any] = []
        for number in range(300):
            detectors.append(SimpleNamespace(net=SimpleNamespace(backbone=nn.Linear(1, 1 + number % 7))))
            backbones.share_backbone(detectors[-1], torch.float32)
            del detectors[:-20]

    def count() -> None:
        while not stop.is_set():
            assert backbones.num_bytes >= 0

    with ThreadPoolExecutor(4) as pool:
        counter = pool.submit(count)
        loaders = [pool.submit(load) for _ in range(3)]
        for loader in loaders:
            loader.result()
        stop.set()
        counter.result()


def test_the_size_of_a_model_includes_both_memories(plant: TwoTeams) -> None:
    detector = read_bundle(plant.bundles["gear"]).detector
    density: Any = detector.density
    memory = getattr(density, "memory", density)  # without the Gaussians that check it
    memories = (memory.location_memory.bank, memory.coreset.patches)
    assert sum(tensor.nbytes for tensor in iterate_non_backbone_tensors(detector)) > sum(
        part.nbytes for part in memories
    )
