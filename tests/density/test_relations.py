"""Tests of relations: leave-one-out excludes images that show the same part together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focus_ray.density.base import Statistics
from focus_ray.density.gaussian import LeaveOneOutGaussian, fit_gaussian, mahalanobis
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import NearestMemory, build_memory
from focus_ray.density.relations import Relations, assign_folds, join_relations


def make_relations(groups: list[int]) -> Relations:
    return Relations.from_groups(torch.tensor(groups))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_relatives_are_the_images_of_the_same_group(groups: list[int]) -> None:
    relations = make_relations(groups)
    relatives = relations.relatives(torch.arange(len(groups)))
    for image, numbers in enumerate(relatives.tolist()):
        assert set(numbers) == {other for other, group in enumerate(groups) if group == groups[image]}


def test_a_subset_and_a_join_preserve_relations() -> None:
    first, second = make_relations([0, 1, 0]), make_relations([3, 3])
    joined = join_relations(first, 3, second, 2)
    assert joined is not None
    expected = make_relations([0, 1, 0, 2, 2])
    assert torch.equal(joined.related, expected.related)
    assert torch.equal(joined.subset([1, 3, 4]).related, make_relations([0, 1, 1]).related)
    assert join_relations(None, 2, None, 2) is None


def test_tiles_of_related_images_are_related() -> None:
    related = make_relations([0, 1, 0]).repeat(2).related
    assert related[0].tolist() == [True, True, False, False, True, True]


def test_folds_contain_whole_groups_and_alternate_without_groups() -> None:
    assert assign_folds(torch.arange(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert assign_folds(torch.tensor([4, 4, 9, 1, 9]), 2).tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("per_place", [None, 6])
def test_a_memory_that_excludes_a_group_scores_like_the_memory_of_the_other_images(per_place: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 5, 3, 3, generator=generator)
    moments = Moments(3, 3, 5)
    moments.update(images)
    bank = images.flatten(2).transpose(1, 2)
    memory = build_memory(bank, moments, None, 3, per_place=per_place)
    numbers = torch.tensor([[1, 4, 6]])
    distance = memory.score(images[1:2], numbers)
    if per_place is None:
        other_images = [0, 2, 3, 5, 7]
        expected = NearestMemory(bank[other_images].transpose(0, 1), memory.whitening, 3, 3, 3).score(images[1:2])
    else:  # the coresets stay the same: move their embeddings of the three images far away
        assert memory.image_numbers is not None
        hidden = torch.isin(memory.image_numbers, numbers)[:, :, None]
        far = memory.bank.masked_fill(hidden, 1e3)
        expected = NearestMemory(far, memory.whitening, 3, 3, 3).score(images[1:2])
    torch.testing.assert_close(distance, expected)


@pytest.mark.parametrize("pooling", [0.0, 0.5])
def test_a_gaussian_that_excludes_a_group_scores_like_the_gaussian_of_the_other_images(pooling: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 2, 2, generator=generator)
    whole, remaining = Moments(2, 2, 3), Moments(2, 2, 3)
    group = torch.tensor([1, 4, 6])
    whole.update(images)
    remaining.update(images[[number for number in range(12) if number not in group]])
    ridge = 0.1
    if pooling:  # leave-one-out uses the pooled covariance of all images
        whole_covariance = whole.scatter.mean(dim=0) / (whole.count - 1)
        covariance = (1 - pooling) * remaining.scatter / (remaining.count - 1) + pooling * whole_covariance
        factor = torch.linalg.inv(torch.linalg.cholesky(covariance + ridge * torch.eye(3)))
        expected = mahalanobis(images[1:2], remaining.mean, factor)
    else:
        expected = mahalanobis(images[1:2], *fit_gaussian(remaining, ridge))
    density = LeaveOneOutGaussian(whole, ridge, pooling, images.flatten(2).transpose(1, 2))
    distances = density.score(images[[1, 0]], torch.tensor([[1, 4, 6], [0, 0, 0]]))
    if pooling == 0.0:
        torch.testing.assert_close(distances[:1], expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(distances[1:], density.score(images[:1], torch.tensor([0])))
    else:
        torch.testing.assert_close(distances[:1], expected, rtol=0.05, atol=0)  # pooled over n - k - 1, not n - 1


def test_too_few_remaining_images_are_an_error_that_names_their_number() -> None:
    images = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    moments = Moments(1, 1, 3)
    moments.update(images)
    density = LeaveOneOutGaussian(moments, 0.1, 0.0, images.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="got 4"):
        density.score(images[:1], torch.tensor([[0, 1, 2]]))


def test_selecting_bank_images_selects_their_relations() -> None:
    moments = Moments(1, 1, 2)
    bank = torch.zeros(3, 1, 2)
    statistics = Statistics(moments, bank, relations=make_relations([0, 0, 1]))
    assert statistics.images_to_exclude(torch.tensor([0])).tolist() == [[0, 1]]
    statistics.select_bank_images([0, 2])
    assert statistics.relations is not None
    assert statistics.relations.is_trivial
