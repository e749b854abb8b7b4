"""TIFF by its tags: each kind is read as it looks or refused by what it is, never taken for damage and never misread."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from focus_ray.data.images import ImageError, decode_image, read_header, read_image

GREY8 = np.add.outer(np.arange(24), np.arange(36)).astype(np.uint8) * 3
RGB8 = np.stack([GREY8, 255 - GREY8, GREY8 // 2], axis=2)
GREY16, RGB16 = GREY8.astype(np.uint16) * 257, RGB8.astype(np.uint16) * 257
ALPHA8 = np.full_like(GREY8, 128)
CASES = Path(__file__).parents[3] / "shared" / "cases"


def encode(values: np.ndarray, **options: Any) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, values, metadata=None, **options)
    return sink.getvalue()


def shown(grey_or_rgb: np.ndarray) -> np.ndarray:
    return grey_or_rgb if grey_or_rgb.ndim == 3 else np.repeat(grey_or_rgb[:, :, None], 3, axis=2)


READ = {
    "grey": (GREY8, {"photometric": "minisblack"}, GREY8),
    "grey, WhiteIsZero": (255 - GREY8, {"photometric": "miniswhite"}, GREY8),
    "grey 16": (GREY16, {"photometric": "minisblack"}, GREY8),
    "grey 16, big-endian": (GREY16, {"photometric": "minisblack", "byteorder": ">"}, GREY8),
    "grey 16, WhiteIsZero": (65535 - GREY16, {"photometric": "miniswhite"}, GREY8),
    "grey 16, WhiteIsZero, big-endian": (65535 - GREY16, {"photometric": "miniswhite", "byteorder": ">"}, GREY8),
    "grey 16, WhiteIsZero, deflate": (65535 - GREY16, {"photometric": "miniswhite", "compression": "zlib"}, GREY8),
    "RGB": (RGB8, {"photometric": "rgb"}, RGB8),
    "RGB, planes": (RGB8.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}, RGB8),
    "RGB 16": (RGB16, {"photometric": "rgb"}, RGB8),
    "RGB 16, big-endian": (RGB16, {"photometric": "rgb", "byteorder": ">"}, RGB8),
    "RGB 16, planes": (RGB16.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}, RGB8),
    "RGB 16, planes, big-endian": (
        RGB16.transpose(2, 0, 1),
        {"photometric": "rgb", "planarconfig": "separate", "byteorder": ">"},
        RGB8,
    ),
    "RGB 16, planes, deflate": (
        RGB16.transpose(2, 0, 1),
        {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"},
        RGB8,
    ),
    "RGB and something": (np.dstack([RGB8, ALPHA8]), {"photometric": "rgb", "extrasamples": ["unspecified"]}, RGB8),
    "RGB and two things": (
        np.dstack([RGB8, ALPHA8, ALPHA8]),
        {"photometric": "rgb", "extrasamples": ["unspecified", "unspecified"]},
        RGB8,
    ),
    "RGBA": (
        np.dstack([RGB8, ALPHA8]),
        {"photometric": "rgb", "extrasamples": ["unassalpha"]},
        (RGB8.astype(int) * 128 // 255).astype(np.uint8),
    ),
    "RGBA, multiplied": (
        np.dstack([RGB8 // 2, ALPHA8]),
        {"photometric": "rgb", "extrasamples": ["assocalpha"]},
        RGB8 // 2,
    ),
    "RGBA 16": (
        np.dstack([RGB16, ALPHA8.astype(np.uint16) * 257]),
        {"photometric": "rgb", "extrasamples": ["unassalpha"]},
        (RGB8.astype(int) * 128 // 255).astype(np.uint8),
    ),
    "grey and something": (
        np.dstack([GREY8, ALPHA8]),
        {"photometric": "minisblack", "extrasamples": ["unspecified"]},
        GREY8,
    ),
    "grey 16 and something": (
        np.dstack([GREY16, GREY16 // 3]),
        {"photometric": "minisblack", "extrasamples": ["unspecified"]},
        GREY8,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_read_as_it_looks(name: str) -> None:
    values, options, expected = READ[name]
    if "extrasamples" in options:
        options = {**options, "planarconfig": "contig"}
    data = encode(values, **options)
    info, found = read_image(data)
    assert np.abs(found.astype(int) - shown(expected)).max() <= 1
    assert (info.width, info.height) == (36, 24)
    header = read_header(data)
    assert (header.width, header.height) == (36, 24)


REFUSED = {
    "signed 16": (GREY16.astype(np.int16), "signed values have no set range.*16-bit signed"),
    "signed 8": (GREY8.astype(np.int8), "signed values have no set range.*8-bit signed"),
    "32 bits": (GREY8.astype(np.uint32), "32-bit values have no set range"),
    "signed 32": (GREY8.astype(np.int32), "signed values have no set range.*32-bit"),
    "float 16": (GREY8.astype(np.float16), "floating-point.*16-bit float"),
    "float 32": (GREY8.astype(np.float32) / 255, "floating-point.*32-bit float"),
    "float 64": (GREY8.astype(np.float64), "floating-point.*64-bit float"),
    "complex": (GREY8.astype(np.complex64), "floating-point.*complex"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_it_is_refused_by_what_it_is(name: str, byteorder: str) -> None:
    values, message = REFUSED[name]
    data = encode(values, photometric="minisblack", byteorder=byteorder)
    for read in (read_header, lambda data: decode_image(data, 16)):
        with pytest.raises(ImageError, match=message) as caught:
            read(data)
        assert caught.value.reason == "unsupported"
        assert "copy it again" not in str(caught.value)


def test_a_file_in_separate_planes_is_turned_upright() -> None:
    planes = RGB16.transpose(2, 0, 1)
    data = encode(planes, photometric="rgb", planarconfig="separate", extratags=[(274, "H", 1, 6, True)])
    info, found = read_image(data)
    assert (info.width, info.height) == (24, 36)
    assert np.array_equal(found, np.rot90(RGB8, -1))


def test_a_truncated_file_is_called_so() -> None:
    data = encode(RGB8, photometric="rgb")
    with pytest.raises(ImageError) as caught:
        decode_image(data[: len(data) // 2], None)
    assert caught.value.reason == "truncated"


def test_an_image_that_shows_nothing_is_told() -> None:
    clear = np.dstack([RGB8, np.zeros_like(GREY8)])
    for data in (
        encode(clear, photometric="rgb", extrasamples=["unassalpha"]),
        encode(clear.astype(np.uint16), photometric="rgb", extrasamples=["unassalpha"]),
    ):
        assert read_image(data)[0].see_through
    assert not read_image(encode(RGB8, photometric="rgb"))[0].see_through


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("00-rgb.png", "04-rgb16.tif"),
        ("04-rgb16.tif", "05-rgb16-planar.tif"),
        ("12-grey16.tif", "14-grey16-whiteiszero.tif"),
    ],
)
def test_one_picture_in_two_files_is_one_picture(one: str, other: str) -> None:
    first, second = (decode_image((CASES / name).read_bytes(), None) for name in (one, other))
    assert np.array_equal(first, second)
