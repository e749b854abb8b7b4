"""Masks of several pages or frames: combined, or refused with the reason; no region vanishes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from focus_ray.data.images import ImageError, decode_image, decode_mask, encode_png, probe_mask
from focus_ray.data.read import iter_test_records
from focus_ray.ingestion.ingest import ingest

SIDE = 120


def regions(value: int = 255) -> list[NDArray[np.uint8]]:
    """Three masks of 41 x 41 pixels each, which do not overlap."""
    pages = [np.zeros((SIDE, SIDE + 8), np.uint8) for _ in range(3)]
    for number, page in enumerate(pages):
        page[number * 39 : number * 39 + 41, number * 41 : number * 41 + 41] = value
    return pages


def tiff_of(pages: list[NDArray[Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    with tifffile.TiffWriter(sink) as writer:
        for page in pages:
            writer.write(page, contiguous=False, **options)
    return sink.getvalue()


def pillow_of(pages: list[Image.Image], file_format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    pages[0].save(sink, file_format, save_all=True, append_images=pages[1:], **options)
    return sink.getvalue()


KINDS = {
    "8 bits": lambda: tiff_of(regions()),
    "values 1": lambda: tiff_of(regions(1)),
    "a value a region": lambda: tiff_of([page // 255 * np.uint8(number + 1) for number, page in enumerate(regions())]),
    "16 bits": lambda: tiff_of([page.astype(np.uint16) for page in regions(7)]),
    "deflate": lambda: tiff_of(regions(), compression="zlib"),
    "big endian": lambda: pillow_big_endian(),
    "Pillow, LZW": lambda: pillow_of([Image.fromarray(page) for page in regions()], "TIFF", compression="tiff_lzw"),
    "1 bit": lambda: pillow_of([Image.fromarray(page).convert("1") for page in regions()], "TIFF"),
    "colours": lambda: tiff_of([np.repeat(page[:, :, None], 3, axis=2) for page in regions()], photometric="rgb"),
    "WhiteIsZero": lambda: tiff_of([255 - page for page in regions()], photometric="miniswhite"),
    "16 bits, WhiteIsZero": lambda: tiff_of(
        [65535 - page.astype(np.uint16) for page in regions()], photometric="miniswhite"
    ),
    "pages of several kinds": lambda: mixed(),
    "a stack": lambda: stack(),
    "a stack of ImageJ": lambda: stack(imagej=True),
}


def pillow_big_endian() -> bytes:
    sink = io.BytesIO()
    with tifffile.TiffWriter(sink, byteorder=">") as writer:
        for page in regions():
            writer.write(page.astype(np.uint16), contiguous=False)
    return sink.getvalue()


def mixed() -> bytes:
    first, second, third = regions()
    sink = io.BytesIO()
    with tifffile.TiffWriter(sink) as writer:
        writer.write(first)
        writer.write(second.astype(np.uint16))
        writer.write(255 - third, photometric="miniswhite")
    return sink.getvalue()


def stack(**options: Any) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, np.stack(regions()), **options)
    return sink.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_of_a_mask_are_combined(kind: str) -> None:
    expected = np.any(regions(), axis=0)
    assert int(expected.sum()) >= 5000
    data = KINDS[kind]()
    np.testing.assert_array_equal(probe_mask(data)[0], expected)
    np.testing.assert_array_equal(decode_mask(data, *expected.shape), expected)
    assert probe_mask(data)[1] == 1


def test_a_page_that_is_empty_or_a_reduced_copy_changes_nothing() -> None:
    pages = regions()
    np.testing.assert_array_equal(probe_mask(tiff_of([np.zeros_like(pages[0]), pages[1]]))[0], pages[1] > 0)
    sink = io.BytesIO()
    with tifffile.TiffWriter(sink) as writer:
        writer.write(pages[0])
        writer.write(pages[0][::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(probe_mask(sink.getvalue())[0], pages[0] > 0)


def frames(file_format: str) -> bytes:
    images = [Image.fromarray(page).convert("RGB") for page in regions()]
    return pillow_of(images, file_format, **({"lossless": True} if file_format == "WEBP" else {}))


def channels(count: int) -> bytes:
    sink = io.BytesIO()
    pixels = np.stack(regions()[:count], axis=2)
    tifffile.imwrite(
        sink, pixels, photometric="minisblack", planarconfig="contig", extrasamples=["unspecified"] * (count - 1)
    )
    return sink.getvalue()


def truncated_stack() -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, np.stack(regions() * 2), photometric="minisblack", truncate=True)
    return sink.getvalue()


def cut_off() -> bytes:
    """The link from the first page to the second leads beyond the end of the file."""
    data = bytearray(tiff_of(regions()))
    place = int.from_bytes(data[4:8], "little")
    link = place + 2 + 12 * int.from_bytes(data[place : place + 2], "little")
    data[link : link + 4] = (len(data) + 1000).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: frames("PNG"), "a PNG mask of 3 frames: export it as one frame"),
        (lambda: frames("WEBP"), "a WEBP mask of 3 frames"),
        (lambda: tiff_of([regions()[0], regions()[1][:60]]), "page 2 is 128 x 60 pixels, and page 1 is 128 x 120"),
        (lambda: channels(2), "samples that are neither colours nor alpha: save each region as a page"),
        (lambda: channels(3), "samples that are neither colours nor alpha"),
        (truncated_stack, "a stack without a page for each image"),
        (cut_off, "after page 1"),
        (lambda: tiff_of([regions()[0], np.zeros((SIDE, SIDE + 8), np.float32)]), "a floating-point image"),
    ],
)
def test_a_mask_whose_regions_cannot_be_combined_is_refused_with_the_reason(data: Any, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        probe_mask(data())


def test_ingest_combines_the_pages_of_a_mask_and_of_an_image_takes_the_first(tmp_path: Path) -> None:
    source = tmp_path / "images/part"
    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (source / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (SIDE, SIDE + 8, 3), dtype=np.uint8) for _ in range(6)]
    for number, pixels in enumerate(pictures[:4]):
        (source / f"train/good/{number}.png").write_bytes(encode_png(pixels))
    (source / "test/good/0.png").write_bytes(encode_png(pictures[4]))
    (source / "test/spot/0.png").write_bytes(encode_png(pictures[5]))
    (source / "ground_truth/spot/0_mask.tif").write_bytes(tiff_of(regions()))
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    (mask,) = (one["mask"] for one in iter_test_records(str(tmp_path / "data"), "part") if one["label"])
    np.testing.assert_array_equal(probe_mask(mask)[0], np.any(regions(), axis=0))
    pages = tiff_of(pictures[:2], photometric="rgb")
    np.testing.assert_array_equal(decode_image(pages, None), pictures[0])
