"""What a TIFF file's tags say of its pixels, and what is to be done with them.

Pillow reads the everyday kinds rightly and some others wrongly in silence, so the tags decide: Pillow reads a file, tifffile
reads it, or it is refused by what it is.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

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


class TiffError(ValueError):
    """A TIFF file that is not read; its words say what it is and what to do."""


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

    Raises: TiffError: the pages are damaged, or the file holds images or samples that are not pages, which nothing here reads.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        try:
            pages = list(file.pages)
            shapes = [series.shape for series in file.series]
        except Exception as error:  # whatever a parser meets in damaged bytes
            raise TiffError(f"the pages of the TIFF are damaged ({error}): copy the file again") from error
        if not _is_chain_whole(data):
            raise TiffError(f"the TIFF is cut off after page {len(pages)}: copy the file again")
        values = sum(int(np.prod(page.shape)) for page in pages)
        if sum(int(np.prod(shape)) for shape in shapes) > values or any(page.imagedepth > 1 for page in pages):
            raise TiffError("a TIFF that holds a stack without a page for each image: save each image as a page")
        if any(0 in map(int, page.extrasamples or ()) for page in pages):
            raise TiffError("a TIFF with samples that are neither colours nor alpha: save each region as a page")
        full = [number for number, page in enumerate(pages) if not page.is_reduced]
    return full or [0]


def _is_chain_whole(data: bytes) -> bool:
    """Whether each page links to a place within the file, or ends the chain; tifffile stops at a broken link without an error."""
    order: Literal["little", "big"] = "big" if data.startswith(b"MM") else "little"
    place, seen = int.from_bytes(data[4:8], order), set()
    while place:
        count = int.from_bytes(data[place : place + 2], order)
        link = place + 2 + 12 * count
        if place in seen or not count or link + 4 > len(data):
            return False
        seen.add(place)
        place = int.from_bytes(data[link : link + 4], order)
    return True


def read_tags(data: bytes, number: int = 0) -> Tags | None:
    """The tags of a page; None where the file is so damaged that there are none."""
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
            values = np.asarray(file.pages[page].asarray())
    except Exception as error:
        # without its larger companion, tifffile reads no LZW or JPEG
        raise TiffError(f"{tags.words}: cannot be read here ({error}): save it without compression") from error
    if tags.samples > 1:
        values = np.moveaxis(values, 0, -1) if tags.planar else values
        if values.ndim != 3 or values.shape[2] != tags.samples:
            raise TiffError(f"{tags.words}: its pixels have the shape {values.shape}: save it as 8-bit grey or RGB")
    else:
        values = values.reshape(values.shape[:2])[:, :, None]
    full = 2**tags.bits - 1
    colours = _COLOURS[tags.photometric]
    shown, rest = values[:, :, :colours].astype(np.int64), values[:, :, colours:]
    if tags.photometric == 0:
        shown = full - shown
    alpha = next((number for number, kind in enumerate(tags.extras) if kind in _ALPHA), None)
    if alpha is not None and tags.extras[alpha] == 2:
        shown = shown * rest[:, :, alpha : alpha + 1] // full
    if tags.bits == 16:  # as elsewhere: grey by its full range, of colour the high byte
        shown = (shown * 255 + 32767) // 65535 if colours == 1 else shown >> 8
    found = np.clip(shown, 0, 255).astype(np.uint8)
    see_through = alpha is not None and not rest[:, :, alpha].any()
    return (found[:, :, 0] if colours == 1 else found), see_through
