"""Groups and natural ranks of the images of a split plan, up to the shards of the workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from focus_ray.fitting.shards import MemoryShard
from focus_ray.fitting.split import SplitPlan, SplitRows


def images_of(first: int, groups: list[int], order: list[int]) -> SplitRows:
    return SplitRows(np.arange(first, first + len(groups)), np.array(groups), np.array(order))


PLAN = SplitPlan(
    images_of(0, [0, 0, 1, 2, 1, 3, 0], [3, 1, 0, 2, 9, 8, 12]),
    np.arange(7) % 5,
    images_of(7, [4, 4, 5], [5, 6, 7]),
    images_of(10, [6, 7, 6, 8], [4, 13, 11, 10]),
    "fingerprint",
)
PARTS = ("fit", "validation", "holdout")


def columns_of(*parts: SplitRows) -> list[list[int]]:
    return [np.concatenate([getattr(part, name) for part in parts]).tolist() for name in ("rows", "groups", "order")]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 9])
def test_the_shares_of_all_workers_have_equal_sizes_and_together_are_the_plan(num_workers: int) -> None:
    shares = [PLAN.get_worker_share(rank, num_workers) for rank in range(num_workers)]
    for part in PARTS:
        pieces = [getattr(share, part) for share in shares]
        assert columns_of(*pieces) == columns_of(getattr(PLAN, part))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert np.concatenate([share.folds for share in shares]).tolist() == PLAN.folds.tolist()


def test_a_plan_with_some_of_the_fit_images_keeps_their_groups_ranks_and_folds() -> None:
    reduced = PLAN.select_fit_images([1, 4, 6])
    assert columns_of(reduced.fit) == [[1, 4, 6], [0, 1, 0], [1, 9, 12]]
    assert reduced.folds.tolist() == [1, 4, 1]
    assert columns_of(reduced.holdout) == columns_of(PLAN.holdout)


def test_validation_images_join_the_fit_images_with_one_fold_for_each_group() -> None:
    joined = PLAN.merge_validation_into_fit()
    assert columns_of(joined.fit) == columns_of(PLAN.fit, PLAN.validation)
    assert joined.folds.tolist() == [0, 1, 2, 3, 4, 0, 1, 4, 4, 0]
    assert len(joined.validation) == 0


def test_a_memory_shard_gives_each_image_without_a_group_a_number_of_its_own() -> None:
    images = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    shard = MemoryShard(images, images[:2], validation=images)
    assert [*shard.share.fit.groups, *shard.share.validation.groups, *shard.share.holdout.groups] == list(range(8))
    assert shard.share.fit.order.tolist() == [0, 1, 2]
    shard = MemoryShard(images, images[:2], groups=[5, 5, 2], order=[9, 4, 6])
    assert (shard.share.fit.groups.tolist(), shard.share.fit.order.tolist()) == ([5, 5, 2], [9, 4, 6])
    assert not {*shard.share.holdout.groups} & {5, 2}


def test_a_memory_shard_without_folds_refuses_cross_calibration() -> None:
    with pytest.raises(ValueError, match="folds"):
        MemoryShard(torch.zeros(3, 2, 2, 3, dtype=torch.uint8)).get_fit_folds()
