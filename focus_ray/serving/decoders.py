"""Processes that decode images. A stranger's image can be slow or large in ways that no check foresees; a process can be killed.

Imports neither torch nor Ray: the process that decoders are forked from starts in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import TimeoutError as PoolTimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessPool
from PIL import Image

from focus_ray.data.framing import Frame
from focus_ray.data.images import (
    MAX_PIXELS,
    ImageError,
    ImageInfo,
    decode_image,
    read_header,
    read_image,
    refuse_drawing,
)

DECODE_TIMEOUT_S = 10.0  # of one image; the slowest honest image, of 89 million pixels, takes about half as long
DECODER_MEMORY_BYTES = 2**30  # of one image, beside the process itself; 16-bit RGBA of 25 million pixels takes 600 MB
DECODER_NICENESS = 4  # a slow image must not take the CPU from scoring; Ray's workers have 15, and 19 is the most

T = TypeVar("T")
Decoded = tuple[ImageInfo, NDArray[np.uint8]]


class Turns:
    """A number of places that teams hold for a while. Waiting teams are served in turn, each in the order of its requests."""

    def __init__(self, num_places: int, max_per_team: int) -> None:
        self._num_free, self._max_per_team = num_places, max_per_team
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of the teams' turns

    @asynccontextmanager
    async def hold(self, team: str) -> AsyncIterator[None]:
        """Waits for a place and holds it as a context."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(team, deque()).append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(team)
            raise
        try:
            yield
        finally:
            self._release(team)

    def _release(self, team: str) -> None:
        self._num_free += 1
        self._held[team] -= 1
        if not self._held[team]:
            del self._held[team]
        self._give()

    def _give(self) -> None:
        for team in list(self._waiting):
            if not self._num_free:
                return
            if self._held[team] >= self._max_per_team:
                continue
            turns = self._waiting.pop(team)
            while turns and turns[0].done():  # cancelled while it waited
                turns.popleft()
            if turns:
                turns.popleft().set_result(None)
                self._num_free -= 1
                self._held[team] += 1
            if turns:
                self._waiting[team] = turns  # at the end: the other teams come first
        if self._num_free and any(self._held[team] < self._max_per_team for team in self._waiting):
            self._give()


class Decoders:
    """Processes that decode one image each at a time, within `DECODE_TIMEOUT_S` and `DECODER_MEMORY_BYTES`.

    One team occupies all of them but one, if there are several. Each process has a pool of its own: in a shared pool the next
    image of an attacker would go to the free process while the killed one starts anew.
    """

    def __init__(self, count: int) -> None:
        """count: processes; they start with the first image."""
        self._turns = Turns(count, max(1, count - 1))
        self._idle = [_create_pool() for _ in range(count)]
        self._running: set[asyncio.Task[object]] = set()
        weakref.finalize(self, _stop_pools, self._idle)

    async def decode(
        self, team: str, images: Sequence[bytes], frame: Frame, max_pixels: int
    ) -> list[Decoded | ImageError]:
        """Returns, for each image, what `decode_images` returns, or the reason why its decoder was killed."""
        bare = Frame(frame.height, frame.width, frame.resize, frame.region, frame.cells)  # without what it has cached
        asked = (self._run(team, decode_images, [image], bare, max_pixels) for image in images)
        return [result if isinstance(result, ImageError) else result[0] for result in await asyncio.gather(*asked)]

    async def decode_picture(self, team: str, image: bytes, width: int, height: int) -> NDArray[np.uint8] | ImageError:
        """Returns (height, width, 3) RGB of the whole image."""
        return await self._run(team, decode_picture, image, width, height)

    def launch(self) -> None:
        """Starts the processes, unless they run, and does not wait for them."""
        for number, pool in enumerate(self._idle):
            if (
                not pool.active
            ):  # `active` starts it; False: an idle process was killed from outside, which breaks its pool
                self._idle[number] = _create_pool()
                pool.stop()

    async def start(self) -> None:
        """Waits for one process to be ready."""
        await self._run("", _do_nothing)

    async def _run(self, team: str, function: Callable[..., T], *arguments: object) -> T | ImageError:
        async with AsyncExitStack() as place:
            await place.enter_async_context(self._turns.hold(team))
            # A request that is given up leaves a decoder that is at work: the team holds its place until the decoder is free.
            task = asyncio.create_task(self._run_at(place.pop_all(), function, arguments))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _run_at(
        self, place: AsyncExitStack, function: Callable[..., T], arguments: tuple[object, ...]
    ) -> T | ImageError:
        async with place:
            self.launch()
            pool = self._idle.pop(0)
            try:
                return await asyncio.wrap_future(pool.schedule(function, arguments, timeout=DECODE_TIMEOUT_S))
            except MemoryError:
                return _describe_size()
            except (
                PoolTimeoutError,
                asyncio.TimeoutError,
                ProcessExpired,
            ) as error:  # Python 3.11 made the first two one
                pool = await _restart(pool)
                if isinstance(error, ProcessExpired):
                    return _describe_size()
                return ImageError(
                    "too_slow", f"the image takes more than {DECODE_TIMEOUT_S:g} s to decode: save it as a plain PNG"
                )
            except (BrokenProcessPool, RuntimeError):
                pool = await _restart(pool)
                raise
            finally:
                self._idle.append(pool)


def _describe_size() -> ImageError:
    return ImageError(
        "too_large",
        f"the image takes more than {DECODER_MEMORY_BYTES >> 20} MiB to decode: cut it into tiles, or save it as a plain PNG",
    )


def _create_pool() -> ProcessPool:
    # A clean process imports this module once, and decoders are forked from it: a new one is ready in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPool(1, initializer=_confine, context=context)


async def _restart(pool: ProcessPool) -> ProcessPool:
    """Returns the pool, or another, once its new process is ready."""
    try:
        await asyncio.wrap_future(pool.schedule(_do_nothing))
        return pool
    except (BrokenProcessPool, ProcessExpired, RuntimeError):
        pool.stop()
        return _create_pool()


def _stop_pools(pools: list[ProcessPool]) -> None:
    for pool in pools:
        pool.stop()
        pool.join()


# ---- within a decoder


def _confine() -> None:
    """Limits the memory of this process, lets scoring go first, and lets it be ended within native code too."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's own handler would wait for the native code
    if sys.platform == "linux":
        import resource

        os.nice(DECODER_NICENESS)
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
        limit = 1024 * int(line.split()[1]) + DECODER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _do_nothing() -> None:
    pass


def decode_images(images: Sequence[bytes], frame: Frame, max_pixels: int = MAX_PIXELS) -> list[Decoded | ImageError]:
    """Returns info and pixels of the frame's shape for each image, or the reason why it is not decoded."""
    results: list[Decoded | ImageError] = []
    for image in images:
        try:
            refuse_drawing(image)
            if max_pixels < MAX_PIXELS:
                _check_pixels(image, max_pixels)
            results.append(read_image(image, frame))
        except ImageError as error:
            results.append(error)
    return results


def _check_pixels(image: bytes, max_pixels: int) -> None:
    """Raises: ImageError: the header claims more pixels, or cannot be read."""
    info = read_header(image)
    if info.width * info.height > max_pixels:
        raise ImageError(
            "too_large",
            f"{info.width} x {info.height} is {info.width * info.height} pixels; at most {max_pixels} are taken: cut it into "
            "tiles",
        )


def decode_picture(image: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """(height, width, 3) RGB of the whole image, resized by Pillow's bilinear filter. Raises: ImageError."""
    picture = Image.fromarray(decode_image(image, None)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)
