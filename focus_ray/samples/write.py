"""An offline sample data set, drawn from nothing: two categories of parts with defects and exact masks.

`gear` lies at any angle on a mat, as parts on a belt do; `board` comes out of a fixture nearly upright. Light,
exposure, position, surface and solder differ from image to image. A defective part is drawn twice from the same
numbers, with and without its defect, and the mask is where the two pictures differ. Good for a first run,
demonstrations and tests; figures measured on it say nothing about real parts.
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
from focus_ray.samples.painting import Field, develop

MASK_DIFFERENCE = 10  # of 255, in any channel: what counts as changed; sensor noise is equal in both pictures


def write_samples(
    root: Path,
    seed: int = 0,
    size_px: int = 256,
    num_train: int = 100,
    num_test_good: int = 40,
    num_bad_per_type: int = 8,
) -> None:
    """Writes `root/<category>/{train/good,test/good,test/<type>,ground_truth/<type>}` in MVTec AD's layout, as PNG.

    The same arguments write the same pictures (given the same numpy and Pillow), and picture i of a kind does not
    depend on how many are asked for. Masks are 0 or 255 and named `<picture>_mask.png`.

    Args:
        seed: 0 or more.  size_px: height and width, at least 64.
        num_train: a fifth of 100, where it is held out, still suffices for a target of 0.05 (docs/learn/verdicts.md).

    Raises: DataError: seed, size_px or a count is too small, or the folder of a category exists and is not empty.
    """
    if size_px < 64:
        raise DataError(f"size_px={size_px}; expected at least 64: smaller parts have no visible defects")
    for name, count in (
        ("seed", seed),
        ("num_train", num_train),
        ("num_test_good", num_test_good),
        ("num_bad_per_type", num_bad_per_type),
    ):
        if count < 0:
            raise DataError(f"{name}={count}; expected 0 or more")
    root = Path(root)
    for category in CATEGORIES:
        folder = root / category
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} exists and is not empty; remove it or choose another root")
    for category, (_, types) in CATEGORIES.items():
        folder = root / category
        for index in range(num_train):
            save(
                draw_sample(category, seed, "train", index, size_px)[0], folder / "train" / "good" / f"{index:03d}.png"
            )
        for index in range(num_test_good):
            save(draw_sample(category, seed, "good", index, size_px)[0], folder / "test" / "good" / f"{index:03d}.png")
        for defect_type in types:
            for index in range(num_bad_per_type):
                image, mask = draw_sample(category, seed, defect_type, index, size_px)
                save(image, folder / "test" / defect_type / f"{index:03d}.png")
                save(mask.astype(np.uint8) * 255, folder / "ground_truth" / defect_type / f"{index:03d}_mask.png")


def draw_sample(
    category: str, seed: int, kind: str, index: int, size_px: int = 256
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One picture. kind: "train", "good" (of the test set) or a defect type of the category in `CATEGORIES`.

    Returns: (size_px, size_px, 3) uint8 and its (size_px, size_px) mask, empty unless kind is a defect type.

    Raises: DataError: the category or kind is unknown.
    """
    if category not in CATEGORIES:
        raise DataError(f"category={category!r}; expected one of {sorted(CATEGORIES)}")
    draw, types = CATEGORIES[category]
    kinds = ("train", "good", *types)
    if kind not in kinds:
        raise DataError(f"kind={kind!r}; expected one of {kinds}")
    stream = [seed, sorted(CATEGORIES).index(category), kinds.index(kind), index]
    if kind not in types:
        return develop(draw(np.random.default_rng(stream), size_px, None, 0)), np.zeros((size_px, size_px), bool)
    for attempt in range(20):  # a defect may fall where it cannot be seen, a scratch into a hole for instance
        clean = develop(draw(np.random.default_rng(stream), size_px, None, attempt))
        bad = develop(draw(np.random.default_rng(stream), size_px, kind, attempt))
        mask = changed(clean, bad)
        if mask.sum() >= 2e-4 * size_px**2:
            return bad, mask
    raise AssertionError(f"{category}/{kind}/{index}: no visible defect in 20 attempts")


def changed(clean: NDArray[np.uint8], bad: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where two pictures differ by more than MASK_DIFFERENCE; specks dropped, small gaps and holes closed."""
    differ = np.abs(clean.astype(np.int16) - bad.astype(np.int16)).max(axis=2) > MASK_DIFFERENCE
    reach = max(1, clean.shape[0] // 128)
    disc = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), reach)
    closed = ndimage.binary_closing(np.pad(differ, reach), structure=disc)[reach:-reach, reach:-reach]
    filled = ndimage.binary_fill_holes(closed)
    labelled, count = ndimage.label(filled, structure=np.ones((3, 3), bool))
    if not count:
        return np.zeros(differ.shape, bool)
    areas = np.bincount(labelled.ravel())
    areas[0] = 0
    return np.asarray((areas >= max(4, 0.04 * areas.max()))[labelled])


def save(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)


CATEGORIES: dict[str, tuple[Callable[[np.random.Generator, int, str | None, int], Field], tuple[str, ...]]] = {
    "board": (draw_board, ("missing_component", "misplaced_component", "scratch", "solder_bridge")),
    "gear": (draw_gear, ("broken_tooth", "contamination", "missing_hole", "scratch")),
}
"""Each category's painter and defect types."""
