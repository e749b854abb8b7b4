"""Distribution shift in service: metrics, log and card report a shifted stream once, and do not report a few defects."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving_set import (
    MILL,
    PRESS,
    RecordedMetrics,
    TwoTeams,
    bearer_header,
    create_client,
    create_service,
    create_settings,
)
from waiting import wait_for

from focus_ray.bundle.bundle import read_manifest
from focus_ray.bundle.registry import Registry, Version
from focus_ray.data.images import ImageError
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.shift import MIN_STREAM, STREAM_ALPHA, WINDOW
from focus_ray.errors import DataError
from focus_ray.samples.write import write_samples
from focus_ray.serving import stream_shift
from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.stream_shift import StreamShiftDetector

NUM_IMAGES = 64


def draw_stream(folder: Path) -> list[bytes]:
    """Draws new good gears, two of them defective."""
    write_samples(folder, seed=7, size_px=64, num_train=NUM_IMAGES, num_test_good=1, num_bad_per_type=1)
    good = sorted((folder / "gear/train/good").iterdir())
    bad = sorted(path for path in (folder / "gear/test").rglob("*.png") if path.parent.name != "good")
    return [path.read_bytes() for path in (*good[:30], *bad[:2], *good[30:])][:NUM_IMAGES]


def darken(encoded: bytes) -> bytes:
    """Halves the brightness of a picture."""
    target = io.BytesIO()
    Image.fromarray(np.asarray(Image.open(io.BytesIO(encoded))) // 2).save(target, "PNG")
    return target.getvalue()


def inspect_in_batches(client: TestClient, team: str, token: str, images: list[bytes]) -> None:
    for first in range(0, len(images), 32):
        files = [("images", (f"{n}.png", image)) for n, image in enumerate(images[first : first + 32])]
        assert client.post(f"/v1/{team}/gear/inspect", files=files, headers=bearer_header(token)).status_code == 200


def test_metrics_and_card_report_a_shifted_stream_but_not_a_few_defects(plant: TwoTeams, tmp_path: Path) -> None:
    recorder, stream = RecordedMetrics(), draw_stream(tmp_path)

    def p_values(team: str, direction: str) -> list[float]:
        tags = {"team": team, "category": "gear", "version": "v0001", "direction": direction}
        return [value for name, value, recorded in recorder.records if (name, recorded) == ("shift_p_value", tags)]

    with create_client(create_service(create_settings(plant), recorder)) as client:

        def card(team: str, token: str) -> Any:
            return client.get(f"/v1/{team}/gear", headers=bearer_header(token)).json()

        before = card(PRESS, plant.press)
        assert before["shift"] is None
        inspect_in_batches(client, PRESS, plant.press, stream)
        wait_for(lambda: p_values(PRESS, "lower"), 60, "a test of the usual images")
        after = card(PRESS, plant.press)
        assert (after["shift"]["direction"], after["caveats"]) == (None, before["caveats"])
        inspect_in_batches(client, MILL, plant.mill, [darken(image) for image in stream])
        wait_for(lambda: p_values(MILL, "lower"), 60, "a test of the dark images")
        after = card(MILL, plant.mill)
    assert p_values(MILL, "higher")[-1] <= STREAM_ALPHA < p_values(PRESS, "higher")[-1]
    assert (after["shift"]["direction"], after["shift"]["p_value"] <= STREAM_ALPHA) == ("higher", True)
    assert after["caveats"][:-1] == before["caveats"]
    assert "higher" in after["caveats"][-1]


def create_inspection(score: float) -> Inspection:
    return Inspection(score, 0.5, False, 1.0, 1.0, np.empty((0, 0), np.float32), 1, 1, ())


def feed_streams(
    versions: list[Version], read: Callable[[Version], Awaitable[Any]], log: pytest.LogCaptureFixture
) -> tuple[StreamShiftDetector, list[dict[str, Any]]]:
    """Adds high scores of each version, one after the other. Returns: the shifts, and the facts of the log."""

    async def run() -> StreamShiftDetector:
        shifts = StreamShiftDetector(read, MetricsRecorder())
        for version in versions:
            shifts.add_scores(
                version, [ImageError("empty", "no image"), *(create_inspection(100.0 + n) for n in range(MIN_STREAM))]
            )
            await shifts.close()
        return shifts

    return asyncio.run(run()), [record.facts for record in log.records]  # type: ignore[attr-defined]


def test_each_version_has_its_own_scores_and_idle_versions_are_dropped(
    monkeypatch: pytest.MonkeyPatch, plant: TwoTeams, service_log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream_shift, "MAX_VERSIONS", 2)
    places = ((PRESS, "gear"), (MILL, "gear"), (PRESS, "board"))
    press, mill, board = (Registry(plant.registry).resolve(*place) for place in places)

    async def read(version: Version) -> dict[str, Any]:
        return read_manifest(version.uri)

    shifts, logged_facts = feed_streams([press, mill, press, board], read, service_log)  # mill is idle for longest
    assert shifts.get_latest_shift(mill) is None
    shift = shifts.get_latest_shift(press)
    assert shift is not None
    assert (shift.num_new, shift.direction) == (2 * MIN_STREAM, "higher")
    assert shifts.get_latest_shift(board) is not None
    assert [(facts["team"], facts["category"]) for facts in logged_facts] == list(places)  # one for each version
    assert WINDOW > 2 * MIN_STREAM


def test_a_manifest_that_cannot_be_read_is_logged_and_fails_no_request(
    plant: TwoTeams, service_log: pytest.LogCaptureFixture
) -> None:
    version = Registry(plant.registry).resolve(PRESS, "gear")

    async def fail(version: Version) -> dict[str, Any]:
        raise DataError("the storage is away")

    shifts, logged_facts = feed_streams([version], fail, service_log)
    assert shifts.get_latest_shift(version) is None
    assert [facts["error"] for facts in logged_facts] == ["the storage is away"]
