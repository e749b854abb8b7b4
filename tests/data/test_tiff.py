"""TIFF files: each kind is read correctly or refused with its kind in the message, and small files cannot cost much."""

from __future__ import annotations

import io
import json
import lzma
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from focus_ray.data.images import ImageError, decode_image, read_header, read_image, read_mask

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
def test_supported_kinds_are_read_correctly(name: str) -> None:
    values, options, expected = READ[name]
    if "extrasamples" in options:
        options = {**options, "planarconfig": "contig"}
    data = encode(values, **options)
    info, pixels = read_image(data)
    assert np.abs(pixels.astype(int) - shown(expected)).max() <= 1
    assert (info.width, info.height) == (36, 24)
    header = read_header(data)
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
    for read in (read_header, lambda data: decode_image(data, 16)):
        with pytest.raises(ImageError, match=message) as caught:
            read(data)
        assert caught.value.reason == "unsupported"
        assert "copy it again" not in str(caught.value)


def test_a_file_in_separate_planes_is_rotated_upright() -> None:
    planes = RGB16.transpose(2, 0, 1)
    data = encode(planes, photometric="rgb", planarconfig="separate", extratags=[(274, "H", 1, 6, True)])
    info, pixels = read_image(data)
    assert (info.width, info.height) == (24, 36)
    assert np.array_equal(pixels, np.rot90(RGB8, -1))


def test_a_truncated_file_has_the_reason_truncated() -> None:
    data = encode(RGB8, photometric="rgb")
    with pytest.raises(ImageError) as caught:
        decode_image(data[: len(data) // 2], None)
    assert caught.value.reason == "truncated"


def test_a_fully_transparent_image_is_marked() -> None:
    clear = np.dstack([RGB8, np.zeros_like(GREY8)])
    for data in (
        encode(clear, photometric="rgb", extrasamples=["unassalpha"]),
        encode(clear.astype(np.uint16), photometric="rgb", extrasamples=["unassalpha"]),
    ):
        assert read_image(data)[0].see_through
    assert not read_image(encode(RGB8, photometric="rgb"))[0].see_through


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")
@pytest.mark.parametrize(
    ("first_name", "second_name"),
    [
        ("00-rgb.png", "04-rgb16.tif"),
        ("04-rgb16.tif", "05-rgb16-planar.tif"),
        ("12-grey16.tif", "14-grey16-whiteiszero.tif"),
    ],
)
def test_the_same_picture_in_two_formats_has_the_same_pixels(first_name: str, second_name: str) -> None:
    first, second = (decode_image((CASES / name).read_bytes(), None) for name in (first_name, second_name))
    assert np.array_equal(first, second)


# ---- files that are small and costly

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES = 256, 257, 258, 259, 262, 273, 277
ROWS_PER_STRIP, BYTE_COUNTS, PLANAR, TILE_WIDTH, TILE_HEIGHT, EXTRAS = 278, 279, 284, 322, 323, 338
TILE_OFFSETS, TILE_BYTE_COUNTS = 324, 325
FORMS = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 12: "d"}


def tiff_of(tags: list[tuple[int, int, list[Any] | bytes]], pixels: bytes, num_pages: int = 1) -> bytes:
    """A little-endian TIFF of any tags (code, type, values), whose strip or tile starts at byte 8; equal values share bytes."""
    body = bytearray(b"II*\0" + bytes(4) + pixels)
    entries, places = b"", {}
    for code, kind, values in sorted(tags, key=lambda tag: tag[0]):
        packed = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{FORMS[kind]}", *values)
        if len(packed) > 4:
            place = struct.pack("<I", places.setdefault(packed, len(body)))
            body += packed if len(body) in places.values() else b""
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", code, kind, len(values)) + place
    for page in range(num_pages):
        directory_offset = len(body)
        body[4:8] = struct.pack("<I", directory_offset) if page == 0 else body[4:8]
        following = directory_offset + 6 + len(entries) if page + 1 < num_pages else 0
        body += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return bytes(body)


def rgba(side: int, pixels: bytes, compression: int = 8, **changes: Any) -> bytes:
    """A square RGBA image of 16 bits in one strip."""
    tags: dict[int, tuple[int, Any]] = {
        WIDTH: (4, [side]),
        HEIGHT: (4, [side]),
        BITS: (3, [16] * 4),
        COMPRESSION: (3, [compression]),
        PHOTOMETRIC: (3, [2]),
        OFFSETS: (4, [8]),
        SAMPLES: (3, [4]),
        ROWS_PER_STRIP: (4, [side]),
        BYTE_COUNTS: (4, [len(pixels)]),
        EXTRAS: (3, [2]),
    }
    tags.update({int(code[1:]): value for code, value in changes.items()})
    return tiff_of([(code, *value) for code, value in tags.items() if value], pixels)


def in_a_tile(width: int, height: int, pixels: bytes, **changes: Any) -> bytes:
    no_strips: dict[str, Any] = dict.fromkeys((f"t{OFFSETS}", f"t{BYTE_COUNTS}", f"t{ROWS_PER_STRIP}"))
    tiles = {f"t{TILE_WIDTH}": (4, [width]), f"t{TILE_HEIGHT}": (4, [height])}
    places = {f"t{TILE_OFFSETS}": (4, [8]), f"t{TILE_BYTE_COUNTS}": (4, [len(pixels)])}
    return rgba(10, pixels, **{**no_strips, **tiles, **places, **changes})


GREY_16 = {f"t{BITS}": (3, [16]), f"t{SAMPLES}": (3, [1]), f"t{PHOTOMETRIC}": (3, [1]), f"t{EXTRAS}": None}


def make_bombs() -> dict[str, bytes]:
    zeros = bytes(2**28)
    deflated = zlib.compress(zeros)
    row = bytes(10 * 8)
    return {
        "a strip that inflates": rgba(10, deflated),
        "a strip that inflates by LZMA": rgba(10, lzma.compress(zeros, preset=0), 34925),
        "a strip that inflates by PackBits": rgba(10, b"\x81\0" * 2**20, 32773),
        "a tile that inflates": in_a_tile(16, 16, deflated),
        "a tile as large as the world": in_a_tile(40_000, 40_000, deflated),
        "a tile as large as the world, for Pillow": in_a_tile(40_000, 40_000, deflated, **GREY_16),
        "a tag of many numbers": rgba(10, row * 10, 1, t65000=(4, bytes(2**23))),
        "many strips": rgba(
            10, row * 10, 1, **{f"t{OFFSETS}": (4, [8] * 300_000), f"t{BYTE_COUNTS}": (4, [80] * 300_000)}
        ),
        "the same strip again and again": rgba(
            1000,
            bytes(999_000 * 2),
            1,
            **GREY_16,
            **{
                f"t{ROWS_PER_STRIP}": (4, [999]),
                f"t{OFFSETS}": (4, [8] * 50_000),
                f"t{BYTE_COUNTS}": (4, [999_000 * 2] * 50_000),
            },
        ),
        "many tags": rgba(10, row * 10, 1, **{f"t{code}": (3, [1]) for code in range(40_000, 60_000)}),
        "tags that share bytes": rgba(
            10, bytes(2**20), 1, **{f"t{code}": (7, bytes(2**20)) for code in range(65000, 65400)}
        ),
    }


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc, of Linux")
PROBE = """
import json, sys, time
from pathlib import Path
from focus_ray.data.images import ImageError, decode_image, read_header
def resident(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024
results = {}
for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    for read in (read_header, lambda data: decode_image(data, None)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start, reason = resident("VmRSS"), time.perf_counter(), None
        try:
            read(data)
        except ImageError as error:
            reason = error.reason
        results.setdefault(path, []).append((reason, resident("VmHWM") - before, time.perf_counter() - start))
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
        allowed_mb = 16 + 3 * len(bombs[name]) / 2**20
        assert max(header_mb, mb) < allowed_mb, (name, outcomes)
        assert max(header_s, seconds) < 0.5, (name, outcomes)
        assert reason in ("too_large", "truncated", "unsupported"), (name, outcomes)


def test_a_mask_of_very_many_pages_is_refused() -> None:
    grey = [
        (WIDTH, 3, [4]),
        (HEIGHT, 3, [4]),
        (BITS, 3, [8]),
        (PHOTOMETRIC, 3, [1]),
        (OFFSETS, 4, [8]),
        (BYTE_COUNTS, 4, [16]),
    ]
    assert not read_mask(tiff_of(grey, bytes(16), num_pages=3)).any()  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="more than 1000 pages") as caught:
        read_mask(tiff_of(grey, bytes(16), num_pages=1001))  # type: ignore[arg-type]
    assert caught.value.reason == "too_large"


@linux
@pytest.mark.parametrize("compression", ["none", "deflate", "one strip", "planes", "tiles"])
def test_a_large_16_bit_image_needs_at_most_three_times_its_size(tmp_path: Path, compression: str) -> None:
    side = 1500
    values = np.zeros((side, side, 4), np.uint16)
    values[::7] = 40_000
    options: dict[str, Any] = {
        "none": {},
        "deflate": {"compression": "zlib", "rowsperstrip": 64},
        "one strip": {"compression": "zlib", "predictor": True, "rowsperstrip": side},
        "planes": {"compression": "zlib", "planarconfig": "separate"},
        "tiles": {"compression": "zlib", "tile": (256, 256)},
    }[compression]
    shaped = values.transpose(2, 0, 1) if compression == "planes" else values
    data = encode(shaped, photometric="rgb", extrasamples=["unassalpha"], **options)
    ((_, header_mb, _), (reason, mb, _)) = probe(tmp_path, {"large": data})["large"]
    assert reason is None
    assert header_mb < 4
    assert mb <= 3 * values.nbytes / 2**20


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("compression", ["zlib", "lzma"])
@pytest.mark.parametrize("layout", [{"rowsperstrip": 5}, {"tile": (16, 16)}, {"rowsperstrip": 24}])
def test_every_layout_and_compression_gives_the_same_pixels(
    layout: dict[str, Any], compression: str, predictor: bool, byteorder: str
) -> None:
    values = np.dstack([RGB16, ALPHA8.astype(np.uint16) * 257])
    options: dict[str, Any] = {"photometric": "rgb", "extrasamples": ["unassalpha"], "byteorder": byteorder}
    plain = encode(values, **options)
    compressed = encode(values, **options, **layout, compression=compression, predictor=predictor)
    assert np.array_equal(decode_image(compressed, None), decode_image(plain, None))
    planes = encode(values.transpose(2, 0, 1), **options, **layout, planarconfig="separate", compression=compression)
    assert np.array_equal(decode_image(planes, None), decode_image(plain, None))


def test_packbits_gives_the_same_pixels() -> None:
    image, plain, packed = Image.fromarray(np.dstack([RGB8, ALPHA8])), io.BytesIO(), io.BytesIO()
    image.save(plain, "TIFF")
    image.save(packed, "TIFF", compression="packbits")
    assert np.array_equal(decode_image(packed.getvalue(), None), decode_image(plain.getvalue(), None))
