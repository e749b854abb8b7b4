"""Tests that photographs of one part and sequences are recognised without labels, and that different parts are not related."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focus_ray.detect.detector import compute_descriptors
from focus_ray.fitting import duplicates
from focus_ray.fitting.duplicates import ImageGroupsAndOrder, find_related_images


def make_parts(num_parts: int, photographs: int, noise: float, seed: int = 0) -> torch.Tensor:
    """Makes descriptors (num_parts * photographs, 4, 8) of random parts, each photographed several times with noise."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(num_parts, 4, 8, generator=generator).repeat_interleave(photographs, dim=0)
    return parts + noise * torch.randn(parts.shape, generator=generator)


def make_groups_and_order(count: int, same_part_distance: float | None = 1.0) -> ImageGroupsAndOrder:
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    return ImageGroupsAndOrder(torch.arange(count), shuffled, same_part_distance)


def make_walk(count: int) -> torch.Tensor:
    """Makes descriptors (count, 4, 8) of a slowly changing part: each is close to the previous one."""
    generator = torch.Generator().manual_seed(3)
    angles = 0.1 * torch.arange(count)[:, None, None]
    axes = torch.randn(2, 4, 8, generator=generator)
    noise = 0.3 * torch.randn(count, 4, 8, generator=generator)
    return angles.sin() * axes[0] + angles.cos() * axes[1] + noise


@pytest.mark.parametrize("photographs", [2, 3, 4, 10])
def test_only_photographs_of_the_same_part_are_related(photographs: int) -> None:
    descriptors = make_parts(10, photographs, noise=0.05)
    relations = find_related_images(descriptors, make_groups_and_order(len(descriptors)))
    parts = torch.arange(10).repeat_interleave(photographs)
    assert torch.equal(relations.related, parts[:, None] == parts)
    assert relations.num_groups == 10


PAIRS = make_parts(10, 2, noise=0.05)


@pytest.mark.parametrize(
    ("descriptors", "groups_and_order"),
    [
        *((make_parts(30, 1, 0.0, seed), make_groups_and_order(30, 100.0)) for seed in range(20)),
        (PAIRS, make_groups_and_order(20, 1e-3)),
        (PAIRS, make_groups_and_order(20, None)),
        (torch.cat([make_parts(2, 2, 0.05), make_parts(30, 1, 0.0, seed=1)]), make_groups_and_order(34)),
        (make_parts(12, 1, 0.0), make_groups_and_order(12)._replace(groups=torch.zeros(12, dtype=torch.long))),
        (make_walk(64), make_groups_and_order(64, None)),
        (torch.zeros(3, 4, 8), make_groups_and_order(3)),
    ],
    ids=[
        *(f"different parts {seed}" for seed in range(20)),
        *("too far apart", "not searched", "few duplicates", "one part", "random order", "three images"),
    ],
)
def test_images_without_a_reason_are_not_related(
    descriptors: torch.Tensor, groups_and_order: ImageGroupsAndOrder
) -> None:
    assert find_related_images(descriptors, groups_and_order) is None


def test_images_of_a_named_group_are_related_even_if_they_look_different() -> None:
    named = torch.arange(12)
    named[7] = 2
    relations = find_related_images(make_parts(12, 1, noise=0.0), make_groups_and_order(12)._replace(groups=named))
    assert relations.related.nonzero().tolist() == sorted([[n, n] for n in range(12)] + [[2, 7], [7, 2]])


def test_neighbours_in_a_sequence_are_related() -> None:
    relations = find_related_images(make_walk(64), ImageGroupsAndOrder(torch.arange(64), torch.arange(64), None))
    assert relations.related[10, [11, 9, 40]].tolist() == [True, True, False]
    assert int(relations.related.sum(dim=1).max()) <= 64 // 2
    assert 4 <= relations.num_groups < 64
    assert bool(relations.related[relations.groups[:, None] == relations.groups].all())


def test_bursts_in_file_order_are_no_sequence() -> None:
    relations = find_related_images(
        make_parts(10, 4, 0.05), ImageGroupsAndOrder(torch.arange(40), torch.arange(40), 1.0)
    )
    assert int(relations.related.sum()) == 10 * 4 * 4


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=15))
def test_components_equal_those_of_union_find(edges: list[tuple[int, int]]) -> None:
    linked = torch.zeros(10, 10, dtype=torch.bool)
    parent = list(range(10))
    for first, second in edges:
        linked[first, second] = linked[second, first] = True
        a, b = parent[first], parent[second]
        parent = [min(a, b) if value in (a, b) else value for value in parent]
    assert duplicates.find_connected_components(linked).tolist() == parent


def test_distances_are_means_over_cells() -> None:
    descriptors = compute_descriptors(torch.randn(3, 5, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert descriptors.shape == (3, 64, 5)
    expected = (descriptors[0] - descriptors[1]).norm(dim=1).mean()
    distance = duplicates.compute_descriptor_distances(descriptors, descriptors)[0, 1]
    torch.testing.assert_close(distance, expected, rtol=1e-3, atol=1e-4)


def test_photographs_of_training_parts_are_recognised_among_test_images() -> None:
    parts = make_parts(30, 1, noise=0.0)
    again = parts[:5] + 0.05 * torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(9))
    images = torch.cat([again, make_parts(5, 1, noise=0.0, seed=8)])
    assert (
        duplicates.RepeatedPartFinder(parts, same_part_distance=0.5).find_repeats(images).tolist()
        == [True] * 5 + [False] * 5
    )


def test_many_repeats_are_reported_and_few_are_not() -> None:
    assert (duplicates.format_repeat_warning(3, 20), duplicates.format_repeat_warning(0, 2)) == (None, None)
    assert "5 of 20" in str(duplicates.format_repeat_warning(5, 20))
