"""Module that computes a validation score from normal images alone: normal images against copies with synthetic defects.

The score ranks configurations of one category (alignment, training length, density). It is not a detection rate, and it needs no
test image and no label. docs/learn/selection.md says how well it ranks configurations on real defects.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from focus_ray.defects import make_defective_copies
from focus_ray.errors import DataError
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS

DEFECTS_PER_IMAGE = 3
MIN_GAIN = 0.01  # in score, for which a later network replaces the best network so far
# name of a validation metric -> key of the metric in METRICS
JUDGED_BY = {
    "image_auroc": "image_auroc",
    "pixel_auroc": "pixel_auroc",
    "pixel_average_precision": "pixel_average_precision",
    "aupro": "aupro_0.3",
}


def make_validation_images(normals: NDArray[np.uint8], seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Makes a validation set: N normal images, followed by `DEFECTS_PER_IMAGE` copies of each image with synthetic defects.

    Args:
        normals: (N, H, W, C) uint8 images that the density has not seen. A fourth channel marks the scored pixels
            (`data.framing`). The copies keep this channel, and masks lie inside the scored pixels.
        seed: seed of the defects, 0 or more.

    Returns: all images (M, H, W, C), and masks (M, H, W), bool, that are True at defective pixels.

    Raises: DataError: fewer than two images.
    """
    if len(normals) < 2:
        raise DataError(f"a validation score needs at least 2 held-out normal images, got {len(normals)}")
    defective, masks, _ = make_defective_copies(normals[..., :3], seed, DEFECTS_PER_IMAGE)
    clean = np.zeros(normals.shape[:3], dtype=bool)
    if normals.shape[3] > 3:
        scored_pixels = np.repeat(normals[..., 3:], DEFECTS_PER_IMAGE, axis=0)
        defective, masks = np.concatenate([defective, scored_pixels], axis=3), masks & (scored_pixels[..., 0] > 0)
    return np.concatenate([normals, defective]), np.concatenate([clean, masks])


def compute_validation_metrics(
    masks: NDArray[np.bool_], scores: NDArray[np.float32], maps: NDArray[np.float32]
) -> dict[str, float]:
    """Computes validation metrics: how well image scores and anomaly maps detect synthetic defects.

    Args:
        masks: (N, H, W) bool, True at defective pixels; an image without such pixels is normal.
        scores: (N,), image scores.
        maps: (N, H, W), anomaly maps.

    Returns: name of a metric -> value. 'score' ranks configurations: it is the mean of 'image_auroc' and 'aupro' (false positive
        rates up to 0.3). The others are 'pixel_auroc' and 'pixel_average_precision'.

    Raises: DataError: a metric cannot be computed, because the masks contain no defect or every image has one.
    """
    labels = np.asarray(masks.any(axis=(1, 2)), dtype=np.int64)
    measured = ScoredTestImages(labels, scores.astype(np.float64), list(masks), list(maps), 0.0)
    metrics: dict[str, float] = {}
    for name, key in JUDGED_BY.items():
        value = METRICS[key].value(measured)
        if value is None:
            raise DataError(f"{key} cannot be computed: the validation images have no synthetic defect")
        metrics[name] = value
    return {"score": (metrics["image_auroc"] + metrics["aupro"]) / 2, **metrics}
