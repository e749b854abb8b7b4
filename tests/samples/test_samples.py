"""The drawn sample data set: one seed gives the same images, only defective images have a mask, folders follow MVTec AD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from focus_ray.errors import DataError
from focus_ray.samples.write import CATEGORIES, MASK_DIFFERENCE, draw_sample, write_samples

DEFECTS = [(category, kind) for category, (_, kinds) in CATEGORIES.items() for kind in kinds]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a small data set."""
    root = tmp_path_factory.mktemp("samples")
    write_samples(root, seed=3, size_px=64, num_train=3, num_test_good=2, num_bad_per_type=1)
    return root


def test_folders_have_the_layout_of_mvtec_ad(root: Path) -> None:
    expected = set()
    for category, (_, types) in CATEGORIES.items():
        expected |= {f"{category}/train/good/{number:03d}.png" for number in range(3)}
        expected |= {f"{category}/test/good/{number:03d}.png" for number in range(2)}
        expected |= {f"{category}/test/{kind}/000.png" for kind in types}
        expected |= {f"{category}/ground_truth/{kind}/000_mask.png" for kind in types}
    assert {path.relative_to(root).as_posix() for path in root.rglob("*.png")} == expected


@pytest.mark.parametrize(("category", "kind"), DEFECTS)
def test_files_contain_the_images_and_masks_of_draw_sample(root: Path, category: str, kind: str) -> None:
    image, mask = draw_sample(category, 3, kind, 0, size_px=64)
    assert np.array_equal(np.asarray(Image.open(root / category / "test" / kind / "000.png")), image)
    written_mask = np.asarray(Image.open(root / category / "ground_truth" / kind / "000_mask.png"))
    assert np.array_equal(written_mask, mask * np.uint8(255))


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_only_the_same_seed_kind_and_number_give_the_same_image(category: str) -> None:
    first, repeated, *different = (
        draw_sample(category, seed, kind, number, size_px=64)
        for seed, kind, number in [(1, "train", 5), (1, "train", 5), (2, "train", 5), (1, "good", 5), (1, "train", 6)]
    )
    assert np.array_equal(first[0], repeated[0])
    assert not any(np.array_equal(first[0], other[0]) for other in different)
    assert not first[1].any()  # a good image has an empty mask


@pytest.mark.parametrize(("category", "kind"), DEFECTS)
def test_the_mask_covers_the_pixels_that_differ_from_the_same_part_without_its_defect(category: str, kind: str) -> None:
    draw, kinds = CATEGORIES[category]
    stream = [0, sorted(CATEGORIES).index(category), ("train", "good", *kinds).index(kind), 0]
    image, mask = draw_sample(category, 0, kind, 0, size_px=128)
    clean, defective = (
        np.clip(np.round(draw(np.random.default_rng(stream), 128, defect, 0) * 255), 0, 255) for defect in (None, kind)
    )
    assert np.array_equal(defective, image)  # visible at the first attempt
    changed = np.abs(defective - clean).max(axis=2) > MASK_DIFFERENCE
    assert 3 <= mask.sum() <= 0.05 * mask.size
    assert changed[mask].mean() > 0.6  # the other mask pixels are closed gaps
    outside = ~ndimage.binary_dilation(mask, iterations=2)
    assert changed[outside].sum() <= 0.1 * changed.sum()  # specks


@pytest.mark.parametrize("arguments", [{"size_px": 16}, {"seed": -2}, {"num_train": -1}])
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(DataError, match=f"{name}={value}"):
        write_samples(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_overwritten(root: Path) -> None:
    with pytest.raises(DataError, match="not empty"):
        write_samples(root)
