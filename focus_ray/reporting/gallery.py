"""Which test images a report shows, and their pictures. Only these are read again; no others are held."""

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
from focus_ray.errors import DataError
from focus_ray.evaluation.calibration import is_above
from focus_ray.evaluation.evaluate import LabelledImages
from focus_ray.evaluation.inspection import Inspection
from focus_ray.evaluation.metrics import ScoredImages
from focus_ray.evaluation.report import overlay
from focus_ray.reporting.page import jpeg_uri

Kind = Literal["misses", "false_alarms", "finds"]
PER_KIND = 4
PICTURE_PX = 320  # a side, at most


@dataclass(frozen=True)
class Card:
    """One image. name: its id.  mistake: 'missed' or 'false alarm'; empty where the verdict is right.

    views: what is seen -> picture as a data URI.
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


def choose(measured: ScoredImages, per_kind: int = PER_KIND) -> dict[Kind, list[int]]:
    """Numbers of the images to show, at most `per_kind` of each: no image twice.

    misses: the bad images that score lowest, lowest first.  false_alarms: the good ones that score highest, highest first;
    both whether or not they lie on the wrong side of the threshold.  finds: bad images above it, next to the bad ones' median.
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
    """Reads the chosen images of the data set at `data` again, one at a time, and draws them.

    Raises: DataError: one is not there any more, or cannot be read.
    """
    picked = choose(labelled.measured)
    cards = _draw_all(inspector, data, labelled, sorted({number for some in picked.values() for number in some}))
    return {kind: [cards[number] for number in numbers] for kind, numbers in picked.items()}


def _draw_all(inspector: Inspector, data: str, labelled: LabelledImages, numbers: Sequence[int]) -> dict[int, Card]:
    category = inspector.bundle.category
    names = [labelled.ids[number] for number in numbers]
    index = read_index(data, category, split="test")
    places = pc.index_in(pa.array(names, pa.string()), value_set=index["id"])
    if places.null_count:
        gone = names[places.is_null().to_pylist().index(True)]
        raise DataError(f"{data}: category {category!r} has no image {gone!r} any more: evaluate it again")
    number_at = dict(zip(index["row"].take(places).to_pylist(), numbers, strict=True))
    rows = sorted(number_at)
    cards = {}
    records = read_rows(data, category, rows, columns=("id", "image", "mask"), version=index_version(index))
    for row, record in zip(rows, records, strict=True):
        number = number_at[row]
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


def _mistake(bad: bool, called_bad: bool) -> str:
    return "" if bad == called_bad else "missed" if bad else "false alarm"


def _views(inspector: Inspector, inspection: Inspection, image: bytes, mask: bytes | None) -> dict[str, str]:
    whole = Image.fromarray(decode_image(image, None))
    scale = min(1.0, PICTURE_PX / max(whole.size))
    size = max(1, round(whole.width * scale)), max(1, round(whole.height * scale))
    picture = np.asarray(whole.resize(size, Image.Resampling.BILINEAR))
    heat = overlay(picture, inspection.scaled(scale))
    if mask is not None:
        heat = outlined(heat, decode_mask(mask, size[1], size[0]))
    views = {"image": jpeg_uri(picture), "heat map": jpeg_uri(heat)}
    aligned = inspector.aligned(image)
    if aligned is not None:
        square = Image.fromarray(aligned)
        square.thumbnail((PICTURE_PX, PICTURE_PX))
        views["as aligned"] = jpeg_uri(np.asarray(square))
    return views


def outlined(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The picture (H, W, 3) with the mask's (H, W) outline: white outside of it, black within, seen on any colour."""
    drawn = picture.copy()
    around = np.ones((3, 3), dtype=bool)
    drawn[mask & ~ndimage.binary_erosion(mask, around, border_value=1)] = 0
    drawn[ndimage.binary_dilation(mask, around) & ~mask] = 255
    return drawn
