"""What a TIFF file's tags say of its pixels, and what is to be done with them.

Pillow reads the everyday kinds rightly and some others wrongly in silence, so the tags decide: Pillow reads a file, tifffile
reads it, or it is refused by what it is.

Files may come from strangers. `_check_directory` therefore bounds tags, strips and tiles before either library parses them, and
strips are inflated here, because tifffile (2026.3) inflates a strip to any size.
"""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tifffile

SIGNS = (b"II*\x00", b"MM\x00*")
_PHOTOMETRIC = {
    0: "WhiteIsZero",
    1: "BlackIsZero",
    2: "RGB",
    3: "palette",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
}
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_ALPHA = (1, 2)  # extra samples: associated, that is multiplied already, and not

_MAX_PAGES = 1000
_MAX_TAGS = 1024  # of a page; cameras, microscopes and Photoshop write fewer than 100
_MAX_NUMBERS = 2**18  # in one tag, such as the offsets of strips; each becomes a Python object
_MAX_TILE_PADDING_BYTES = 2**24  # a small image may lie in a large tile
_MAX_LZMA_BYTES = 2**28  # memory of the LZMA decoder, whose dictionary the file chooses
_MAX_JPEG_SCANS = 100  # libtiff (4.7) itself allows as many in new-style JPEG, and any number in old-style JPEG
_BLOCK_VALUES = 2**20  # samples converted at once, so that wide integers need little memory

_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # by type of a tag
_BYTE_TYPES = (1, 2, 6, 7)  # their values are copied, not converted
_INTEGERS = {1: "B", 3: "H", 4: "I"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS_PER_STRIP, _PLANAR = 256, 257, 258, 259, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT, _IMAGE_DEPTH, _TILE_DEPTH = 322, 323, 32997, 32998
_LAYOUT = (
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS_PER_STRIP, _PLANAR),
    *(_TILE_WIDTH, _TILE_HEIGHT, _IMAGE_DEPTH, _TILE_DEPTH),
)
_SEGMENT_TAGS = (273, 279, 324, 325)  # offsets and byte counts of strips and tiles


class TiffError(ValueError):
    """A TIFF file that is not read; the message says what it is and what to do.

    reason: as of `images.ImageError`.
    """

    def __init__(self, message: str, reason: Literal["unsupported", "too_large", "truncated"] = "unsupported") -> None:
        super().__init__(message, reason)  # both in args, so that it survives pickle
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Tags:
    """bits: a sample.  kind: of the samples.  samples: a pixel.  extras: what the samples beyond the colours are."""

    width: int
    height: int
    bits: int
    kind: Literal["unsigned", "signed", "float", "complex"]
    samples: int
    photometric: int
    planar: bool
    extras: tuple[int, ...]
    orientation: int
    compression: str
    big_endian: bool

    @property
    def words(self) -> str:
        colours = _PHOTOMETRIC.get(self.photometric, f"photometric {self.photometric}")
        planes = " in separate planes" if self.planar and self.samples > 1 else ""
        return (
            f"{self.bits}-bit {self.kind} {colours} of {self.samples} sample(s){planes}, compression {self.compression}"
        )


def list_pages(data: bytes) -> list[int]:
    """Numbers of the full pages of a file, from 0, without reduced copies of them.

    Raises: TiffError: the pages are damaged or too many, or the file holds images or samples that are not pages, which nothing
        here reads.
    """
    places, is_whole = _find_directories(data)
    for place in places:
        _check_directory(data, place)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        try:
            pages = list(file.pages)
            shapes = [series.shape for series in file.series]
        except Exception as error:  # whatever a parser meets in damaged bytes
            raise TiffError(f"the pages of the TIFF are damaged ({error}): copy the file again") from error
        if not is_whole:
            raise TiffError(f"the TIFF is cut off after page {len(pages)}: copy the file again")
        values = sum(int(np.prod(page.shape)) for page in pages)
        if sum(int(np.prod(shape)) for shape in shapes) > values or any(page.imagedepth > 1 for page in pages):
            raise TiffError("a TIFF that holds a stack without a page for each image: save each image as a page")
        if any(0 in map(int, page.extrasamples or ()) for page in pages):
            raise TiffError("a TIFF with samples that are neither colours nor alpha: save each region as a page")
        full = [number for number, page in enumerate(pages) if not page.is_reduced]
    return full or [0]


def _byte_order(data: bytes) -> Literal["little", "big"]:
    return "big" if data.startswith(b"MM") else "little"


def _find_directories(data: bytes) -> tuple[list[int], bool]:
    """Returns the offset of each page's directory, the last perhaps cut off, and whether the chain ends within the file.

    tifffile stops at a broken link without an error.

    Raises: TiffError: more than `_MAX_PAGES`.
    """
    order = _byte_order(data)
    place = int.from_bytes(data[4:8], order)
    places: dict[int, None] = {}
    while place:
        if len(places) == _MAX_PAGES:
            raise TiffError(f"more than {_MAX_PAGES} pages in a TIFF: save fewer pages in a file", "too_large")
        count = int.from_bytes(data[place : place + 2], order)
        link = place + 2 + 12 * count
        if place in places or not count:
            return list(places), False
        places[place] = None
        if link + 4 > len(data):
            return list(places), False
        place = int.from_bytes(data[link : link + 4], order)
    return list(places), True


def _check_directory(data: bytes, place: int) -> None:
    """Bounds what reading a page can cost, by its directory alone: tags, strips and tiles. `place` is an offset in bytes.

    A directory that is damaged otherwise passes: the libraries say so.

    Raises: TiffError: too many or too large tags, more strips or tiles than the image has, or tiles much larger than the image.
    """
    order = ">" if _byte_order(data) == "big" else "<"
    (count,) = struct.unpack_from(order + "H", data, place)
    if count > _MAX_TAGS:
        raise TiffError(f"a TIFF page of {count} tags; at most {_MAX_TAGS} are read: save it without them", "too_large")
    layout: dict[int, int] = {}
    num_segments, tag_bytes = 0, 0
    num_whole = (len(data) - place - 2) // 12  # Pillow reads a directory as far as it goes
    for number in range(min(count, num_whole)):
        entry = place + 2 + 12 * number
        code, kind, length = struct.unpack_from(order + "HHI", data, entry)
        if length > _MAX_NUMBERS and kind not in _BYTE_TYPES:
            raise TiffError(
                f"tag {code} of the TIFF has {length} values; at most {_MAX_NUMBERS} are read: save it in fewer strips",
                "too_large",
            )
        size = _VALUE_BYTES.get(kind, 0) * length
        tag_bytes += size if size > 4 else 0
        if code in _SEGMENT_TAGS:
            num_segments = max(num_segments, length)
        if code not in _LAYOUT or not length:
            continue
        if kind not in _INTEGERS or code in layout:  # libraries differ in what they make of such a tag
            raise TiffError(f"tag {code} of the TIFF is given twice or is no integer: save the image again")
        values = entry + 8
        if size > 4:
            (values,) = struct.unpack_from(order + "I", data, values)
            if values + size > len(data):
                continue
        layout[code] = max(struct.unpack_from(f"{order}{length}{_INTEGERS[kind]}", data, values))
    if tag_bytes > len(data):
        raise TiffError("the tags of the TIFF are larger than the file: copy it again", "truncated")
    _check_layout(data, layout, num_segments)


def _check_layout(data: bytes, layout: dict[int, int], num_segments: int) -> None:
    """Raises: TiffError: see `_check_directory`. layout: code of a tag -> its largest value."""
    width, height = layout.get(_WIDTH, 0), layout.get(_HEIGHT, 0)
    if not width or not height:
        return
    if max(layout.get(_IMAGE_DEPTH, 1), layout.get(_TILE_DEPTH, 1)) > 1:
        raise TiffError("a TIFF that holds a stack without a page for each image: save each image as a page")
    samples, is_planar = layout.get(_SAMPLES, 1), layout.get(_PLANAR, 1) == 2
    if _TILE_WIDTH in layout or _TILE_HEIGHT in layout:
        tile_width, tile_height = layout.get(_TILE_WIDTH, 0), layout.get(_TILE_HEIGHT, 0)
        if not tile_width or not tile_height:
            raise TiffError("a TIFF with tiles of no size: save the image again")
        across, down = -(-width // tile_width), -(-height // tile_height)
        pixel_bytes = samples * layout.get(_BITS, 1) / 8
        padded_bytes = across * tile_width * down * tile_height * pixel_bytes
        if padded_bytes > 2 * width * height * pixel_bytes + _MAX_TILE_PADDING_BYTES:
            raise TiffError(
                f"tiles of {tile_width} x {tile_height} pixels in a TIFF of {width} x {height}: save it with smaller tiles",
                "too_large",
            )
        expected = across * down
    else:
        expected = -(-height // max(1, min(height, layout.get(_ROWS_PER_STRIP, height))))
    expected *= samples if is_planar else 1
    if num_segments > expected > 1:  # of a single strip Pillow reads the last offset alone
        raise TiffError(f"a TIFF with {num_segments} strips or tiles where {expected} are needed: save the image again")
    if layout.get(_COMPRESSION) == 6 and data.count(b"\xff\xda") > _MAX_JPEG_SCANS + expected:
        raise TiffError(f"a TIFF of more than {_MAX_JPEG_SCANS} JPEG scans: save it without compression", "too_large")


def read_tags(data: bytes, number: int = 0) -> Tags | None:
    """The tags of a page; None where the file is so damaged that there are none.

    Raises: TiffError: samples that differ in bits, or more to read than a page of its size needs.
    """
    places, _ = _find_directories(data)
    for place in {*places[:1], *places[number : number + 1]}:  # tifffile parses the first in any case
        _check_directory(data, place)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[number]
            tag = page.tags.get(339)
            numbers = {1} if tag is None else {*np.atleast_1d(tag.value).tolist()}
            known: dict[int, Literal["unsigned", "signed", "float", "complex"]] = {
                **{1: "unsigned", 2: "signed", 3: "float", 4: "unsigned"},
                **{5: "complex", 6: "complex"},
            }
            bits = {*np.atleast_1d(page.bitspersample).tolist()}
            if len(bits) != 1 or len(numbers) != 1:
                raise TiffError(
                    f"a TIFF whose samples differ in bits ({sorted(bits)}): save it with 8 or 16 bits a sample"
                )
            orientation = page.tags.get(274)
            return Tags(
                int(page.imagewidth),
                int(page.imagelength),
                int(bits.pop()),
                known.get(int(numbers.pop()), "complex"),
                int(page.samplesperpixel),
                int(page.photometric),
                int(page.planarconfig or 1) == 2,
                tuple(int(extra) for extra in page.extrasamples or ()),
                1 if orientation is None else int(orientation.value),
                str(getattr(page.compression, "name", page.compression)),
                data.startswith(b"MM"),
            )
    except TiffError:
        raise
    except Exception:  # whatever a parser meets in damaged bytes
        return None


def reader_of(tags: Tags) -> Literal["Pillow", "Pillow, inverted", "tifffile"]:
    """Who reads such a file rightly. Raises: TiffError: nobody here."""
    if tags.kind == "float" or tags.kind == "complex":
        raise TiffError(f"a floating-point image has no set range ({tags.words}): save it as 8-bit or 16-bit")
    if tags.kind == "signed":
        raise TiffError(f"signed values have no set range ({tags.words}): save it as unsigned 8-bit or 16-bit")
    if tags.bits > 16:
        raise TiffError(f"{tags.bits}-bit values have no set range ({tags.words}): save the image as 8-bit or 16-bit")
    if tags.photometric not in _PHOTOMETRIC:
        raise TiffError(f"this kind of colour is not read ({tags.words}): save it as grey or RGB")
    extra = tags.samples - _COLOURS[tags.photometric]
    if extra < 0 or extra > 3:
        raise TiffError(f"{tags.samples} samples a pixel are not read ({tags.words}): save it as grey or RGB")
    if tags.bits == 16:
        if tags.photometric in (0, 1) and tags.samples == 1:
            if tags.photometric == 1:
                return "Pillow"
            return "tifffile" if tags.big_endian else "Pillow, inverted"  # Pillow does not know the former at all
        if tags.photometric in (2, 5) and not tags.planar and not extra:
            return "Pillow"
        if tags.photometric in (0, 1, 2):
            return "tifffile"
    elif tags.bits == 8:
        if tags.photometric in (0, 1, 2) and (extra or tags.planar):
            return "tifffile"
        if not (extra or tags.planar):
            return "Pillow"
    elif (tags.bits in (1, 2, 4) and tags.samples == 1) or (
        tags.bits == 12 and tags.samples == 1 and tags.photometric == 1
    ):
        return "Pillow"
    raise TiffError(f"this kind of TIFF is not read ({tags.words}): save it as 8-bit grey or RGB")


def read_pixels(data: bytes, tags: Tags, page: int = 0) -> tuple[npt.NDArray[np.uint8], bool]:
    """(H, W) grey or (H, W, 3) RGB, not yet turned, alpha composed over black; and whether all of it is transparent.

    Raises: TiffError: it cannot be read.
    """
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            samples = _read_samples(data, file.pages[page])
    except TiffError:
        raise
    except Exception as error:  # whatever a parser meets in damaged bytes
        raise TiffError(f"{tags.words}: cannot be read here ({error}): save it without compression") from error
    is_planar = tags.planar and tags.samples > 1
    samples = np.moveaxis(samples[..., 0], 0, -1) if is_planar else samples[0]
    if samples.shape != (tags.height, tags.width, tags.samples):
        raise TiffError(f"{tags.words}: its pixels have the shape {samples.shape}: save it as 8-bit grey or RGB")
    full = 2**tags.bits - 1
    colours = _COLOURS[tags.photometric]
    alpha = next((colours + number for number, kind in enumerate(tags.extras) if kind in _ALPHA), None)
    is_multiplied = alpha is not None and tags.extras[alpha - colours] == 1

    def show(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        shown: npt.NDArray[Any] = block[:, :, :colours].astype(np.uint32)  # holds 65535 * 65535
        if tags.photometric == 0:
            shown = full - shown
        if alpha is not None and not is_multiplied:
            shown = shown * block[:, :, alpha : alpha + 1] // full
        if tags.bits == 16:  # as elsewhere: grey by its full range, of colour the high byte
            shown = (shown * 255 + 32767) // 65535 if colours == 1 else shown >> 8
        return shown

    pixels = convert_rows(samples, show, (tags.height, tags.width, colours), np.uint8)
    see_through = alpha is not None and not samples[:, :, alpha].any()
    return (pixels[:, :, 0] if colours == 1 else pixels), see_through


def convert_rows(
    values: npt.NDArray[Any],
    convert: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
) -> npt.NDArray[Any]:
    """Returns `convert(values)` of `shape` and `dtype`, computed over blocks of rows, so that wide types need little memory."""
    converted = np.empty(shape, dtype)
    rows = max(1, _BLOCK_VALUES // max(1, values[:1].size))
    for top in range(0, len(values), rows):
        converted[top : top + rows] = convert(values[top : top + rows])
    return converted


def _read_samples(data: bytes, page: Any) -> npt.NDArray[Any]:
    """Samples of a `tifffile.TiffPage` of 8 or 16 bits: (planes, H, W, samples of a plane), perhaps a view of `data`.

    Raises: TiffError: a strip or tile inflates to more than its size, or is cut off.  ValueError: its compression is not read.
    """
    planes, _, height, width, num_samples = page.shaped
    dtype = np.dtype(page.parent.byteorder + page.dtype.char)
    if page.is_contiguous and page.predictor == 1 and page.fillorder == 1:
        count, offset = planes * height * width * num_samples, page.dataoffsets[0]
        if offset + count * dtype.itemsize > len(data):
            raise TiffError("the TIFF is cut off within its pixels: copy it again", "truncated")
        return np.frombuffer(data, dtype, count, offset).reshape(planes, height, width, num_samples)
    inflate = _INFLATERS.get(int(page.compression))
    if inflate is None or page.predictor not in (1, 2):
        raise ValueError(f"compression {page.compression!s} with predictor {page.predictor!s} is not read")
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
    num_segments = planes * -(-height // rows) * -(-width // columns)
    is_reversed, page.fillorder = page.fillorder == 2, 1
    page.compression = 1  # `decode` then gets inflated bytes, and still knows predictor, byte order and place
    samples = np.zeros((planes, height, width, num_samples), dtype.newbyteorder("="))
    for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=False)):
        if number == num_segments:
            break
        if not count:  # nothing stored: zeros
            continue
        encoded = data[offset : offset + count]
        if len(encoded) < count:
            raise TiffError("the TIFF is cut off within its pixels: copy it again", "truncated")
        if is_reversed:
            encoded = encoded.translate(_REVERSED_BITS)
        inflated = inflate(
            encoded, 2 * rows * columns * num_samples * dtype.itemsize
        )  # some programs pad the last strip
        segment, (plane, _, top, left, _), _ = page.decode(inflated, number)
        if segment.shape == samples.shape:  # the whole image: not copied
            return np.asarray(segment)
        target = samples[plane, top : top + rows, left : left + columns]
        target[...] = segment[0, : target.shape[0], : target.shape[1]]
    return samples


_REVERSED_BITS = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def _bomb(limit: int) -> TiffError:
    return TiffError(
        f"a strip or tile of the TIFF inflates to more than {limit} bytes, twice its size: save the image again",
        "too_large",
    )


def _take_stored(data: bytes, limit: int) -> bytes:
    return data[:limit]


def _inflate_deflate(data: bytes, limit: int) -> bytes:
    inflater = zlib.decompressobj()
    inflated = inflater.decompress(data, limit)
    if inflater.unconsumed_tail and inflater.decompress(inflater.unconsumed_tail, 1):
        raise _bomb(limit)
    return inflated


def _inflate_lzma(data: bytes, limit: int) -> bytes:
    inflater = lzma.LZMADecompressor(memlimit=_MAX_LZMA_BYTES)
    inflated = inflater.decompress(data, limit)
    if not (inflater.eof or inflater.needs_input) and inflater.decompress(b"", 1):
        raise _bomb(limit)
    return inflated


def _inflate_packbits(data: bytes, limit: int) -> bytes:
    inflated, place = bytearray(), 0
    while place + 1 < len(data):
        code = data[place]
        if code < 128:
            inflated += data[place + 1 : place + code + 2]
            place += code + 2
        else:
            if code > 128:  # 128 stands for nothing
                inflated += data[place + 1 : place + 2] * (257 - code)
            place += 2 if code > 128 else 1
        if len(inflated) > limit:
            raise _bomb(limit)
    return bytes(inflated)


# (encoded, most bytes) -> inflated bytes. Raises: TiffError: there are more.
_INFLATERS: dict[int, Callable[[bytes, int], bytes]] = {
    1: _take_stored,
    8: _inflate_deflate,
    32773: _inflate_packbits,
    32946: _inflate_deflate,
    34925: _inflate_lzma,
}
