"""Synthetic defects: exact masks, seeds, balance of kinds, and placement on the object."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from places import SHARED

from focus_ray.defects import KINDS, VISIBLE_CHANGE, find_foreground, make_defective_copies, merge_defective_copies
from focus_ray.samples.write import draw_sample

MVTEC = SHARED / "data" / "mvtec"


def textured(seed: int, height: int = 64, width: int = 80) -> np.ndarray:
    """Draws a grainy disc on a plain light background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    disc = np.hypot(y - height / 2, x - width / 2) < 0.35 * height
    image = np.where(disc[..., None], (90.0, 80.0, 60.0), 200.0)
    return np.clip(image + rng.normal(0, 6, image.shape) * (1 + 2 * disc[..., None]), 0, 255).astype(np.uint8)


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_a_set_has_every_kind_equally_often_with_masks_of_all_changes_and_nothing_else(seed):
    images = np.stack([textured(number) for number in range(6)])
    copies, masks, kinds = make_defective_copies(images, seed, per_image=2)
    change = np.abs(copies.astype(int) - np.repeat(images, 2, axis=0)).max(axis=3)
    assert np.array_equal(images[3], textured(3))
    assert (copies.dtype, masks.dtype) == (np.uint8, np.bool_)
    assert kinds == [*KINDS, *KINDS]
    assert masks.any(axis=(1, 2)).all()
    assert masks[change > VISIBLE_CHANGE].all()
    assert (change[masks] > 0).all()


def test_a_set_depends_on_its_seed_only():
    images = np.stack([textured(seed) for seed in range(3)])
    first, again, other = (make_defective_copies(images, seed) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_merged_copies_keep_every_defect_separate():
    image = draw_sample("board", 0, "train", 0)[0]
    copies, masks, _ = make_defective_copies(image[None], seed=1, per_image=6)
    merged, merged_masks = merge_defective_copies(image, copies, masks)
    assert 1 <= len(merged) < 6
    assert merged_masks.sum() == masks.sum()  # overlapping defects are on different copies
    for copy, mask in zip(copies, masks, strict=True):
        index = next(index for index, merged_mask in enumerate(merged_masks) if merged_mask[mask].all())
        assert (merged[index][mask] == copy[mask]).all()
    untouched = ~masks.any(axis=0)
    assert (merged[:, untouched] == image[untouched]).mean() > 0.9


@pytest.mark.parametrize("value", [0, 128, 255])
def test_uniform_images_get_the_kinds_that_are_visible_on_them(value):
    _, masks, kinds = make_defective_copies(np.full((12, 32, 32, 3), value, np.uint8), seed=0)
    assert masks.any(axis=(1, 2)).all()
    assert ("cut_paste" in kinds) == (value > 0)  # a pasted patch may be a little brighter or darker, black cannot


def test_defects_reach_from_barely_visible_to_plain_and_from_small_to_large():
    images = np.stack([draw_sample("board", 0, "train", index)[0] for index in range(4)])
    copies, masks, _ = make_defective_copies(images, seed=0, per_image=30)
    change = np.abs(copies.astype(int) - np.repeat(images, 30, axis=0)).max(axis=3)
    contrast = np.array([np.median(change_of_copy[mask]) for change_of_copy, mask in zip(change, masks, strict=True)])
    area = masks.mean(axis=(1, 2))
    assert np.quantile(contrast, 0.15) < 25
    assert np.quantile(contrast, 0.85) > 60
    assert np.quantile(area, 0.2) < 0.0015
    assert 0.004 < np.quantile(area, 0.9) < 0.05


def test_defects_fall_on_the_object_more_often_than_beside_it():
    image = draw_sample("gear", 0, "train", 0)[0]
    foreground = find_foreground(image)
    masks = make_defective_copies(image[None], seed=0, per_image=60)[1]
    assert foreground.mean() < 0.6
    assert np.mean([foreground[mask].mean() > 0.5 for mask in masks]) > 0.75


@pytest.mark.parametrize("factor", [1, 3])
def test_the_foreground_of_a_disc_is_the_disc(factor):
    image = np.kron(textured(0, 128, 160), np.ones((factor, factor, 1), np.uint8))[: 128 * factor - 1]
    y, x = np.mgrid[0 : 128 * factor - 1, 0 : 160 * factor]
    disc = np.hypot(y - 64 * factor, x - 80 * factor) < 0.35 * 128 * factor
    foreground = find_foreground(image)
    assert (foreground & disc).sum() / (foreground | disc).sum() > 0.9


@pytest.mark.parametrize("image", [np.random.default_rng(0).integers(0, 255, (64, 64, 3)), np.full((64, 64, 3), 77)])
def test_a_texture_without_an_object_counts_as_all_foreground(image):
    assert find_foreground(image.astype(np.uint8)).all()


@pytest.mark.skipif(not MVTEC.exists(), reason="needs ../shared/data/mvtec")
@pytest.mark.parametrize(("category", "share"), [("bottle", (0.5, 0.75)), ("screw", (0.08, 0.25))])
def test_real_parts_are_separated_from_their_background(category, share):
    for path in sorted((MVTEC / category / "train" / "good").glob("*"))[:5]:
        foreground = find_foreground(np.asarray(Image.open(path).convert("RGB")))
        assert share[0] < foreground.mean() < share[1]
        assert not foreground[0, 0]
