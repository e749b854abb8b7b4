"""Decoding in processes: a decoder is killed for time or memory, teams take turns, and one team never stops the others."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from focus_ray.data.framing import InputFrame
from focus_ray.data.images import ImageError, decode_image_with_info, encode_png
from focus_ray.serving import decoders as decoders_module
from focus_ray.serving.decoders import DecoderPool, FairTeamSemaphore
from focus_ray.serving.limits import RequestLimiter
from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.problems import HttpProblem
from focus_ray.serving.settings import MIB, RequestLimits

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def decoders() -> DecoderPool:
    return DecoderPool(2)


def get_error_reason(result: Any) -> str:
    assert isinstance(result, ImageError)
    return result.reason


def test_a_decoder_process_gives_the_same_pixels_or_the_error(decoders: DecoderPool) -> None:
    frame, image = InputFrame(32, 40, "pad"), encode_png(PIXELS)
    good, bad = asyncio.run(decoders.decode_images("press", [image, b"no image"], frame, 64 * 48))
    info, pixels = decode_image_with_info(image, frame)
    assert isinstance(good, tuple)
    assert good[0] == info
    assert np.array_equal(good[1], pixels)
    assert get_error_reason(bad) == "not_an_image"
    (large,) = asyncio.run(decoders.decode_images("press", [image], frame, 64 * 48 - 1))
    assert get_error_reason(large) == "too_large"
    assert get_error_reason(asyncio.run(decoders.decode_resized_image("press", b"no image", 8, 8))) == "not_an_image"


def test_a_decoder_that_takes_too_long_is_killed_and_replaced(
    decoders: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        await asyncio.gather(*(decoders._run_in_decoder("press", os.getpid) for _ in range(2)))  # both are started
        monkeypatch.setattr(decoders_module, "DECODE_TIMEOUT_S", 2.0)
        slow = asyncio.create_task(decoders._run_in_decoder("press", time.sleep, 60))
        assert isinstance(await decoders._run_in_decoder("mill", os.getpid), int)
        assert not slow.done()  # the other decoder was free
        assert get_error_reason(await slow) == "too_slow"
        assert isinstance(await decoders._run_in_decoder("press", os.getpid), int)

    asyncio.run(run())


def test_a_decoder_that_dies_or_exceeds_memory_gives_an_error_and_is_replaced(decoders: DecoderPool) -> None:
    async def run() -> list[Any]:
        return [await decoders._run_in_decoder("press", *work) for work in ((bytearray, 2**31), (os.abort,), (abs, -1))]

    large, aborted, next_result = asyncio.run(run())
    assert [get_error_reason(large), get_error_reason(aborted), next_result] == ["too_large", "too_large", 1]


def test_a_cancelled_request_leaves_nothing_in_the_queue(
    decoders: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: list[Any] = []
    run_in_idle_decoder = decoders._run_in_idle_decoder

    async def run_and_count(slot: Any, function: Any, arguments: Any) -> Any:
        functions.append(function)
        return await run_in_idle_decoder(slot, function, arguments)

    async def run() -> None:
        tasks = [asyncio.create_task(decoders._run_in_decoder("press", time.sleep, 0.3)) for _ in range(20)]
        while not functions:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        assert await decoders._run_in_decoder("press", abs, -1) == 1

    monkeypatch.setattr(decoders, "_run_in_idle_decoder", run_and_count)
    asyncio.run(run())
    assert functions.count(time.sleep) <= 2
    assert functions[-1] is abs


def test_teams_get_slots_in_turn_and_no_team_takes_all_slots() -> None:
    order: list[str] = []
    num_held, max_held = Counter[str](), Counter[str]()

    async def run() -> None:
        slots = FairTeamSemaphore(3, 2)

        async def work(team: str) -> None:
            async with slots.acquire_slot(team):
                num_held[team] += 1
                max_held[team] = max(max_held[team], num_held[team])
                order.append(team)
                try:
                    await asyncio.sleep(0.001)
                finally:
                    num_held[team] -= 1

        flood = [asyncio.create_task(work("flood")) for _ in range(100)]
        await asyncio.sleep(0)
        for number in (0, 3, 50):  # one that holds a slot, the next one of its team, one that waits
            flood[number].cancel()
        await asyncio.gather(*(asyncio.create_task(work(team)) for team in ["press", "mill"] * 5))
        await asyncio.gather(*flood, return_exceptions=True)
        async with (
            slots.acquire_slot("a"),
            slots.acquire_slot("b"),
            slots.acquire_slot("c"),
        ):  # all slots are free again
            pass

    asyncio.run(asyncio.wait_for(run(), 30))
    assert max_held["flood"] == 2
    assert Counter(order[:24])["press"] == Counter(order[:24])["mill"] == 5  # not behind the hundred
    assert order.count("flood") == 98


def test_one_team_leaves_memory_for_a_body_of_another_team() -> None:
    gate = RequestLimiter(RequestLimits(max_in_flight_mb=96, max_body_mb=32), MetricsRecorder())
    with gate.admit("flood", 32 * MIB), gate.admit("flood", 32 * MIB):
        with pytest.raises(HttpProblem, match="429"), gate.admit("flood", MIB):
            pass
        with gate.admit("press", 32 * MIB):
            pass
