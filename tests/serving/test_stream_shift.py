"""Distribution shift in service: a shifted stream is told in metrics, log and card, once; a few defects are not."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving_set import MILL, PRESS, Plant, make_plant
from waiting import wait_for

from focus_ray.bundle.bundle import read_manifest
from focus_ray.bundle.registry import Registry, Version
from focus_ray.data.images import ImageError
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.shift import MIN_STREAM, STREAM_ALPHA, WINDOW, Shift
from focus_ray.errors import DataError
from focus_ray.samples.write import write_samples
from focus_ray.serving import stream_shift
from focus_ray.serving.api import create_api
from focus_ray.serving.measures import Measures
from focus_ray.serving.metrics import RayMeasures
from focus_ray.serving.scorer import ImageScorer
from focus_ray.serving.service import Service
from focus_ray.serving.settings import parse_settings
from focus_ray.serving.stream_shift import StreamShifts

NUM_IMAGES = 64


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Returns new good gears and two defective ones."""
    folder = tmp_path_factory.mktemp("new")
    write_samples(folder, seed=7, size_px=64, num_train=NUM_IMAGES, num_test_good=1, num_bad_per_type=1)
    good = sorted((folder / "gear/train/good").iterdir())
    bad = sorted(path for path in (folder / "gear/test").rglob("*.png") if path.parent.name != "good")
    return [path.read_bytes() for path in (*good[:30], *bad[:2], *good[30:])][:NUM_IMAGES]


def darken(encoded: bytes) -> bytes:
    """Halves the brightness of a picture."""
    target = io.BytesIO()
    Image.fromarray(np.asarray(Image.open(io.BytesIO(encoded))) // 2).save(target, "PNG")
    return target.getvalue()


class ShiftRecorder(Measures):
    """Records the reported shift tests."""

    def __init__(self) -> None:
        self.shifts: list[Shift] = []

    def shift(self, version: Version, shift: Shift) -> None:
        self.shifts.append(shift)


@pytest.fixture
def recorder() -> ShiftRecorder:
    return ShiftRecorder()


@pytest.fixture
def http(plant: Plant, recorder: ShiftRecorder) -> Iterator[TestClient]:
    settings = parse_settings({"registry": plant.registry, "tokens": plant.tokens})
    with TestClient(create_api(Service(settings, ImageScorer(settings.pool, "cpu", recorder), recorder))) as client:
        yield client


def inspect_all(http: TestClient, team: str, token: str, images: list[bytes]) -> None:
    headers = {"authorization": f"Bearer {token}"}
    for first in range(0, len(images), 8):
        files = [("images", (f"{n}.png", image)) for n, image in enumerate(images[first : first + 8])]
        assert http.post(f"/v1/{team}/gear/inspect", files=files, headers=headers).status_code == 200


def card_of(http: TestClient, team: str, token: str) -> dict[str, Any]:
    card: dict[str, Any] = http.get(f"/v1/{team}/gear", headers={"authorization": f"Bearer {token}"}).json()
    return card


def test_metrics_and_card_report_a_shifted_stream_but_not_a_few_defects(
    http: TestClient, plant: Plant, recorder: ShiftRecorder, usual: list[bytes]
) -> None:
    before = card_of(http, PRESS, plant.press)
    assert before["shift"] is None
    inspect_all(http, PRESS, plant.press, usual)
    wait_for(lambda: recorder.shifts, 20, "a test of the usual images")
    card = card_of(http, PRESS, plant.press)
    assert (card["shift"]["direction"], card["caveats"]) == (None, before["caveats"])
    inspect_all(http, MILL, plant.mill, [darken(image) for image in usual])
    wait_for(lambda: recorder.shifts[-1].direction == "higher", 20, "a test of the dark images")
    card = card_of(http, MILL, plant.mill)
    assert card["shift"]["direction"] == "higher"
    assert card["shift"]["p_value"] <= STREAM_ALPHA
    assert card["caveats"][:-1] == before["caveats"]
    assert "score higher than the" in card["caveats"][-1]


def finding(score: float) -> Inspection:
    return Inspection(score, 0.5, False, 1.0, 1.0, np.empty((0, 0), np.float32), 1, 1, ())


def test_each_version_has_its_own_scores_and_idle_versions_are_dropped(
    monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    monkeypatch.setattr(stream_shift, "MAX_VERSIONS", 2)
    press, mill = Registry(plant.registry).resolve("press", "gear"), Registry(plant.registry).resolve("mill", "gear")
    board = Registry(plant.registry).resolve("press", "board")
    logged_facts: list[dict[str, Any]] = []

    async def manifest(version: Version) -> dict[str, Any]:
        return read_manifest(version.uri)

    async def run() -> StreamShifts:
        shifts = StreamShifts(manifest, Measures(), lambda message, **facts: logged_facts.append(facts))
        for version in (press, mill, press, board):  # mill is idle for longest when board comes
            results = [ImageError("empty", "no image"), *(finding(100.0 + n) for n in range(MIN_STREAM))]
            shifts.add(version, results)
            await shifts.close()
        return shifts

    shifts = asyncio.run(run())
    assert shifts.latest_shift(mill) is None
    shift = shifts.latest_shift(press)
    assert shift is not None
    assert (shift.num_new, shift.direction) == (2 * MIN_STREAM, "higher")
    assert shifts.latest_shift(board) is not None
    assert [facts["category"] for facts in logged_facts] == ["gear", "gear", "board"]  # once a version
    assert len(logged_facts) == 3
    assert WINDOW > 2 * MIN_STREAM


def test_a_manifest_that_cannot_be_read_is_logged_and_fails_no_request(plant: Plant) -> None:
    version = Registry(plant.registry).resolve("press", "gear")
    errors: list[str] = []

    async def manifest(version: Version) -> dict[str, Any]:
        raise DataError("the storage is away")

    async def run() -> Shift | None:
        shifts = StreamShifts(manifest, Measures(), lambda message, **facts: errors.append(facts["error"]))
        shifts.add(version, [finding(float(n)) for n in range(MIN_STREAM)])
        await shifts.close()
        return shifts.latest_shift(version)

    assert asyncio.run(run()) is None
    assert errors == ["the storage is away"]


def test_the_gauge_has_a_value_for_each_direction(plant: Plant) -> None:
    version = Registry(plant.registry).resolve("press", "gear")
    measures, gauge_values = RayMeasures(), []
    measures._shift.set = lambda value, tags: gauge_values.append((tags["direction"], value))  # type: ignore[method-assign]
    measures.shift(version, Shift(300, 60, 0.2, 1.0, None))
    assert gauge_values == [("higher", 0.2), ("lower", 1.0)]
