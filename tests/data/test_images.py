"""Images and masks: sizes, colours and orientation are correct, and every unusual file has a defined result."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import time
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from costly_images import jpeg_of_scans
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sources import encode
from PIL import Image

from focus_ray.data.images import (
    MAX_JPEG_SCANS,
    MAX_PIXELS,
    ImageError,
    decode_batch,
    decode_batch_with_info,
    decode_image,
    decode_image_with_info,
    decode_mask,
    decode_mask_and_count_values,
    encode_png,
    read_image_header,
    resize_mask,
)
from focus_ray.errors import DataError

ORIENTATION = 0x0112
FORMATS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"]
READERS = [
    decode_image_with_info,
    lambda data: decode_image(data, 16),
    lambda data: decode_batch([data], 16),
    decode_mask_and_count_values,
]


def pattern(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth colour pattern with no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / width, y * 255 / height, (x + 2 * y) * 255 / (width + 2 * height)]
    return np.stack(channels, axis=2).astype(np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG header for any size, with hardly any pixels behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rotated(orientation: int | None, file_format: str, height: int = 40, width: int = 60) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    return encode(Image.fromarray(pattern(height, width)), file_format, exif=exif, **options)


def palette(*colours: int, index: int = 1) -> Image.Image:
    image = Image.new("P", (4, 4), index)
    image.putpalette(colours)
    return image


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_a_png_round_trip_changes_no_pixel(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = pixels[:, :, 0] < 80
    assert np.array_equal(decode_image(encode_png(pixels), None), pixels)
    assert np.array_equal(decode_mask(encode_png(mask), height, width), mask)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_decode_to_the_same_writable_pixels(format: str) -> None:
    decoded = decode_image(encode(Image.fromarray(pattern()), format), None)
    assert np.array_equal(decoded, pattern())
    assert (decoded.dtype, decoded.flags.writeable) == (np.uint8, True)


def test_reducing_an_image_averages_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inside = decode_image(encode_png(stripes), 8)[:, 1:-1].astype(int)  # at the border the filter is cut off
    assert np.abs(inside - 127).max() <= 1  # without antialiasing: 0 or 255


def test_an_image_is_stretched_to_the_square() -> None:
    wide = decode_image(encode_png(pattern(20, 200)), 20)
    assert np.abs(wide[:, :, 1].astype(int) - pattern(20, 20)[:, :, 1]).max() <= 1


def test_a_draft_of_a_large_jpeg_stays_within_two_grey_levels_of_the_full_decoding() -> None:
    data = encode(Image.fromarray(pattern(600, 900)), "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(decode_image(data, 64).astype(int) - np.asarray(full).astype(int)).max() <= 2


# the EXIF standard's meaning of each value, as an operation on the stored pixels
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    upright = UPRIGHT[orientation](pattern())
    info, pixels = decode_image_with_info(rotated(orientation, format))
    assert np.array_equal(pixels, upright)
    assert (info.height, info.width) == upright.shape[:2]


@pytest.mark.parametrize("orientation", [None, *UPRIGHT])
def test_a_batch_has_the_sizes_of_the_files_after_rotation(orientation: int | None) -> None:
    data = rotated(orientation, "JPEG", 120, 160)  # reduced while it is decoded
    height, width = decode_image(data, None).shape[:2]
    (info,), batch = decode_batch_with_info([data], 16)
    assert (info.width, info.height, batch.shape) == (width, height, (1, 16, 16, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_ignored() -> None:
    data = encode(Image.fromarray(pattern()), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode_image(data, None), pattern())


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_by_its_full_range(format: str) -> None:
    values = np.array([[0, 128, 257, 32768], [4095, 65278, 65534, 65535]], np.uint16)
    expected = np.round(values * (255 / 65535)).astype(np.uint8)  # nothing is stretched to its own minimum and maximum
    decoded = decode_image(encode(Image.fromarray(values), format), None)
    assert np.array_equal(decoded, np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), [255, 0, 0]),
        (encode(palette(0, 0, 0, 10, 20, 30)), [10, 20, 30]),
        (encode(palette(0, 0, 0, 10, 20, 30), transparency=1), [0, 0, 0]),
        (encode(Image.new("RGBA", (4, 4), (200, 100, 50, 255))), [200, 100, 50]),
        (encode(Image.new("RGBA", (4, 4), (200, 100, 50, 0))), [0, 0, 0]),
        (encode(Image.new("RGBA", (4, 4), (200, 100, 50, 51))), [40, 20, 10]),
    ],
    ids=["CMYK", "palette", "transparent palette", "opaque", "transparent", "a fifth"],
)
def test_colours_become_rgb_over_black(data: bytes, colour: list[int]) -> None:
    assert decode_image(data, None)[0, 0].tolist() == colour


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"", "empty", "0 bytes"),
        (b"hello, this is text", "not_an_image", "hello"),
        (encode(Image.new("L", (4, 4)), "GIF"), "unsupported", "GIF"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "unsupported", "HEIC"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "unsupported", "floating-point"),
        (encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "unsupported", "32-bit signed"),
        (encode(Image.new("RGB", (4, 4)))[:20], "truncated", "copy it again"),
        (png_claiming(10_000, 10_000), "too_large", str(MAX_PIXELS)),
        (png_claiming(100_000, 100_000), "too_large", str(MAX_PIXELS)),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unusable_bytes_have_a_reason_and_a_message(data: bytes, reason: str, message: str) -> None:
    for read in READERS[:3]:
        with pytest.raises(ImageError, match=message) as caught:
            read(data)
        assert caught.value.reason == reason


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cut", [3, 100, 0.5])
def test_truncated_files_are_detected(format: str, cut: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    with pytest.raises(ImageError) as caught:
        decode_image_with_info(data[: -int(cut * len(data) if cut < 1 else cut)])
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("damage", ["no end mark", "wrong checksum", "flipped pixels"])
def test_every_reader_refuses_a_damaged_png(damage: str) -> None:
    data = bytearray(PNG)
    data[{"no end mark": -6, "wrong checksum": PNG.rindex(b"IEND") - 5, "flipped pixels": len(PNG) // 2}[damage]] ^= 1
    for read in READERS:
        with pytest.raises(ImageError) as caught:
            read(bytes(data))
        assert caught.value.reason == "truncated"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow, on damaged TIFF tags
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_gives_an_image_or_an_image_error(data: st.DataObject) -> None:
    damaged = bytearray(encode(Image.fromarray(pattern(12, 16)), data.draw(st.sampled_from(FORMATS))))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(damaged), 16).shape == (16, 16, 3)


def test_image_errors_survive_pickle() -> None:
    error = pickle.loads(pickle.dumps(ImageError("empty", "nothing there")))
    assert (error.reason, str(error), isinstance(error, DataError)) == ("empty", "nothing there", True)


@pytest.mark.parametrize("value", [1, 7, 255, np.uint16(1)])
def test_any_mask_value_above_zero_is_anomalous_at_every_bit_depth(value: Any) -> None:
    values = np.zeros((4, 5), getattr(value, "dtype", np.uint8))
    values[1, 2] = value
    assert np.argwhere(decode_mask(encode(Image.fromarray(values)), 4, 5)).tolist() == [[1, 2]]


def test_a_palette_mask_uses_colours_instead_of_indices() -> None:
    image = palette(255, 255, 255, 0, 0, 0, index=0)
    image.putpixel((0, 0), 1)
    assert decode_mask(encode(image), 4, 4).sum() == 15


def test_an_enlarged_mask_repeats_pixels() -> None:
    mask = np.eye(4, dtype=bool)
    assert np.array_equal(decode_mask(encode_png(mask), 8, 8), np.kron(mask, np.ones((2, 2))) > 0)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 39), st.integers(0, 39))
def test_a_defect_of_one_pixel_is_one_pixel_of_a_smaller_mask(height: int, width: int, y: int, x: int) -> None:
    mask = np.zeros((40, 40), bool)
    mask[y, x] = True
    assert resize_mask(mask, height, width).sum() == 1


def test_a_batch_has_the_images_in_order() -> None:
    files = [encode_png(np.roll(pattern(), shift, axis=1)) for shift in range(9)]
    expected = np.stack([decode_image(data, 32) for data in files])
    for num_threads in (1, 4):
        assert np.array_equal(decode_batch(files, 32, num_threads), expected)
    assert decode_batch([], 32, 2).shape == (0, 32, 32, 3)


def test_a_bad_image_in_a_batch_is_named_by_position() -> None:
    with pytest.raises(ImageError, match=r"image 2 of 3: .*0 bytes"):
        decode_batch([PNG, PNG, b""], 32, 2)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="size_px=0"):
        decode_image(PNG, 0)
    with pytest.raises(ValueError, match="float64"):
        encode_png(np.zeros((4, 4)))


# ---- files that are small and costly


PNG = encode(Image.fromarray(pattern()))
JPEG = encode(Image.fromarray(pattern()), "JPEG")


@cache
def deflate_zeros() -> bytes:
    """256 MiB of zeros, compressed to 1 MiB."""
    return zlib.compress(bytes(2**28), 1)


COSTLY = {
    "scans": lambda: jpeg_of_scans(40, 16_000),
    "segments": lambda: JPEG[:2] + b"\xff\xfe\0\2" * 2_000_000 + JPEG[2:],
    "fill bytes": lambda: JPEG[:2] + b"\xff" * 8_000_000 + JPEG[2:],
    "bytes between segments": lambda: JPEG[:2] + bytes(8_000_000) + JPEG[2:],
    "markers without length": lambda: JPEG[:2] + b"\xff\x01" * 4_000_000 + JPEG[2:],
    "no pixels": lambda: b"\xff\xd8\xff\xe0\0\2" + bytes(8_000_000),
    "chunks": lambda: PNG[:33] + chunk(b"quQk", b"") * 700_000 + PNG[33:],
    "chunks behind the pixels": lambda: PNG[:-12] + chunk(b"quQk", b"") * 700_000 + PNG[-12:],
    "a text that inflates": lambda: PNG[:33] + chunk(b"zTXt", b"a\0\0" + deflate_zeros()) + PNG[33:],
    "a profile that inflates": lambda: PNG[:33] + chunk(b"iCCP", b"a\0\0" + deflate_zeros()) + PNG[33:],
    "pixels that inflate": lambda: PNG[:33] + chunk(b"IDAT", deflate_zeros()) + PNG[-12:],
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_small_file_takes_little_time(name: str) -> None:
    data = COSTLY[name]()
    started = time.process_time()
    for read in (read_image_header, decode_image_with_info, decode_mask_and_count_values):
        with contextlib.suppress(ImageError):
            read(data)
    assert time.process_time() - started < 4.0  # CPU time, on a slow machine; without the checks many seconds


def test_a_jpeg_of_more_than_100_scans_is_refused() -> None:
    assert decode_image(jpeg_of_scans(40, MAX_JPEG_SCANS), None).shape == (40, 40, 3)
    for read in (read_image_header, decode_image_with_info, decode_mask_and_count_values):
        with pytest.raises(ImageError, match="100 scans") as caught:
            read(jpeg_of_scans(40, MAX_JPEG_SCANS + 1))
        assert caught.value.reason == "too_large"


def test_scans_of_a_preview_and_bytes_after_a_jpeg_do_not_count() -> None:
    preview = jpeg_of_scans(40, MAX_JPEG_SCANS)[:60_000]
    data = JPEG[:2] + b"\xff\xe2" + struct.pack(">H", len(preview) + 2) + preview + JPEG[2:]
    assert np.array_equal(decode_image(data + jpeg_of_scans(40, 200), None), decode_image(JPEG, None))
