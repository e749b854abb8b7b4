"""Small folders of random images, in the layouts of the importers, and the rows that an ingestion makes of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focus_ray.data.images import encode_png
from focus_ray.data.read import read_index, read_rows
from focus_ray.data.schema import SCHEMA
from focus_ray.ingestion.ingest import ingest
from focus_ray.ingestion.report import IngestReport

SIZE = (12, 16)  # height, width


def pixels(seed: int) -> np.ndarray:
    """Returns a random RGB image of `SIZE`. No two images are equal."""
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def spot(*positions: tuple[int, int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns a mask that is True at the positions (row, column)."""
    mask = np.zeros(size, dtype=bool)
    for row, column in positions:
        mask[row, column] = True
    return mask


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Returns the bytes of an image file that Pillow writes."""
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


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


def save_all(root: Path, files: dict[str, Any]) -> Path:
    """Writes files below a folder, and returns the folder. files: path -> seed of `pixels`, or content for `save`."""
    for name, content in files.items():
        save(root / name, pixels(content) if isinstance(content, int) else content)
    return root


def make_mvtec(root: Path, num_train: int = 3, seed: int = 0) -> Path:
    """Writes train/good 000.., test/good 000, and test/crack 000 and 001 with masks."""
    train = {f"train/good/{number:03}.png": seed + number for number in range(num_train)}
    test = {"test/good/000.png": seed + 100, "test/crack/000.png": seed + 200, "test/crack/001.png": seed + 201}
    masks = {f"ground_truth/crack/{number:03}_mask.png": spot((1, number)) for number in range(2)}
    return save_all(root, {**train, **test, **masks})


def make_folder(root: Path) -> Path:
    """Writes good/ with 10 images, and two folders of one defective image each, with masks."""
    good = {f"good/{number:03}.png": number for number in range(10)}
    bad = {"bad/000.png": 50, "bad_scratch/001.png": 51}
    return save_all(
        root, {**good, **bad, "masks/000.png": spot((1, 1)), "masks/bad_scratch/001_mask.png": spot((2, 2))}
    )


def ingest_quietly(source: Any, out: Any, **options: Any) -> IngestReport:
    """Ingests a source without a progress bar."""
    return ingest(source, out, progress=False, **options)


def rows_of(root: Any, category: str = "bolt") -> list[dict[str, Any]]:
    """Returns all rows of a category, with all columns."""
    index = read_index(root, category)
    return list(read_rows(root, category, index["row"].to_numpy(), SCHEMA.names))


def rows_by_id(root: Any, category: str = "bolt") -> dict[str, dict[str, Any]]:
    """Returns all rows of a category by their id without the category."""
    return {row["id"].removeprefix(f"{category}/"): row for row in rows_of(root, category)}
