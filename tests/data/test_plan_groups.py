"""Group numbers and natural ranks of the rows of a split plan, up to the shards of the workers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from focus_ray.fitting.shards import MemoryShard
from focus_ray.fitting.split import NO_ROWS, SplitPlan


def rows(count: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.int64)


def make_plan() -> SplitPlan:
    return SplitPlan(
        rows(7),
        rows(7) % 5,
        rows(3, 7),
        rows(4, 10),
        "fingerprint",
        fit_groups=np.array([0, 0, 1, 2, 1, 3, 0]),
        validation_groups=np.array([4, 4, 5]),
        holdout_groups=np.array([6, 7, 6, 8]),
        fit_order=np.array([3, 1, 0, 2, 9, 8, 12]),
        holdout_order=np.array([4, 13, 11, 10]),
    )


def test_without_groups_each_row_of_a_plan_has_a_unique_number() -> None:
    plan = SplitPlan(rows(4), NO_ROWS, rows(2, 4), rows(3, 6), "")
    numbers = [*plan.fit_groups, *plan.validation_groups, *plan.holdout_groups]
    assert sorted(numbers) == list(range(9))
    assert plan.fit_order.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 9])
def test_the_shares_of_all_workers_together_have_every_group_number_and_rank_in_order(num_workers: int) -> None:
    plan = make_plan()
    shares = [plan.share(rank, num_workers) for rank in range(num_workers)]
    for name in ("fit_groups", "validation_groups", "holdout_groups", "fit_order", "holdout_order"):
        joined = np.concatenate([getattr(share, name) for share in shares])
        assert joined.tolist() == getattr(plan, name).tolist(), name


def test_a_plan_with_some_of_the_fit_rows_keeps_their_groups() -> None:
    reduced = make_plan().take_fit([1, 4, 6])
    assert reduced.fit_rows.tolist() == [1, 4, 6]
    assert reduced.folds.tolist() == [1, 4, 1]
    assert reduced.fit_groups.tolist() == [0, 1, 0]
    assert reduced.fit_order.tolist() == [1, 9, 12]
    assert reduced.holdout_groups.tolist() == [6, 7, 6, 8]


def test_a_plan_with_more_rows_than_group_numbers_is_refused() -> None:
    with pytest.raises(AssertionError, match="fit_groups"):
        dataclasses.replace(make_plan(), fit_rows=rows(3))


def test_a_memory_shard_numbers_its_images_by_default() -> None:
    images = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    shard = MemoryShard(images, images[:2])
    assert shard.fit_groups().tolist() == [0, 1, 2]
    assert shard.holdout_groups().tolist() == [3, 4]
    assert shard.fit_order().tolist() == [0, 1, 2]
    shard = MemoryShard(images, images[:2], groups=[5, 5, 2], holdout_groups=[2, 7], order=[9, 4, 6])
    assert shard.fit_groups().tolist() == [5, 5, 2]
    assert shard.holdout_groups().tolist() == [2, 7]
    assert shard.fit_order().tolist() == [9, 4, 6]
    assert shard.fit_groups().dtype == np.int64


def test_a_memory_shard_refuses_a_wrong_number_of_groups() -> None:
    with pytest.raises(ValueError, match="groups has shape"):
        MemoryShard(torch.zeros(3, 2, 2, 3, dtype=torch.uint8), groups=[0, 1])
