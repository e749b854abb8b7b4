"""One pass at a time over whatever is waiting: the longer a pass takes, the more the next one carries.

Serve's own batching (2.60) closes a batch after a set wait, whether the device is idle (then the wait is lost) or busy
(then small batches queue behind it), and never joins requests for different models. This waits for nothing and joins all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Runs `run(items) -> results` in a thread, on the items that came in while it ran before."""

    def __init__(self, run: Callable[[Sequence[T]], Sequence[R]], max_size: int, executor: Executor) -> None:
        """
        Args:
            max_size: of a batch, in what items say they weigh; one item that weighs more goes alone.
            executor: a thread of its own, so that passes do not compete.
        """
        self.run, self.max_size, self.executor = run, max_size, executor
        self._waiting: deque[tuple[T, int, asyncio.Future[R]]] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: T, size: int) -> R:
        """The item's result. Raises: what `run` raises on this item alone."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, size, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run_all())
        return await future

    async def _run_all(self) -> None:
        try:
            while self._waiting:
                await self._run_batch(self._take())
        finally:
            self._runner = None

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch: list[tuple[T, asyncio.Future[R]]] = []
        room = self.max_size
        while self._waiting and (not batch or self._waiting[0][1] <= room):
            item, size, future = self._waiting.popleft()
            if not future.cancelled():  # given up while it waited
                batch.append((item, future))
                room -= size
        return batch

    async def _run_batch(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        if not batch:
            return
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self.executor, self.run, [item for item, _ in batch])
        except Exception as error:
            if len(batch) > 1:  # what one item breaks must not break for those beside it
                for one in batch:
                    await self._run_batch([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
