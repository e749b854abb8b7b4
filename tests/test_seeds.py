"""Derived seeds are equal for equal arguments and different for different arguments."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from focus_ray.seeds import derive_seed


@given(st.integers(0, 2**31 - 1), st.text(), st.lists(st.integers(0, 2**31), max_size=3))
def test_a_seed_is_deterministic_and_in_the_range_of_every_generator(seed: int, name: str, numbers: list[int]) -> None:
    assert 0 <= derive_seed(seed, name, *numbers) == derive_seed(seed, name, *numbers) < 2**32


def test_another_seed_name_or_number_gives_another_derived_seed() -> None:
    arguments = list(itertools.product(range(4), ("step", "points"), range(8), range(4)))
    assert len({derive_seed(*values) for values in arguments}) == len(arguments)
