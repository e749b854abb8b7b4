"""Reads the tags of TIFF files, chooses the library for decoding, and decodes the files that Pillow misreads.

Pillow decodes common TIFFs correctly, but decodes some kinds wrongly without an error. So the tags of a file decide: Pillow
decodes the file, tifffile decodes it, or it is refused with a message that names its kind.

Files may be made by an attacker. Therefore, `_check_page_directory` limits tags, strips and tiles before a library parses them.
And strips are decompressed here, because tifffile (2026.3) does not limit the size of a decompressed strip.

A TIFF has one directory for each page: the list of the page's tags. A sample is one channel value of a pixel. Strips and tiles
("segments") are parts of the pixels that are compressed separately.
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

from focus_ray.data.image_errors import ImageError

TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*")
# photometric tag -> name of the kind of colour, and its number of samples
_COLOURS = {
    0: ("WhiteIsZero", 1),
    1: ("BlackIsZero", 1),
    2: ("RGB", 3),
    3: ("palette", 1),
    5: ("CMYK", 4),
    6: ("YCbCr", 3),
    8: ("CIELab", 3),
}
_KINDS: dict[int, Literal["unsigned", "signed", "float"]] = {1: "unsigned", 2: "signed", 3: "float", 4: "unsigned"}
_MULTIPLIED_ALPHA, _ALPHA = (
    1,
    2,
)  # kinds of extra samples that are alpha: the colours are already multiplied by it, or not

_MAX_PAGES = 1000
_MAX_TAGS = 1024  # in a page; cameras, microscopes and Photoshop write fewer than 100
_MAX_NUMBERS = 2**18  # in one tag, such as the offsets of strips; each number becomes a Python object
_MAX_TILE_PADDING_BYTES = 2**24  # a small image may be stored in one large tile
_MAX_LZMA_BYTES = 2**28  # memory of the LZMA decoder; the file chooses the size of its dictionary
_MAX_JPEG_SCANS = 100  # the limit of libtiff (4.7) for new-style JPEG; it has no limit for old-style JPEG
_BLOCK_VALUES = 2**20  # samples that are converted at a time, so that wide integers need little memory

# bytes of a value, by number type of a tag
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BYTE_TYPES = (1, 2, 6, 7)  # number types whose values are copied as bytes, not converted to Python objects
_INTEGERS = {1: "B", 3: "H", 4: "I"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS_PER_STRIP, _PLANAR = 256, 257, 258, 259, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT, _IMAGE_DEPTH, _TILE_DEPTH = 322, 323, 32997, 32998
_LAYOUT = {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS_PER_STRIP, _PLANAR}
_LAYOUT |= {_TILE_WIDTH, _TILE_HEIGHT, _IMAGE_DEPTH, _TILE_DEPTH}
_SEGMENT_TAGS = (273, 279, 324, 325)  # offsets and byte counts of strips and tiles
_STACK = "a TIFF that holds a stack without a page for each image: save each image as a page"
_CUT_OFF = "the TIFF is cut off within its pixels: copy it again"


@dataclass(frozen=True)
class TiffTags:
    """The tags (header fields) of one page of a TIFF that describe how its pixels are stored.

    Attributes:
        width, height: in pixels, before rotation.
        bits: bits of a sample. A sample is one channel value of a pixel.
        kind: number type of the samples.
        samples: samples per pixel.
        photometric: meaning of the colours, a key of `_COLOURS` or an unknown number.
        planar: whether each channel is stored in a separate plane.
        extras: for each sample after the colours, its meaning, such as `_ALPHA`.
        orientation: rotation, 1 to 8, with the meaning of EXIF.
        compression: tifffile's name of the compression.
        big_endian: whether the most significant byte of a number comes first.
    """

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
    def description(self) -> str:
        """The bit depth, number type, colours and compression of the page in words, for error messages."""
        colours, _ = _COLOURS.get(self.photometric, (f"photometric {self.photometric}", 0))
        planes = " in separate planes" if self.planar and self.samples > 1 else ""
        return (
            f"{self.bits}-bit {self.kind} {colours} of {self.samples} sample(s){planes}, compression {self.compression}"
        )


def list_full_size_pages(data: bytes) -> list[int]:
    """Returns the numbers of the pages of a TIFF, from 0, without pages that are reduced copies of other pages.

    Raises: ImageError: the pages are damaged or too many, a page is refused by `_check_page_directory`, or the file has images or
        samples that are not stored as pages.
    """
    offsets, is_whole = _find_page_directories(data)
    for offset in offsets:
        _check_page_directory(data, offset)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        try:
            pages = list(file.pages)
            shapes = [series.shape for series in file.series]
        except Exception as error:  # tifffile raises many types of errors for damaged bytes
            message = f"the pages of the TIFF are damaged ({error}): copy the file again"
            raise ImageError("unsupported", message) from error
        if not is_whole:
            raise ImageError("unsupported", f"the TIFF is cut off after page {len(pages)}: copy the file again")
        values = sum(int(np.prod(page.shape)) for page in pages)
        if sum(int(np.prod(shape)) for shape in shapes) > values or any(page.imagedepth > 1 for page in pages):
            raise ImageError("unsupported", _STACK)
        if any(0 in map(int, page.extrasamples or ()) for page in pages):
            message = "a TIFF with samples that are neither colours nor alpha: save each region as a page"
            raise ImageError("unsupported", message)
        full = [number for number, page in enumerate(pages) if not page.is_reduced]
    return full or [0]


def _read_byte_order(data: bytes) -> Literal["little", "big"]:
    """Returns the byte order of the numbers in a TIFF."""
    return "big" if data.startswith(b"MM") else "little"


def _find_page_directories(data: bytes) -> tuple[list[int], bool]:
    """Finds the directories of all pages of a TIFF. A directory is the list of a page's tags, with a link to the next directory.

    tifffile stops at a broken link without an error. So this function also reports whether the links are intact.

    Args: data: bytes of the file.

    Returns: the offset of each directory in bytes; and whether the last link ends the list correctly. If the file is cut off,
        the last directory may be incomplete.

    Raises: ImageError: the file has more than `_MAX_PAGES` pages.
    """
    order = _read_byte_order(data)
    offset = int.from_bytes(data[4:8], order)
    offsets: dict[int, None] = {}
    while offset:
        if len(offsets) == _MAX_PAGES:
            raise ImageError("too_large", f"more than {_MAX_PAGES} pages in a TIFF: save fewer pages in a file")
        count = int.from_bytes(data[offset : offset + 2], order)
        link = offset + 2 + 12 * count
        if offset in offsets or not count:
            return list(offsets), False
        offsets[offset] = None
        if link + 4 > len(data):
            return list(offsets), False
        offset = int.from_bytes(data[link : link + 4], order)
    return list(offsets), True


def _check_page_directory(data: bytes, offset: int) -> None:
    """Checks a page's directory (its list of tags), so that decoding the page cannot take much time or memory.

    Only the directory is read. A directory with other damage passes, because the libraries report such damage.

    Args:
        data: bytes of the file.
        offset: position of the directory in bytes.

    Raises: ImageError: the page has too many or too large tags, more strips or tiles than its size needs, or tiles that are much
        larger than the image; a tag is given twice or has a wrong type; the page is a stack, or has too many JPEG scans.
    """
    order = ">" if _read_byte_order(data) == "big" else "<"
    (count,) = struct.unpack_from(order + "H", data, offset)
    if count > _MAX_TAGS:
        raise ImageError("too_large", f"a TIFF page of {count} tags: save it with at most {_MAX_TAGS}")
    layout: dict[int, int] = {}
    num_segments, tag_bytes = 0, 0
    num_whole = (len(data) - offset - 2) // 12  # Pillow also reads a directory whose end is cut off
    for number in range(min(count, num_whole)):
        entry = offset + 2 + 12 * number
        code, kind, length = struct.unpack_from(order + "HHI", data, entry)
        if length > _MAX_NUMBERS and kind not in _BYTE_TYPES:
            message = f"tag {code} of the TIFF has {length} values: save it in strips with at most {_MAX_NUMBERS}"
            raise ImageError("too_large", message)
        size = _VALUE_BYTES.get(kind, 0) * length
        tag_bytes += size if size > 4 else 0
        if code in _SEGMENT_TAGS:
            num_segments = max(num_segments, length)
        if code not in _LAYOUT or not length:
            continue
        if kind not in _INTEGERS or code in layout:  # libraries interpret such a tag in different ways
            message = f"tag {code} of the TIFF is given twice or is no integer: save the image again"
            raise ImageError("unsupported", message)
        values = entry + 8
        if size > 4:
            (values,) = struct.unpack_from(order + "I", data, values)
            if values + size > len(data):
                continue
        layout[code] = max(struct.unpack_from(f"{order}{length}{_INTEGERS[kind]}", data, values))
    if tag_bytes > len(data):
        raise ImageError("truncated", "the tags of the TIFF are larger than the file: copy it again")
    _check_segment_layout(data, layout, num_segments)


def _check_segment_layout(data: bytes, layout: dict[int, int], num_segments: int) -> None:
    """Checks that the strips or tiles of a page (parts of its pixels) fit the size of the image, see `_check_page_directory`.

    Args:
        data: bytes of the file.
        layout: code of a tag -> the largest value of the tag.
        num_segments: number of strips or tiles that the directory lists.

    Raises: ImageError: the strips or tiles do not fit the size of the image, or are too large; the page is a stack of images; or
        the file has too many JPEG scans.
    """
    width, height = layout.get(_WIDTH, 0), layout.get(_HEIGHT, 0)
    if not width or not height:
        return
    if max(layout.get(_IMAGE_DEPTH, 1), layout.get(_TILE_DEPTH, 1)) > 1:
        raise ImageError("unsupported", _STACK)
    samples = layout.get(_SAMPLES, 1)
    if _TILE_WIDTH in layout or _TILE_HEIGHT in layout:
        tile_width, tile_height = layout.get(_TILE_WIDTH, 0), layout.get(_TILE_HEIGHT, 0)
        if not tile_width or not tile_height:
            raise ImageError("unsupported", "a TIFF with tiles of no size: save the image again")
        across, down = -(-width // tile_width), -(-height // tile_height)
        pixel_bytes = samples * layout.get(_BITS, 1) / 8
        padded_bytes = across * tile_width * down * tile_height * pixel_bytes
        if padded_bytes > 2 * width * height * pixel_bytes + _MAX_TILE_PADDING_BYTES:
            tiles = f"tiles of {tile_width} x {tile_height} pixels in a TIFF of {width} x {height}"
            raise ImageError("too_large", f"{tiles}: save it with smaller tiles")
        expected = across * down
    else:
        expected = -(-height // max(1, min(height, layout.get(_ROWS_PER_STRIP, height))))
    expected *= samples if layout.get(_PLANAR, 1) == 2 else 1
    if num_segments > expected > 1:  # if one strip is expected, Pillow reads only the last offset
        message = f"a TIFF with {num_segments} strips or tiles where {expected} are needed: save the image again"
        raise ImageError("unsupported", message)
    if layout.get(_COMPRESSION) == 6 and data.count(b"\xff\xda") > _MAX_JPEG_SCANS + expected:
        message = f"a TIFF of more than {_MAX_JPEG_SCANS} JPEG scans: save it without compression"
        raise ImageError("too_large", message)


def read_page_tags(data: bytes, number: int = 0) -> TiffTags | None:
    """Reads the tags of a page of a TIFF. Returns None if the file is so damaged that its tags cannot be read.

    Args:
        data: bytes of the file.
        number: number of the page, from 0.

    Raises: ImageError: the samples of a pixel differ in bits or number type, or the page is refused by `_check_page_directory`.
    """
    offsets, _ = _find_page_directories(data)
    for offset in {*offsets[:1], *offsets[number : number + 1]}:  # tifffile always parses the first directory
        _check_page_directory(data, offset)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[number]
            kinds, orientations = (
                np.unique(1 if tag is None else tag.value).tolist() for tag in map(page.tags.get, (339, 274))
            )
            bits = np.unique(page.bitspersample).tolist()
            if len(bits) != 1 or len(kinds) != 1:
                message = f"a TIFF whose samples differ in bits ({bits}): save it with 8 or 16 bits a sample"
                raise ImageError("unsupported", message)
            return TiffTags(
                int(page.imagewidth),
                int(page.imagelength),
                int(bits[0]),
                _KINDS.get(kinds[0], "complex"),
                int(page.samplesperpixel),
                int(page.photometric),
                int(page.planarconfig or 1) == 2,
                tuple(int(extra) for extra in page.extrasamples or ()),
                int(orientations[0]),
                str(getattr(page.compression, "name", page.compression)),
                data.startswith(b"MM"),
            )
    except ImageError:
        raise
    except Exception:  # tifffile raises many types of errors for damaged bytes
        return None


def choose_decoding_library(tags: TiffTags) -> Literal["Pillow", "tifffile"]:
    """Returns the name of the library that decodes a TIFF with these tags correctly.

    Raises: ImageError: no library decodes this kind of TIFF correctly. The message names the kind and the remedy.
    """
    refusals = {
        "a floating-point image has no set range": tags.kind in ("float", "complex"),
        "signed values have no set range": tags.kind == "signed",
        f"{tags.bits}-bit values have no set range": tags.bits > 16,
        "this kind of colour is not read": tags.photometric not in _COLOURS,
    }
    for problem, is_refused in refusals.items():
        if is_refused:
            message = f"{problem} ({tags.description}): save it as unsigned 8-bit or 16-bit grey or RGB"
            raise ImageError("unsupported", message)
    extra = tags.samples - _COLOURS[tags.photometric][1]
    is_grey, is_plain = tags.photometric in (0, 1), not extra and not tags.planar
    if tags.bits in (8, 16) and 0 <= extra <= 3:
        if is_grey and tags.bits == 16 and tags.samples == 1:
            # Pillow cannot open the big-endian kind of WhiteIsZero
            return "tifffile" if tags.photometric == 0 and tags.big_endian else "Pillow"
        if is_plain and (tags.bits == 8 or tags.photometric in (2, 5)):
            return "Pillow"
        if is_grey or tags.photometric == 2:
            return "tifffile"
    elif tags.samples == 1 and not extra and (tags.bits in (1, 2, 4) or (tags.bits == 12 and tags.photometric == 1)):
        return "Pillow"
    message = f"this kind of TIFF is not read ({tags.description}): save it as 8-bit grey or RGB"
    raise ImageError("unsupported", message)


def decode_tiff_page(data: bytes, tags: TiffTags, page: int = 0) -> tuple[npt.NDArray[np.uint8], bool]:
    """Decodes a page of a TIFF with the library tifffile.

    Args:
        data: bytes of the file.
        tags: tags of the page, from `read_page_tags`.
        page: number of the page, from 0.

    Returns: pixels (H, W) grey or (H, W, 3) RGB, uint8, before rotation, with transparent pixels composed over black; and
        whether the page has an alpha channel that is zero everywhere.

    Raises: ImageError: the pixels cannot be decoded.
    """
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            samples = _decompress_samples(data, file.pages[page])
    except ImageError:
        raise
    except Exception as error:  # tifffile raises many types of errors for damaged bytes
        message = f"{tags.description}: cannot be read here ({error}): save it without compression"
        raise ImageError("unsupported", message) from error
    is_planar = tags.planar and tags.samples > 1
    samples = np.moveaxis(samples[..., 0], 0, -1) if is_planar else samples[0]
    if samples.shape != (tags.height, tags.width, tags.samples):
        message = f"{tags.description}: its pixels have the shape {samples.shape}: save it as 8-bit grey or RGB"
        raise ImageError("unsupported", message)
    full = 2**tags.bits - 1
    _, colours = _COLOURS[tags.photometric]
    alphas = [number for number, kind in enumerate(tags.extras) if kind in (_MULTIPLIED_ALPHA, _ALPHA)]
    alpha = samples[:, :, colours + alphas[0]] if alphas else None

    def convert_to_8_bits(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Converts samples (h, W, samples) to colours (h, W, 1 or 3) from 0 to 255; the number type stays uint32."""
        values: npt.NDArray[Any] = block[:, :, :colours].astype(np.uint32)  # large enough for 65535 * 65535
        if tags.photometric == 0:
            values = full - values
        if alphas and tags.extras[alphas[0]] == _ALPHA:
            values = values * block[:, :, colours + alphas[0], None] // full
        if tags.bits == 16:  # the rules of `images`: grey is scaled by its full range, colour keeps its high byte
            values = (values * 255 + 32767) // 65535 if colours == 1 else values >> 8
        return values

    pixels = convert_row_blocks(samples, convert_to_8_bits, (tags.height, tags.width, colours), np.uint8)
    return (pixels[:, :, 0] if colours == 1 else pixels), alpha is not None and not alpha.any()


def convert_row_blocks(
    values: npt.NDArray[Any],
    convert: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
) -> npt.NDArray[Any]:
    """Converts an array to another number type in blocks of rows, so that wide intermediate numbers need little RAM.

    Args:
        values: array whose first axis has H rows.
        convert: converts a block of some rows.
        shape, dtype: shape and number type of the result; the first axis of `shape` has H rows too.
    """
    converted = np.empty(shape, dtype)
    rows = max(1, _BLOCK_VALUES // max(1, values[:1].size))
    for top in range(0, len(values), rows):
        converted[top : top + rows] = convert(values[top : top + rows])
    return converted


def _decompress_samples(data: bytes, page: Any) -> npt.NDArray[Any]:
    """Decompresses the samples (channel values) of a page that has 8 or 16 bits per sample.

    Args:
        data: bytes of the file.
        page: a `tifffile.TiffPage`. The function changes it, so that it cannot be decoded again.

    Returns: (planes, H, W, samples in a plane), uint8 or uint16; it may be a view of `data`.

    Raises:
        ImageError: a strip or tile decompresses to more than twice its size, or the file is cut off.
        ValueError: the compression or its predictor is not supported.
    """
    planes, _, height, width, num_samples = page.shaped
    dtype = np.dtype(page.parent.byteorder + page.dtype.char)
    if page.is_contiguous and page.predictor == 1 and page.fillorder == 1:
        count, offset = planes * height * width * num_samples, page.dataoffsets[0]
        if offset + count * dtype.itemsize > len(data):
            raise ImageError("truncated", _CUT_OFF)
        return np.frombuffer(data, dtype, count, offset).reshape(planes, height, width, num_samples)
    if page.predictor not in (1, 2):
        raise ValueError(f"predictor {page.predictor!s} is not read")
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
    num_segments = planes * -(-height // rows) * -(-width // columns)
    max_bytes = 2 * rows * columns * num_samples * dtype.itemsize  # some programs pad the last strip
    is_reversed, page.fillorder = page.fillorder == 2, 1
    # `decode` then gets decompressed bytes, and still applies predictor, byte order and position
    compression, page.compression = page.compression, 1
    samples = np.zeros((planes, height, width, num_samples), dtype.newbyteorder("="))
    for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=False)):
        if number == num_segments:
            break
        if not count:  # an empty strip or tile means zeros
            continue
        encoded = data[offset : offset + count]
        if len(encoded) < count:
            raise ImageError("truncated", _CUT_OFF)
        if is_reversed:
            encoded = encoded.translate(_REVERSED_BITS)
        segment, (plane, _, top, left, _), _ = page.decode(_decompress_segment(compression, encoded, max_bytes), number)
        if segment.shape == samples.shape:  # one segment is the whole image: do not copy it
            return np.asarray(segment)
        target = samples[plane, top : top + rows, left : left + columns]
        target[...] = segment[0, : target.shape[0], : target.shape[1]]
    return samples


_REVERSED_BITS = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def _decompress_segment(compression: int, data: bytes, limit: int) -> bytes:
    """Decompresses a strip or tile of a TIFF, up to a limit.

    Args:
        compression: number of the compression in the TIFF standard.
        data: the compressed bytes.
        limit: largest number of decompressed bytes. Uncompressed data is cut to it.

    Raises:
        ImageError: the data decompresses to more than `limit` bytes (a decompression bomb).
        ValueError: the compression is not supported.
    """
    if compression == 1:
        return data[:limit]
    if compression in (8, 32946):
        inflated = zlib.decompressobj().decompress(data, limit + 1)
    elif compression == 34925:
        inflated = lzma.LZMADecompressor(memlimit=_MAX_LZMA_BYTES).decompress(data, limit + 1)
    elif compression == 32773:
        inflated = _decompress_packbits(data, limit)
    else:
        raise ValueError(f"compression {compression!s} is not read")
    if len(inflated) > limit:
        message = f"a strip or tile of the TIFF inflates to more than {limit} bytes, twice its size: save it again"
        raise ImageError("too_large", message)
    return inflated


def _decompress_packbits(data: bytes, limit: int) -> bytes:
    """Decompresses PackBits, a run-length code. Stops when the result has more than `limit` bytes."""
    inflated, offset = bytearray(), 0
    while offset + 1 < len(data) and len(inflated) <= limit:
        code = data[offset]
        if code < 128:
            inflated += data[offset + 1 : offset + code + 2]
            offset += code + 2
        elif code > 128:
            inflated += data[offset + 1 : offset + 2] * (257 - code)
            offset += 2
        else:  # code 128 is ignored
            offset += 1
    return bytes(inflated)
