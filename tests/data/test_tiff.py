"""TIFF files: each kind is read correctly or refused with its kind in the message, and small files cannot cost much."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from costly_images import make_bombs, many_pages
from made_sources import encode as write_with_pillow
from PIL import Image

from focus_ray.data.images import (
    ImageError,
    decode_image,
    decode_image_with_info,
    decode_mask_and_count_values,
    read_image_header,
)

GREY8 = np.add.outer(np.arange(24), np.arange(36)).astype(np.uint8) * 3
RGB8 = np.stack([GREY8, 255 - GREY8, GREY8 // 2], axis=2)
GREY16, RGB16 = GREY8.astype(np.uint16) * 257, RGB8.astype(np.uint16) * 257
ALPHA8 = np.full_like(GREY8, 128)


def encode(values: np.ndarray, **options: Any) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, values, metadata=None, **options)
    return sink.getvalue()


def shown(grey_or_rgb: np.ndarray) -> np.ndarray:
    return grey_or_rgb if grey_or_rgb.ndim == 3 else np.repeat(grey_or_rgb[:, :, None], 3, axis=2)


BLACK, WHITE, RGB = ({"photometric": name} for name in ("minisblack", "miniswhite", "rgb"))
BIG, PLANES, DEFLATE = {"byteorder": ">"}, {"planarconfig": "separate"}, {"compression": "zlib"}
OTHER, ALPHA, MULTIPLIED = ({"extrasamples": [name]} for name in ("unspecified", "unassalpha", "assocalpha"))
ON_BLACK = (RGB8.astype(int) * 128 // 255).astype(np.uint8)


def planes(values: np.ndarray) -> np.ndarray:
    return values.transpose(2, 0, 1)


# kind -> samples, tags, pixels as they are shown
READ: dict[str, tuple[np.ndarray, dict[str, Any], np.ndarray]] = {
    "grey": (GREY8, BLACK, GREY8),
    "grey, WhiteIsZero": (255 - GREY8, WHITE, GREY8),
    "grey 16": (GREY16, BLACK, GREY8),
    "grey 16, big-endian": (GREY16, {**BLACK, **BIG}, GREY8),
    "grey 16, WhiteIsZero": (65535 - GREY16, WHITE, GREY8),
    "grey 16, WhiteIsZero, big-endian": (65535 - GREY16, {**WHITE, **BIG}, GREY8),
    "grey 16, WhiteIsZero, deflate": (65535 - GREY16, {**WHITE, **DEFLATE}, GREY8),
    "RGB": (RGB8, RGB, RGB8),
    "RGB, planes": (planes(RGB8), {**RGB, **PLANES}, RGB8),
    "RGB 16": (RGB16, RGB, RGB8),
    "RGB 16, big-endian": (RGB16, {**RGB, **BIG}, RGB8),
    "RGB 16, planes": (planes(RGB16), {**RGB, **PLANES}, RGB8),
    "RGB 16, planes, big-endian": (planes(RGB16), {**RGB, **PLANES, **BIG}, RGB8),
    "RGB 16, planes, deflate": (planes(RGB16), {**RGB, **PLANES, **DEFLATE}, RGB8),
    "RGB and something": (np.dstack([RGB8, ALPHA8]), {**RGB, **OTHER}, RGB8),
    "RGB and two things": (np.dstack([RGB8, ALPHA8, ALPHA8]), {**RGB, "extrasamples": ["unspecified"] * 2}, RGB8),
    "RGBA": (np.dstack([RGB8, ALPHA8]), {**RGB, **ALPHA}, ON_BLACK),
    "RGBA, multiplied": (np.dstack([RGB8 // 2, ALPHA8]), {**RGB, **MULTIPLIED}, RGB8 // 2),
    "RGBA 16": (np.dstack([RGB16, ALPHA8.astype(np.uint16) * 257]), {**RGB, **ALPHA}, ON_BLACK),
    "grey and something": (np.dstack([GREY8, ALPHA8]), {**BLACK, **OTHER}, GREY8),
    "grey 16 and something": (np.dstack([GREY16, GREY16 // 3]), {**BLACK, **OTHER}, GREY8),
}


@pytest.mark.parametrize("name", READ)
def test_supported_kinds_are_read_correctly(name: str) -> None:
    values, options, expected = READ[name]
    if "extrasamples" in options:
        options = {**options, "planarconfig": "contig"}
    data = encode(values, **options)
    info, pixels = decode_image_with_info(data)
    assert np.abs(pixels.astype(int) - shown(expected)).max() <= 1
    assert (info.width, info.height) == (36, 24)
    header = read_image_header(data)
    assert (header.width, header.height) == (36, 24)


REFUSED = {
    "signed 16": (GREY16.astype(np.int16), "signed values.*16-bit signed"),
    "signed 8": (GREY8.astype(np.int8), "signed values.*8-bit signed"),
    "32 bits": (GREY8.astype(np.uint32), "32-bit values"),
    "signed 32": (GREY8.astype(np.int32), "signed values.*32-bit"),
    "float 16": (GREY8.astype(np.float16), "floating-point.*16-bit float"),
    "float 32": (GREY8.astype(np.float32) / 255, "floating-point.*32-bit float"),
    "float 64": (GREY8.astype(np.float64), "floating-point.*64-bit float"),
    "complex": (GREY8.astype(np.complex64), "floating-point.*complex"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_unsupported_kinds_are_refused_with_their_kind(name: str, byteorder: str) -> None:
    values, message = REFUSED[name]
    data = encode(values, photometric="minisblack", byteorder=byteorder)
    for read in (read_image_header, lambda data: decode_image(data, 16)):
        with pytest.raises(ImageError, match=message) as caught:
            read(data)
        assert caught.value.reason == "unsupported"


def test_a_file_in_separate_planes_is_rotated_upright() -> None:
    data = encode(planes(RGB16), **RGB, **PLANES, extratags=[(274, "H", 1, 6, True)])
    info, pixels = decode_image_with_info(data)
    assert (info.width, info.height) == (24, 36)
    assert np.array_equal(pixels, np.rot90(RGB8, -1))


def test_a_truncated_file_has_the_reason_truncated() -> None:
    data = encode(RGB8, photometric="rgb")
    with pytest.raises(ImageError) as caught:
        decode_image(data[: len(data) // 2], None)
    assert caught.value.reason == "truncated"


def test_a_fully_transparent_image_is_marked() -> None:
    clear = np.dstack([RGB8, np.zeros_like(GREY8)])
    for values in (clear, clear.astype(np.uint16)):
        assert decode_image_with_info(encode(values, **RGB, **ALPHA))[0].fully_transparent
    assert not decode_image_with_info(encode(RGB8, **RGB))[0].fully_transparent


# ---- files that are small and costly

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc, of Linux")
PROBE = """
import json, sys, time
from pathlib import Path
from focus_ray.data.images import ImageError, decode_image, read_image_header
def resident(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024
results = {}
for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    for read in (read_image_header, lambda data: decode_image(data, None)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start, reason = resident("VmRSS"), time.process_time(), None
        try:
            read(data)
        except ImageError as error:
            reason = error.reason
        results.setdefault(path, []).append((reason, resident("VmHWM") - before, time.process_time() - start))
print(json.dumps(results))
"""


def probe(folder: Path, files: dict[str, bytes]) -> dict[str, list[tuple[str | None, float, float]]]:
    """Reads header and pixels of files in a process; returns (reason of the error, growth of peak memory in MiB, seconds)."""
    paths = {name: folder / f"{number}.tif" for number, name in enumerate(files)}
    for name, path in paths.items():
        path.write_bytes(files[name])
    command = [sys.executable, "-c", PROBE, *map(str, paths.values())]
    process = subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    results = json.loads(process.stdout)
    return {name: results[str(path)] for name, path in paths.items()}


@linux
def test_a_small_hostile_file_is_refused_with_little_memory_and_time(tmp_path: Path) -> None:
    bombs = make_bombs()
    for name, outcomes in probe(tmp_path, bombs).items():
        (_, header_mb, header_s), (reason, mb, seconds) = outcomes
        assert max(header_mb, mb) < 16 + 3 * len(bombs[name]) / 2**20, (name, outcomes)
        assert max(header_s, seconds) < 2, (name, outcomes)  # CPU time, on a slow machine
        assert reason in ("too_large", "truncated", "unsupported"), (name, outcomes)


def test_a_mask_of_very_many_pages_is_refused() -> None:
    assert not decode_mask_and_count_values(many_pages(3))[0].any()
    with pytest.raises(ImageError, match="more than 1000 pages") as caught:
        decode_mask_and_count_values(many_pages(1001))[0]
    assert caught.value.reason == "too_large"


@linux
def test_a_large_16_bit_image_needs_at_most_three_times_its_size(tmp_path: Path) -> None:
    side = 1500
    values = np.zeros((side, side, 4), np.uint16)
    values[::7] = 40_000
    layouts: dict[str, dict[str, Any]] = {
        "none": {},
        "deflate": {"compression": "zlib", "rowsperstrip": 64},
        "one strip": {"compression": "zlib", "predictor": True, "rowsperstrip": side},
        "planes": {"compression": "zlib", "planarconfig": "separate"},
        "tiles": {"compression": "zlib", "tile": (256, 256)},
    }
    files = {
        name: encode(planes(values) if name == "planes" else values, **RGB, **ALPHA, **options)
        for name, options in layouts.items()
    }
    for name, ((_, header_mb, _), (reason, mb, _)) in probe(tmp_path, files).items():
        assert (reason, header_mb < 4, mb <= 3 * values.nbytes / 2**20) == (None, True, True), (name, header_mb, mb)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("compression", ["zlib", "lzma"])
@pytest.mark.parametrize("layout", [{"rowsperstrip": 5}, {"tile": (16, 16)}, {"rowsperstrip": 24}])
def test_every_layout_and_compression_gives_the_same_pixels(
    layout: dict[str, Any], compression: str, predictor: bool, byteorder: str
) -> None:
    values = np.dstack([RGB16, ALPHA8.astype(np.uint16) * 257])
    options: dict[str, Any] = {**RGB, **ALPHA, "byteorder": byteorder}
    plain = encode(values, **options)
    compressed = encode(values, **options, **layout, compression=compression, predictor=predictor)
    assert np.array_equal(decode_image(compressed, None), decode_image(plain, None))
    in_planes = encode(planes(values), **options, **layout, **PLANES, compression=compression)
    assert np.array_equal(decode_image(in_planes, None), decode_image(plain, None))


def test_packbits_gives_the_same_pixels() -> None:
    image = Image.fromarray(np.dstack([RGB8, ALPHA8]))
    plain, packed = (write_with_pillow(image, "TIFF", **how) for how in ({}, {"compression": "packbits"}))
    assert np.array_equal(decode_image(packed, None), decode_image(plain, None))
