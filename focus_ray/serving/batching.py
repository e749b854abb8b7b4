"""Dynamic batching: while a batch is computed, new items wait; the waiting items together are the next batch.

Serve's own batching (2.60) closes a batch after a fixed wait. If the device is idle, this wait is lost. If the device is busy,
small batches queue up. It also never joins requests for different models. This batching has no fixed wait and joins all items.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class DynamicBatcher(Generic[T, R]):
    """Collects items of concurrent callers into batches, and calls `run` on one batch at a time in a thread."""

    def __init__(self, run: Callable[[Sequence[T]], Sequence[R]], max_size: int, executor: Executor) -> None:
        """Stores the function; the first call of `submit` starts to compute.

        Args:
            run: takes the items of a batch, and returns one result for each item, in order.
            max_size: largest sum of the sizes of the items of a batch; a larger item is a batch alone.
            executor: an executor with one thread, so that batches do not compete.
        """
        self.run, self.max_size, self.executor = run, max_size, executor
        self._waiting: deque[tuple[T, int, asyncio.Future[R]]] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: T, size: int) -> R:
        """Adds an item to the next batch, waits for the batch, and returns the result of the item.

        Args: size: counts towards `max_size`, for instance the number of images of the item.

        Raises: the error that `run` raises for this item alone.
        """
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, size, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run_batches())
        return await future

    async def _run_batches(self) -> None:
        """Computes one batch after the other until no item waits."""
        try:
            while self._waiting:
                await self._run_batch(self._take_batch())
        finally:
            self._runner = None

    def _take_batch(self) -> list[tuple[T, asyncio.Future[R]]]:
        """Removes the items of the next batch from the queue: as many as fit into `max_size`, and at least one.

        Items of cancelled requests are left out, so the batch may be empty.
        """
        batch: list[tuple[T, asyncio.Future[R]]] = []
        free_size = self.max_size
        while self._waiting and (not batch or self._waiting[0][1] <= free_size):
            item, size, future = self._waiting.popleft()
            if not future.cancelled():  # the request was cancelled while the item waited
                batch.append((item, future))
                free_size -= size
        return batch

    async def _run_batch(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        """Computes a batch and gives each waiting caller its result.

        If `run` fails, computes each item alone, so that only the callers of faulty items get an error.
        """
        if not batch:
            return
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self.executor, self.run, [item for item, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._run_batch([entry])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
