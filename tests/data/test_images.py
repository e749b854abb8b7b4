"""Images and masks: sizes, colours and orientation are correct, and every unusual file has a defined result."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from focus_ray.data.images import (
    MAX_JPEG_SCANS,
    MAX_PIXELS,
    ImageError,
    decode_batch,
    decode_image,
    decode_mask,
    encode_png,
    probe_mask,
    read_batch,
    read_header,
    read_image,
)
from focus_ray.errors import DataError

ORIENTATION = 0x0112


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def pattern(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth colour pattern with no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / width, y * 255 / height, (x + 2 * y) * 255 / (width + 2 * height)]
    return np.stack(channels, axis=2).astype(np.uint8)


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG header for any size, with hardly any pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_a_png_round_trip_changes_no_pixel(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_png(pixels), None), pixels)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_a_mask_round_trip_changes_no_pixel(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.3
    assert np.array_equal(decode_mask(encode_png(mask), height, width), mask)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_decode_to_the_same_pixels(format: str) -> None:
    assert np.array_equal(decode_image(encode(Image.fromarray(pattern()), format), None), pattern())


def test_decoded_arrays_are_writable_uint8_rgb() -> None:
    array = decode_image(encode(Image.fromarray(pattern())), None)
    assert (array.shape, array.dtype, array.flags.writeable) == ((40, 60, 3), np.uint8, True)


def test_reducing_an_image_averages_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = decode_image(encode(Image.fromarray(stripes)), 8)
    assert small.shape == (8, 8, 3)
    inside = small[:, 1:-1].astype(int)  # at the border the filter is cut off, off a stripe's middle
    assert np.abs(inside - 127).max() <= 1  # without antialiasing: 0 or 255


def test_an_image_is_stretched_to_the_square() -> None:
    wide = decode_image(encode(Image.fromarray(pattern(20, 200))), 20)
    assert np.abs(wide[:, :, 1].astype(int) - pattern(20, 20)[:, :, 1]).max() <= 1


def test_a_draft_of_a_large_jpeg_stays_within_two_grey_levels_of_the_full_decoding() -> None:
    image = Image.fromarray(pattern(600, 900))
    data = encode(image, "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(decode_image(data, 64).astype(int) - np.asarray(full).astype(int)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    # The EXIF standard's meaning of each value, as an operation on the stored pixels.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation](pattern())
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(pattern()), format, exif=exif, **options)
    info, pixels = read_image(data)
    assert np.array_equal(pixels, upright)
    assert (info.height, info.width) == upright.shape[:2]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_ignored() -> None:
    data = encode(Image.fromarray(pattern()), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode_image(data, None), pattern())


def test_grey_is_repeated_over_the_channels() -> None:
    grey = pattern()[:, :, 0]
    assert np.array_equal(decode_image(encode(Image.fromarray(grey)), None), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_by_its_full_range(format: str) -> None:
    values = np.array([[0, 128, 257, 32768], [4095, 65278, 65534, 65535]], np.uint16)
    expected = np.round(values * (255 / 65535)).astype(np.uint8)  # nothing is stretched to its own minimum and maximum
    assert np.array_equal(decode_image(encode(Image.fromarray(values), format), None)[:, :, 0], expected)


def test_cmyk_becomes_rgb() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert decode_image(encode(cmyk, "TIFF"), None)[0, 0].tolist() == [255, 0, 0]


def test_palette_indices_become_colours() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encode(image), None)[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("alpha", "expected"), [(255, [200, 100, 50]), (0, [0, 0, 0]), (51, [40, 20, 10])])
def test_alpha_is_composed_over_black(alpha: int, expected: list[int]) -> None:
    data = encode(Image.new("RGBA", (4, 4), (200, 100, 50, alpha)))
    assert decode_image(data, None)[0, 0].tolist() == expected


def test_a_transparent_palette_colour_is_black() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encode(image, transparency=1), None)[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"", "empty", "0 bytes"),
        (b"hello, this is text", "not_an_image", "hello"),
        (encode(Image.new("L", (4, 4)), "GIF"), "unsupported", "GIF"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "unsupported", "HEIC"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "unsupported", "floating-point"),
        (
            encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"),
            "unsupported",
            "32-bit signed BlackIsZero",
        ),
        (encode(Image.new("RGB", (4, 4)))[:20], "truncated", "copy it again"),
        (png_claiming(10_000, 10_000), "too_large", str(MAX_PIXELS)),
        (png_claiming(100_000, 100_000), "too_large", str(MAX_PIXELS)),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unusable_bytes_have_a_reason_and_a_message(data: bytes, reason: str, message: str) -> None:
    for read in (read_image, lambda data: decode_image(data, 16), lambda data: decode_image(data, None)):
        with pytest.raises(ImageError, match=message) as caught:
            read(data)
        assert caught.value.reason == reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("cut", [3, 100, 0.5])
def test_truncated_files_are_detected(format: str, cut: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    with pytest.raises(ImageError) as caught:
        read_image(data[: -int(cut * len(data) if cut < 1 else cut)])
    assert caught.value.reason == "truncated"


def test_a_flipped_bit_in_a_png_is_detected() -> None:
    data = bytearray(encode(Image.fromarray(pattern())))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError, match="damaged"):
        read_image(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow, on damaged TIFF tags
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_gives_an_image_or_an_image_error(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"]))
    damaged = bytearray(encode(Image.fromarray(pattern(12, 16)), format))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(damaged), 16).shape == (16, 16, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_a_batch_has_the_sizes_of_the_files_after_rotation(format: str, orientation: int | None) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    data = encode(Image.fromarray(pattern(120, 160)), format, exif=exif)
    height, width = decode_image(data, None).shape[:2]
    (info,), batch = read_batch([data], 16)
    assert (info.width, info.height, batch.shape) == (width, height, (1, 16, 16, 3))


def test_image_errors_survive_pickle() -> None:
    error = pickle.loads(pickle.dumps(ImageError("empty", "nothing there")))
    assert (error.reason, str(error), isinstance(error, DataError)) == ("empty", "nothing there", True)


@pytest.mark.parametrize("value", [1, 7, 128, 255])
def test_any_mask_value_above_zero_is_anomalous(value: int) -> None:
    values = np.zeros((4, 5), np.uint8)
    values[1, 2] = value
    assert np.argwhere(decode_mask(encode(Image.fromarray(values)), 4, 5)).tolist() == [[1, 2]]


def test_a_16_bit_mask_keeps_its_smallest_value() -> None:
    values = np.zeros((4, 5), np.uint16)
    values[1, 2] = 1
    assert decode_mask(encode(Image.fromarray(values)), 4, 5).sum() == 1


def test_a_palette_mask_uses_colours_instead_of_indices() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 255, 255, 0, 0, 0])  # white at index 0
    image.putpixel((0, 0), 1)
    assert decode_mask(encode(image), 4, 4).sum() == 15


def test_masks_are_resized_by_nearest_neighbour() -> None:
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    assert np.array_equal(decode_mask(encode_png(mask), 8, 8), np.kron(mask, np.ones((2, 2))) > 0)


def test_a_batch_has_the_images_in_order() -> None:
    arrays = [np.roll(pattern(), shift, axis=1) for shift in range(9)]
    files = [encode_png(array) for array in arrays]
    expected = np.stack([decode_image(data, 32) for data in files])
    for num_threads in (1, 4):
        assert np.array_equal(decode_batch(files, 32, num_threads), expected)


def test_an_empty_batch_has_no_rows() -> None:
    assert decode_batch([], 32, 2).shape == (0, 32, 32, 3)


def test_a_bad_image_in_a_batch_is_named_by_position() -> None:
    good = encode_png(pattern())
    with pytest.raises(ImageError, match=r"image 2 of 3: .*0 bytes"):
        decode_batch([good, good, b""], 32, 2)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="size_px=0"):
        decode_image(encode_png(pattern()), 0)
    with pytest.raises(ValueError, match="max_workers"):
        decode_batch([], 32, 0)
    with pytest.raises(ValueError, match="float64"):
        encode_png(np.zeros((4, 4)))


@pytest.mark.parametrize("damage", ["no end mark", "wrong checksum"])
def test_every_decoding_function_refuses_a_damaged_png(damage: str) -> None:
    whole = encode(Image.fromarray(pattern()))
    spoilt = whole[: -len(b"\x00\x00\x00\x00IEND\xaeB`\x82")] if damage == "no end mark" else None
    if spoilt is None:
        place = whole.rindex(b"IEND") - 5  # in the checksum of the last data chunk
        spoilt = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for read in (read_image, lambda data: decode_image(data, 16), lambda data: decode_batch([data], 16), probe_mask):
        with pytest.raises(ImageError, match="truncated") as caught:
            read(spoilt)
        assert caught.value.reason == "truncated"


# ---- files that are small and costly


def jpeg_of(num_scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, as decoders allow."""
    data = encode(Image.fromarray(pattern()), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * (num_scans - data.count(b"\xff\xda") + 1) + data[-2:]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


PNG = encode(Image.fromarray(pattern()))
JPEG = encode(Image.fromarray(pattern()), "JPEG")
COSTLY = {
    "scans": jpeg_of(16_000),
    "segments": JPEG[:2] + b"\xff\xfe\0\2" * 2_000_000 + JPEG[2:],
    "fill bytes": JPEG[:2] + b"\xff" * 8_000_000 + JPEG[2:],
    "bytes between segments": JPEG[:2] + bytes(8_000_000) + JPEG[2:],
    "markers without length": JPEG[:2] + b"\xff\x01" * 4_000_000 + JPEG[2:],
    "no pixels": b"\xff\xd8\xff\xe0\0\2" + bytes(8_000_000),
    "chunks": PNG[:33] + chunk(b"quQk", b"") * 700_000 + PNG[33:],
    "chunks behind the pixels": PNG[:-12] + chunk(b"quQk", b"") * 700_000 + PNG[-12:],
    "a text that inflates": PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))) + PNG[33:],
    "a profile that inflates": PNG[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28))) + PNG[33:],
    "pixels that inflate": PNG[:33] + chunk(b"IDAT", zlib.compress(bytes(2**28))) + PNG[-12:],
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_small_file_takes_little_time(name: str) -> None:
    started = time.process_time()
    for read in (read_header, read_image, probe_mask):
        with contextlib.suppress(ImageError):
            read(COSTLY[name])
    assert time.process_time() - started < 1.0


def test_a_jpeg_of_more_than_100_scans_is_refused() -> None:
    assert decode_image(jpeg_of(MAX_JPEG_SCANS), None).shape == (40, 60, 3)
    for read in (read_header, read_image, probe_mask):
        with pytest.raises(ImageError, match="more than 100 scans") as caught:
            read(jpeg_of(MAX_JPEG_SCANS + 1))
        assert caught.value.reason == "too_large"


def test_scans_of_a_preview_and_bytes_after_a_jpeg_do_not_count() -> None:
    preview = jpeg_of(MAX_JPEG_SCANS)[:60_000]
    data = JPEG[:2] + b"\xff\xe2" + struct.pack(">H", len(preview) + 2) + preview + JPEG[2:]
    assert np.array_equal(decode_image(data + jpeg_of(200), None), decode_image(JPEG, None))
