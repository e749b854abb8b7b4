"""The drawn sample data set: one seed gives the same images, only defective images have a mask, folders follow MVTec AD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from focus_ray.errors import DataError
from focus_ray.samples.write import CATEGORIES, MASK_DIFFERENCE, draw_sample, write_samples

DEFECTS = [(category, kind) for category, (_, kinds) in CATEGORIES.items() for kind in kinds]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("samples")
    write_samples(root, seed=3, size_px=96, num_train=3, num_test_good=2, num_bad_per_type=1)
    return root


def test_folders_have_the_layout_of_mvtec_ad(root):
    for category, (_, types) in CATEGORIES.items():
        assert sorted(p.name for p in (root / category).iterdir()) == ["ground_truth", "test", "train"]
        assert sorted(p.name for p in (root / category / "test").iterdir()) == sorted(["good", *types])
        assert sorted(p.name for p in (root / category / "ground_truth").iterdir()) == sorted(types)
        assert [p.name for p in sorted((root / category / "train" / "good").iterdir())] == [
            "000.png",
            "001.png",
            "002.png",
        ]
        assert len(list((root / category / "test" / "good").iterdir())) == 2
        for kind in types:
            assert [p.name for p in (root / category / "ground_truth" / kind).iterdir()] == ["000_mask.png"]


def test_images_are_rgb_and_masks_are_0_or_255_and_all_have_the_same_size(root):
    for path in root.rglob("*.png"):
        pixels = np.asarray(Image.open(path))
        if "ground_truth" in path.parts:
            assert pixels.shape == (96, 96)
            assert set(np.unique(pixels)) == {0, 255}
        else:
            assert pixels.shape == (96, 96, 3)
            assert pixels.std() > 10


def test_files_contain_the_images_and_masks_of_draw_sample(root):
    for category, kind in DEFECTS:
        image, mask = draw_sample(category, 3, kind, 0, size_px=96)
        assert np.array_equal(np.asarray(Image.open(root / category / "test" / kind / "000.png")), image)
        written_mask = np.asarray(Image.open(root / category / "ground_truth" / kind / "000_mask.png"))
        assert np.array_equal(written_mask > 0, mask)


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_the_same_seed_gives_the_same_image_and_another_seed_gives_another_image(category):
    first, repeated, other_seed = (draw_sample(category, seed, "train", 5, size_px=64)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, repeated)
    assert not np.array_equal(first, other_seed)


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_train_and_test_images_with_the_same_number_differ(category):
    assert not np.array_equal(draw_sample(category, 0, "train", 0, 64)[0], draw_sample(category, 0, "good", 0, 64)[0])


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_good_images_have_an_empty_mask(category):
    assert not draw_sample(category, 0, "good", 0, size_px=64)[1].any()


@pytest.mark.parametrize(("category", "kind"), DEFECTS)
def test_a_defect_is_visible_and_local(category, kind):
    for index in range(2):
        image, mask = draw_sample(category, 0, kind, index, size_px=128)
        assert image.dtype == np.uint8
        assert mask.shape == (128, 128)
        assert 3 <= mask.sum() <= 0.05 * mask.size


@pytest.mark.parametrize(("category", "kind"), DEFECTS)
def test_the_mask_covers_the_pixels_that_differ_from_the_same_part_without_its_defect(category, kind):
    draw = CATEGORIES[category][0]
    kinds = ("train", "good", *CATEGORIES[category][1])
    stream = [0, sorted(CATEGORIES).index(category), kinds.index(kind), 0]
    image, mask = draw_sample(category, 0, kind, 0, size_px=128)
    images = [
        np.clip(np.round(draw(np.random.default_rng(stream), 128, defect, 0) * 255), 0, 255) for defect in (None, kind)
    ]
    assert np.array_equal(images[1], image)  # visible at the first attempt
    changed = np.abs(images[1] - images[0]).max(axis=2) > MASK_DIFFERENCE
    assert changed[mask].mean() > 0.6  # the other mask pixels are closed gaps
    assert (
        changed[~ndimage.binary_dilation(mask, iterations=2)].sum() <= 0.1 * changed.sum()
    )  # the other changed pixels are specks


def test_bad_arguments_are_refused(tmp_path, root):
    with pytest.raises(DataError, match="size_px=16"):
        write_samples(tmp_path, size_px=16)
    with pytest.raises(DataError, match="seed=-2"):
        write_samples(tmp_path, seed=-2)
    with pytest.raises(DataError, match="num_train=-1"):
        write_samples(tmp_path, num_train=-1)
    with pytest.raises(DataError, match="exists and is not empty"):
        write_samples(root)
    with pytest.raises(DataError, match="category='cog'"):
        draw_sample("cog", 0, "train", 0)
    with pytest.raises(DataError, match="kind='dent'"):
        draw_sample("gear", 0, "dent", 0)
    assert list(tmp_path.iterdir()) == []
