"""One image and its masks, read once and checked: a row, or the reason why not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from focus_ray.data.images import ImageError, content_hash, encode_png, probe_mask, read_image, refuse_drawing
from focus_ray.data.importers.base import ImportSettings, Sample, is_lost, lost_words
from focus_ray.data.schema import Reject, RejectReason, Row

Facts = tuple[int, str]
"""Bytes and SHA-256 hex of a file; -1 and the error's number of one that cannot be read."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A sample that can be used: its row but for the image's bytes."""

    sample: Sample
    digest: str  # SHA-256 hex of the file
    width: int
    height: int
    content_hash: str
    mask: bytes | None  # PNG; empty for one that is written already and was not kept
    note: str | None
    levels: int = 256  # different values of its pixels
    marked: float = 0.0  # the mask's share of the image
    mask_values: int = 1  # different ones above 0


def read_files(sample: Sample) -> list[bytes | OSError]:
    """The image and its masks, or why one cannot be read. Raises: DataError: the storage fails."""
    contents: list[bytes | OSError] = []
    for file in (sample.path, *sample.masks):
        try:
            contents.append(file.read_bytes())
        except OSError as error:
            contents.append(error)
    return contents


def facts_of(content: bytes | OSError) -> Facts:
    if isinstance(content, OSError):
        return -1, str(content.errno)
    return len(content), hashlib.sha256(content).hexdigest()


def _bytes_of(content: bytes | OSError) -> bytes:
    if isinstance(content, OSError):
        raise content
    return content


def check(
    sample: Sample, contents: Sequence[bytes | OSError], category: str, settings: ImportSettings
) -> Checked | Reject:
    """What becomes of an image. contents: of `read_files`."""

    def reject(reason: RejectReason, detail: str) -> Reject:
        return Reject(settings.relative(sample.path), category, reason, detail)

    try:
        data = _bytes_of(contents[0])
        refuse_drawing(data)
        info, pixels = read_image(data)
    except ImageError as error:
        return reject(error.reason, str(error))
    except OSError as error:
        return reject("unreadable", error.strerror or str(error))
    content = content_hash(pixels)
    levels = int(np.count_nonzero(np.bincount(pixels.reshape(-1), minlength=256)))
    del pixels

    joined: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    mask_values = 0
    for path, mask_content in zip(sample.masks, contents[1:], strict=True):
        if is_lost(path):
            return reject("mask_unreadable", f"its mask {settings.relative(path)} is {lost_words(path)}")
        try:
            mask, different = probe_mask(_bytes_of(mask_content))
            mask_values = max(mask_values, different)
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
            + (", nearly all, as an inverted mask does (defective is what is above 0)" if joined.mean() > 0.9 else "")
            + ": move the image to a defect's folder, or mend or remove the mask",
        )
    if joined is not None and sample.label and not joined.any():
        note = "its mask marks nothing although the image is anomalous; taken as an image without a mask"
    if info.see_through:
        note = "its alpha channel is 0 everywhere: it is taken as black; export it without transparency"
    encoded = encode_png(joined) if joined is not None and joined.any() else None
    digest = hashlib.sha256(data).hexdigest()
    marked = 0.0 if joined is None else float(joined.mean())
    return Checked(sample, digest, info.width, info.height, content, encoded, note, levels, marked, mask_values)


def make_row(name: str, item: Checked, data: bytes, category: str, site: str) -> Row:
    return {
        "id": name,
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
