"""A validation score from normal images alone: held-out normals against themselves with synthetic defects.

It ranks configurations of one category (alignment groups, epochs, densities); it is not a detection rate, and no test
image or label enters it. docs/learn/selection.md says how well it ranks on real defects.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from focus_ray.errors import DataError
from focus_ray.evaluation.defects import synthetic_validation_set
from focus_ray.evaluation.metrics import Measured
from focus_ray.kinds import METRICS

DEFECTS_PER_IMAGE = 3
# figure of a validation -> metric
JUDGED_BY = {
    "image_auroc": "image_auroc",
    "pixel_auroc": "pixel_auroc",
    "pixel_average_precision": "pixel_average_precision",
    "aupro": "aupro_0.3",
}


def validation_images(
    normals: NDArray[np.uint8], seed: int, per_image: int = DEFECTS_PER_IMAGE
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Normal images and their defective copies, with masks: (N (1 + per_image), H, W, C) and (..., H, W).

    Args:
        normals: (N, H, W, C) uint8, that the density has not seen. A fourth channel, what is scored (`data.framing`), is kept,
            and no mask reaches beyond it.

    Raises: DataError: fewer than two images.
    """
    if len(normals) < 2:
        raise DataError(f"a validation score needs at least 2 held-out normal images, got {len(normals)}")
    defective, masks, _ = synthetic_validation_set(normals[..., :3], seed, per_image)
    clean = np.zeros(normals.shape[:3], dtype=bool)
    if normals.shape[3] > 3:
        shown = np.repeat(normals[..., 3:], per_image, axis=0)
        defective, masks = np.concatenate([defective, shown], axis=3), masks & (shown[..., 0] > 0)
    return np.concatenate([normals, defective]), np.concatenate([clean, masks])


def validation_figures(
    masks: NDArray[np.bool_], scores: NDArray[np.float32], maps: NDArray[np.float32]
) -> dict[str, float]:
    """How well scores (N,) and maps (N, S, S) find the synthetic defects of masks (N, S, S).

    Returns: score, what configurations are ranked by: the mean of image AUROC and AUPRO (limit 0.3); and image_auroc,
        pixel_auroc, pixel_average_precision, aupro.
    """
    labels = np.asarray(masks.any(axis=(1, 2)), dtype=np.int64)
    measured = Measured(labels, scores.astype(np.float64), list(masks), list(maps), 0.0)
    found: dict[str, float] = {}
    for name, key in JUDGED_BY.items():
        value = METRICS[key].value(measured)
        if value is None:
            raise DataError(f"the validation images cannot give {key}: there is no synthetic defect among them")
        found[name] = value
    return {"score": (found["image_auroc"] + found["aupro"]) / 2, **found}
