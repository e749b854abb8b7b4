"""Decodes image files to RGB arrays and mask files to bool arrays, and encodes arrays as PNG.

Training, batch inspection and serving treat unusual files in the same way:

- The EXIF orientation is applied. An EXIF block that cannot be parsed is ignored, as in every viewer.
- Grey is repeated over the three channels. Pillow converts CMYK, YCbCr, LAB and HSV. ICC profiles are ignored.
- Transparent pixels (alpha channel, palette or colour key) are composed over black, so their hidden colours have no effect.
- 16-bit grey is scaled by its full range, round(value * 255 / 65535), and not by the minimum and maximum of the image. So equal
  exposure stays equal. A 12-bit camera that does not shift its values up gives dark images: shift the values first.
- 16-bit colour keeps its high byte, because Pillow reads no more. 32-bit integer, signed and float images are refused.
- The tags of a TIFF decide how it is read, or that it is refused (`tiff`). WhiteIsZero pixels are inverted, so that white is 255.
- Pictures that focus_ray drew itself are decoded like other images. Callers can refuse them with `refuse_generated_picture`.
- Only the first frame or page of an image is used. The pages of a mask's TIFF are combined, because some programs write one page
  for each region. Masks of other formats with several frames are refused.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.ExifTags import IFD, Base

from focus_ray.data import tiff
from focus_ray.data.framing import InputFrame
from focus_ray.data.image_errors import ImageError as ImageError
from focus_ray.drawing.mark import is_drawn_by_focus_ray
from focus_ray.drawing.png import encode_png
from focus_ray.errors import DataError

# Largest image that is read, in pixels (about 9459 x 9459). Above this size, Pillow warns of decompression bombs: a file of a few
# hundred kilobytes can need gigabytes of memory. Larger images, such as line scans, must be cut into tiles.
MAX_PIXELS = 89_478_485

# Formats that Pillow may decode. Its many other decoders never see untrusted bytes.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")

# Bounds of the time that a small file can take. A scan goes over the whole image, and Pillow reads segments and chunks in a
# Python loop.
MAX_JPEG_SCANS = 100  # encoders write at most 12
_MAX_JPEG_SEGMENTS = 10_000  # before the pixels; 64 KiB each
_MAX_JPEG_FILL_BYTES = 2**16  # between the segments
_MAX_PNG_CHUNKS = 2**15  # encoders put at least 8 KiB of pixels into each chunk
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # without stuffed bytes, restarts within a scan, and fill bytes

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
# First bytes of common image formats that are not read, for a better message than "not an image".
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
# Errors that Pillow's decoders raise for damaged bytes.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


@dataclass(frozen=True)
class ImageInfo:
    """The size of an image file, whether it is fully transparent, and a hash of its pixels.

    Attributes:
        width, height: pixels after EXIF rotation; `read_image_header` gives the size before EXIF rotation.
        fully_transparent: whether the image has an alpha channel that is zero everywhere, so that the image shows nothing.
        content_hash: `hash_pixels` of the pixels; None unless it was requested.
    """

    width: int
    height: int
    fully_transparent: bool = False
    content_hash: str | None = None


def decode_image(data: bytes, size: int | InputFrame | None) -> npt.NDArray[np.uint8]:
    """Decodes the bytes of an image file to RGB pixels, and resizes them to the requested size.

    The rules at the top of this module say how unusual files are decoded. Images are resized with Pillow's antialiased bilinear
    filter. A JPEG of at least four times the requested size is first decoded at a half, a quarter or an eighth of its size, but
    never below twice the requested size. This saves most of the time and changes pixels by about one grey level.

    Args:
        data: bytes of a file in one of the formats ``FORMATS``.
        size: `InputFrame` (target size and padding) into which the image is placed; or the side, in pixels, of a square to which
            the image is stretched. None keeps the size of the image.

    Returns: uint8, RGB, writable: (H, W, 3), or the shape of the `InputFrame`, which may have a fourth channel that marks the
        scored pixels.

    Raises: ImageError: the data is empty, truncated, no image, of an unsupported kind, has more than ``MAX_PIXELS`` pixels, or
        no pixel of the image can be scored.
    """
    return decode_image_with_info(data, size)[1]


def decode_image_with_info(
    data: bytes, size: int | InputFrame | None = None, with_hash: bool = False
) -> tuple[ImageInfo, npt.NDArray[np.uint8]]:
    """Decodes one image. Returns its `ImageInfo` (size, transparency, hash) and its pixels.

    The whole file is checked, including the checksums of a PNG. Wrong bits inside the compressed pixels of a JPEG cannot be
    detected, because they decode to other pixels.

    Args:
        data: bytes of a file in one of the formats ``FORMATS``.
        size: see `decode_image`.
        with_hash: also computes the content hash. A JPEG that is decoded at a reduced size is then decoded twice.

    Raises: ImageError: see `decode_image`.
    """
    frame = _make_frame(size)
    _verify_png(data)
    image, orientation, (width, height) = _load_pixels(data, None if frame is None else max(frame.height, frame.width))
    with _explain_conversion_errors(image):
        plain = _rotate_upright(_convert_to_grey_or_rgb(image), orientation)
        digest = None
        if with_hash:
            is_whole = plain.size == (width, height)
            digest = hash_pixels(np.asarray(plain.convert("RGB")) if is_whole else decode_image(data, None))
        info = ImageInfo(width, height, _is_fully_transparent(image), digest)
        if frame is not None:
            return info, frame.resize_image(plain, width, height)
        return info, np.array(plain.convert("RGB"), dtype=np.uint8)


def read_image_header(data: bytes) -> ImageInfo:
    """Reads the size of an image (before EXIF rotation) from the header of its file. No pixel is decoded.

    Raises: ImageError: the data is empty, no image, of an unsupported kind, has more than ``MAX_PIXELS`` pixels, or its header
        is damaged.
    """
    tags = _read_tiff_tags(data)
    if tags is not None and tiff.choose_decoding_library(tags) == "tifffile":
        return ImageInfo(tags.width, tags.height)
    return ImageInfo(*_open_with_pillow(data).size)


def decode_mask(data: bytes, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Decodes a mask, and resizes it to (height, width). A pixel is anomalous if at least one of its channels is above 0.

    This rule holds for every bit depth; of 16-bit colour only the high byte counts. For a palette image the colours count, not
    the palette indices. Transparent pixels are composed over black. The full-size pages of a TIFF are combined: a pixel is
    anomalous if it is anomalous on one page. `resize_mask` describes the resizing.

    Args:
        data: bytes of a file in one of the formats ``FORMATS``.
        height, width: size of the result in pixels.

    Returns: (height, width) bool, True at anomalous pixels.

    Raises: ImageError: see `decode_image`. Also if the mask has several frames (animation), or pages of different sizes.
    """
    return resize_mask(decode_mask_and_count_values(data)[0], height, width)


def resize_mask(mask: npt.NDArray[np.bool_], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Resizes a mask (H, W), bool, to (height, width), so that thin defects do not disappear.

    If a side becomes smaller, a pixel is anomalous if at least one pixel that it replaces is anomalous. If a side becomes
    larger, pixels are repeated.
    """
    for axis, size in enumerate((height, width)):
        length = mask.shape[axis]
        if size < length:
            mask = np.logical_or.reduceat(mask, np.arange(size) * length // size, axis=axis)
        elif size > length:
            mask = mask.take(np.arange(size) * length // size, axis=axis)
    return np.ascontiguousarray(mask)


def decode_mask_and_count_values(data: bytes) -> tuple[npt.NDArray[np.bool_], int]:
    """Decodes a mask without resizing it, and counts the different pixel values above 0 in its file.

    A usual mask has one such value. Masks with one value for each type of defect have a few. Masks that were saved as JPEG,
    blurred or resized have many.

    Returns: the mask (H, W), bool, and the number of values. For several pages, the union of the masks and the largest number.

    Raises: ImageError: see `decode_mask`.
    """
    _verify_png(data)
    if _read_tiff_tags(data) is not None:
        pages = tiff.list_full_size_pages(data)
    else:
        pages, image = [0], _open_with_pillow(data)
        with _explain_pillow_errors(data, "list of frames"):
            num_frames = int(getattr(image, "n_frames", 1))
        if num_frames > 1:
            raise ImageError("unsupported", f"a {image.format} mask of {num_frames} frames: export it as one frame")
    mask, num_values = _decode_mask_page(data, pages[0])
    for page in pages[1:]:
        other, num_page_values = _decode_mask_page(data, page)
        if other.shape != mask.shape:
            sizes = f"{other.shape[1]} x {other.shape[0]} pixels, and page {pages[0] + 1} is {mask.shape[1]} x {mask.shape[0]}"
            raise ImageError("unsupported", f"the mask's page {page + 1} is {sizes}: export the mask as one page")
        mask, num_values = mask | other, max(num_values, num_page_values)
    return mask, num_values


def _decode_mask_page(data: bytes, page: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Decodes one page of a mask, and counts its different pixel values above 0, see `decode_mask_and_count_values`.

    Args: page: number of the page, from 0.

    Raises: ImageError: see `decode_image`.
    """
    image, orientation, _ = _load_pixels(data, None, page)
    with _explain_conversion_errors(image):
        deep = _has_wide_integers(image) or image.mode == "F"
        values = np.asarray(image if deep else _convert_to_grey_or_rgb(image))
        if values.ndim == 3:
            values = values.max(axis=2)
        mask: npt.NDArray[np.bool_] = values > 0
        num_values = len(np.unique(values[mask]))
    upright = _rotate_upright(Image.fromarray(mask.astype(np.uint8)), orientation)
    return np.asarray(upright) > 0, num_values


def encode_pillow_image(image: Image.Image) -> bytes:
    """Encodes an opened or created Pillow image as a lossless PNG and returns the bytes of the file.

    The PNG has the pixels that `decode_image` would return for the file of the image: the rules at the top of this module hold
    for palette, transparency, bit depth, colour space and EXIF orientation.

    Raises: ImageError: the pixels are damaged or of an unsupported kind, or the image is a TIFF of a kind that Pillow misreads.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    deep = _has_wide_integers(image) and (tags.get(262) == 0 or max(tags.get(258, (16,))) == 12)
    turned = tags.get(274, 1) != 1  # Pillow 12 does not rotate an uncompressed TIFF that was opened by its file name
    if deep or turned or 338 in tags or tags.get(284, 1) != 1 or set(tags.get(339, (1,))) != {1}:
        raise ImageError("unsupported", "Pillow misreads this kind of TIFF: give the path or the bytes of the file")
    with _explain_conversion_errors(image):
        image.load()
        plain = _convert_to_grey_or_rgb(image)
    return encode_png(np.asarray(_rotate_upright(plain, _read_exif_orientation(image))))


def refuse_generated_picture(data: bytes) -> None:
    """Checks that a file is not a picture that focus_ray drew, because only photographs may be used for training and inspection.

    Raises: ImageError: the file is such a picture.
    """
    if is_drawn_by_focus_ray(data):
        raise ImageError("unsupported", "a heat map or plot that focus_ray drew, not a photograph: give the photograph")


def decode_batch(
    images: Sequence[bytes], size: int | InputFrame, num_threads: int = 1, names: Sequence[str] | None = None
) -> npt.NDArray[np.uint8]:
    """Decodes a batch of photographs in threads, to arrays of one size.

    Several threads are faster than one, because Pillow releases the interpreter lock.

    Args:
        images: bytes of B files.
        size: `InputFrame` into which each image is placed, or the side, in pixels, of a square to which each image is stretched.
        num_threads: number of threads; at most one thread per image is used.
        names: name of each image for error messages; None: messages give the position of the image.

    Returns: (B, H, W, 3), uint8, in the order of `images`; (B, H, W, 4) if the frame has the channel of scored pixels.

    Raises: ImageError: an image cannot be decoded (see `decode_image`), or is a picture that focus_ray drew. The message names
        the first such image.
    """
    return decode_batch_with_info(images, size, num_threads, names=names)[1]


def hash_pixels(pixels: npt.NDArray[np.uint8]) -> str:
    """Returns the SHA-256 hex of the size and the pixels of an RGB image (H, W, 3). Images with equal pixels have equal hashes.

    It does not depend on the name and the lossless compression of the file.
    """
    digest = hashlib.sha256(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def decode_batch_with_info(
    images: Sequence[bytes],
    size: int | InputFrame,
    num_threads: int = 1,
    with_hash: bool = False,
    names: Sequence[str] | None = None,
) -> tuple[list[ImageInfo], npt.NDArray[np.uint8]]:
    """Decodes a batch of photographs. Returns the `ImageInfo` (size, transparency, hash) of each file, and the pixels.

    Args:
        images, size, num_threads, names: see `decode_batch`.
        with_hash: also computes the content hash of each image, see `decode_image_with_info`.

    Returns: one `ImageInfo` per image; pixels (B, H, W, 3 or 4), uint8.

    Raises: ImageError: see `decode_batch`.
    """
    frame = _make_frame(size)
    assert frame is not None
    batch = np.empty((len(images), *frame.shape), dtype=np.uint8)

    def decode_to_position(position: int) -> ImageInfo:
        """Decodes the image at a position of the batch and writes its pixels to the same position of the array."""
        try:
            refuse_generated_picture(images[position])
            info, batch[position] = decode_image_with_info(images[position], frame, with_hash)
            return info
        except ImageError as error:
            name = f"image {position} of {len(images)}" if names is None else names[position]
            raise ImageError(error.reason, f"{name}: {error}") from error

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(decode_to_position, range(len(images)))), batch


def _make_frame(size: int | InputFrame | None) -> InputFrame | None:
    """Returns the `InputFrame` for a size: a number becomes a square frame of this side; other values stay."""
    return InputFrame(size, size) if isinstance(size, int) else size


@contextmanager
def _explain_conversion_errors(image: Image.Image) -> Iterator[None]:
    """Context manager: turns errors of the conversion to RGB, or of the placement in the frame, into ImageError."""
    try:
        yield
    except ImageError:
        raise
    except DataError as error:  # from the frame: no pixel of this image can be scored
        raise ImageError("unsupported", str(error)) from error
    except _DECODE_ERRORS as error:
        raise ImageError("unsupported", f"pixels of mode {image.mode} cannot be converted to RGB ({error})") from error


@contextmanager
def _explain_pillow_errors(data: bytes, part: str) -> Iterator[None]:
    """Context manager: turns errors of Pillow into ImageError.

    Args:
        data: bytes of the file, to recognise its format for the message.
        part: name of the part that is read, for the message, such as "header".
    """
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", f"{error}; at most {MAX_PIXELS} pixels are read: cut it into tiles") from error
    except UnidentifiedImageError as error:
        raise _make_unidentified_error(data) from error
    except _DECODE_ERRORS as error:
        message = f"the {part} of the image is truncated or damaged ({error}): copy it again"
        raise ImageError("truncated", message) from error


def _load_pixels(data: bytes, size_px: int | None, page: int = 0) -> tuple[Image.Image, int, tuple[int, int]]:
    """Opens an image file and decodes its pixels, without EXIF rotation and without conversion to RGB.

    Args:
        data: bytes of the file.
        size_px: a JPEG may be decoded at a reduced size of at least twice this many pixels; None: at its full size.
        page: number of the frame or page, from 0.

    Returns: the image before EXIF rotation; the EXIF orientation (1 to 8) that must still be applied; the (width, height) of the
        full image after EXIF rotation.

    Raises: ImageError: see `decode_image`.
    """
    tags = _read_tiff_tags(data, page)
    image: Image.Image
    if tags is not None and tiff.choose_decoding_library(tags) == "tifffile":
        pixels, fully_transparent = tiff.decode_tiff_page(data, tags, page)
        image, orientation = Image.fromarray(pixels), tags.orientation
        image.info["fully_transparent"] = fully_transparent
        size = image.size
    else:
        image = _open_with_pillow(data)
        with _explain_pillow_errors(data, "pixel data"):
            image.seek(page)
            size = image.size  # read before `draft`, which reduces the size of a JPEG
            if size_px is not None and image.format in ("JPEG", "MPO"):
                image.draft("", (2 * size_px, 2 * size_px))
            image.load()
        orientation = _read_exif_orientation(image)
        if tags is not None and tags.bits in (12, 16) and _has_wide_integers(image):
            image = _stretch_to_16_bits(image, tags)
    return image, orientation, size[::-1] if orientation in _QUARTER_TURNS else size


def _read_tiff_tags(data: bytes, page: int = 0) -> tiff.TiffTags | None:
    """Returns the tags of a page of a TIFF; None for other formats, and for a TIFF whose tags are too damaged to be read.

    Raises: ImageError: see `tiff.read_page_tags`. Also if the page has more than ``MAX_PIXELS`` pixels.
    """
    if not data.startswith(tiff.TIFF_SIGNATURES):
        return None
    tags = tiff.read_page_tags(data, page)
    if tags is not None:
        _check_num_pixels(tags.width, tags.height)
    return tags


def _rotate_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Applies the EXIF orientation to an image, so that it is upright.

    Args: orientation: 1 to 8; 1 returns the image unchanged.
    """
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _stretch_to_16_bits(image: Image.Image, tags: tiff.TiffTags) -> Image.Image:
    """Scales 12-bit or 16-bit grey pixels to the full 16-bit range, and inverts them if the tags say that 0 is white."""
    full = 2**tags.bits - 1

    def stretch_block(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        values = block.astype(np.int64)
        return ((full - values if tags.photometric == 0 else values) * 65535 // full).clip(0, 65535)

    values = np.asarray(image)
    return Image.fromarray(tiff.convert_row_blocks(values, stretch_block, values.shape, np.uint16))


def _is_fully_transparent(image: Image.Image) -> bool:
    """Returns whether an image is fully transparent: its alpha channel is zero everywhere."""
    if image.mode in ("RGBA", "LA", "PA"):
        return not np.asarray(image.getchannel("A")).any()
    return bool(image.info.get("fully_transparent", False))


def _open_with_pillow(data: bytes) -> ImageFile.ImageFile:
    """Opens a file with Pillow and reads its header. The pixels are not checked and may still be damaged.

    Raises: ImageError: the data is empty, no image, of an unsupported kind, too large, or its header is damaged.
    """
    if not data:
        raise ImageError("empty", "the image is empty (0 bytes): copy it again from its source")
    _check_file_structure(data)
    with _explain_pillow_errors(data, "header"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    # Pillow also opens TIFFs with other first bytes, whose tags `tiff` does not check
    if image.format == "TIFF" and not data.startswith(tiff.TIFF_SIGNATURES):
        raise _make_unidentified_error(data)
    _check_num_pixels(*image.size)
    return image


def _check_file_structure(data: bytes) -> None:
    """Checks that a JPEG has not too many scans or segments, or a PNG too many chunks, which would take long to decode.

    Damaged files pass, because the decoder detects the damage. Other formats pass too.

    Raises: ImageError: a limit is exceeded, or a JPEG has much data without a scan.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg_structure(data)
    elif data.startswith(b"\x89PNG"):
        offset = 8
        for _ in range(_MAX_PNG_CHUNKS):
            offset += 12 + int.from_bytes(data[offset : offset + 4], "big")
            if offset >= len(data):
                return
        raise ImageError("too_large", f"a PNG of more than {_MAX_PNG_CHUNKS} chunks: save it again")


def _check_jpeg_structure(data: bytes) -> None:
    """Checks that a JPEG has not too many scans or segments, too many bytes between segments, or much data without a scan.

    The check jumps from marker to marker, so that marker bytes inside a segment do not count; see `_check_file_structure`.

    Raises: ImageError: a limit is exceeded.
    """
    offset, num_scans, num_segments, fill_bytes = 2, 0, 0, 0
    while (marker := _JPEG_MARKER.search(data, offset)) is not None:
        code = data[marker.end() - 1]
        if code == 0xD9:  # the end of the image
            break
        if not num_scans:
            fill_bytes += marker.start() - offset
        num_segments += 1
        num_scans += code == 0xDA
        if num_scans > MAX_JPEG_SCANS:
            raise ImageError("too_large", f"a JPEG of more than {MAX_JPEG_SCANS} scans: save it without them")
        if num_segments > _MAX_JPEG_SEGMENTS or fill_bytes > _MAX_JPEG_FILL_BYTES:
            raise ImageError("too_large", "a JPEG with too many segments, or bytes between them: save it again")
        offset = marker.end()
        if code not in (0x01, 0xD8):  # these two markers have no length
            offset += max(2, int.from_bytes(data[offset : offset + 2], "big"))
    if not num_scans and len(data) - offset > _MAX_JPEG_FILL_BYTES:
        raise ImageError("truncated", "a JPEG without pixels in it: copy it again")


def _check_num_pixels(width: int, height: int) -> None:
    """Checks that an image has at most ``MAX_PIXELS`` pixels. Raises: ImageError: it has more."""
    pixels = width * height
    if pixels > MAX_PIXELS:
        size = f"{width} x {height} is {pixels} pixels"
        raise ImageError("too_large", f"{size}; at most {MAX_PIXELS} are read: cut it into tiles")


def _read_exif_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation (1 to 8) that must still be applied to a loaded image; 1 if it is missing or damaged."""
    # Pillow rotates a TIFF while it loads the pixels, and then removes the tag.
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except (*_DECODE_ERRORS, AttributeError):
        return 1


def read_capture_time(data: bytes | Path) -> datetime | None:
    """Returns the EXIF time at which a photograph was taken: DateTimeOriginal or, if that is missing or invalid, DateTime.

    Fractions of a second are added if the file has them. Time zones are ignored. Only the header of the file is read.

    Args: data: bytes of an image file, or the path of the file.

    Returns: None if the file has no valid time or cannot be read as an image.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
            if image.format == "PNG" and not _PNG_EXIF & image.info.keys():
                return None  # getexif would decode the whole image to look for a block behind the pixels
            exif = image.getexif()
            details = exif.get_ifd(IFD.Exif)
        for value, fraction in (
            (details.get(Base.DateTimeOriginal), details.get(Base.SubsecTimeOriginal)),
            (exif.get(Base.DateTime), details.get(Base.SubsecTime)),
        ):
            digits = str(fraction or "").strip("\0 ")
            try:
                time = datetime.strptime(str(value or "").strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
            except ValueError:  # absent, or the zeros of a camera whose clock was never set
                continue
            return time + timedelta(seconds=float(f"0.{digits}") if digits.isdecimal() else 0.0)
    except (*_DECODE_ERRORS, AttributeError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass  # the check of the image reports the problem
    return None


def _convert_to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """Converts a loaded image to 8-bit grey (mode L) or RGB by the rules at the top of this module.

    Raises: ImageError: the pixels are floats, or integers that do not fit into 16 bits.
    """
    if _has_wide_integers(image):
        image = _scale_to_8_bit_grey(image)
    elif image.mode == "F":
        raise ImageError("unsupported", "a floating-point image has no set range: save it as 8-bit or 16-bit")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _has_wide_integers(image: Image.Image) -> bool:
    """Returns whether Pillow gives the pixels as 16-bit or 32-bit integers."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _scale_to_8_bit_grey(image: Image.Image) -> Image.Image:
    """Scales grey pixels from 16 bits to 8 bits. Raises: ImageError: a value does not fit into 16 bits."""
    # Mode "I" contains 32-bit integers: Pillow uses it for all 32-bit files and for some 16-bit files.
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError("unsupported", f"32-bit values from {low} to {high}: save the image as 8-bit or 16-bit")
    grey = tiff.convert_row_blocks(
        values, lambda block: (block.astype(np.int64) * 255 + 32767) // 65535, values.shape, np.uint8
    )
    return Image.fromarray(grey)


def _verify_png(data: bytes) -> None:
    """Checks that a PNG is complete and that its checksums are right. Other formats pass.

    Pillow decodes a PNG that ends after its last pixel, or that has a wrong checksum, without an error.

    Raises: ImageError: the PNG is truncated, has a wrong checksum, or has too many chunks.
    """
    if not data.startswith(b"\x89PNG"):
        return
    _check_file_structure(data)
    if b"IEND\xaeB`\x82" not in data:
        raise ImageError("truncated", "the PNG image is truncated (it has no whole end mark): copy it again")
    with _explain_pillow_errors(data, "content"):
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()


def _make_unidentified_error(data: bytes) -> ImageError:
    """Returns the error for a file that Pillow does not recognise: unsupported format, truncated header, or no image."""
    format_names = ", ".join(FORMATS)
    for magic, name in _UNSUPPORTED_MAGIC.items():
        if data.startswith(magic):
            return ImageError("unsupported", f"{name} files are not read: convert to one of {format_names}")
    if data[4:8] == b"ftyp":
        return ImageError("unsupported", f"HEIC, AVIF and video files are not read: convert to one of {format_names}")
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"II*\x00", b"MM\x00*", b"BM")):
        return ImageError("truncated", f"the image stops within its header ({len(data)} bytes): copy it again")
    return ImageError(
        "not_an_image",
        f"{len(data)} bytes that start with {data[:8]!r} are not an image: expected one of {format_names}",
    )
