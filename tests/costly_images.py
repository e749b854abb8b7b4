"""Images for attacks: TIFF bombs, and JPEG images of many progressive scans, small as files and costly to decode."""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from typing import Any

from PIL import Image

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
        directory = len(body)
        body[4:8] = struct.pack("<I", directory) if page == 0 else body[4:8]
        following = directory + 6 + len(entries) if page + 1 < num_pages else 0
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
    deflated = zlib.compress(zeros, 1)
    row = bytes(10 * 8)
    return {
        "a strip that inflates": rgba(10, deflated),
        "a strip that inflates by LZMA": rgba(10, lzma.compress(zeros[: 2**26], preset=0), 34925),
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


def many_pages(num_pages: int) -> bytes:
    """A grey TIFF of 4 x 4 pixels whose pages share their pixels."""
    tags: list[tuple[int, int, list[Any] | bytes]] = [
        (WIDTH, 3, [4]),
        (HEIGHT, 3, [4]),
        (BITS, 3, [8]),
        (PHOTOMETRIC, 3, [1]),
        (OFFSETS, 4, [8]),
        (BYTE_COUNTS, 4, [16]),
    ]
    return tiff_of(tags, bytes(16), num_pages)


def jpeg_of_scans(side: int, num_scans: int) -> bytes:
    """A square progressive JPEG whose last scan is repeated, as the format allows."""
    sink = io.BytesIO()
    Image.new("L", (side, side)).save(sink, "JPEG", progressive=True)
    data = sink.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * (num_scans - data.count(b"\xff\xda") + 1) + data[-2:]
