"""Working ahead: the same items in the same order, errors where they belong, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from focus_ray.data.prefetch import prefetch


def threads_ahead() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


@given(st.lists(st.integers(), max_size=20), st.integers(1, 4))
def test_items_come_as_they_are_in_order(items: list[int], depth: int) -> None:
    assert list(prefetch(iter(items), depth)) == items


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    found = prefetch(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    assert threads_ahead() == 0


def test_items_are_made_while_the_reader_works_and_no_more_than_fit() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    found = prefetch(items(), depth=2)
    assert next(found) == 0
    until = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(made) == 4  # one is read, two wait, one is in hand


def test_a_reader_that_goes_away_ends_the_thread() -> None:
    before = threads_ahead()
    found = prefetch(iter(range(100)))
    next(found)
    assert threads_ahead() == before + 1
    found.close()
    assert threads_ahead() == before
