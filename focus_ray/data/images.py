"""Decodes and encodes images (uint8 RGB) and masks (bool), with a defined result for every unusual file.

The rules are the same for training, batch inspection and serving:

- EXIF orientation is applied; an EXIF block that cannot be parsed counts as absent, as in every viewer.
- Grey is repeated over the three channels; CMYK, YCbCr, LAB and HSV are converted by Pillow; ICC profiles are ignored.
- Transparency (alpha channel, palette or colour key) is composed over black, so hidden colours never matter.
- 16-bit grey is scaled by its full range, round(value * 255 / 65535), never by its own minimum and maximum: equal
  exposure stays equal. A 12-bit camera that does not shift its values up gives dark images: shift them first.
- 16-bit colour keeps its high byte (Pillow reads no more). 32-bit integer, signed and float images are refused.
- The tags of a TIFF decide how it is read, or whether it is refused (`tiff`). WhiteIsZero images are inverted, as viewers do.
- Pictures that focus_ray drew are decoded like others; functions that expect photographs refuse them (`refuse_drawing`).
- The first frame or page of an image is read. The pages of a TIFF mask are combined, because some programs write a page for each
  region; other masks with several frames are refused.
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

# Largest image that is read, in pixels (about 9459 x 9459); Pillow warns of decompression bombs above it. A file of a few hundred
# kilobytes can announce gigabytes. Larger images, such as line scans, must be cut into tiles.
MAX_PIXELS = 89_478_485

# Decoders of Pillow that may read untrusted bytes; the many other decoders are never used.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")

# Limits on the cost of a small file. Every scan decodes the whole image; Pillow reads segments and chunks in a Python loop.
MAX_JPEG_SCANS = 100  # encoders write at most 12
_MAX_JPEG_SEGMENTS = 10_000  # before the pixels; 64 KiB each
_MAX_JPEG_FILL_BYTES = 2**16  # between the segments
_MAX_PNG_CHUNKS = 2**15  # encoders put at least 8 KiB of pixels into each
_JPEG_MARKER = re.compile(
    rb"\xff[\x01-\xcf\xd8-\xfe]"
)  # excludes stuffed bytes, restart markers within a scan, and fill bytes

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
# First bytes of common formats that are not supported, for a better message than "not an image".
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
# Errors that Pillow's decoders raise on damaged bytes.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


class ImageError(DataError):
    """Bytes that cannot be used as an image; `reason` is the code in reject lists."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both in args, so that it survives pickle
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class ImageInfo:
    """Properties of an image file.

    Attributes:
        width: pixels, after EXIF rotation.
        height: pixels, after EXIF rotation.
        mode: Pillow's mode of the file (L, RGB, I;16, ...).
        format: one of `FORMATS`.
        see_through: the image is transparent everywhere, so that it shows nothing.
        content_hash: `content_hash` of the pixels; None if it was not computed.
    """

    width: int
    height: int
    mode: str
    format: str
    see_through: bool = False
    content_hash: str | None = None


def decode_image(data: bytes, size: int | Frame | None) -> npt.NDArray[np.uint8]:
    """Decodes an image by the rules at the top of this file.

    Images are resized with Pillow's antialiased bilinear filter. A JPEG at least four times larger than `size` is first
    decoded at a half, quarter or eighth of its size, but never below twice `size`. This saves most of the time. It changes pixels
    by about one grey level.

    Args:
        data: an encoded file of one of ``FORMATS``.
        size: frame of the result; a number: side of a square to which the image is stretched; None: keep the size.

    Returns: (H, W, 3) RGB, uint8, writable. With a frame: the shape of the frame, which may have a fourth channel.

    Raises: ImageError: the file is empty, truncated, not an image, of an unsupported kind, or larger than `MAX_PIXELS`.
    """
    return _decode(data, _to_frame(size))[1]


def read_image(data: bytes, size: int | Frame | None = None) -> tuple[ImageInfo, npt.NDArray[np.uint8]]:
    """Returns `probe_image(data)` and `decode_image(data, size)` with a single decoding. Raises: ImageError: as these."""
    return _decode(data, _to_frame(size))


def probe_image(data: bytes) -> ImageInfo:
    """Returns the properties of an image. Reads the whole file with pixels and PNG checksums, so that it detects truncation.

    It cannot detect flipped bits in the entropy-coded data of a JPEG, because they look like other content.

    Raises: ImageError: as `decode_image`.
    """
    return read_image(data)[0]


def read_header(data: bytes) -> ImageInfo:
    """Returns size (before EXIF rotation), mode and format from the header of a file, without decoding pixels.

    Raises: ImageError: the file is empty, not an image, of an unsupported kind, or larger than `MAX_PIXELS`.
    """
    tags = _read_tiff_tags(data)
    if tags is not None and _choose_reader(tags) == "tifffile":
        return ImageInfo(tags.width, tags.height, "RGB" if tags.photometric == 2 else "L", "TIFF")
    image = _open(data)
    return ImageInfo(image.width, image.height, image.mode, image.format or "?")


def decode_mask(data: bytes, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Decodes a mask and resizes it. A pixel is anomalous if any of its channels is above 0, for every bit depth.

    In a palette image the colours count, not the indices. Transparency is composed over black. `resize_mask` describes resizing.

    Args: height, width: size of the result, pixels.

    Returns: (H, W) bool, True is anomalous.

    Raises: ImageError: as `decode_image`.
    """
    return resize_mask(read_mask(data), height, width)


def resize_mask(mask: npt.NDArray[np.bool_], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Resizes a mask (H, W) to (height, width), bool.

    In a smaller mask, a pixel is anomalous if any pixel of its area was, so that thin defects do not vanish. In a larger mask, a
    pixel has the value of the nearest pixel.
    """
    for axis, size in enumerate((height, width)):
        length = mask.shape[axis]
        if size < length:
            mask = np.logical_or.reduceat(mask, np.arange(size) * length // size, axis=axis)
        elif size > length:
            mask = mask.take(np.arange(size) * length // size, axis=axis)
    return np.ascontiguousarray(mask)


def read_mask(data: bytes) -> npt.NDArray[np.bool_]:
    """Decodes a mask at its own size. Returns: (H, W) bool. Raises: ImageError: as `decode_mask`."""
    return probe_mask(data)[0]


def probe_mask(data: bytes) -> tuple[npt.NDArray[np.bool_], int]:
    """Decodes a mask at its own size, and counts its distinct values above 0.

    A clean mask has one such value, or a few if they encode kinds of defects. Many values show that the mask was saved as JPEG,
    blurred or scaled.

    Raises: ImageError: as `decode_mask`.
    """
    _verify_chunks(data)
    pages = _find_mask_pages(data)
    mask, num_values = _probe_page(data, pages[0])
    for page in pages[1:]:
        page_mask, page_num_values = _probe_page(data, page)
        if page_mask.shape != mask.shape:
            raise ImageError(
                "unsupported",
                f"the mask's page {page + 1} is {page_mask.shape[1]} x {page_mask.shape[0]} pixels, and page {pages[0] + 1} is "
                f"{mask.shape[1]} x {mask.shape[0]}: export the mask as one page",
            )
        mask, num_values = mask | page_mask, max(num_values, page_num_values)
    return mask, num_values


def _find_mask_pages(data: bytes) -> list[int]:
    """Returns the numbers, from 0, of the pages of a mask. Raises: ImageError: the file has frames that are not combined."""
    if _read_tiff_tags(data) is not None:
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
    """Returns the mask of one page and the number of its distinct values above 0."""
    image, orientation, _ = _load_pixels(data, None, page)
    try:
        is_deep = _is_deep_grey(image) or image.mode == "F"
        values = np.asarray(image) if is_deep else _maximum_over_channels(_to_grey_or_rgb(image))
        mask: npt.NDArray[np.bool_] = values > 0
        num_values = len(np.unique(values[mask]))
    except _DECODE_ERRORS as error:
        raise _describe_undecodable(error, image) from error
    if orientation in _TRANSPOSE:
        upright = Image.fromarray(mask.astype(np.uint8)).transpose(_TRANSPOSE[orientation])
        mask = np.asarray(upright) > 0
    return mask, num_values


def encode_png(array: npt.NDArray[Any], *, drawn: bool = False) -> bytes:
    """Encodes an array as a lossless PNG: uint8 (H, W, 3) or (H, W) with 8 bits, bool (H, W) with 1 bit.

    Args: drawn: marks the file as a picture that focus_ray drew, so that no command uses it as a photograph.

    Raises: ValueError: the array has another shape or dtype.
    """
    is_plane, is_colour = array.ndim == 2, array.ndim == 3 and array.shape[2] == 3
    if not (array.dtype == np.uint8 and (is_plane or is_colour)) and not (array.dtype == np.bool_ and is_plane):
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
    """Encodes an image of Pillow as a lossless PNG with the same pixels as `decode_image` of its file.

    The rules at the top of this file apply to palette, transparency, bit depth, colour space and EXIF orientation.

    Raises: ImageError: the pixels are damaged or of an unsupported kind, or Pillow reads this kind of TIFF wrongly.
    """
    tags = getattr(image, "tag_v2", {})  # only TIFFs have it
    is_deep = _is_deep_grey(image) and (tags.get(262) == 0 or max(tags.get(258, (16,))) == 12)
    is_turned = tags.get(274, 1) != 1  # Pillow 12 does not rotate an uncompressed TIFF that was opened by its path
    if is_deep or is_turned or 338 in tags or tags.get(284, 1) != 1 or set(tags.get(339, (1,))) != {1}:
        raise ImageError(
            "unsupported", "Pillow reads this kind of TIFF wrongly: pass the path or the bytes of the file"
        )
    try:
        image.load()
        plain = _to_grey_or_rgb(image)
    except _DECODE_ERRORS as error:
        raise _describe_undecodable(error, image) from error
    orientation = _read_orientation(image)
    return encode_png(np.asarray(plain.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else plain))


def refuse_drawing(data: bytes) -> None:
    """Raises: ImageError: focus_ray drew this picture; such pictures are never used for training, calibration or inspection."""
    if is_drawing(data):
        raise ImageError(
            "unsupported", "a heat map or plot that focus_ray drew, not a photograph: use the photograph itself"
        )


def decode_batch(
    images: Sequence[bytes], size: int | Frame, num_threads: int = 1, names: Sequence[str] | None = None
) -> npt.NDArray[np.uint8]:
    """Decodes a batch of images as `decode_image`, in threads, because Pillow releases the interpreter lock.

    Args:
        num_threads: most threads; never more than images.
        names: names of the images in errors; None: their positions.

    Returns: (B, H, W, 3 or 4), uint8, in the order of `images`.

    Raises: ImageError: names the first image that cannot be decoded.
    """
    return read_batch(images, size, num_threads, names=names)[1]


def content_hash(pixels: npt.NDArray[np.uint8]) -> str:
    """Returns the SHA-256 (hex) of size and pixels (H, W, 3); equal images have equal hashes, whatever their name or format."""
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
    """Decodes a batch as `decode_batch`, and returns the properties of each image too. Raises: ImageError: as `decode_batch`.

    Args: hashed: computes the content hashes; JPEGs that are read at a reduced size are then decoded twice.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1")
    frame = _to_frame(size)
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


def _to_frame(size: int | Frame | None) -> Frame | None:
    """Turns the side of a square into a frame."""
    return Frame(size, size) if isinstance(size, int) else size


def _decode(data: bytes, frame: Frame | None, hashed: bool = False) -> tuple[ImageInfo, npt.NDArray[np.uint8]]:
    """Returns the properties and the pixels of an image, (H, W, 3) or the shape of the frame."""
    _verify_chunks(data)
    image, orientation, (width, height) = _load_pixels(data, None if frame is None else max(frame.height, frame.width))
    info = ImageInfo(width, height, image.mode, image.format or "?", _is_transparent(image))
    try:
        plain = _to_grey_or_rgb(image)
        if orientation in _TRANSPOSE:
            plain = plain.transpose(_TRANSPOSE[orientation])
        if hashed:
            full_size = np.asarray(plain.convert("RGB")) if plain.size == (width, height) else _decode(data, None)[1]
            info = replace(info, content_hash=content_hash(full_size))
        if frame is not None:
            return info, frame.place_image(plain, width, height)
        return info, np.array(plain.convert("RGB"), dtype=np.uint8)
    except _DECODE_ERRORS as error:
        raise _describe_undecodable(error, image) from error


def _load_pixels(data: bytes, size_px: int | None, page: int = 0) -> tuple[Image.Image, int, tuple[int, int]]:
    """Opens an image file and loads the pixels of a page.

    Args: size_px: a JPEG may be decoded smaller, but not below twice this size; None: full size.

    Returns: the image before rotation, the EXIF orientation that must be applied, and the (width, height) of the file after it.
    """
    tags = _read_tiff_tags(data, page)
    if tags is not None and _choose_reader(tags) == "tifffile":
        return _load_tiff(data, tags, page)
    image = _open(data)
    try:
        image.seek(page)
        width, height = image.size  # before `draft` reduces a JPEG
        if size_px is not None and image.format in ("JPEG", "MPO"):
            image.draft("", (2 * size_px, 2 * size_px))
        image.load()
    except _DECODE_ERRORS as error:
        raise ImageError(
            "truncated", f"the {image.format} image's pixels are truncated or damaged ({error}): copy it again"
        ) from error
    orientation = _read_orientation(image)
    size = (height, width) if orientation in _QUARTER_TURNS else (width, height)
    if tags is not None and tags.bits in (12, 16) and _is_deep_grey(image):
        return _scale_to_full_range(image, tags), orientation, size
    return image, orientation, size


def _read_tiff_tags(data: bytes, page: int = 0) -> tiff.Tags | None:
    """Reads the tags of a TIFF; None for other files and for badly damaged ones. Raises: ImageError: the kind is unsupported."""
    if not data.startswith(tiff.TIFF_SIGNATURES):
        return None
    try:
        tags = tiff.read_tags(data, page)
    except tiff.TiffError as error:
        raise ImageError(error.reason, str(error)) from error
    if tags is not None:
        _check_size(tags.width, tags.height)
    return tags


def _choose_reader(tags: tiff.Tags) -> str:
    """Returns the library that reads a TIFF. Raises: ImageError: neither does."""
    try:
        return tiff.choose_reader(tags)
    except tiff.TiffError as error:
        raise ImageError(error.reason, str(error)) from error


def _load_tiff(data: bytes, tags: tiff.Tags, page: int = 0) -> tuple[Image.Image, int, tuple[int, int]]:
    """Loads a page of a TIFF with tifffile; returns and raises as `_load_pixels`."""
    try:
        pixels, is_transparent = tiff.read_pixels(data, tags, page)
    except tiff.TiffError as error:
        raise ImageError(error.reason, str(error)) from error
    image = Image.fromarray(pixels)
    image.format = "TIFF"
    image.info["see_through"] = is_transparent
    is_turned = tags.orientation in _QUARTER_TURNS
    return image, tags.orientation, (image.height, image.width) if is_turned else image.size


def _scale_to_full_range(image: Image.Image, tags: tiff.Tags) -> Image.Image:
    """Scales grey of 12 or 16 bits to the full range of 16 bits, and inverts WhiteIsZero."""
    max_value = 2**tags.bits - 1

    def stretch(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        values = block.astype(np.int64)
        return ((max_value - values if tags.photometric == 0 else values) * 65535 // max_value).clip(0, 65535)

    values = np.asarray(image)
    scaled = Image.fromarray(tiff.convert_rows(values, stretch, values.shape, np.uint16))
    scaled.format = image.format
    return scaled


def _is_transparent(image: Image.Image) -> bool:
    """Says whether alpha is 0 everywhere."""
    if image.mode in ("RGBA", "LA", "PA"):
        return not np.asarray(image.getchannel("A")).any()
    return bool(image.info.get("see_through", False))


def _open(data: bytes) -> ImageFile.ImageFile:
    """Opens an image file and reads its header, not its pixels. Raises: ImageError: as `read_header`."""
    if not data:
        raise ImageError("empty", "the image is empty (0 bytes): copy it again from its source")
    _check_structure(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", f"{error}; at most {MAX_PIXELS} pixels are read: cut it into tiles") from error
    except UnidentifiedImageError as error:
        raise _describe_unidentified(data) from error
    except _DECODE_ERRORS as error:
        raise ImageError("truncated", f"the image's header is damaged ({error}): copy it again") from error
    # Pillow accepts more signatures, but the tags of such files were not checked
    if image.format == "TIFF" and not data.startswith(tiff.TIFF_SIGNATURES):
        raise _describe_unidentified(data)
    _check_size(*image.size)
    return image


def _check_structure(data: bytes) -> None:
    """Raises: ImageError: the file has more JPEG scans or segments, or PNG chunks, than an image needs. Damaged files pass."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        offset = 8
        for _ in range(_MAX_PNG_CHUNKS):
            offset += 12 + int.from_bytes(data[offset : offset + 4], "big")
            if offset >= len(data):
                return
        raise ImageError("too_large", f"a PNG of more than {_MAX_PNG_CHUNKS} chunks: save it again")


def _check_jpeg(data: bytes) -> None:
    """Counts the scans and segments of a JPEG, from marker to marker, so that bytes within a segment do not count as markers.

    Raises: ImageError: there are too many.
    """
    offset, num_scans, num_segments, fill_bytes = 2, 0, 0, 0
    # marker D9 is the end of the image
    while (marker := _JPEG_MARKER.search(data, offset)) is not None and data[marker.end() - 1] != 0xD9:
        if not num_scans:
            fill_bytes += marker.start() - offset
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
        offset = marker.end()
        if data[offset - 1] not in (0x01, 0xD8):  # markers 01 and D8 have no length
            offset += max(2, int.from_bytes(data[offset : offset + 2], "big"))
    if not num_scans and len(data) - offset > _MAX_JPEG_FILL_BYTES:
        raise ImageError("truncated", "a JPEG without pixels in it: copy it again")


def _check_size(width: int, height: int) -> None:
    """Raises: ImageError: the image has more than `MAX_PIXELS` pixels."""
    num_pixels = width * height
    if num_pixels > MAX_PIXELS:
        raise ImageError(
            "too_large",
            f"{width} x {height} is {num_pixels} pixels; at most {MAX_PIXELS} are read: cut it into tiles",
        )


def _read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation that must still be applied; 1 if there is none."""
    # Pillow rotates TIFFs while it loads them and removes the tag.
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
                return None  # getexif would decode the whole image to search for a block after the pixels
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
        pass  # the check of the image reports the damage
    return None


def _maximum_over_channels(image: Image.Image) -> npt.NDArray[Any]:
    """Returns the maximum (H, W) over the channels of each pixel."""
    values = np.asarray(image)
    return np.asarray(values.max(axis=2) if values.ndim == 3 else values)


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to mode L or RGB, composed over black. Raises: ImageError: the mode is not supported."""
    if _is_deep_grey(image):
        image = _deep_grey_to_8_bit(image)
    elif image.mode == "F":
        raise ImageError("unsupported", "a floating-point image has no defined range: save it as 8-bit or 16-bit")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _is_deep_grey(image: Image.Image) -> bool:
    """Says whether an image is grey with more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scales grey of 16 bits to 8 bits by its full range. Raises: ImageError: the values need more than 16 bits."""
    # Pillow opens some 16-bit files, and all 32-bit files, with mode I.
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError("unsupported", f"32-bit values from {low} to {high}: save the image as 8-bit or 16-bit")
    grey = tiff.convert_rows(
        values, lambda block: (block.astype(np.int64) * 255 + 32767) // 65535, values.shape, np.uint8
    )
    return Image.fromarray(grey)


def _verify_chunks(data: bytes) -> None:
    """Checks the end mark and the checksums of a PNG, which Pillow's pixel loader ignores. Raises: ImageError: one is wrong."""
    if not data.startswith(b"\x89PNG"):
        return
    _check_structure(data)
    if b"IEND\xaeB`\x82" not in data:
        raise ImageError("truncated", "the PNG image is truncated (its end mark is not complete): copy it again")
    try:
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    except UnidentifiedImageError as error:
        raise ImageError("truncated", "the PNG image stops within its header: copy it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return  # the loader reports it
    except _DECODE_ERRORS as error:
        raise ImageError("truncated", f"the PNG image is truncated or damaged ({error}): copy it again") from error


def _describe_unidentified(data: bytes) -> ImageError:
    """Returns the error for bytes that Pillow does not identify, with the format if its first bytes are known."""
    readable_formats = ", ".join(FORMATS)
    for magic, name in _UNSUPPORTED_MAGIC.items():
        if data.startswith(magic):
            return ImageError("unsupported", f"{name} files are not read: convert to one of {readable_formats}")
    if data[4:8] == b"ftyp":
        return ImageError(
            "unsupported", f"HEIC, AVIF and video files are not read: convert to one of {readable_formats}"
        )
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"II*\x00", b"MM\x00*", b"BM")):
        return ImageError("truncated", f"the image stops within its header ({len(data)} bytes): copy it again")
    return ImageError(
        "not_an_image",
        f"{len(data)} bytes that start with {data[:8]!r} are not an image: expected one of {readable_formats}",
    )


def _describe_undecodable(error: BaseException, image: Image.Image) -> ImageError:
    """Turns an error of a conversion into an ImageError."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, DataError):  # from the frame: no part of this image is in it
        return ImageError("unsupported", str(error))
    return ImageError("unsupported", f"{image.format} of mode {image.mode} cannot be converted to RGB ({error})")
