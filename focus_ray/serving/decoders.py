"""Decodes images in separate processes, which can be killed if an image is too slow or takes too much memory.

No check of the header predicts the cost of every hostile image. This module imports neither torch nor Ray, so that the process
from which decoders are forked starts in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import TimeoutError as PoolTimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary, finalize

import numpy as np
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessPool
from PIL import Image

from focus_ray.data.framing import InputFrame
from focus_ray.data.images import (
    MAX_PIXELS,
    ImageError,
    ImageInfo,
    decode_image,
    decode_image_with_info,
    read_image_header,
    refuse_generated_picture,
)

DECODE_TIMEOUT_S = 10.0  # for one image; the slowest honest image, of 89 million pixels, takes about half as long
DECODER_MEMORY_BYTES = 2**30  # for one image, without the process itself; 16-bit RGBA of 25 million pixels takes 600 MB

T = TypeVar("T")
Decoded = tuple[ImageInfo, NDArray[np.uint8]]


class _TeamSemaphores:
    """The free slots of a team, and a lock: only the first waiting request of the team waits in the queue of all teams."""

    def __init__(self, max_slots: int) -> None:
        self.slots, self.place_in_queue = asyncio.Semaphore(max_slots), asyncio.Lock()


class FairTeamSemaphore:
    """A semaphore with a limit for each team. A slot is the permission to work, for instance to use a decoder process.

    Waiting teams get free slots in turn, and each team serves its requests in their order.
    """

    def __init__(self, num_slots: int, max_per_team: int) -> None:
        """Creates free slots.

        Args:
            num_slots: number of slots of all teams together.
            max_per_team: most slots that one team may hold at the same time.
        """
        self._max_per_team = max_per_team
        self._free_slots = asyncio.Semaphore(
            num_slots
        )  # first come, first served, with one waiting request of each team
        self._teams: WeakValueDictionary[str, _TeamSemaphores] = WeakValueDictionary()  # with requests

    @asynccontextmanager
    async def acquire_slot(self, team: str) -> AsyncIterator[None]:
        """Context manager: waits for a slot of a team, and holds the slot while the context is open."""
        state = self._teams.get(team)
        if state is None:
            state = self._teams[team] = _TeamSemaphores(self._max_per_team)
        async with state.slots:
            async with state.place_in_queue:
                await self._free_slots.acquire()
            try:
                yield
            finally:
                self._free_slots.release()


class DecoderPool:
    """A pool of decoder processes. Each process decodes one image at a time, within a time limit and a memory limit.

    The limits are `DECODE_TIMEOUT_S` and, on Linux, `DECODER_MEMORY_BYTES`. A process that exceeds the time limit is killed and
    restarted. If there are several processes, a single team can occupy all except one. Each process is a `ProcessPool` of its
    own. In a shared pool, the next harmful image of a team could take the remaining free process while another restarts.
    """

    def __init__(self, count: int) -> None:
        """Prepares the processes; `start_idle_processes`, `wait_until_ready` or the first image starts them.

        Args: count: number of processes.
        """
        self._slots = FairTeamSemaphore(count, max(1, count - 1))
        self._idle_pools = [_create_decoder() for _ in range(count)]
        self._running_tasks: set[asyncio.Task[object]] = set()
        finalize(self, _stop_decoders, self._idle_pools)

    async def decode_images(
        self, team: str, images: Sequence[bytes], frame: InputFrame, max_pixels: int
    ) -> list[Decoded | ImageError]:
        """Decodes images in the decoder processes, resizes them to the input size of the network, and returns them in order.

        The result of an image is as in `decode_and_resize_to_frame`. It is an `ImageError` if the image cannot be decoded, takes
        too long or takes too much memory.

        Args:
            team: the team whose slots the decoding uses.
            frame: input size of the network, and how images are resized to it.
            max_pixels: images with more pixels are not decoded.
        """
        # a frame without cached values, which would be copied to the process
        plain_frame = InputFrame(frame.height, frame.width, frame.resize, frame.region, frame.cells)
        decodings = (
            self._run_in_decoder(team, decode_and_resize_to_frame, image, plain_frame, max_pixels) for image in images
        )
        return await asyncio.gather(*decodings)

    async def decode_resized_image(
        self, team: str, image: bytes, width: int, height: int
    ) -> NDArray[np.uint8] | ImageError:
        """Decodes an image and resizes it to (height, width, 3) RGB; returns an `ImageError` if it cannot be decoded."""
        return await self._run_in_decoder(team, decode_and_resize, image, width, height)

    def start_idle_processes(self) -> None:
        """Starts the idle processes that do not run, and does not wait for them. Replaces broken processes."""
        for number, pool in enumerate(self._idle_pools):
            # reading `active` starts a pool; it is False after an idle process was killed from outside, which breaks the pool
            if not pool.active:
                self._idle_pools[number] = _create_decoder()
                pool.stop()

    async def wait_until_ready(self) -> None:
        """Starts the processes and waits until one is ready."""
        await self._run_in_decoder("", _do_nothing)

    async def _run_in_decoder(self, team: str, function: Callable[..., T], *arguments: object) -> T | ImageError:
        """Waits for a slot of the team, and calls a function in a decoder process.

        Returns: the result of the function; an `ImageError` if the function raises it, takes too long or takes too much memory.

        Raises: any other error of the function, or an error of the process pool.
        """
        async with AsyncExitStack() as slot:
            await slot.enter_async_context(self._slots.acquire_slot(team))
            # A cancelled request does not stop its decoder. The team therefore holds the slot until the decoder is free.
            task = asyncio.create_task(self._run_in_idle_decoder(slot.pop_all(), function, arguments))
        self._running_tasks.add(task)
        task.add_done_callback(self._running_tasks.discard)
        return await asyncio.shield(task)

    async def _run_in_idle_decoder(
        self, slot: AsyncExitStack, function: Callable[..., T], arguments: tuple[object, ...]
    ) -> T | ImageError:
        """Calls a function in an idle decoder process, and then releases the slot.

        Returns: as `_run_in_decoder`.

        Raises: as `_run_in_decoder`.
        """
        async with slot:
            self.start_idle_processes()
            pool = self._idle_pools.pop(0)
            try:
                return await asyncio.wrap_future(pool.schedule(function, arguments, timeout=DECODE_TIMEOUT_S))
            except ImageError as error:
                return error
            # from Python 3.11 on, the first two are the same class
            except (PoolTimeoutError, asyncio.TimeoutError):
                pool = await _restart_decoder(pool)
                return ImageError(
                    "too_slow", f"the image takes more than {DECODE_TIMEOUT_S:g} s to decode: save it as a plain PNG"
                )
            except (MemoryError, ProcessExpired) as error:
                if isinstance(error, ProcessExpired):
                    pool = await _restart_decoder(pool)
                limit = f"more than {DECODER_MEMORY_BYTES >> 20} MiB to decode"
                return ImageError("too_large", f"the image takes {limit}: cut it into tiles, or save it as a plain PNG")
            except (BrokenProcessPool, RuntimeError):
                pool = await _restart_decoder(pool)
                raise
            finally:
                self._idle_pools.append(pool)


def _create_decoder() -> ProcessPool:
    """Creates a pool with one decoder process, which starts with the first task."""
    # A fork server imports this module once. Decoders are forked from it, so that a new one is ready in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPool(1, initializer=_limit_decoder_process, context=context)


async def _restart_decoder(pool: ProcessPool) -> ProcessPool:
    """Waits until a pool has started a new process. Returns the pool; if it is broken, stops it and returns a new pool."""
    try:
        await asyncio.wrap_future(pool.schedule(_do_nothing))
        return pool
    except (BrokenProcessPool, ProcessExpired, RuntimeError):
        pool.stop()
        return _create_decoder()


def _stop_decoders(pools: list[ProcessPool]) -> None:
    """Ends the processes of the pools, and waits until they have ended."""
    for pool in pools:
        pool.stop()
        pool.join()


# ---- functions that run in a decoder process


def _limit_decoder_process() -> None:
    """Prepares this decoder process: SIGTERM ends the process at once, even in native code.

    On Linux, also limits the memory of the process, and gives it the lowest CPU priority so that scoring comes first.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's own handler would wait for the native code
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(OSError):  # a sandbox may forbid it
            # a slow image must not take the CPU from scoring; niceness is too weak, because Ray's workers already have 15 of 19
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
        limit = 1024 * int(line.split()[1]) + DECODER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _do_nothing() -> None:
    """Does nothing in a decoder process; when the call returns, the process is ready."""
    pass


def decode_and_resize_to_frame(image: bytes, frame: InputFrame, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decodes an image and resizes it to the frame, the input size of the network.

    Returns: its `ImageInfo` and its pixels (H, W, 3 or 4) uint8; a fourth channel marks the scored pixels.

    Raises: ImageError: the image cannot be decoded, its header announces more than `max_pixels`, it has no scored pixel, or it
        is a picture that focus_ray drew.
    """
    refuse_generated_picture(image)
    if max_pixels < MAX_PIXELS:
        info = read_image_header(image)
        if info.width * info.height > max_pixels:
            size = f"{info.width} x {info.height} is {info.width * info.height} pixels"
            raise ImageError("too_large", f"{size}; the service accepts at most {max_pixels}: cut the image into tiles")
    return decode_image_with_info(image, frame)


def decode_and_resize(image: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Decodes an image and resizes it to (height, width, 3) RGB with Pillow's bilinear filter.

    Raises: ImageError: the image cannot be decoded.
    """
    picture = Image.fromarray(decode_image(image, None)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)
