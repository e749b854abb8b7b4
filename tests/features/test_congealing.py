"""Tests that the congealing aligner estimates any rotation, respects its bounds, and is disabled where it does not help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from focus_ray.data.images import decode_batch
from focus_ray.features.alignment.congealing import CongealingAligner
from focus_ray.features.alignment.pairwise import measure_pairwise_l2
from focus_ray.features.alignment.theta import (
    GROUP_COMPONENTS,
    build_theta_from_components,
    compute_rotation_angle,
    compute_valid_mask,
    warp_images,
)
from focus_ray.features.settings import Group

SIZE_PX = 128


def draw_part() -> Tensor:
    """Draws (1, 3, S, S) in 0..1: an arrow with a hook on one side, without any rotational or mirror symmetry."""
    scale = 4
    picture = Image.new("L", (SIZE_PX * scale, SIZE_PX * scale), 60)
    draw = ImageDraw.Draw(picture)

    def box(x0: int, y0: int, x1: int, y1: int, grey: int) -> None:
        draw.rectangle([x0 * scale, y0 * scale, x1 * scale, y1 * scale], fill=grey)

    box(34, 58, 84, 70, 200)
    draw.polygon([(x * scale, y * scale) for x, y in ((82, 46), (104, 64), (82, 82))], fill=230)
    box(34, 70, 46, 92, 150)
    picture = picture.filter(ImageFilter.GaussianBlur(1.5 * scale)).resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
    return (torch.from_numpy(np.array(picture)).float() / 255).expand(1, 3, -1, -1)


def move(
    images: Tensor, seed: int, max_angle: float = math.pi, max_shift: float = 0.0, noise: float = 0.02
) -> tuple[Tensor, Tensor]:
    """Rotates and shifts images at random, and changes brightness and noise. Returns: the copies, and their angles (N,)."""
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    angles = (torch.rand(count, generator=generator) * 2 - 1) * max_angle
    shifts = (torch.rand(count, 2, generator=generator) * 2 - 1) * max_shift
    moved = warp_images(images, build_theta_from_components(angles, torch.ones(count), shifts), "reflection")
    gain = 0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    return (moved * gain + noise * torch.randn(moved.shape, generator=generator)).clamp(0, 1), angles


def fit_aligner(
    images: Tensor, group: str = "rotation_translation", seed: int = 0
) -> tuple[CongealingAligner, dict[str, Any]]:
    aligner = CongealingAligner(group)
    return aligner, aligner.fit(aligner.standardise_images(images), seed)


def errors_of_pairs(theta: Tensor, angles: Tensor) -> Tensor:
    """Computes the error, in degrees, of the relative rotation of every pair of images."""
    # for an image rotated by a, the angle of theta is c - a: the sum is the same for all images
    total = compute_rotation_angle(theta) + angles
    first, second = torch.triu_indices(len(total), len(total), 1)
    difference = total[first] - total[second]
    return torch.atan2(difference.sin(), difference.cos()).abs().rad2deg()


@pytest.fixture(scope="module")
def rotation_aligner() -> CongealingAligner:
    """Fits an aligner to 32 copies of the drawn part at all angles."""
    aligner, report = fit_aligner(move(draw_part().expand(32, -1, -1, -1), seed=1, max_shift=0.1)[0])
    assert report.enabled
    return aligner


@pytest.fixture(scope="module")
def bounded_aligner() -> CongealingAligner:
    """Fits an aligner to 16 copies that rotate by at most 20 degrees and shift by at most 0.1 half widths."""
    images, _ = move(draw_part().expand(16, -1, -1, -1), seed=2, max_angle=math.radians(20), max_shift=0.1)
    return fit_aligner(images)[0]


def read_screws(shared: Path, first: int, count: int) -> Tensor:
    """Reads photographs of screws (count, 3, S, S) in 0..1."""
    paths = sorted((shared / "data" / "mvtec" / "screw" / "train" / "good").iterdir())[first : first + count]
    batch = decode_batch([path.read_bytes() for path in paths], SIZE_PX)
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255


def test_rotations_over_the_full_circle_are_estimated(rotation_aligner: CongealingAligner) -> None:
    images, angles = move(draw_part().expand(24, -1, -1, -1), seed=3, max_shift=0.1)
    errors = errors_of_pairs(rotation_aligner(images), angles)
    assert (errors <= 5).float().mean() >= 0.9
    assert errors.median() <= 1


def test_rotations_of_real_screws_are_estimated(shared: Path) -> None:
    screws = read_screws(shared, 0, 8)
    aligner, report = fit_aligner(move(screws.repeat_interleave(6, 0), seed=4, noise=0.0)[0])
    assert report.enabled
    copies = 5
    images, angles = move(screws.repeat_interleave(copies, 0), seed=5, noise=0.0)
    theta = aligner(images)
    errors = torch.cat([errors_of_pairs(*pair) for pair in zip(theta.split(copies), angles.split(copies), strict=True)])
    assert (errors <= 5).float().mean() >= 0.9


def test_alignment_of_real_screws_lowers_the_pairwise_l2(shared: Path) -> None:
    aligner, report = fit_aligner(read_screws(shared, 0, 120))
    assert report.enabled
    new_screws = read_screws(shared, 200, 40)
    theta = aligner(new_screws)
    valid = compute_valid_mask(theta, SIZE_PX, SIZE_PX)
    before = measure_pairwise_l2(new_screws, valid)
    after = measure_pairwise_l2(warp_images(new_screws, theta), valid)
    print(f"pairwise L2 {before:.4f} -> {after:.4f}, a fall of {1 - after / before:.0%}; in the fit {report.drop:.0%}")
    assert after <= 0.6 * before


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(20, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(6)),
        move(draw_part().expand(20, -1, -1, -1), seed=7, max_angle=0.0)[0],
    ],
    ids=["noise", "aligned images"],
)
def test_it_is_disabled_where_it_does_not_help(images: Tensor) -> None:
    aligner, report = fit_aligner(images)
    assert not report.enabled
    assert torch.equal(aligner(images[:2]), torch.eye(2, 3).expand(2, 2, 3))


def test_theta_stays_within_the_bounds_from_training(bounded_aligner: CongealingAligner) -> None:
    assert math.degrees(float(bounded_aligner.angle_bound)) < 60
    images, _ = move(draw_part().expand(24, -1, -1, -1), seed=8, max_shift=0.4)  # any angle, large shifts
    theta = bounded_aligner(images)
    assert bool((compute_rotation_angle(theta).abs() <= bounded_aligner.angle_bound + 1e-4).all())
    distance = (theta[..., 2] - bounded_aligner.shift_centre).abs()
    assert bool((distance <= bounded_aligner.shift_bound + 1e-4).all())


@pytest.mark.parametrize("group", ["similarity", "affine"])
def test_theta_scales_at_most_by_max_scale(group: str) -> None:
    aligner = CongealingAligner(group, max_scale=1.1, min_drop=0.0)
    images, _ = move(draw_part().expand(6, -1, -1, -1), seed=9, max_angle=math.radians(20))
    aligner.fit(aligner.standardise_images(images))
    aligner.enabled.fill_(True)
    zoomed = warp_images(images, build_theta_from_components(torch.zeros(6), torch.full((6,), 0.6), torch.zeros(6, 2)))
    stretch = torch.linalg.svdvals(aligner(zoomed)[..., :2])
    # an affine stretch is clamped entry by entry, so both axes together may stretch by twice the limit
    limit = math.log(1.1) * (1 if group == "similarity" else 2)
    assert float(stretch.log().abs().max()) <= limit + 0.03


def test_a_state_dict_contains_the_whole_aligner(rotation_aligner: CongealingAligner) -> None:
    images, _ = move(draw_part().expand(6, -1, -1, -1), seed=10)
    other = CongealingAligner("rotation_translation")
    other(images)  # fills the cache, which loading must clear
    other.load_state_dict(rotation_aligner.state_dict())
    assert torch.equal(other(images), rotation_aligner(images))


def test_the_same_seed_gives_the_same_aligner() -> None:
    images, _ = move(draw_part().expand(5, -1, -1, -1), seed=11)
    first, second = (fit_aligner(images, seed=3)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_is_aligned_like_its_images_one_by_one(rotation_aligner: CongealingAligner) -> None:
    images, _ = move(draw_part().expand(9, -1, -1, -1), seed=12, max_shift=0.1)
    expected = torch.cat([rotation_aligner(image[None]) for image in images])
    torch.testing.assert_close(rotation_aligner(images), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("group", [group for group in get_args(Group) if group != "none"])
def test_every_group_moves_only_by_its_components(group: str) -> None:
    images, _ = move(draw_part().expand(6, -1, -1, -1), seed=13, max_angle=0.3, max_shift=0.1)
    aligner, _ = fit_aligner(images[:5], group)
    aligner.enabled.fill_(True)
    theta = aligner(images)
    assert theta.shape == (6, 2, 3)
    assert bool(torch.isfinite(theta).all())
    assert "r" in GROUP_COMPONENTS[group] or compute_rotation_angle(theta).abs().max() == 0
    assert "t" in GROUP_COMPONENTS[group] or theta[..., 2].abs().max() == 0


def test_images_that_cannot_be_aligned_are_refused() -> None:
    aligner = CongealingAligner("rotation")
    with pytest.raises(ValueError, match="got 3"):
        aligner.fit(torch.zeros(3, aligner.FINE_PX, aligner.FINE_PX))
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 32\)"):
        aligner.standardise_images(torch.zeros(1, 3, 64, 32))


@pytest.mark.parametrize("masked", [False, True])
def test_pairwise_l2_is_the_mean_over_pairs_and_pixels_that_both_images_show(masked: bool) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(14))
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    if masked:
        valid[0, :2], valid[1, :, 6:] = False, False
    norm = np.sqrt(((images[0] - images[1]).numpy() ** 2).sum(axis=0))
    expected = norm[2:, :6].mean() if masked else norm.mean()
    assert measure_pairwise_l2(images, valid if masked else None) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="got 1"):
        measure_pairwise_l2(images[:1])
