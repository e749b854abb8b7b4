"""Prefetches the items of an iterator in a thread, so that a device does not wait for disks and decoders."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Items that may wait for the reader. More would cost memory and save no time as long as one item is always ready.
MAX_WAITING_ITEMS = 2

T = TypeVar("T")


def prefetch_items(items: Iterator[T], max_waiting: int = MAX_WAITING_ITEMS) -> Iterator[T]:
    """Generator: yields the items of an iterator in the same order, while a thread already computes the next items.

    The thread ends with the last item, or when this generator is closed or garbage-collected.

    Args:
        items: the iterator. Only the thread uses it.
        max_waiting: number of finished items that may wait for the reader.

    Raises:
        BaseException: an error of `items` is raised here, in the place of the item that failed.
    """
    pool, end = ThreadPoolExecutor(1, "prefetch"), object()
    try:
        pending = deque(pool.submit(next, items, end) for _ in range(max_waiting + 1))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
