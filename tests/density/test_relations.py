"""Relations between the images of a bank that show the same part."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from focus_ray.density.relations import ImageRelations, assign_folds, join_relations


def make_relations(groups: list[int]) -> ImageRelations:
    return ImageRelations.from_groups(torch.tensor(groups))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_relatives_are_the_images_of_the_same_group(groups: list[int]) -> None:
    relatives = make_relations(groups).find_related_images(torch.arange(len(groups)))
    for image, numbers in enumerate(relatives.tolist()):
        assert set(numbers) == {other for other, group in enumerate(groups) if group == groups[image]}


def test_a_subset_and_a_join_preserve_relations() -> None:
    joined = join_relations(make_relations([0, 1, 0]), 3, make_relations([3, 3]), 2)
    assert joined is not None
    assert torch.equal(joined.related, make_relations([0, 1, 0, 2, 2]).related)
    assert torch.equal(joined.select_images([1, 3, 4]).related, make_relations([0, 1, 1]).related)
    assert join_relations(None, 2, None, 2) is None


def test_tiles_of_related_images_are_related() -> None:
    assert make_relations([0, 1, 0]).repeat_for_tiles(2).related[0].tolist() == [True, True, False, False, True, True]


def test_folds_contain_whole_groups_and_alternate_without_groups() -> None:
    assert assign_folds(torch.arange(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert assign_folds(torch.tensor([4, 4, 9, 1, 9]), 2).tolist() == [0, 0, 1, 0, 1]
