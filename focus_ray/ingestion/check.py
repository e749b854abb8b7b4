"""Reads and checks one image with its masks. The result is the content of a row, or the reason for a rejection."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from focus_ray.data.images import ImageError, content_hash, probe_mask, read_image, refuse_drawing
from focus_ray.data.importers.base import ImportSettings, Sample, describe_broken_link, is_broken_link
from focus_ray.data.schema import Reject, RejectReason, Row
from focus_ray.drawing.png import encode_png

FileDigest = tuple[int, str]
"""Size in bytes and SHA-256 hex of a file; -1 and the error number if the file cannot be read."""


@dataclass(frozen=True, slots=True)
class CheckedSample:
    """A sample without errors: the content of its row without the bytes of the image, and facts for plausibility notes."""

    sample: Sample
    digest: str  # SHA-256 hex of the image file
    width: int
    height: int
    content_hash: str
    mask: bytes | None  # PNG; empty bytes after the mask was written and dropped from memory
    note: str | None  # hint for the user
    num_levels: int = 256  # number of different pixel values
    mask_share: float = 0.0  # share of the image that the mask marks
    num_mask_values: int = 1  # number of different mask values above 0


def read_sample_files(sample: Sample) -> list[bytes | OSError]:
    """Returns the bytes of the image and of its masks. A file that cannot be read is represented by its error.

    Raises: DataError: the storage fails.
    """
    contents: list[bytes | OSError] = []
    for file in (sample.path, *sample.masks):
        try:
            contents.append(file.read_bytes())
        except OSError as error:
            contents.append(error)
    return contents


def compute_digest(content: bytes | OSError) -> FileDigest:
    """Returns size and SHA-256 hex of the content of a file. For an error, returns -1 and the error number."""
    if isinstance(content, OSError):
        return -1, str(content.errno)
    return len(content), hashlib.sha256(content).hexdigest()


def _require_bytes(content: bytes | OSError) -> bytes:
    """Returns the content, or raises it if it is the error of a file that cannot be read."""
    if isinstance(content, OSError):
        raise content
    return content


def check_sample(
    sample: Sample, contents: Sequence[bytes | OSError], category: str, settings: ImportSettings
) -> CheckedSample | Reject:
    """Checks an image and its masks.

    Args:
        contents: from `read_sample_files`.
        category: for the record of a rejection.

    Returns:
        The checked sample, or the reason for its rejection.
    """

    def reject(reason: RejectReason, detail: str) -> Reject:
        return Reject(settings.relative(sample.path), category, reason, detail)

    try:
        data = _require_bytes(contents[0])
        refuse_drawing(data)
        info, pixels = read_image(data)
    except ImageError as error:
        return reject(error.reason, str(error))
    except OSError as error:
        return reject("unreadable", error.strerror or str(error))
    content = content_hash(pixels)
    num_levels = int(np.count_nonzero(np.bincount(pixels.reshape(-1), minlength=256)))
    del pixels

    joined: np.ndarray[Any, np.dtype[np.bool_]] | None = None  # (H, W), the union of all masks of the image
    num_mask_values = 0
    for path, mask_content in zip(sample.masks, contents[1:], strict=True):
        if is_broken_link(path):
            return reject("mask_unreadable", f"its mask {settings.relative(path)} is {describe_broken_link(path)}")
        try:
            mask, num_values = probe_mask(_require_bytes(mask_content))
            num_mask_values = max(num_mask_values, num_values)
        except (ImageError, OSError) as error:
            return reject("mask_unreadable", f"its mask {settings.relative(path)} cannot be read: {error}")
        if mask.shape != (info.height, info.width):
            return reject(
                "mask_size",
                f"its mask {settings.relative(path)} is {mask.shape[1]} x {mask.shape[0]} pixels, the image "
                f"{info.width} x {info.height}: export the mask again at the image's size",
            )
        joined = mask if joined is None else joined | mask
    note = None
    if joined is not None and not sample.label and joined.any():
        return reject(
            "mask_on_good",
            f"a normal image whose mask {settings.relative(sample.masks[0])} marks {int(joined.sum())} pixels"
            + (
                ", nearly all of the image: is the mask inverted? Values above 0 mean defective"
                if joined.mean() > 0.9
                else ""
            )
            + ": move the image to the folder of a defect, or correct or remove the mask",
        )
    if joined is not None and sample.label and not joined.any():
        note = "its mask is empty although the image is anomalous; the image is ingested without a mask"
    if info.see_through:
        note = "its alpha channel is 0 everywhere, so the image is read as black; export it without transparency"
    encoded = encode_png(joined) if joined is not None and joined.any() else None
    digest = hashlib.sha256(data).hexdigest()
    mask_share = 0.0 if joined is None else float(joined.mean())
    return CheckedSample(
        sample, digest, info.width, info.height, content, encoded, note, num_levels, mask_share, num_mask_values
    )


def make_row(row_id: str, item: CheckedSample, data: bytes, category: str, site: str) -> Row:
    """Returns the row of a checked sample. data: the bytes of its image file."""
    return {
        "id": row_id,
        "category": category,
        "split": item.sample.split,
        "label": item.sample.label,
        "defect_type": item.sample.defect_type,
        "image": data,
        "mask": item.mask,
        "width": item.width,
        "height": item.height,
        "site": site,
        "content_hash": item.content_hash,
        "group": item.sample.group,
    }
