"""Derived seeds: the same for the same draw, and for no two draws alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from focus_ray.seeds import derive_seed

SEEDS = st.integers(0, 2**31 - 1)


@given(SEEDS, st.text(), st.lists(st.integers(0, 2**31), max_size=3))
def test_a_seed_is_the_same_each_time_and_fits_every_generator(seed: int, what: str, numbers: list[int]) -> None:
    one = derive_seed(seed, what, *numbers)
    assert one == derive_seed(seed, what, *numbers)
    assert 0 <= one < 2**32


def test_seed_name_and_numbers_each_lead_elsewhere() -> None:
    made = {
        derive_seed(seed, what, epoch, rank)
        for seed in range(4)
        for what in ("epoch", "points")
        for epoch in range(8)
        for rank in range(4)
    }
    assert len(made) == 4 * 2 * 8 * 4
