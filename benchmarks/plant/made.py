"""Small photographs of made-up parts, as many as wanted and each its own, put on S3 as a camera would leave them."""

from __future__ import annotations

import io
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks.plant.server import BUCKET, StorageServer

NUM_GOOD, NUM_BAD = 10, 10  # test images of a category
_SENDERS = 16


def make_category_name(category: int) -> str:
    return f"part{category:03}"


@lru_cache(maxsize=8)
def _draw_pattern(category: int, size_px: int) -> NDArray[np.float32]:
    """(H, W, 3), what all parts of a category show: a coloured disc of a texture of its own."""
    rng = np.random.default_rng([category, size_px])
    texture = ndimage.gaussian_filter(rng.standard_normal((size_px, size_px, 3)), (2, 2, 0)) * 60
    down, right = np.mgrid[:size_px, :size_px] / (size_px - 1) - 0.5
    disc = (down**2 + right**2 < 0.4**2)[..., None]
    return np.where(disc, rng.uniform(90, 200, 3) + texture, 40.0).astype(np.float32)


def draw_part_jpeg(category: int, number: int, size_px: int, bad: bool = False) -> bytes:
    """A JPEG of one part: light, place and grain of its own; a bad one has a dark scratch."""
    rng = np.random.default_rng([category, number, int(bad)])
    image = _draw_pattern(category, size_px) * rng.uniform(0.95, 1.05)
    image = np.roll(image, tuple(rng.integers(-1, 2, 2)), axis=(0, 1)) + rng.normal(0, 3, image.shape)
    if bad:
        row, column = rng.integers(size_px // 4, size_px // 2, 2)
        image[row : row + max(2, size_px // 16), column : column + size_px // 4] -= 90
    stream = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _upload_category(prefix: str, category: int, first: int, count: int, size_px: int, tests: bool) -> int:
    """Training images of these numbers, and test images. Returns: bytes put."""
    folder = f"{prefix}/{make_category_name(category)}"
    wanted: list[tuple[str, int, bool]] = [
        (f"{folder}/train/good/{n:07}.jpg", n, False) for n in range(first, first + count)
    ]
    if tests:
        wanted += [(f"{folder}/test/good/{n:03}.jpg", 10**7 + n, False) for n in range(NUM_GOOD)]
        wanted += [(f"{folder}/test/scratch/{n:03}.jpg", 10**7 + n, True) for n in range(NUM_BAD)]
    client = StorageServer.client()

    def upload_image(one: tuple[str, int, bool]) -> int:
        data = draw_part_jpeg(category, one[1], size_px, one[2])
        client.put_object(Bucket=BUCKET, Key=one[0], Body=data)
        return len(data)

    with ThreadPoolExecutor(_SENDERS) as senders:
        return sum(senders.map(upload_image, wanted))


def upload_plant(
    prefix: str, num_categories: int, each: int, size_px: int, first: int = 0, tests: bool = True, processes: int = 2
) -> dict[str, Any]:
    """`each` training images of every category, with numbers from `first` on, and test images where `tests`."""
    with ProcessPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(_upload_category, prefix, category, first, each, size_px, tests)
            for category in range(num_categories)
        ]
        sent = sum(job.result() for job in jobs)
    return {"images": num_categories * (each + (NUM_GOOD + NUM_BAD) * tests), "bytes": sent}
