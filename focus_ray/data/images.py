"""Encoded bytes to uint8 arrays and back: images in RGB, masks as bool; every odd file gets one decided outcome.

Decisions, the same for training, batch inspection and serving:

- EXIF orientation is applied; an EXIF block that cannot be parsed counts as absent, as in every viewer.
- Grey is repeated over the three channels; CMYK, YCbCr, LAB and HSV are converted by Pillow; ICC profiles are ignored.
- Transparency (alpha channel, palette or colour key) is composed over black, so hidden colours never matter.
- 16-bit grey is scaled by its full range, round(value * 255 / 65535), never by its own minimum and maximum: equal
  exposure stays equal. A 12-bit camera that does not shift its values up gives dark images: shift them first.
- 16-bit colour keeps its high byte (Pillow reads no more). 32-bit integer, signed and float images are refused.
- What a TIFF's tags say of its pixels decides how it is read, or that it is refused (`tiff`): WhiteIsZero comes out as it looks.
- Pictures that focus_ray drew itself are decoded like others; whoever expects photographs refuses them (`refuse_drawing`).
- Of an image with several frames or pages the first is taken. The pages of a mask's TIFF are combined, since some programs write
  one for each region; other masks with several frames are refused.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from focus_ray.data import tiff
from focus_ray.data.framing import Frame
from focus_ray.drawings import MARK, is_drawing
from focus_ray.errors import DataError

# Largest image read, in pixels (about 9459 x 9459): where Pillow starts to warn of decompression bombs. A few hundred
# kilobytes can claim gigabytes; larger frames, such as line scans, are to be cut into tiles.
MAX_PIXELS = 89_478_485

# Pillow's decoders that untrusted bytes may reach; the many others stay closed.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")

# Bounds of what a small file can cost. A scan goes over the whole image; Pillow reads segments and chunks in a Python loop.
MAX_JPEG_SCANS = 100  # encoders write at most 12
_MAX_JPEG_SEGMENTS = 10_000  # before the pixels; 64 KiB each
_MAX_JPEG_FILL_BYTES = 2**16  # between the segments
_MAX_PNG_CHUNKS = 2**15  # encoders put at least 8 KiB of pixels into each
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # not a stuffed byte, a restart within a scan, or a fill byte

# too_slow: the service gave up decoding; see `serving.decoders`
Reason = Literal["empty", "not_an_image", "unsupported", "truncated", "too_large", "too_slow"]

_ORIENTATION_TAG = 0x0112
_DATE_TIME, _EXIF_IFD = 0x0132, 0x8769
_DATE_TIME_ORIGINAL, _SUBSEC_TIME, _SUBSEC_TIME_ORIGINAL = 0x9003, 0x9290, 0x9291
_PNG_EXIF = {"exif", "Raw profile type exif"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)
# First bytes of image formats that people do have and that we do not read, for a better message than "not an image".
_UNSUPPORTED_MAGIC = {
    b"GIF8": "GIF",
    b"8BPS": "Photoshop",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"%PDF": "PDF",
    b"v/1\x01": "OpenEXR",
    b"II+\x00": "BigTIFF",
    b"MM\x00+": "BigTIFF",
    b"\x00\x00\x01\x00": "ICO",
}
# What Pillow's decoders raise on damaged bytes.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


class ImageError(DataError):
    """Bytes that cannot be used as an image; ``reason`` is the code that a reject list keeps."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both in args, so that it survives pickle
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class ImageInfo:
    """Size in pixels after EXIF rotation; mode (``L``, ``RGB``, ``I;16``, ...) and format of the file itself.

    see_through: it has an alpha channel, which is zero everywhere, so that it shows nothing.
    content_hash: `content_hash` of its pixels, where it was asked for.
    """

    width: int
    height: int
    mode: str
    format: str
    see_through: bool = False
    content_hash: str | None = None


def decode_image(data: bytes, size: int | Frame | None) -> npt.NDArray[np.uint8]:
    """Decodes one image by the decisions at the top of this file.

    Resizing is by Pillow's antialiased bilinear filter. JPEGs at least four times larger than asked are decoded at a half,
    quarter or eighth (never below twice what is asked) first, which moves pixels by about one grey level and saves most of
    the time.

    Args:
        data: an encoded file of one of ``FORMATS``.
        size: the frame that it is brought to; a number: the side of a square that it is stretched to; None keeps the size.

    Returns: (H, W, 3) RGB, uint8, writable; of the frame's shape, which may have a fourth channel, where there is one.

    Raises: ImageError: empty, truncated, not an image, an unsupported kind, or above ``MAX_PIXELS``.
    """
    return _decode(data, _frame(size))[1]


def read_image(data: bytes, size: int | Frame | None = None) -> tuple[ImageInfo, npt.NDArray[np.uint8]]:
    """What ``probe_image`` and ``decode_image(data, size)`` give, for the price of one decoding; the same errors."""
    return _decode(data, _frame(size))


def probe_image(data: bytes) -> ImageInfo:
    """Reads the whole file, pixels and PNG checksums included, so that truncated data is found.

    Flipped bits inside a JPEG's entropy-coded data cannot be told from content, by anyone.

    Raises: ImageError: as ``decode_image``.
    """
    return read_image(data)[0]


def read_header(data: bytes) -> ImageInfo:
    """Size, mode and format as the file's header tells them, before EXIF rotation; no pixel is decoded.

    Raises: ImageError: empty, not an image, an unsupported kind, or above ``MAX_PIXELS``.
    """
    tags = _tiff_tags(data)
    if tags is not None and _reader_of(tags) == "tifffile":
        return ImageInfo(tags.width, tags.height, "RGB" if tags.photometric == 2 else "L", "TIFF")
    image = _open(data)
    return ImageInfo(image.width, image.height, image.mode, image.format or "?")


def decode_mask(data: bytes, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Decodes a mask: a pixel is anomalous when any of its values is above 0, whatever the bit depth.

    Palettes are looked up, so their colours count and not their indices; transparency is composed over black.
    Reduced, a pixel is anomalous where any of those that it stands for was, so that no defect vanishes, however thin; enlarged,
    it is that of the nearest.

    Args: height, width: size returned, pixels.

    Returns: (H, W) bool, True is anomalous.

    Raises: ImageError: as ``decode_image``.
    """
    return resize_mask(read_mask(data), height, width)


def resize_mask(mask: npt.NDArray[np.bool_], height: int, width: int) -> npt.NDArray[np.bool_]:
    """(H, W) bool to (height, width), as ``decode_mask`` does."""
    for axis, size in enumerate((height, width)):
        length = mask.shape[axis]
        if size < length:
            mask = np.logical_or.reduceat(mask, np.arange(size) * length // size, axis=axis)
        elif size > length:
            mask = mask.take(np.arange(size) * length // size, axis=axis)
    return np.ascontiguousarray(mask)


def read_mask(data: bytes) -> npt.NDArray[np.bool_]:
    """``decode_mask`` at the file's own size. Returns: (H, W) bool. Raises: ImageError."""
    return probe_mask(data)[0]


def probe_mask(data: bytes) -> tuple[npt.NDArray[np.bool_], int]:
    """``read_mask``, and how many different values above 0 the file has: one in a mask, a few where they name kinds of defects,
    many in one that was saved as JPEG, blurred or scaled. Raises: ImageError."""
    _verify_chunks(data)
    pages = _mask_pages(data)
    mask, different = _probe_page(data, pages[0])
    for page in pages[1:]:
        other, values = _probe_page(data, page)
        if other.shape != mask.shape:
            raise ImageError(
                "unsupported",
                f"the mask's page {page + 1} is {other.shape[1]} x {other.shape[0]} pixels, and page {pages[0] + 1} is "
                f"{mask.shape[1]} x {mask.shape[0]}: export the mask as one page",
            )
        mask, different = mask | other, max(different, values)
    return mask, different


def _mask_pages(data: bytes) -> list[int]:
    """Numbers of the pages that make up a mask, from 0. Raises: ImageError: a file with frames that are not combined."""
    if _tiff_tags(data) is not None:
        try:
            return tiff.list_pages(data)
        except tiff.TiffError as error:
            raise ImageError(error.reason, str(error)) from error
    image = _open(data)
    try:
        num_frames = int(getattr(image, "n_frames", 1))
    except _DECODE_ERRORS as error:
        raise ImageError("truncated", f"the mask's frames are damaged ({error}): copy it again") from error
    if num_frames > 1:
        raise ImageError("unsupported", f"a {image.format} mask of {num_frames} frames: export it as one frame")
    return [0]


def _probe_page(data: bytes, page: int) -> tuple[npt.NDArray[np.bool_], int]:
    """`probe_mask` of one page."""
    image, orientation, _ = _load(data, None, page)
    try:
        deep = _is_deep(image) or image.mode == "F"
        values = np.asarray(image) if deep else _highest_channel(_to_grey_or_rgb(image))
        mask: npt.NDArray[np.bool_] = values > 0
        different = len(np.unique(values[mask]))
    except _DECODE_ERRORS as error:
        raise _undecodable(error, image) from error
    if orientation in _TRANSPOSE:
        upright = Image.fromarray(mask.astype(np.uint8)).transpose(_TRANSPOSE[orientation])
        mask = np.asarray(upright) > 0
    return mask, different


def encode_png(array: npt.NDArray[Any], *, drawn: bool = False) -> bytes:
    """A lossless PNG: (H, W, 3) or (H, W) uint8 as 8-bit, (H, W) bool as 1-bit.

    Args: drawn: mark the file as a picture that focus_ray drew, which no command takes for a photograph.

    Raises: ValueError: another shape or dtype.
    """
    plane, colour = array.ndim == 2, array.ndim == 3 and array.shape[2] == 3
    if not (array.dtype == np.uint8 and (plane or colour)) and not (array.dtype == np.bool_ and plane):
        raise ValueError(
            f"cannot encode shape {array.shape} of {array.dtype} as PNG: expected (H, W, 3) or (H, W) of uint8, "
            "or (H, W) of bool"
        )
    if array.dtype == np.bool_:
        image = Image.fromarray(array.astype(np.uint8) * np.uint8(255)).convert("1", dither=Image.Dither.NONE)
    else:
        image = Image.fromarray(np.ascontiguousarray(array))
    sink = io.BytesIO()
    text = PngInfo()
    if drawn:
        text.add_text("Software", MARK)
    image.save(sink, format="PNG", pnginfo=text)
    return sink.getvalue()


def encode_opened(image: Image.Image) -> bytes:
    """A lossless PNG of an image that Pillow has opened or made, with the pixels that `decode_image` gives for its file.

    Palette, transparency, bit depth, colour space and EXIF orientation count as at the top of this file.

    Raises: ImageError: its pixels are damaged, or of a kind that is not read; a TIFF of a kind that Pillow misreads.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    deep = _is_deep(image) and (tags.get(262) == 0 or max(tags.get(258, (16,))) == 12)
    turned = tags.get(274, 1) != 1  # opened by name and stored raw, it is not turned (Pillow 12)
    if deep or turned or 338 in tags or tags.get(284, 1) != 1 or set(tags.get(339, (1,))) != {1}:
        raise ImageError("unsupported", "Pillow misreads this kind of TIFF: give the path or the bytes of the file")
    try:
        image.load()
        plain = _to_grey_or_rgb(image)
    except _DECODE_ERRORS as error:
        raise _undecodable(error, image) from error
    orientation = _orientation(image)
    return encode_png(np.asarray(plain.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else plain))


def refuse_drawing(data: bytes) -> None:
    """Raises: ImageError: the file is a picture that focus_ray drew; those are never inspected, learnt or calibrated with."""
    if is_drawing(data):
        raise ImageError(
            "unsupported", "a heat map or plot that focus_ray drew, not a photograph: give the photograph itself"
        )


def decode_batch(
    images: Sequence[bytes], size: int | Frame, num_threads: int = 1, names: Sequence[str] | None = None
) -> npt.NDArray[np.uint8]:
    """``decode_image`` over a batch; Pillow lets go of the interpreter lock, so threads help.

    Args: num_threads: threads used, at most one an image.  names: of the images, for errors; None: their positions.

    Returns: (B, H, W, 3 or 4), uint8, in the order given.

    Raises: ImageError: naming the first image that cannot be decoded.
    """
    return read_batch(images, size, num_threads, names=names)[1]


def content_hash(pixels: npt.NDArray[np.uint8]) -> str:
    """SHA-256 hex of the size and the decoded RGB pixels (H, W, 3): what tells an image, however its file is named or packed."""
    digest = hashlib.sha256(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def read_batch(
    images: Sequence[bytes],
    size: int | Frame,
    num_threads: int = 1,
    hashed: bool = False,
    names: Sequence[str] | None = None,
) -> tuple[list[ImageInfo], npt.NDArray[np.uint8]]:
    """``decode_batch`` and what is known of each image, its own size above all; the same errors.

    Args:
        hashed: tell the images' content hashes too; costs a second decoding of JPEGs that are read at a reduced size.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1")
    frame = _frame(size)
    assert frame is not None
    batch = np.empty((len(images), *frame.shape), dtype=np.uint8)

    def decode_into(position: int) -> ImageInfo:
        try:
            refuse_drawing(images[position])
            info, batch[position] = _decode(images[position], frame, hashed)
            return info
        except ImageError as error:
            name = f"image {position} of {len(images)}" if names is None else names[position]
            raise ImageError(error.reason, f"{name}: {error}") from error

    if num_threads == 1 or len(images) < 2:
        infos = [decode_into(position) for position in range(len(images))]
    else:
        with ThreadPoolExecutor(min(num_threads, len(images))) as pool:
            infos = list(pool.map(decode_into, range(len(images))))
    return infos, batch


def _frame(size: int | Frame | None) -> Frame | None:
    return Frame(size, size) if isinstance(size, int) else size


def _decode(data: bytes, frame: Frame | None, hashed: bool = False) -> tuple[ImageInfo, npt.NDArray[np.uint8]]:
    _verify_chunks(data)
    image, orientation, (width, height) = _load(data, None if frame is None else max(frame.height, frame.width))
    info = ImageInfo(width, height, image.mode, image.format or "?", _is_see_through(image))
    try:
        plain = _to_grey_or_rgb(image)
        if orientation in _TRANSPOSE:
            plain = plain.transpose(_TRANSPOSE[orientation])
        if hashed:
            whole = np.asarray(plain.convert("RGB")) if plain.size == (width, height) else _decode(data, None)[1]
            info = replace(info, content_hash=content_hash(whole))
        if frame is not None:
            return info, frame.place_image(plain, width, height)
        return info, np.array(plain.convert("RGB"), dtype=np.uint8)
    except _DECODE_ERRORS as error:
        raise _undecodable(error, image) from error


def _load(data: bytes, size_px: int | None, page: int = 0) -> tuple[Image.Image, int, tuple[int, int]]:
    """Opens and loads the pixels.

    Returns: the image, not yet rotated, the EXIF orientation still to be applied, and the file's (width, height) after it.
    """
    tags = _tiff_tags(data, page)
    if tags is not None and _reader_of(tags) == "tifffile":
        return _load_tiff(data, tags, page)
    image = _open(data)
    try:
        image.seek(page)
        width, height = image.size  # before a JPEG is decoded smaller; a TIFF's is as it will be
        if size_px is not None and image.format in ("JPEG", "MPO"):
            image.draft("", (2 * size_px, 2 * size_px))
        image.load()
    except _DECODE_ERRORS as error:
        raise ImageError(
            "truncated", f"the {image.format} image's pixels are truncated or damaged ({error}): copy it again"
        ) from error
    orientation = _orientation(image)
    size = (height, width) if orientation in _QUARTER_TURNS else (width, height)
    if tags is not None and tags.bits in (12, 16) and _is_deep(image):
        return _at_full_range(image, tags), orientation, size
    return image, orientation, size


def _tiff_tags(data: bytes, page: int = 0) -> tiff.Tags | None:
    """None for other files, and for one that is too damaged to have any. Raises: ImageError: its kind is not read."""
    if not data.startswith(tiff.SIGNS):
        return None
    try:
        tags = tiff.read_tags(data, page)
    except tiff.TiffError as error:
        raise ImageError(error.reason, str(error)) from error
    if tags is not None:
        _check_size(tags.width, tags.height)
    return tags


def _reader_of(tags: tiff.Tags) -> str:
    try:
        return tiff.reader_of(tags)
    except tiff.TiffError as error:
        raise ImageError(error.reason, str(error)) from error


def _load_tiff(data: bytes, tags: tiff.Tags, page: int = 0) -> tuple[Image.Image, int, tuple[int, int]]:
    try:
        pixels, see_through = tiff.read_pixels(data, tags, page)
    except tiff.TiffError as error:
        raise ImageError(error.reason, str(error)) from error
    image = Image.fromarray(pixels)
    image.format = "TIFF"
    image.info["see_through"] = see_through
    turned = tags.orientation in _QUARTER_TURNS
    return image, tags.orientation, (image.height, image.width) if turned else image.size


def _at_full_range(image: Image.Image, tags: tiff.Tags) -> Image.Image:
    """Deep grey as it looks, and as 16 bits."""
    full = 2**tags.bits - 1

    def stretch(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        values = block.astype(np.int64)
        return ((full - values if tags.photometric == 0 else values) * 65535 // full).clip(0, 65535)

    values = np.asarray(image)
    found = Image.fromarray(tiff.convert_rows(values, stretch, values.shape, np.uint16))
    found.format = image.format
    return found


def _is_see_through(image: Image.Image) -> bool:
    """Whether alpha is zero everywhere."""
    if image.mode in ("RGBA", "LA", "PA"):
        return not np.asarray(image.getchannel("A")).any()
    return bool(image.info.get("see_through", False))


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads the header only; the decoder may still find the pixels damaged."""
    if not data:
        raise ImageError("empty", "the image is empty (0 bytes): copy it again from its source")
    _check_structure(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", f"{error}; at most {MAX_PIXELS} pixels are read: cut it into tiles") from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except _DECODE_ERRORS as error:
        raise ImageError("truncated", f"the image's header is damaged ({error}): copy it again") from error
    if image.format == "TIFF" and not data.startswith(
        tiff.SIGNS
    ):  # Pillow takes more signatures, whose tags nothing checks
        raise _unidentified(data)
    _check_size(*image.size)
    return image


def _check_structure(data: bytes) -> None:
    """Raises: ImageError: more JPEG scans or segments, or more PNG chunks, than an image needs. Damaged files pass."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        place = 8
        for _ in range(_MAX_PNG_CHUNKS):
            place += 12 + int.from_bytes(data[place : place + 4], "big")
            if place >= len(data):
                return
        raise ImageError("too_large", f"a PNG of more than {_MAX_PNG_CHUNKS} chunks: save it again")


def _check_jpeg(data: bytes) -> None:
    """Raises: ImageError: see `_check_structure`. Goes from marker to marker, so that bytes within a segment do not count."""
    place, num_scans, num_segments, fill_bytes = 2, 0, 0, 0
    while (marker := _JPEG_MARKER.search(data, place)) is not None and data[
        marker.end() - 1
    ] != 0xD9:  # the end of the image
        if not num_scans:
            fill_bytes += marker.start() - place
        num_segments += 1
        num_scans += data[marker.end() - 1] == 0xDA
        if num_scans > MAX_JPEG_SCANS:
            raise ImageError(
                "too_large", f"a JPEG of more than {MAX_JPEG_SCANS} scans: save it without progressive scans"
            )
        if num_segments > _MAX_JPEG_SEGMENTS or fill_bytes > _MAX_JPEG_FILL_BYTES:
            raise ImageError(
                "too_large", "a JPEG with too many segments, or too many bytes between them: save it again"
            )
        place = marker.end()
        if data[place - 1] not in (0x01, 0xD8):  # these two have no length
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
    if not num_scans and len(data) - place > _MAX_JPEG_FILL_BYTES:
        raise ImageError("truncated", "a JPEG without pixels in it: copy it again")


def _check_size(width: int, height: int) -> None:
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise ImageError(
            "too_large",
            f"{width} x {height} is {pixels} pixels; at most {MAX_PIXELS} are read: cut it into tiles",
        )


def _orientation(image: Image.Image) -> int:
    # TIFFs turn themselves while loading and drop the tag, so this reads what is left to do.
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (*_DECODE_ERRORS, AttributeError):
        return 1


def read_capture_time(data: bytes | Path) -> datetime | None:
    """Returns the EXIF time at which a photograph was taken: DateTimeOriginal, else DateTime; None if there is none.

    Fractions of a second are added where the file has them. Only the header is read. Time zones are ignored.

    Args: data: an encoded file, or its path.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
            if image.format == "PNG" and not _PNG_EXIF & image.info.keys():
                return None  # getexif would decode the whole image to look for a block behind the pixels
            exif = image.getexif()
            details = exif.get_ifd(_EXIF_IFD)
        for value, fraction in (
            (details.get(_DATE_TIME_ORIGINAL), details.get(_SUBSEC_TIME_ORIGINAL)),
            (exif.get(_DATE_TIME), details.get(_SUBSEC_TIME)),
        ):
            digits = str(fraction or "").strip("\0 ")
            try:
                time = datetime.strptime(str(value or "").strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
            except ValueError:  # absent, or the zeros of a camera whose clock was never set
                continue
            return time + timedelta(seconds=float(f"0.{digits}") if digits.isdecimal() else 0.0)
    except (*_DECODE_ERRORS, AttributeError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass  # the check of the image says what is wrong
    return None


def _highest_channel(image: Image.Image) -> npt.NDArray[Any]:
    values = np.asarray(image)
    return np.asarray(values.max(axis=2) if values.ndim == 3 else values)


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        image = _deep_to_grey(image)
    elif image.mode == "F":
        raise ImageError("unsupported", "a floating-point image has no set range: save it as 8-bit or 16-bit")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _deep_to_grey(image: Image.Image) -> Image.Image:
    # "I" is how Pillow hands over some 16-bit files, and all 32-bit ones.
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError("unsupported", f"32-bit values from {low} to {high}: save the image as 8-bit or 16-bit")
    grey = tiff.convert_rows(
        values, lambda block: (block.astype(np.int64) * 255 + 32767) // 65535, values.shape, np.uint8
    )
    return Image.fromarray(grey)


def _verify_chunks(data: bytes) -> None:
    """Pillow's pixel loader forgives a PNG that stops after its last pixel or has a wrong checksum; this does not."""
    if not data.startswith(b"\x89PNG"):
        return
    _check_structure(data)
    if b"IEND\xaeB`\x82" not in data:
        raise ImageError("truncated", "the PNG image is truncated (it has no whole end mark): copy it again")
    try:
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    except UnidentifiedImageError as error:
        raise ImageError("truncated", "the PNG image stops within its header: copy it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return  # told by the loader
    except _DECODE_ERRORS as error:
        raise ImageError("truncated", f"the PNG image is truncated or damaged ({error}): copy it again") from error


def _unidentified(data: bytes) -> ImageError:
    known = ", ".join(FORMATS)
    for magic, name in _UNSUPPORTED_MAGIC.items():
        if data.startswith(magic):
            return ImageError("unsupported", f"{name} files are not read: convert to one of {known}")
    if data[4:8] == b"ftyp":
        return ImageError("unsupported", f"HEIC, AVIF and video files are not read: convert to one of {known}")
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"II*\x00", b"MM\x00*", b"BM")):
        return ImageError("truncated", f"the image stops within its header ({len(data)} bytes): copy it again")
    return ImageError(
        "not_an_image", f"{len(data)} bytes that start with {data[:8]!r} are not an image: expected one of {known}"
    )


def _undecodable(error: BaseException, image: Image.Image) -> ImageError:
    if isinstance(error, ImageError):
        return error
    if isinstance(error, DataError):  # of the frame: nothing of this image can be scored
        return ImageError("unsupported", str(error))
    return ImageError("unsupported", f"{image.format} of mode {image.mode} cannot be converted to RGB ({error})")
