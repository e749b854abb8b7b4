"""Rare faults: simultaneous changes of bundles and tokens, mistyped locations, broken models."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from serving_set import PRESS, Plant, make_plant
from torch import nn

from focus_ray.bundle import bundle as bundle_module
from focus_ray.bundle.bundle import read_bundle, read_manifest, read_statistics, write_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Registry
from focus_ray.cli.main import main
from focus_ray.errors import ConfigError, ScoreError
from focus_ray.serving.api import create_api
from focus_ray.serving.measures import Measures
from focus_ray.serving.models import SharedBackbones, _num_bytes, tensors_without_backbone
from focus_ray.serving.scorer import ImageScorer
from focus_ray.serving.service import Service
from focus_ray.serving.settings import ServiceSettings, parse_settings
from focus_ray.serving.tokens import create_token, read_tokens, revoke_token


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))


def settings_of(plant: Plant, **changes: Any) -> ServiceSettings:
    return parse_settings({"registry": plant.registry, "tokens": plant.tokens, "refresh_s": 0.05, **changes})


def service_of(settings: ServiceSettings) -> Service:
    return Service(settings, ImageScorer(settings.pool, "cpu", Measures()), Measures())


# Bundles


def test_a_bundle_replaced_during_reading_is_read_completely_anew(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_bundle(plant.bundles["gear"])
    statistics = read_statistics(plant.bundles["gear"])

    def write(seed: int) -> None:
        config = source.config.model_copy(update={"train": source.config.train.model_copy(update={"seed": seed})})
        next(source.detector.net.backbone.parameters()).data.mul_(1.01)  # other tensors, so other files
        statistics.moments.mean.add_(0.01)
        write_bundle(
            tmp_path / "bundle",
            config=config,
            category="gear",
            detector=source.detector,
            statistics=statistics,
            calibration=source.calibration,
            data=source.manifest["data"],
            metrics={},
        )

    write(0)
    read_part = bundle_module._read_part
    replaced: list[int] = []

    def read_late(uri: Any, manifest: Any, part: str) -> Any:
        if not replaced:
            replaced.append(1)
            write(1)  # another process publishes just now
        return read_part(uri, manifest, part)

    monkeypatch.setattr(bundle_module, "_read_part", read_late)
    for read in (lambda: read_bundle(tmp_path / "bundle").version, lambda: read_statistics(tmp_path / "bundle")):
        replaced.clear()
        content = read()
        if isinstance(content, str):
            assert content == read_manifest(tmp_path / "bundle")["sha256"]


# Tokens


def test_tokens_created_simultaneously_are_all_stored(tmp_path: Path) -> None:
    place = str(tmp_path / "tokens.yaml")
    with ThreadPoolExecutor(8) as pool:
        token_ids = list(pool.map(lambda number: create_token(place, f"team{number}", ["read"])[1].id, range(12)))
    assert sorted(token.id for token in read_tokens(place).tokens) == sorted(token_ids)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda token_id: revoke_token(place, token_id), token_ids[:6]))
    assert sorted(token.id for token in read_tokens(place).tokens) == sorted(token_ids[6:])
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.yaml"]


def test_a_stale_lock_of_the_token_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "tokens.yaml"
    (tmp_path / "tokens.yaml.lock").write_text("left")
    clock = iter([0.0, 100.0])
    monkeypatch.setattr("focus_ray.serving.tokens.time.monotonic", lambda: next(clock))
    with pytest.raises(ConfigError, match=r"tokens\.yaml\.lock: .*remove this file"):
        create_token(str(place), "press", ["read"])


# Mistyped places


def test_a_service_without_models_is_not_ready_and_limits_its_look_ups(plant: Plant, tmp_path: Path) -> None:
    with TestClient(create_api(service_of(settings_of(plant, registry=str(tmp_path / "regisrty"))))) as client:
        assert client.get("/readyz").status_code == 503
    service = service_of(settings_of(plant, refresh_s=60))
    looked: list[str] = []
    teams = service.source.teams
    service.source.teams = lambda: looked.append("teams") or teams()  # type: ignore[func-returns-value,method-assign]
    with TestClient(create_api(service)) as client:
        assert [client.get("/readyz").status_code for _ in range(5)] == [200] * 5
    assert looked == ["teams"]


def test_serving_a_folder_of_runs_names_a_run(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Path(plant.bundles["gear"]).parents[2]
    assert main(["serve", str(runs)]) == 1
    assert "a folder of runs" in capsys.readouterr().err


# Models


def test_a_score_that_is_not_finite_is_a_500(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    inspector = Inspector.load(plant.bundles["gear"], "cpu")
    with pytest.raises(ScoreError, match=r"'gear'.*version"):
        inspector.judge(float("nan"), np.full((4, 4), np.nan, np.float32), 4, 4)
    with pytest.raises(ScoreError):
        inspector.judge(1.0, np.full((4, 4), np.inf, np.float32), 4, 4)

    def judge(self: Inspector, score: float, *arguments: Any) -> Any:
        return ordinary(self, float("nan"), *arguments)

    ordinary = Inspector.judge
    monkeypatch.setattr(Inspector, "judge", judge)
    with TestClient(create_api(service_of(settings_of(plant))), raise_server_exceptions=False) as client:
        answer = client.post("/v1/press/gear/inspect", content=plant.images[0], headers=plant.headers(plant.press))
    assert answer.status_code == 500
    assert "no finite score" in answer.text
    assert "cannot be read" not in answer.text


def test_a_hanging_shadow_is_cancelled(plant: Plant, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.publish(plant.bundles["gear"], PRESS, aliases=["production"])
    registry.publish(plant.bundles["gear"], PRESS, aliases=["candidate"])
    route = {"team": PRESS, "category": "gear", "ref": "production", "shadow": "candidate"}
    settings = settings_of(plant, registry=str(tmp_path), routes=[route], limits={"timeout_s": 1.0})
    service = service_of(settings)
    inspect = service.backend.inspect

    async def hang_for_the_shadow(version: Any, *arguments: Any) -> Any:
        if version.name == "v0002":
            await asyncio.sleep(3600)
        return await inspect(version, *arguments)

    service.backend.inspect = hang_for_the_shadow  # type: ignore[method-assign]

    async def run() -> None:
        await service.start()
        await service.inspect(PRESS, "gear", None, plant.images[:1], "json", False, "request")
        assert len(service._shadow_tasks) == 1
        await asyncio.wait(set(service._shadow_tasks), timeout=10)
        await asyncio.sleep(0)
        assert not service._shadow_tasks
        await service.close()

    asyncio.run(run())


def test_shared_backbones_can_be_counted_while_loaders_add_some() -> None:
    backbones, stop = SharedBackbones(), threading.Event()
    detectors: list[Any] = []
    errors: list[BaseException] = []

    class Net:
        def __init__(self, number: int) -> None:
            self.backbone: nn.Module = nn.Linear(1, 1 + number % 7)

    class TinyDetector:
        def __init__(self, number: int) -> None:
            self.net = Net(number)

    def load(first: int) -> None:
        try:
            for number in range(first, first + 300):
                detector = TinyDetector(number)
                backbones.share(detector, torch.float32)  # type: ignore[arg-type]
                detectors.append(detector)
                if len(detectors) > 20:
                    detectors.pop(0)
        except BaseException as error:
            errors.append(error)

    def count() -> None:
        while not stop.is_set():
            try:
                assert backbones.num_bytes >= 0
            except BaseException as error:
                errors.append(error)
                return

    counter = threading.Thread(target=count)
    counter.start()
    loaders = [threading.Thread(target=load, args=(1000 * number,)) for number in range(3)]
    for thread in loaders:
        thread.start()
    for thread in loaders:
        thread.join()
    stop.set()
    counter.join()
    assert not errors


def test_the_size_of_a_model_includes_both_memories(plant: Plant) -> None:
    detector = read_bundle(plant.bundles["gear"]).detector
    density: Any = detector.density
    memory = getattr(density, "memory", density)  # without the Gaussians that check it
    memory_bytes = _num_bytes(iter([memory.location_memory.bank, memory.coreset.patches]))
    assert _num_bytes(tensors_without_backbone(detector)) > memory_bytes
