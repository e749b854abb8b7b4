"""Derived seeds are equal for equal arguments and different for different arguments."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from focus_ray.seeds import derive_seed

SEEDS = st.integers(0, 2**31 - 1)


@given(SEEDS, st.text(), st.lists(st.integers(0, 2**31), max_size=3))
def test_a_seed_is_deterministic_and_in_the_range_of_every_generator(seed: int, name: str, numbers: list[int]) -> None:
    derived = derive_seed(seed, name, *numbers)
    assert derived == derive_seed(seed, name, *numbers)
    assert 0 <= derived < 2**32


def test_another_seed_name_or_number_gives_another_derived_seed() -> None:
    seeds = {
        derive_seed(seed, name, epoch, rank)
        for seed in range(4)
        for name in ("epoch", "points")
        for epoch in range(8)
        for rank in range(4)
    }
    assert len(seeds) == 4 * 2 * 8 * 4
