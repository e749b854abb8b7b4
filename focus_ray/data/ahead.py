"""An iterator that works ahead of its reader, so that a device does not wait for disks and decoders."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

DEPTH = 2  # items that wait for the reader: more would take memory and gain nothing once one is always there

T = TypeVar("T")


def ahead(items: Iterator[T], depth: int = DEPTH) -> Iterator[T]:
    """The same items in the same order, made by a thread of its own; what it raises is raised where its item would come.

    The thread ends with its items, or when this iterator is closed or forgotten.
    """
    waiting: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | BaseException | None, more: bool) -> None:
        while not stop.is_set():
            try:
                return waiting.put((more, item), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, more=True)
                if stop.is_set():
                    return
        except BaseException as error:
            put(error, more=False)
        else:
            put(None, more=False)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if more:
                yield item  # type: ignore[misc]
            elif isinstance(item, BaseException):
                raise item
            else:
                return
    finally:
        stop.set()
        thread.join()
