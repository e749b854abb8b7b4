"""Synthetic defects: exact masks, seeds, balance of kinds, and placement on the object."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from places import SHARED

from focus_ray.defects import (
    KINDS,
    VISIBLE_CHANGE,
    find_foreground,
    merge_copies,
    synthesize_defect,
    synthetic_validation_set,
)
from focus_ray.errors import DataError
from focus_ray.samples.write import draw_sample

MVTEC = SHARED / "data" / "mvtec"


def textured(seed: int, height: int = 64, width: int = 80) -> np.ndarray:
    """Draws a grainy disc on a plain light background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    disc = np.hypot(y - height / 2, x - width / 2) < 0.35 * height
    image = np.full((height, width, 3), 200.0)
    image[disc] = (90, 80, 60)
    return np.clip(image + rng.normal(0, 6, image.shape) * (1 + 2 * disc[..., None]), 0, 255).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.booleans())
def test_the_mask_holds_every_noticeable_change_and_nothing_unchanged(seed, kind, with_donor):
    image = textured(seed % 7)
    before = image.copy()
    changed, mask = synthesize_defect(image, np.random.default_rng(seed), kind, textured(8) if with_donor else None)
    change = np.abs(changed.astype(int) - image.astype(int)).max(axis=2)
    assert np.array_equal(image, before)
    assert changed.dtype == np.uint8
    assert mask.dtype == np.bool_
    assert mask.any()
    assert mask[change > VISIBLE_CHANGE].all()
    assert (change[mask] > 0).all()


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_the_same_generator_state_makes_the_same_defect(kind):
    first, again, other = (synthesize_defect(textured(0), np.random.default_rng(seed), kind) for seed in (4, 4, 5))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_kinds_take_turns_and_every_image_has_its_copies():
    images = np.stack([textured(seed) for seed in range(6)])
    copies, masks, kinds = synthetic_validation_set(images, seed=1, per_image=2)
    assert copies.shape == (12, 64, 80, 3)
    assert masks.shape == (12, 64, 80)
    assert kinds == [*KINDS, *KINDS]
    assert masks.any(axis=(1, 2)).all()
    for index in range(12):
        untouched = ~masks[index]
        change = np.abs(copies[index].astype(int) - images[index // 2].astype(int)).max(axis=2)
        assert change[untouched].max() <= VISIBLE_CHANGE


def test_merged_copies_keep_every_defect_separate():
    image = draw_sample("board", 0, "train", 0)[0]
    copies, masks, _ = synthetic_validation_set(image[None], seed=1, per_image=6)
    merged, merged_masks = merge_copies(image, copies, masks)
    assert 1 <= len(merged) < 6
    for copy, mask in zip(copies, masks, strict=True):
        (index,) = [
            index for index, merged_mask in enumerate(merged_masks) if (merged_mask & mask).sum() == mask.sum()
        ][:1]
        assert (merged[index][mask] == copy[mask]).all()
    assert merged_masks.sum() == masks.sum()  # overlapping defects are on different copies
    assert (
        merged[:, ~masks.any(axis=0)] == np.where(masks.any(axis=0)[..., None], 0, image)[~masks.any(axis=0)]
    ).mean() > 0.9


def test_a_set_depends_on_its_seed_only():
    images = np.stack([textured(seed) for seed in range(3)])
    first, again, other = (synthetic_validation_set(images, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert first[2] == again[2]
    assert not np.array_equal(first[0], other[0])


def test_a_set_of_one_image_and_of_uniform_images_can_be_made():
    assert synthetic_validation_set(textured(0)[None], seed=0)[2] == [KINDS[0]]
    for value in (0, 128, 255):
        _, masks, kinds = synthetic_validation_set(np.full((12, 32, 32, 3), value, np.uint8), seed=0)
        assert masks.any(axis=(1, 2)).all()
        assert ("cut_paste" in kinds) == (value > 0)  # a pasted patch may be a little brighter or darker, black cannot


def test_defects_reach_from_barely_visible_to_plain_and_from_small_to_large():
    images = np.stack([draw_sample("board", 0, "train", index)[0] for index in range(4)])
    copies, masks, _ = synthetic_validation_set(images, seed=0, per_image=30)
    change = np.abs(copies.astype(int) - np.repeat(images, 30, axis=0)).max(axis=3)
    contrast = np.array([np.median(change_of_copy[mask]) for change_of_copy, mask in zip(change, masks, strict=True)])
    area = masks.mean(axis=(1, 2))
    assert np.quantile(contrast, 0.15) < 25
    assert np.quantile(contrast, 0.85) > 60
    assert np.quantile(area, 0.2) < 0.0015
    assert 0.004 < np.quantile(area, 0.9) < 0.05


def test_the_foreground_of_a_disc_is_the_disc():
    image = textured(0, 128, 160)
    y, x = np.mgrid[0:128, 0:160]
    disc = np.hypot(y - 64, x - 80) < 0.35 * 128
    foreground = find_foreground(image)
    assert (foreground & disc).sum() / (foreground | disc).sum() > 0.9


def test_the_foreground_of_a_large_picture_has_its_size():
    image = np.kron(textured(0, 100, 130), np.ones((3, 3, 1), np.uint8))[:299, :387]
    foreground = find_foreground(image)
    assert foreground.shape == (299, 387)
    assert 0.15 < foreground.mean() < 0.45


@pytest.mark.parametrize("texture", ["noise", "uniform"])
def test_a_texture_without_an_object_counts_as_all_foreground(texture):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 64, 3)) if texture == "noise" else np.full((64, 64, 3), 77)
    assert find_foreground(image.astype(np.uint8)).all()


def test_defects_fall_on_the_object_more_often_than_beside_it():
    image = draw_sample("gear", 0, "train", 0)[0]
    object_ = find_foreground(image)
    is_on_object = [
        object_[synthesize_defect(image, np.random.default_rng(seed))[1]].mean() > 0.5 for seed in range(60)
    ]
    assert object_.mean() < 0.6
    assert np.mean(is_on_object) > 0.75


@pytest.mark.skipif(not MVTEC.exists(), reason="needs ../shared/data/mvtec")
@pytest.mark.parametrize(("category", "share"), [("bottle", (0.5, 0.75)), ("screw", (0.08, 0.25))])
def test_real_parts_are_separated_from_their_background(category, share):
    for path in sorted((MVTEC / category / "train" / "good").glob("*"))[:5]:
        foreground = find_foreground(np.asarray(Image.open(path).convert("RGB")))
        assert share[0] < foreground.mean() < share[1]
        assert not foreground[0, 0]


def test_an_invisible_kind_is_refused():
    with pytest.raises(DataError, match="cut_paste"):
        synthesize_defect(np.zeros((40, 40, 3), np.uint8), np.random.default_rng(0), "cut_paste")
    assert synthesize_defect(np.zeros((40, 40, 3), np.uint8), np.random.default_rng(0))[1].any()


def test_bad_input_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="hole"):
        synthesize_defect(textured(0), rng, "hole")
    with pytest.raises(DataError, match="image is float64"):
        synthesize_defect(textured(0).astype(float), rng)
    with pytest.raises(DataError, match=r"donor is uint8 of shape \(64, 80\)"):
        synthesize_defect(textured(0), rng, donor=textured(0)[..., 0])
    with pytest.raises(DataError, match=r"20x80 .* 32"):
        synthesize_defect(textured(0)[:20], rng)
    with pytest.raises(DataError, match="images has shape"):
        synthetic_validation_set(textured(0), seed=0)
    with pytest.raises(DataError, match="per_image=0"):
        synthetic_validation_set(textured(0)[None], seed=0, per_image=0)
