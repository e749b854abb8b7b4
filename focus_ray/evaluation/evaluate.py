"""All metrics of one category, over its labelled test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focus_ray.evaluation import metrics

MAX_SIDE_PX = 512  # maps and masks are compared at the mask's own size up to this


def summarise(
    labels: Sequence[int],
    types: Sequence[str],
    scores: Sequence[float],
    maps: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_] | None],
    threshold: float,
    target_fpr: float,
) -> dict[str, Any]:
    """All metrics of one category; a metric that the set cannot give (one class only, no mask) is None.

    masks: None where an anomalous image has none; such an image counts in image metrics alone.
    """
    label = np.asarray(labels)
    score = np.asarray(scores)
    known = [index for index, mask in enumerate(masks) if mask is not None]
    both = 0 < label.sum() < len(label)
    anomalous = score > threshold
    result: dict[str, Any] = {
        "num_normal": int((label == 0).sum()),
        "num_anomalous": int((label == 1).sum()),
        "num_masks": sum(1 for index in known if label[index]),
        "image_auroc": metrics.image_auroc(label, score) if both else None,
        "image_average_precision": metrics.average_precision(label, score) if both else None,
        "image_f1_max": metrics.f1_max(label, score)[0] if both else None,
        "threshold": float(threshold),
        "target_fpr": float(target_fpr),
        "false_positive_rate": float(anomalous[label == 0].mean()) if (label == 0).any() else None,
        "recall": float(anomalous[label == 1].mean()) if (label == 1).any() else None,
    }
    result.update(_pixel_metrics([masks[i] for i in known], [maps[i] for i in known]))
    by_type: dict[str, Any] = {}
    for kind in sorted({kind for kind, value in zip(types, labels, strict=True) if value}):
        chosen = np.array([t == kind and bool(v) for t, v in zip(types, labels, strict=True)])
        use = chosen | (label == 0)
        with_mask = [index for index in known if chosen[index]]
        by_type[kind] = {
            "num_images": int(chosen.sum()),
            "image_auroc": metrics.image_auroc(label[use], score[use]) if both else None,
            "recall": float(anomalous[chosen].mean()),
            **_pixel_metrics([masks[i] for i in with_mask], [maps[i] for i in with_mask]),
        }
    result["defect_types"] = by_type
    return result


def _pixel_metrics(masks: Sequence[Any], maps: Sequence[NDArray[np.float32]]) -> dict[str, float | None]:
    if not any(mask.any() for mask in masks):
        return {"pixel_auroc": None, "pixel_average_precision": None, "aupro_0.3": None, "aupro_0.05": None}
    return dict(metrics.pixel_metrics(masks, maps, (0.3, 0.05)))


def evaluation_size(height: int, width: int, max_side_px: int) -> tuple[int, int]:
    """The size at which a map and a mask are compared: the image's own, scaled down to `max_side_px` a side at most."""
    scale = min(1.0, max_side_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
