"""An offline sample data set: two categories of drawn parts with defects and exact masks.

`gear` lies at any angle on a mat, like parts on a belt. `board` lies nearly upright in a fixture. Light, exposure,
position, surface and solder differ from image to image. A defective part is drawn twice from the same random numbers,
with and without its defect. The mask marks the pixels where the two images differ. The data set is good for a first run,
for demonstrations and for tests. Metrics measured on it say nothing about real parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from focus_ray.errors import DataError
from focus_ray.samples.board import draw_board
from focus_ray.samples.gear import draw_gear
from focus_ray.samples.painting import FloatImage, convert_to_uint8

MASK_DIFFERENCE = 10  # of 255, in any channel; both images have the same sensor noise, so a small value suffices


def write_samples(
    root: Path,
    seed: int = 0,
    size_px: int = 256,
    num_train: int = 100,
    num_test_good: int = 40,
    num_bad_per_type: int = 8,
) -> None:
    """Writes the data set as PNG files in the layout of MVTec AD.

    The folders are `root/<category>/{train/good,test/good,test/<type>,ground_truth/<type>}`. Masks are 0 or 255 and are
    named `<image>_mask.png`. The same arguments write the same images (with the same numpy and Pillow). Image number i of a
    kind does not depend on the number of images.

    Args:
        root: Folder to write to; it is created if it does not exist.
        seed: At least 0.
        size_px: Height and width of the images, at least 64.
        num_train: Normal training images per category. Of 100 images, a held-out fifth is still enough for a target false
            positive rate of 0.05 (docs/learn/verdicts.md).
        num_test_good: Normal test images per category.
        num_bad_per_type: Test images per defect type.

    Raises:
        DataError: seed, size_px or a count is too small, or the folder of a category exists and is not empty.
    """
    if size_px < 64:
        raise DataError(f"size_px={size_px}; expected at least 64: smaller parts have no visible defects")
    counts = {
        "seed": seed,
        "num_train": num_train,
        "num_test_good": num_test_good,
        "num_bad_per_type": num_bad_per_type,
    }
    for name, count in counts.items():
        if count < 0:
            raise DataError(f"{name}={count}; expected 0 or more")
    folders = {category: Path(root) / category for category in CATEGORIES}
    for folder in folders.values():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} exists and is not empty; remove it or choose another root")
    for category, folder in folders.items():
        types = CATEGORIES[category][1]
        for kind, count in {
            "train": num_train,
            "good": num_test_good,
            **dict.fromkeys(types, num_bad_per_type),
        }.items():
            for index in range(count):
                image, mask = draw_sample(category, seed, kind, index, size_px)
                save_png(image, folder / ("train/good" if kind == "train" else f"test/{kind}") / f"{index:03d}.png")
                if kind in types:
                    mask_path = folder / "ground_truth" / kind / f"{index:03d}_mask.png"
                    save_png(mask.astype(np.uint8) * 255, mask_path)


def draw_sample(
    category: str, seed: int, kind: str, index: int, size_px: int = 256
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draws one image of the data set and its mask.

    Args:
        category: A key of `CATEGORIES`.
        seed: At least 0.
        kind: "train", "good" (of the test set) or a defect type of the category.
        index: Number of the image, from 0.
        size_px: Height and width of the image.

    Returns:
        image: (size_px, size_px, 3) uint8.
        mask: (size_px, size_px) bool, True at defective pixels; all False unless `kind` is a defect type.
    """
    draw, types = CATEGORIES[category]
    kinds = ("train", "good", *types)
    stream = [seed, sorted(CATEGORIES).index(category), kinds.index(kind), index]
    if kind not in types:
        return convert_to_uint8(draw(np.random.default_rng(stream), size_px, None, 0)), np.zeros(
            (size_px, size_px), bool
        )
    for attempt in range(20):  # a defect can be invisible, for instance a scratch in a hole: try another one
        clean = convert_to_uint8(draw(np.random.default_rng(stream), size_px, None, attempt))
        defective = convert_to_uint8(draw(np.random.default_rng(stream), size_px, kind, attempt))
        mask = compute_difference_mask(clean, defective)
        if mask.sum() >= 2e-4 * size_px**2:
            return defective, mask
    raise AssertionError(f"{category}/{kind}/{index}: no visible defect in 20 attempts")


def compute_difference_mask(clean: NDArray[np.uint8], defective: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Returns the mask of a defect: True where two images differ by more than MASK_DIFFERENCE.

    Closes small gaps, fills holes and removes specks.

    Args:
        clean: (S, S, 3), the image without the defect.
        defective: (S, S, 3), the image with the defect.

    Returns:
        (S, S) bool.
    """
    differ = np.abs(clean.astype(np.int16) - defective.astype(np.int16)).max(axis=2) > MASK_DIFFERENCE
    radius_px = max(1, clean.shape[0] // 128)
    disc = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), radius_px)
    closed = ndimage.binary_closing(np.pad(differ, radius_px), structure=disc)
    filled = ndimage.binary_fill_holes(closed[radius_px:-radius_px, radius_px:-radius_px])
    labelled, _ = ndimage.label(filled, structure=np.ones((3, 3), bool))
    areas = np.bincount(labelled.ravel())
    areas[0] = 0
    # An area counts if it has at least 4 pixels and 4 % of the largest area.
    return np.asarray((areas >= max(4, 0.04 * areas.max()))[labelled])


def save_png(pixels: NDArray[np.uint8], path: Path) -> None:
    """Writes pixels to a PNG file; creates the folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)


CATEGORIES: dict[str, tuple[Callable[[np.random.Generator, int, str | None, int], FloatImage], tuple[str, ...]]] = {
    "board": (draw_board, ("missing_component", "misplaced_component", "scratch", "solder_bridge")),
    "gear": (draw_gear, ("broken_tooth", "contamination", "missing_hole", "scratch")),
}
"""Category -> its drawing function and its defect types."""
