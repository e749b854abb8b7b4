"""All metrics of one category, over its labelled test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focus_ray.errors import DataError
from focus_ray.evaluation.metrics import Measured, Metric
from focus_ray.kinds import METRICS

MAX_SIDE_PX = 512  # maps and masks are compared at the mask's own size up to this


class Labelled(NamedTuple):
    """Labelled images of one category, scored, in the order of their records.

    types: N defect types.  ids: N; '' where a record has none.  reduced: whether maps are smaller than their images.
    """

    measured: Measured
    types: tuple[str, ...]
    ids: tuple[str, ...]
    reduced: bool


def summarise(
    labels: Sequence[int],
    types: Sequence[str],
    scores: Sequence[float],
    maps: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_] | None],
    threshold: float,
    target_fpr: float,
) -> dict[str, Any]:
    """`figures` of arrays.

    masks: None where an anomalous image has none; such an image counts in image metrics alone.
    """
    measured = Measured(
        np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64), masks, maps, float(threshold)
    )
    return figures(measured, types, target_fpr)


def figures(measured: Measured, types: Sequence[str], target_fpr: float) -> dict[str, Any]:
    """All metrics of one category; a metric that the set cannot give (one class only, no mask) is None.

    So is one that fails on what the set holds, masks that cover whole images for instance: 'reasons' then says why, by the
    metric's name, after its defect's where it is of one defect.
    """
    reasons: dict[str, str] = {}
    masks, labels = measured.masks, measured.labels
    result: dict[str, Any] = {
        "num_normal": int((measured.labels == 0).sum()),
        "num_anomalous": int((measured.labels == 1).sum()),
        "num_masks": sum(mask is not None for mask, label in zip(masks, measured.labels, strict=True) if label),
        "threshold": measured.threshold,
        "target_fpr": float(target_fpr),
        **{key: _value(METRICS[key], measured, reasons, key) for key in METRICS},
    }
    kinds = np.array([kind if label else "" for kind, label in zip(types, labels, strict=True)])
    result["defect_types"] = {
        str(kind): _of_one_type(measured, kinds == kind, str(kind), reasons)
        for kind in sorted(set(kinds[measured.labels == 1]))
    }
    return {**result, "reasons": reasons}


def _value(metric: Metric, measured: Measured, reasons: dict[str, str], where: str) -> float | None:
    try:
        return metric.value(measured)
    except DataError as error:
        reasons[where] = str(error)
        return None


def _of_one_type(measured: Measured, chosen: NDArray[np.bool_], kind: str, reasons: dict[str, str]) -> dict[str, Any]:
    parts = {"alone": measured.only(chosen), "with_normals": measured.only(chosen | (measured.labels == 0))}
    told = {key: METRICS[key] for key in METRICS if METRICS[key].per_defect}
    return {
        "num_images": int(chosen.sum()),
        **{key: _value(metric, parts[metric.per_defect], reasons, f"{kind}: {key}") for key, metric in told.items()},
    }


def evaluation_size(height: int, width: int, max_side_px: int) -> tuple[int, int]:
    """The size at which a map and a mask are compared: the image's own, scaled down to `max_side_px` a side at most."""
    scale = min(1.0, max_side_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
