"""Chooses the test images that a report shows, and draws their pictures. Only the chosen images are read again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focus_ray.data.images import decode_image, decode_mask
from focus_ray.data.schema import Row
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.pictures import draw_inspection_overlay
from focus_ray.drawing.overlay import draw_mask_outline
from focus_ray.metrics.evaluate import UnseenTestImages
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.ties import exceeds_threshold
from focus_ray.reporting.page import encode_jpeg_uri

CardKind = Literal["misses", "false_alarms", "finds"]
ReadRecords = Callable[[Sequence[int]], Iterable[Row]]
"""Reads the records (id, image and mask) of test images, from their ascending numbers among all test images."""
PER_KIND = 4
PICTURE_PX = 320  # longest side of a picture


class GalleryInspector(Protocol):
    """The interface of the object that inspects images for a gallery: two methods of `Inspector`."""

    def inspect(self, images: Sequence[bytes]) -> list[Inspection]: ...

    def align_images(self, image: bytes) -> NDArray[np.uint8] | None: ...


@dataclass(frozen=True)
class GalleryCard:
    """An image in the gallery, with its result and its pictures.

    Attributes:
        name: id of the image.
        defect_type: name of the image's class, such as 'crack' or 'good'.
        score_to_threshold: score divided by the threshold.
        mistake: 'missed' or 'false alarm'; empty if the verdict is right.
        views: title of a view, such as 'heat map' -> picture as a data URI.
    """

    name: str
    defect_type: str
    score: float
    threshold: float
    score_to_threshold: float
    p_value: float
    verdict: str
    mistake: str
    views: dict[str, str]


def choose_gallery_images(measured: ScoredTestImages, per_kind: int = PER_KIND) -> dict[CardKind, list[int]]:
    """Chooses the images to show. Returns kind -> indices of images in `measured`, at most `per_kind` per kind, no image twice.

    misses: the bad images with the lowest scores, lowest first, even if they are above the threshold.
    false_alarms: the good images with the highest scores, highest first, even if they are below the threshold.
    finds: bad images above the threshold whose scores are nearest to the median of the bad images.
    """
    scores, bad = measured.scores, np.flatnonzero(measured.labels == 1)
    good = np.flatnonzero(measured.labels == 0)
    misses = bad[np.argsort(scores[bad], kind="stable")][:per_kind]
    false_alarms = good[np.argsort(-scores[good], kind="stable")][:per_kind]
    finds = np.setdiff1d(bad[exceeds_threshold(scores[bad], measured.threshold)], misses)
    if len(finds):
        finds = finds[np.argsort(np.abs(scores[finds] - np.median(scores[bad])), kind="stable")][:per_kind]
    return {"misses": misses.tolist(), "false_alarms": false_alarms.tolist(), "finds": finds.tolist()}


def make_gallery_cards(
    inspector: GalleryInspector, labelled: UnseenTestImages, read_records: ReadRecords
) -> dict[CardKind, list[GalleryCard]]:
    """Chooses images for the gallery, reads and inspects them again one by one, and draws their pictures.

    Args:
        labelled: scored test images.
        read_records: reads the chosen images.

    Returns: kind -> cards, in the order of `choose_gallery_images`.

    Raises: DataError: an image cannot be read or inspected again.
    """
    chosen = choose_gallery_images(labelled.measured)
    indices = sorted({index for indices in chosen.values() for index in indices})
    records = read_records(labelled.numbers[indices].tolist())
    cards = {
        index: _make_gallery_card(inspector, record, labelled.types[index], bool(labelled.measured.labels[index]))
        for index, record in zip(indices, records, strict=True)
    }
    return {kind: [cards[index] for index in indices] for kind, indices in chosen.items()}


def _make_gallery_card(inspector: GalleryInspector, record: Row, defect_type: str, is_bad: bool) -> GalleryCard:
    """Inspects an image again and makes its card, with pictures. Raises: DataError: the image cannot be inspected."""
    (inspection,) = inspector.inspect([record["image"]])
    mistake = "missed" if is_bad else "false alarm"
    return GalleryCard(
        name=record["id"],
        defect_type=defect_type,
        score=inspection.score,
        threshold=inspection.threshold,
        score_to_threshold=inspection.score_to_threshold,
        p_value=inspection.p_value,
        verdict=inspection.verdict,
        mistake=mistake if is_bad != inspection.anomalous else "",
        views=_draw_views(inspector, inspection, record["image"], record["mask"]),
    )


def _draw_views(
    inspector: GalleryInspector, inspection: Inspection, image: bytes, mask: bytes | None
) -> dict[str, str]:
    """Draws the image, its heat map with the outline of the mask, and the aligned image if the model aligns images.

    Returns: title of a picture -> JPEG as a data URI.

    Raises: DataError: the image or the mask cannot be decoded.
    """
    full_image = Image.fromarray(decode_image(image, None))
    scale = min(1.0, PICTURE_PX / max(full_image.size))
    size = max(1, round(full_image.width * scale)), max(1, round(full_image.height * scale))
    picture = np.asarray(full_image.resize(size, Image.Resampling.BILINEAR))
    heat_map = draw_inspection_overlay(picture, inspection, scale)
    if mask is not None:
        heat_map = draw_mask_outline(heat_map, decode_mask(mask, size[1], size[0]))
    views = {"image": encode_jpeg_uri(picture), "heat map": encode_jpeg_uri(heat_map)}
    aligned = inspector.align_images(image)
    if aligned is not None:
        thumbnail = Image.fromarray(aligned)
        thumbnail.thumbnail((PICTURE_PX, PICTURE_PX))
        views["as aligned"] = encode_jpeg_uri(np.asarray(thumbnail))
    return views
