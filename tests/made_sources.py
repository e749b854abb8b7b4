"""Small folders of random images, in the layouts of the importers. No two images are equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from focus_ray.data.images import encode_png

SIZE = (12, 16)  # height, width


def pixels(seed: int) -> np.ndarray:
    """Returns a random RGB image of `SIZE`."""
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def spot(*positions: tuple[int, int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns a mask that is True at the positions (row, column)."""
    mask = np.zeros(size, dtype=bool)
    for row, column in positions:
        mask[row, column] = True
    return mask


def save(path: Path, content: bytes | np.ndarray) -> Path:
    """Writes bytes, an image or a mask to a file, and creates its folder. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".png":
        path.write_bytes(encode_png(content))
    else:
        Image.fromarray(content.astype(np.uint8) * 255 if content.dtype == bool else content).save(path)
    return path


def make_mvtec(root: Path, num_train: int = 3, seed: int = 0) -> Path:
    """Writes train/good 000.., test/good 000, and test/crack 000 and 001 with masks. No two images are equal."""
    for number in range(num_train):
        save(root / f"train/good/{number:03}.png", pixels(seed + number))
    save(root / "test/good/000.png", pixels(seed + 100))
    for number in range(2):
        save(root / f"test/crack/{number:03}.png", pixels(seed + 200 + number))
        save(root / f"ground_truth/crack/{number:03}_mask.png", spot((1, number)))
    return root


def make_folder(root: Path) -> Path:
    """Writes good/ with 10 images, and two folders of one defective image each, with masks."""
    for number in range(10):
        save(root / f"good/{number:03}.png", pixels(number))
    save(root / "bad/000.png", pixels(50))
    save(root / "bad_scratch/001.png", pixels(51))
    save(root / "masks/000.png", spot((1, 1)))
    save(root / "masks/bad_scratch/001_mask.png", spot((2, 2)))
    return root
