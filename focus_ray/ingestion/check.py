"""Checks one image with its masks. The result is the content of a row, or the reason for a rejection."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from focus_ray.data.images import (
    ImageError,
    decode_image_with_info,
    decode_mask_and_count_values,
    hash_pixels,
    refuse_generated_picture,
)
from focus_ray.data.importers.base import ImportSettings, SourceImage, describe_broken_link, is_broken_link
from focus_ray.data.schema import RejectedFile, RejectReason
from focus_ray.data.source import SourcePath
from focus_ray.drawing.png import encode_png

FileDigest = tuple[int, str]
"""Size in bytes and SHA-256 hex of a file; -1 and the error number if the file cannot be read."""


@dataclass(frozen=True, slots=True)
class CheckedSample:
    """An image that passed all checks: its row without the bytes of the image, and numbers for plausibility notes."""

    sample: SourceImage
    width: int
    height: int
    content_hash: str
    mask: bytes | None  # PNG; empty bytes after the mask was written and dropped from memory
    note: str | None  # hint for the user
    num_levels: int  # number of different pixel values
    mask_share: float  # share of the image that the mask marks
    num_mask_values: int  # number of different mask values above 0


def read_source_file(path: SourcePath) -> bytes | OSError:
    """Reads a source file. Returns its bytes, or the OSError if the file cannot be read.

    Raises: DataError: the S3 storage fails.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def compute_file_digest(content: bytes | OSError) -> FileDigest:
    """Returns size and SHA-256 hex of a file, to recognise unchanged content; for an error, -1 and the error number."""
    if isinstance(content, OSError):
        return -1, str(content.errno)
    return len(content), hashlib.sha256(content).hexdigest()


def check_sample(
    sample: SourceImage, contents: Sequence[bytes | OSError], category: str, settings: ImportSettings
) -> CheckedSample | RejectedFile:
    """Checks an image and its masks. Returns the checked sample, or a `RejectedFile` with the reason of the refusal.

    Args:
        sample: the image.
        contents: from `read_source_file`: of the image, then of each mask.
        category: name of the category, for a rejection.
        settings: the settings of the ingestion.
    """

    def make_reject(reason: RejectReason, detail: str) -> RejectedFile:
        return RejectedFile(settings.describe_path(sample.path), category, reason, detail)

    data = contents[0]
    if isinstance(data, OSError):
        return make_reject("unreadable", data.strerror or str(data))
    try:
        refuse_generated_picture(data)
        info, pixels = decode_image_with_info(data)
    except ImageError as error:
        return make_reject(error.reason, str(error))
    content = hash_pixels(pixels)
    num_levels = int(np.count_nonzero(np.bincount(pixels.reshape(-1), minlength=256)))
    del pixels

    marked = np.zeros((info.height, info.width), dtype=bool)  # the union of all masks of the image
    num_mask_values = 0
    for path, mask_content in zip(sample.masks, contents[1:], strict=True):
        name = f"its mask {settings.describe_path(path)}"
        if is_broken_link(path):
            return make_reject("mask_unreadable", f"{name} is {describe_broken_link(path)}")
        try:
            if isinstance(mask_content, OSError):
                raise mask_content
            mask, num_values = decode_mask_and_count_values(mask_content)
        except (ImageError, OSError) as error:
            return make_reject("mask_unreadable", f"{name} cannot be read: {error}")
        if mask.shape != marked.shape:
            return make_reject(
                "mask_size",
                f"{name} is {mask.shape[1]} x {mask.shape[0]} pixels, the image {info.width} x {info.height}: export the "
                "mask again at the image's size",
            )
        num_mask_values = max(num_mask_values, num_values)
        marked |= mask
    is_marked, mask_share = bool(marked.any()), float(marked.mean())
    if is_marked and not sample.label:
        hint = ", nearly all of the image: is the mask inverted? Values above 0 mean defective"
        return make_reject(
            "mask_on_good",
            f"a normal image whose mask {settings.describe_path(sample.masks[0])} marks {int(marked.sum())} pixels"
            f"{hint if mask_share > 0.9 else ''}: move the image to the folder of a defect, or correct or remove the mask",
        )
    note = None
    if info.fully_transparent:
        note = "its alpha channel is 0 everywhere, so the image is read as black; export it without transparency"
    elif sample.masks and sample.label and not is_marked:
        note = "its mask is empty although the image is anomalous; the image is ingested without a mask"
    encoded = encode_png(marked) if is_marked else None
    return CheckedSample(
        sample, info.width, info.height, content, encoded, note, num_levels, mask_share, num_mask_values
    )
