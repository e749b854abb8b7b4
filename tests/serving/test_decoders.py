"""Decoding in processes: a decoder is killed for time or memory, teams take turns, and one team never stops the others."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from costly_images import jpeg_of_scans
from fastapi.testclient import TestClient
from service_load import NOISE_S, Probe, compare_waits
from serving_set import Plant, make_plant

from focus_ray.data.framing import Frame
from focus_ray.data.images import ImageError, encode_png, read_image
from focus_ray.serving import decoders as decoders_module
from focus_ray.serving.api import create_api
from focus_ray.serving.decoders import Decoders, TeamSlots
from focus_ray.serving.limits import Gate
from focus_ray.serving.measures import Measures
from focus_ray.serving.problems import Problem
from focus_ray.serving.scorer import ImageScorer
from focus_ray.serving.service import Service
from focus_ray.serving.settings import MIB, Limits, parse_settings

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture(scope="module")
def decoders() -> Decoders:
    return Decoders(2)


def reason_of(result: Any) -> str:
    assert isinstance(result, ImageError)
    return result.reason


def test_a_decoder_process_gives_the_same_pixels(decoders: Decoders) -> None:
    frame = Frame(32, 40, "pad")
    images = [encode_png(PIXELS), b"no image", encode_png(PIXELS[:, ::-1])]
    results = asyncio.run(decoders.decode("press", images, frame, 10_000))
    for number in (0, 2):
        info, pixels = read_image(images[number], frame)
        assert results[number][0] == info  # type: ignore[index]
        assert np.array_equal(results[number][1], pixels)  # type: ignore[index]
    assert reason_of(results[1]) == "not_an_image"
    (result,) = asyncio.run(decoders.decode("press", images[:1], frame, 64 * 48 - 1))
    assert reason_of(result) == "too_large"


def test_a_decoder_that_takes_too_long_is_killed_and_replaced(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders_module, "DECODE_TIMEOUT_S", 0.5)

    async def run() -> list[Any]:
        started = time.monotonic()
        slow = asyncio.create_task(decoders._run("press", time.sleep, 60))
        first = await decoders._run("mill", os.getpid)
        assert time.monotonic() - started < 0.5  # the other decoder is free
        return [await slow, first, await decoders._run("press", os.getpid)]

    slow, first, _ = asyncio.run(run())
    assert reason_of(slow) == "too_slow"
    assert isinstance(first, int)


def test_a_decoder_that_dies_or_exceeds_memory_gives_an_error_and_is_replaced(decoders: Decoders) -> None:
    async def run() -> list[Any]:
        return [await decoders._run("press", *work) for work in ((bytearray, 2**31), (os.abort,), (abs, -1))]

    large, aborted, next_result = asyncio.run(run())
    assert [reason_of(large), reason_of(aborted), next_result] == ["too_large", "too_large", 1]


def test_a_cancelled_request_leaves_nothing_in_the_queue(decoders: Decoders) -> None:
    async def run() -> None:
        tasks = [asyncio.create_task(decoders._run("press", time.sleep, 0.3)) for _ in range(20)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        started = time.monotonic()
        assert await decoders._run("press", abs, -1) == 1
        assert time.monotonic() - started < 1.0

    asyncio.run(run())


def test_teams_get_slots_in_turn_and_no_team_takes_all_slots() -> None:
    slots, order, num_held, max_held = TeamSlots(3, 2), [], Counter[str](), Counter[str]()

    async def work(team: str) -> None:
        async with slots.hold(team):
            num_held[team] += 1
            max_held[team] = max(max_held[team], num_held[team])
            order.append(team)
            await asyncio.sleep(0.001)
            num_held[team] -= 1

    async def run() -> None:
        flood = [asyncio.create_task(work("flood")) for _ in range(100)]
        await asyncio.sleep(0)
        flood[50].cancel()
        await asyncio.gather(*(asyncio.create_task(work(team)) for team in ["press", "mill"] * 5))
        await asyncio.gather(*flood, return_exceptions=True)

    asyncio.run(run())
    assert max_held["flood"] == 2
    assert Counter(order[:24])["press"] == Counter(order[:24])["mill"] == 5  # not behind the hundred
    assert len(order) == 109


def test_one_team_leaves_memory_for_a_body_of_another_team() -> None:
    gate = Gate(Limits(max_in_flight_mb=96, max_body_mb=32), Measures())
    with gate.admit("flood", 32 * MIB), gate.admit("flood", 32 * MIB):
        with pytest.raises(Problem) as caught, gate.admit("flood", MIB):
            pass
        assert caught.value.status == 429
        with gate.admit("press", 32 * MIB):
            pass


@pytest.mark.cluster
def test_bombs_of_one_team_do_not_slow_down_another(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders_module, "DECODE_TIMEOUT_S", 2.0)
    bombs = [jpeg_of_scans(5000, 100), jpeg_of_scans(64, 16_000)]  # seconds of decoding; more scans than are read
    settings = parse_settings({"registry": plant.registry, "tokens": plant.tokens})
    service = Service(settings, ImageScorer(settings.pool, "cpu"), Measures())
    statuses = Counter[int]()
    with TestClient(create_api(service)) as client:

        def attack(stop: threading.Event) -> None:
            while not stop.is_set():
                for bomb in bombs:
                    answer = client.post("/v1/mill/gear/inspect", content=bomb, headers=plant.headers(plant.mill))
                    statuses[answer.status_code] += 1

        def inspect() -> None:
            answer = client.post("/v1/press/gear/inspect", content=plant.images[0], headers=plant.headers(plant.press))
            assert answer.status_code == 200

        with Probe(inspect) as probe:
            probe.wait_for(20)  # the model is loaded
        quiet_s, busy_s = compare_waits(inspect, attack)
    assert statuses[422]
    assert set(statuses) <= {200, 422}  # an idle machine decodes some of these images in time
    assert busy_s < max(2 * quiet_s, NOISE_S)
