"""Chooses the test images that a report shows, and draws their pictures. Only the chosen images are read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import decode_image, decode_mask
from focus_ray.data.read import index_version, read_index, read_rows
from focus_ray.detect.inspection import Inspection
from focus_ray.errors import DataError
from focus_ray.evaluation.report import overlay
from focus_ray.metrics.evaluate import LabelledImages
from focus_ray.metrics.metrics import MeasuredImages
from focus_ray.metrics.ties import is_above
from focus_ray.reporting.page import jpeg_uri

Kind = Literal["misses", "false_alarms", "finds"]
PER_KIND = 4
PICTURE_PX = 320  # longest side of a picture


@dataclass(frozen=True)
class Card:
    """An image in the gallery.

    Attributes:
        name: id of the image.
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


def choose_images(measured: MeasuredImages, per_kind: int = PER_KIND) -> dict[Kind, list[int]]:
    """Returns kind -> numbers of the images to show, at most `per_kind` of each kind and no image twice.

    misses: the bad images with the lowest scores, lowest first, even if they are above the threshold.
    false_alarms: the good images with the highest scores, highest first, even if they are below the threshold.
    finds: bad images above the threshold whose scores are nearest to the median of the bad images.
    """
    scores, bad = measured.scores, np.flatnonzero(measured.labels == 1)
    good = np.flatnonzero(measured.labels == 0)
    misses = bad[np.argsort(scores[bad], kind="stable")][:per_kind]
    false_alarms = good[np.argsort(-scores[good], kind="stable")][:per_kind]
    finds = np.setdiff1d(bad[is_above(scores[bad], measured.threshold)], misses)
    if len(finds):
        finds = finds[np.argsort(np.abs(scores[finds] - np.median(scores[bad])), kind="stable")][:per_kind]
    return {"misses": misses.tolist(), "false_alarms": false_alarms.tolist(), "finds": finds.tolist()}


def make_cards(inspector: Inspector, data: str, labelled: LabelledImages) -> dict[Kind, list[Card]]:
    """Chooses images, reads them again from the data set at `data` one by one, and draws them.

    Raises: DataError: an image does not exist any more or cannot be read.
    """
    numbers_of = choose_images(labelled.measured)
    cards = _draw_cards(
        inspector, data, labelled, sorted({number for chosen in numbers_of.values() for number in chosen})
    )
    return {kind: [cards[number] for number in numbers] for kind, numbers in numbers_of.items()}


def _draw_cards(inspector: Inspector, data: str, labelled: LabelledImages, numbers: Sequence[int]) -> dict[int, Card]:
    """Returns image number -> card. numbers: ascending numbers in `labelled`."""
    category = inspector.bundle.category
    names = [labelled.ids[number] for number in numbers]
    index = read_index(data, category, split="test")
    positions = pc.index_in(pa.array(names, pa.string()), value_set=index["id"])
    if positions.null_count:
        missing = names[positions.is_null().to_pylist().index(True)]
        raise DataError(f"{data}: category {category!r} has no image {missing!r} any more: evaluate the category again")
    number_of_row = dict(zip(index["row"].take(positions).to_pylist(), numbers, strict=True))
    rows = sorted(number_of_row)
    cards = {}
    records = read_rows(data, category, rows, columns=("id", "image", "mask"), version=index_version(index))
    for row, record in zip(rows, records, strict=True):
        number = number_of_row[row]
        (inspection,) = inspector.inspect([record["image"]])
        cards[number] = Card(
            name=record["id"],
            defect_type=labelled.types[number],
            score=inspection.score,
            threshold=inspection.threshold,
            score_to_threshold=inspection.score_to_threshold,
            p_value=inspection.p_value,
            verdict=inspection.verdict,
            mistake=_mistake(bool(labelled.measured.labels[number]), inspection.anomalous),
            views=_views(inspector, inspection, record["image"], record["mask"]),
        )
    return cards


def _mistake(is_bad: bool, is_called_bad: bool) -> str:
    """Returns the kind of mistake of a verdict; empty if the verdict is right."""
    return "" if is_bad == is_called_bad else "missed" if is_bad else "false alarm"


def _views(inspector: Inspector, inspection: Inspection, image: bytes, mask: bytes | None) -> dict[str, str]:
    """Draws the image, its heat map with the outline of the mask, and the aligned image if the model aligns images."""
    full_image = Image.fromarray(decode_image(image, None))
    scale = min(1.0, PICTURE_PX / max(full_image.size))
    size = max(1, round(full_image.width * scale)), max(1, round(full_image.height * scale))
    picture = np.asarray(full_image.resize(size, Image.Resampling.BILINEAR))
    heat_map = overlay(picture, inspection.scaled(scale))
    if mask is not None:
        heat_map = draw_outline(heat_map, decode_mask(mask, size[1], size[0]))
    views = {"image": jpeg_uri(picture), "heat map": jpeg_uri(heat_map)}
    aligned = inspector.align(image)
    if aligned is not None:
        thumbnail = Image.fromarray(aligned)
        thumbnail.thumbnail((PICTURE_PX, PICTURE_PX))
        views["as aligned"] = jpeg_uri(np.asarray(thumbnail))
    return views


def draw_outline(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Returns a copy of a picture (H, W, 3) with the outline of a mask (H, W).

    The outline is black inside the mask and white outside, so that it is visible on every colour.
    """
    outlined = picture.copy()
    neighbourhood = np.ones((3, 3), dtype=bool)
    outlined[mask & ~ndimage.binary_erosion(mask, neighbourhood, border_value=1)] = 0
    outlined[ndimage.binary_dilation(mask, neighbourhood) & ~mask] = 255
    return outlined
