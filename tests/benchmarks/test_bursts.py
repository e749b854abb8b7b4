"""Simulated photographs of the same part."""

import pytest
import torch

from benchmarks.bursts import crop_at_random, crop_in_steps, simulate_photographs

IMAGES = torch.randint(20, 200, (3, 16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_photographs_of_one_image_follow_each_other() -> None:
    photographs = simulate_photographs(IMAGES, 4, seed=0, shift_px=0, noise=0.0)
    assert torch.equal(photographs, IMAGES.repeat_interleave(4, dim=0))


def test_photographs_of_one_image_differ_and_a_seed_repeats_them() -> None:
    photographs = simulate_photographs(IMAGES, 2, seed=0)
    assert not torch.equal(photographs[0], photographs[1])
    assert torch.equal(photographs, simulate_photographs(IMAGES, 2, seed=0))
    assert not torch.equal(photographs, simulate_photographs(IMAGES, 2, seed=1))


def test_a_shift_moves_the_image_by_whole_pixels_up_to_the_limit() -> None:
    image = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    image[0, 8, 8] = 200
    photographs = simulate_photographs(image, 200, seed=0, shift_px=2, noise=0.0)
    _, rows, columns, _ = photographs.nonzero(as_tuple=True)
    assert set(rows.tolist()) == set(columns.tolist()) == {6, 7, 8, 9, 10}
    assert photographs.amax(dim=(1, 2, 3)).eq(200).all()


def test_noise_and_brightness_have_the_size_that_is_asked_for() -> None:
    image = torch.full((1, 64, 64, 3), 100, dtype=torch.uint8)
    noisy = simulate_photographs(image, 1, seed=0, noise=2.0).float()
    assert noisy.std().item() == pytest.approx(2.0, rel=0.05)  # rounding adds a variance of 1/12
    levels = simulate_photographs(image, 300, seed=0, noise=0.0, brightness=0.1)[:, 0, 0, 0].float()
    assert 90 <= levels.min() < 92
    assert 108 < levels.max() <= 110


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="count=0"):
        simulate_photographs(IMAGES, 0, seed=0)
    with pytest.raises(ValueError, match="noise=-1"):
        simulate_photographs(IMAGES, 1, seed=0, noise=-1)


def test_steps_of_a_strip_overlap_and_cover_its_whole_width() -> None:
    crops = crop_in_steps(IMAGES, side_px=8, step_px=4)
    assert crops.shape == (15, 8, 8, 3)  # 5 of each image
    assert torch.equal(crops[5], IMAGES[1, 4:12, :8])
    assert torch.equal(crops[9], IMAGES[1, 4:12, 16:])
    assert torch.equal(crops[5, :, 4:], crops[6, :, :4])


def test_a_random_crop_is_a_part_of_its_own_image() -> None:
    crops = crop_at_random(IMAGES, side_px=8, seed=0)
    for crop, image in zip(crops, IMAGES, strict=True):
        assert any(torch.equal(crop, image[4:12, left : left + 8]) for left in range(17))
