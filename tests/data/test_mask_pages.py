"""Masks of several pages or frames: combined, or refused with the reason; no region vanishes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from made_sources import encode, ingest_quietly, rows_by_id, save_all
from numpy.typing import NDArray
from PIL import Image

from focus_ray.data.images import ImageError, decode_image, decode_mask, decode_mask_and_count_values, encode_png

SIDE = 120
REGIONS = [np.zeros((SIDE, SIDE + 8), np.uint8) for _ in range(3)]  # three masks, which do not overlap
for number, region in enumerate(REGIONS):
    region[number * 39 : number * 39 + 41, number * 41 : number * 41 + 41] = 255
REGIONS_16 = [region.astype(np.uint16) for region in REGIONS]
IMAGES = [Image.fromarray(region) for region in REGIONS]


def tiff_of(
    pages: list[NDArray[Any]], byteorder: str = "<", options: list[dict[str, Any]] | None = None, **common: Any
) -> bytes:
    sink = io.BytesIO()
    with tifffile.TiffWriter(sink, byteorder=byteorder) as writer:
        for page, own in zip(pages, options or [{}] * len(pages), strict=True):
            writer.write(page, contiguous=False, **common, **own)
    return sink.getvalue()


def stack(values: NDArray[Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, values, **options)
    return sink.getvalue()


def frames(images: list[Image.Image], file_format: str, **options: Any) -> bytes:
    return encode(images[0], file_format, save_all=True, append_images=images[1:], **options)


WHITE = {"photometric": "miniswhite"}
KINDS = {
    "8 bits": tiff_of(REGIONS),
    "values 1": tiff_of([region // 255 for region in REGIONS]),
    "a value a region": tiff_of([region // 255 * np.uint8(number + 1) for number, region in enumerate(REGIONS)]),
    "16 bits": tiff_of(REGIONS_16),
    "deflate": tiff_of(REGIONS, compression="zlib"),
    "big endian": tiff_of(REGIONS_16, byteorder=">"),
    "Pillow, LZW": frames(IMAGES, "TIFF", compression="tiff_lzw"),
    "1 bit": frames([image.convert("1") for image in IMAGES], "TIFF"),
    "colours": tiff_of([np.repeat(region[:, :, None], 3, axis=2) for region in REGIONS], photometric="rgb"),
    "WhiteIsZero": tiff_of([255 - region for region in REGIONS], **WHITE),
    "16 bits, WhiteIsZero": tiff_of([65535 - region for region in REGIONS_16], **WHITE),
    "several kinds": tiff_of([REGIONS[0], REGIONS_16[1], 255 - REGIONS[2]], options=[{}, {}, WHITE]),
    "a stack": stack(np.stack(REGIONS)),
    "a stack of ImageJ": stack(np.stack(REGIONS), imagej=True),
    "an empty page": tiff_of([*REGIONS, np.zeros_like(REGIONS[0])]),
    "a reduced copy": tiff_of([*REGIONS, REGIONS[0][::2, ::2]], options=[{}, {}, {}, {"subfiletype": 1}]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_of_a_mask_are_combined(kind: str) -> None:
    expected = np.any(REGIONS, axis=0)
    mask, num_values = decode_mask_and_count_values(KINDS[kind])
    np.testing.assert_array_equal(mask, expected)
    assert num_values == 1
    np.testing.assert_array_equal(decode_mask(KINDS[kind], *expected.shape), expected)


def channels(count: int) -> bytes:
    extras = ["unspecified"] * (count - 1)
    values = np.stack(REGIONS[:count], axis=2)
    return stack(values, photometric="minisblack", planarconfig="contig", extrasamples=extras)


def cut_off() -> bytes:
    """The link from the first page to the second leads beyond the end of the file."""
    data = bytearray(tiff_of(REGIONS))
    place = int.from_bytes(data[4:8], "little")
    link = place + 2 + 12 * int.from_bytes(data[place : place + 2], "little")
    data[link : link + 4] = (len(data) + 1000).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frames([image.convert("RGB") for image in IMAGES], "PNG"), "PNG mask of 3 frames"),
        (frames([image.convert("RGB") for image in IMAGES], "WEBP", lossless=True), "WEBP mask of 3 frames"),
        (tiff_of([REGIONS[0], REGIONS[1][:60]]), "128 x 60 .* 128 x 120"),
        (channels(2), "neither colours nor alpha"),
        (channels(3), "neither colours nor alpha"),
        (stack(np.stack(REGIONS * 2), photometric="minisblack", truncate=True), "a stack without a page"),
        (cut_off(), "after page 1"),
        (tiff_of([REGIONS[0], np.zeros((SIDE, SIDE + 8), np.float32)]), "floating-point"),
    ],
)
def test_a_mask_whose_regions_cannot_be_combined_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_mask_and_count_values(data)


def test_ingest_combines_the_pages_of_a_mask_and_of_an_image_takes_the_first(tmp_path: Path) -> None:
    pictures = [np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE + 8, 3), np.uint8) for seed in range(3)]
    files = {
        "train/good/0.png": pictures[0],
        "test/spot/0.png": pictures[1],
        "ground_truth/spot/0_mask.tif": KINDS["8 bits"],
    }
    ingest_quietly(save_all(tmp_path / "bolt", files), tmp_path / "data")
    mask = rows_by_id(tmp_path / "data")["test/spot/0"]["mask"]
    assert mask == encode_png(np.any(REGIONS, axis=0))
    np.testing.assert_array_equal(decode_image(tiff_of(pictures, photometric="rgb"), None), pictures[0])
