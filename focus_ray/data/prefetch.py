"""Prefetches the items of an iterator in a thread, so that a device does not wait for disks and decoders."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

# Items that may wait for the reader. More would cost memory and save no time as long as one item is always ready.
MAX_WAITING_ITEMS = 2

T = TypeVar("T")


def prefetch(items: Iterator[T], max_waiting: int = MAX_WAITING_ITEMS) -> Iterator[T]:
    """Yields the items of an iterator in the same order, while a thread already computes the next ones.

    The thread ends with the last item, or when this iterator is closed or garbage-collected.

    Args:
        items: the thread alone iterates over it.
        max_waiting: number of finished items that may wait for the reader.

    Raises:
        BaseException: an error of `items` is raised here, in the place of the item that failed.
    """
    waiting: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(max_waiting)
    stop = threading.Event()

    def put(item: T | BaseException | None, is_item: bool) -> None:
        while not stop.is_set():  # a plain blocking put would hang if the reader has gone
            try:
                return waiting.put((is_item, item), timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item, is_item=True)
                if stop.is_set():
                    return
        except BaseException as error:
            put(error, is_item=False)
        else:
            put(None, is_item=False)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            is_item, item = waiting.get()
            if is_item:
                yield item  # type: ignore[misc]
            elif isinstance(item, BaseException):
                raise item
            else:
                return
    finally:
        stop.set()
        thread.join()
