"""Checks an exported model: compares its scores, anomaly maps and verdicts of real images with the results of PyTorch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focus_ray.bundle.bundle import Bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import decode_image, hash_pixels
from focus_ray.detect.calibration import Calibration
from focus_ray.errors import DataError, ExportError
from focus_ray.export.examples import ExportExample
from focus_ray.export.formats import RunModel
from focus_ray.fitting.split import shorten_hash
from focus_ray.metrics.metrics import image_auroc

MIN_EXAMPLES = 4  # least number of examples that the model was not trained on
_ROUNDING = 1e-6  # relative rounding error of a score in float32
_P_ROUNDING = 1e-3  # relative rounding error of a p-value in float32


# The largest deviations from PyTorch in float32 that an export may have; None: no limit.
# A spread is the highest value minus the lowest value.
# score: largest score difference, as a share of the spread of the examples' scores.
# anomaly_map: largest pixel difference, as a share of the spread of all pixels of all maps.
# auroc: image AUROC of PyTorch minus image AUROC of the export.
TOLERANCE: dict[str, dict[str, float | None]] = {
    "fp32": {"score": 1e-3, "anomaly_map": 1e-3, "auroc": None},
    "fp16": {"score": 0.02, "anomaly_map": 0.02, "auroc": 0.002},
    "int8": {"score": 0.1, "anomaly_map": None, "auroc": 0.01},
}
# name of the limit -> key in the result of `check_export`, and the deviation in words
_LIMITED = {
    "score": ("score_difference", "scores differ by up to {:.2g} of their spread"),
    "anomaly_map": ("map_difference", "maps differ by up to {:.2g} of their spread"),
    "auroc": ("auroc_lost", "image AUROC falls by {:.4f}"),
}


def find_check_failures(check: Mapping[str, Any], tolerance: Mapping[str, float | None]) -> list[str]:
    """Returns one sentence for each reason to refuse an export; the list is empty if the export passes the check.

    Reasons are a deviation above its limit, and verdicts or p-values that do not follow from their scores.

    Args:
        check: result of `check_export`.
        tolerance: name of a limit -> limit, from `TOLERANCE`. A limit of None is not checked.
    """
    sentences = []
    for name, (entry, text) in _LIMITED.items():
        limit, value = tolerance[name], check[entry]
        if limit is not None and value is not None and not value <= limit:
            sentences.append(f"{text.format(value)}, more than {limit:g}")
    if check["verdict_errors"]:
        sentences.append(f"{check['verdict_errors']} verdicts or p-values do not follow from their scores")
    return sentences


@dataclass(frozen=True)
class ReferenceScores:
    """N examples that the model was not trained on, with their scores and anomaly maps from PyTorch in float32.

    Attributes:
        pixels: N arrays (H, W, 3), RGB.
        labels: N labels: 0 good, 1 bad, None unknown.
        scores: (N,).
        maps: (N, height, width), anomaly maps in the input size of the network.
        ms: median milliseconds for one image.
        calibration: turns scores into p-values and verdicts.
    """

    pixels: list[NDArray[np.uint8]]
    labels: list[int | None]
    scores: NDArray[np.float64]
    maps: NDArray[np.float32]
    ms: float
    calibration: Calibration


def score_examples_with_pytorch(bundle: Bundle, examples: Sequence[ExportExample]) -> ReferenceScores:
    """Scores the examples with PyTorch on the CPU, and leaves out the images that the model was trained on.

    Args: bundle: must be read with precision fp32. Its network is changed for faster inference.

    Raises:
        ExportError: after leaving out training images, fewer than `MIN_EXAMPLES` examples remain.
        DataError: an example cannot be decoded, or has no scored pixel; the message names the example.
    """
    decoded = [(example, decode_example(example)) for example in examples]
    new = [
        (example, pixels) for example, pixels in decoded if shorten_hash(hash_pixels(pixels)) not in bundle.fit_hashes
    ]
    if len(new) < MIN_EXAMPLES:
        raise ExportError(
            f"{len(new)} of {len(examples)} examples are not among the images that the model was trained on, but the check of "
            f"an export needs {MIN_EXAMPLES}: give other images of the category with --examples, if possible good and bad ones"
        )
    inspector = Inspector(bundle, "cpu")
    scores, maps, times = [], [], []
    for example, pixels in new:
        start = time.perf_counter()
        try:
            framed = bundle.frame.resize_image(Image.fromarray(pixels), pixels.shape[1], pixels.shape[0])
        except DataError as error:
            raise DataError(f"{example.name}: {error}") from error
        score, anomaly_map = inspector.score(framed[None])
        times.append(time.perf_counter() - start)
        scores.append(score[0])
        maps.append(anomaly_map[0])
    return ReferenceScores(
        [pixels for _, pixels in new],
        [example.label for example, _ in new],
        np.array(scores, dtype=np.float64),
        np.stack(maps),
        1e3 * float(np.median(times)),
        bundle.calibration,
    )


def decode_example(example: ExportExample) -> NDArray[np.uint8]:
    """Decodes an example to pixels (H, W, 3). Raises: DataError: the image cannot be decoded; the message names it."""
    try:
        return decode_image(example.image, None)
    except DataError as error:
        raise DataError(f"{example.name}: {error}") from error


def check_export(run: RunModel, reference: ReferenceScores) -> dict[str, Any]:
    """Runs an export on each example alone, and compares the outputs with the results of PyTorch in float32.

    Both score the same decoded pixels.

    Args:
        run: runs the export, from `open_exported_model`.
        reference: results of PyTorch, from `score_examples_with_pytorch`.

    Returns:
        A dictionary of JSON values with these keys:
        num_images: number of examples.
        num_good, num_bad: number of examples with the label good and with the label bad.
        score_spread: highest minus lowest score of PyTorch.
        map_spread: highest minus lowest value of all pixels of all maps of PyTorch.
        score_difference, score_difference_median: largest and median score difference, as a share of `score_spread`.
        map_difference: largest pixel difference, as a share of `map_spread`.
        p_value_difference: largest difference of a p-value.
        verdict_changes: number of images with a different verdict.
        verdict_errors: number of images whose verdict or p-value does not follow from the export's own score by the calibration.
        auroc_torch, auroc_export, auroc_lost: image AUROC, and the difference; None without good and bad examples, or if a score
            of the export is not finite.
        ms_torch, ms_export: median milliseconds for one image on this machine, from decoded pixels. Both use the same number of
            threads.

    Raises:
        ExportError: PyTorch gives all examples the same score.
        DataError: the score of PyTorch for an example is NaN.
    """
    calibration = reference.calibration
    reference_verdicts = calibration.is_anomalous(reference.scores)
    score_spread, map_spread = float(np.ptp(reference.scores)), float(np.ptp(reference.maps))
    if not score_spread > 0:
        raise ExportError(
            "all examples have the same score, so differences have no scale: give other images with --examples"
        )
    run(reference.pixels[0][None])  # warm-up: the first call is slower
    outputs, times = [], []
    for pixels in reference.pixels:
        start = time.perf_counter()
        outputs.append(run(pixels[None]))
        times.append(time.perf_counter() - start)
    scores, p_values = (np.array([float(output[name][0]) for output in outputs]) for name in ("score", "p_value"))
    verdicts = np.array([bool(output["anomalous"][0]) for output in outputs])
    maps = np.stack([output["anomaly_map"][0] for output in outputs])
    differences = np.abs(scores - reference.scores) / score_spread
    is_labelled = np.array([label is not None for label in reference.labels])
    labels = np.array([label or 0 for label in reference.labels])
    auroc_torch = auroc_export = auroc_lost = None
    if len(set(labels[is_labelled].tolist())) == 2 and bool(np.isfinite(scores).all()):
        auroc_torch = image_auroc(labels[is_labelled], reference.scores[is_labelled])
        auroc_export = image_auroc(labels[is_labelled], scores[is_labelled])
        auroc_lost = auroc_torch - auroc_export
    return {
        "num_images": len(scores),
        "num_good": int((is_labelled & (labels == 0)).sum()),
        "num_bad": int((is_labelled & (labels == 1)).sum()),
        "score_spread": score_spread,
        "map_spread": map_spread,
        "score_difference": float(differences.max()),
        "score_difference_median": float(np.median(differences)),
        "map_difference": float(np.abs(maps - reference.maps).max()) / map_spread,
        "p_value_difference": float(np.abs(p_values - calibration.compute_conformal_p_values(reference.scores)).max()),
        "verdict_changes": int((verdicts != reference_verdicts).sum()),
        "verdict_errors": _count_verdict_errors(calibration, scores, p_values, verdicts),
        "auroc_torch": auroc_torch,
        "auroc_export": auroc_export,
        "ms_torch": reference.ms,
        "ms_export": 1e3 * float(np.median(times)),
        "auroc_lost": auroc_lost,
    }


def _count_verdict_errors(
    calibration: Calibration,
    scores: NDArray[np.float64],
    p_values: NDArray[np.float64],
    verdicts: NDArray[np.bool_],
) -> int:
    """Counts the images whose verdict or p-value differs from the calibration's for the same score by more than rounding.

    An image whose score is not a finite number counts as an error if its verdict is not anomalous.
    """
    is_finite = np.isfinite(scores)
    lower_scores, higher_scores = (scores[is_finite] * (1 + change) for change in (-_ROUNDING, _ROUNDING))
    finite_p_values, finite_verdicts = p_values[is_finite], verdicts[is_finite]
    is_consistent = (finite_verdicts >= calibration.is_anomalous(lower_scores)) & (
        finite_verdicts <= calibration.is_anomalous(higher_scores)
    )
    is_consistent &= finite_p_values >= calibration.compute_conformal_p_values(higher_scores) * (1 - _P_ROUNDING)
    is_consistent &= finite_p_values <= calibration.compute_conformal_p_values(lower_scores) * (1 + _P_ROUNDING)
    return int((~is_consistent).sum() + (~verdicts[~is_finite]).sum())
