"""Prefetching keeps the items and their order, raises errors in the right place, and leaves no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_for

from focus_ray.data.prefetch import prefetch_items


def num_prefetch_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


@given(st.lists(st.integers(), max_size=20), st.integers(1, 4))
def test_items_keep_their_order(items: list[int], max_waiting: int) -> None:
    assert list(prefetch_items(iter(items), max_waiting)) == items
    assert num_prefetch_threads() == 0


def test_an_error_is_raised_in_place_of_its_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    prefetched = prefetch_items(items())
    assert next(prefetched) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(prefetched)
    assert num_prefetch_threads() == 0


def test_items_are_computed_while_the_reader_works_but_only_as_many_as_may_wait() -> None:
    computed: list[int] = []
    prefetched = prefetch_items((computed.append(number) or number for number in range(100)), max_waiting=2)
    assert next(prefetched) == 0
    wait_for(lambda: len(computed) >= 4, 60, "four items are computed", 0.01)
    time.sleep(0.1)
    assert len(computed) == 4  # one was read, and three wait
    prefetched.close()
    assert num_prefetch_threads() == 0
