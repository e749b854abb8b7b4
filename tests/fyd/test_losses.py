"""Tests of losses (against slow loops from their definitions; gradients) and of the figures that show a collapse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focus_ray.fyd.losses import (
    compute_effective_rank,
    compute_fine_feature_loss,
    compute_image_alignment_loss,
    compute_location_std,
    draw_image_pairs,
    sum_directions,
)
from focus_ray.fyd.training import COLLAPSE_STD


def features(seed: int, channels: int = 5, size: int = 3) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(seed))


PAIRS = torch.tensor([2, 0, 3, 1])


# Pairs


@given(st.integers(2, 60), st.integers(0, 2**31))
def test_pairs_are_a_permutation_without_fixed_points(batch_size: int, seed: int) -> None:
    pairs = draw_image_pairs(batch_size, torch.Generator().manual_seed(seed)).tolist()
    assert pairs == draw_image_pairs(batch_size, torch.Generator().manual_seed(seed)).tolist()
    assert sorted(pairs) == list(range(batch_size))
    assert all(image != partner for image, partner in enumerate(pairs))


def test_every_image_is_paired_with_every_other_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros((4, 4))
    for _ in range(3000):
        counts[range(4), draw_image_pairs(4, generator).numpy()] += 1
    np.testing.assert_allclose(counts, (1 - np.eye(4)) * 1000, atol=5 * math.sqrt(3000 * 2 / 9))


def test_one_image_has_no_partner() -> None:
    with pytest.raises(ValueError, match=r"got 1.*train\.batch_size"):
        draw_image_pairs(1)


# Coarse loss


def slow_coarse_loss(images: Tensor, pairs: Tensor, valid: Tensor | None = None) -> float:
    """Computes the coarse loss from its definition, one pixel at a time."""
    means = []
    for b in range(images.shape[0]):
        other, distances = int(pairs[b]), []
        for i in range(images.shape[2]):
            for j in range(images.shape[3]):
                if valid is None or (valid[b, i, j] and valid[other, i, j]):
                    distances.append(math.dist(images[b, :, i, j].tolist(), images[other, :, i, j].tolist()))
        means.append(sum(distances) / len(distances))
    return sum(means) / len(means)


def test_the_coarse_loss_is_the_mean_distance_of_paired_pixels_inside_both_images() -> None:
    images = features(0, channels=3)
    valid = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    for mask in (None, valid):
        shown = None if mask is None else mask & mask[PAIRS]
        assert float(compute_image_alignment_loss(images, images[PAIRS], shown)) == pytest.approx(
            slow_coarse_loss(images, PAIRS, mask), rel=1e-5
        )
    assert float(compute_image_alignment_loss(images, images[PAIRS], torch.zeros_like(valid))) == 0


def test_the_masked_coarse_loss_of_a_batch_equals_the_mean_over_workers() -> None:
    images, valid = features(0, channels=3), torch.zeros(4, 3, 3, dtype=torch.bool)
    valid[:2], valid[2:, 0] = True, True  # on the second worker, a third of the pixels is valid
    partners = images[[1, 0, 3, 2]]
    shares = [
        compute_image_alignment_loss(images[part], partners[part], valid[part]) for part in (slice(0, 2), slice(2, 4))
    ]
    whole = compute_image_alignment_loss(images, partners, valid)
    assert float(whole) == pytest.approx(float(sum(shares)) / 2, rel=1e-6)


def test_equal_images_have_no_coarse_loss_and_a_finite_gradient() -> None:
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    loss = compute_image_alignment_loss(images, images[[1, 0]])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert bool(torch.isfinite(images.grad).all())


# Fine loss


def slow_fine_loss(predicted: Tensor, projected: Tensor) -> float:
    """Computes the fine loss from its definition, one pair of images and one location at a time."""
    cosines = []
    for b, other in itertools.permutations(range(len(predicted)), 2):
        for i in range(predicted.shape[2]):
            for j in range(predicted.shape[3]):
                p, z = predicted[b, :, i, j].double().numpy(), projected[other, :, i, j].double().numpy()
                cosines.append(p @ z / math.sqrt((p @ p) * (z @ z)))
    return -sum(cosines) / len(cosines)


def compute_fine_loss_of_batch(predicted: Tensor, projected: Tensor) -> Tensor:
    return compute_fine_feature_loss(predicted, projected, sum_directions(projected), len(projected))


def test_the_fine_loss_is_the_negative_mean_cosine_of_all_pairs_of_images_at_each_location() -> None:
    expected = slow_fine_loss(features(1), features(2))
    assert float(compute_fine_loss_of_batch(features(1), features(2))) == pytest.approx(expected, abs=1e-6)
    same = features(1)[:1].expand(4, -1, -1, -1)
    assert float(compute_fine_loss_of_batch(same, 3 * same)) == pytest.approx(-1, abs=1e-6)


def test_the_fine_loss_of_a_batch_equals_the_mean_over_workers() -> None:
    predicted, projected = features(1), features(2)
    directions = sum_directions(projected[:1]) + sum_directions(projected[1:])
    shares = [
        len(predicted[part]) / 4 * compute_fine_feature_loss(predicted[part], projected[part], directions, 4)
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert float(sum(shares)) == pytest.approx(float(compute_fine_loss_of_batch(predicted, projected)), abs=1e-6)


def test_no_gradient_flows_through_the_features_of_the_other_images() -> None:
    predicted, projected = features(1).requires_grad_(), features(2).requires_grad_()
    compute_fine_loss_of_batch(predicted, projected).backward()
    assert projected.grad is None
    assert float(predicted.grad.abs().min()) > 0


# Collapse


def test_the_location_std_is_the_standard_deviation_of_normalised_features_over_locations() -> None:
    unit = features(1).flatten(2).numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    assert float(compute_location_std(features(1))) == pytest.approx(unit.std(axis=2).mean() * math.sqrt(5), rel=1e-5)
    even = torch.randn(2, 64, 30, 30, generator=torch.Generator().manual_seed(0))
    assert float(compute_location_std(even)) == pytest.approx(1, abs=0.02)


def test_a_spatial_collapse_and_a_complete_collapse_give_0_and_equal_images_do_not() -> None:
    equal_locations = features(1)[:, :, :1, :1].expand(-1, -1, 3, 3)
    all_equal = equal_locations[:1].expand(4, -1, -1, -1)
    equal_images = features(1)[:1].expand(4, -1, -1, -1)
    values = [float(compute_location_std(case)) for case in (equal_locations, all_equal, equal_images)]
    assert values[:2] == pytest.approx([0, 0], abs=1e-5)
    assert values[2] > 10 * COLLAPSE_STD


@pytest.mark.parametrize(
    ("variances", "rank"),
    [
        ([1, 0, 0, 0], 1.0),
        ([1, 1, 0, 0], 2.0),
        ([4, 4, 4, 4], 4.0),
        ([3, 1, 0, 0], math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))),
    ],
)
def test_the_effective_rank_of_a_given_spectrum_follows_the_definition(variances: list[float], rank: float) -> None:
    axes = torch.diag(torch.tensor(variances).sqrt())
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    samples = torch.cat([axes, -axes]) @ rotation + 3  # mean 3, covariance of these variances
    assert float(compute_effective_rank(samples.reshape(8, 4, 1, 1))) == pytest.approx(rank, rel=1e-3)


def test_the_effective_rank_counts_locations_as_samples_and_is_1_after_a_collapse() -> None:
    samples = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    assert float(compute_effective_rank(samples)) == pytest.approx(3, rel=0.01)
    assert float(compute_effective_rank(torch.full((4, 6, 3, 3), 0.1))) == pytest.approx(1, abs=1e-6)
