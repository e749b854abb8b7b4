"""Sets new thresholds for a bundle without training: from new good images, from the images of a site, or by a person.

Only the manifest changes. The tensors stay the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from focus_ray.bundle.bundle import (
    Bundle,
    compute_manifest_hash,
    copy_bundle,
    describe_precision,
    read_manifest,
    read_statistics,
)
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.update import find_shared_images
from focus_ray.density.base import supports_leave_one_out
from focus_ray.detect.calibration import Calibration, CalibrationBuilder
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.shift import ScoreShift, compare_with_calibration_scores
from focus_ray.errors import DataError
from focus_ray.fitting.leave_one_out import collect_leave_one_out_scores
from focus_ray.fitting.projection import MAX_NEIGHBOURS
from focus_ray.fitting.settings import Config
from focus_ray.metrics.trade_off import ThresholdTradeOff, compute_trade_off
from focus_ray.version import __version__


@dataclass(frozen=True)
class RecalibrationResult:
    """The result of `calibrate_bundle` or `calibrate_for_site`.

    Attributes:
        manifest: manifest of the new bundle.
        calibration: calibration of the new bundle.
        num_trained_on: number of good images that were left out because the density contains them.
        curve: false alarms and missed defects at each threshold; None without bad images.
        is_metric_biased: whether the scores are too low, because the projection of embeddings was learnt from these same, few
            calibration images; always False after `calibrate_bundle`.
        shift: compares the scores of the good images with the previous calibration scores; None for too few good images, and
            after `calibrate_for_site`.
        copies: duplicate file -> first file with the same pixels; only the first file was used.
    """

    manifest: dict[str, Any]
    calibration: Calibration
    num_trained_on: int
    curve: ThresholdTradeOff | None
    is_metric_biased: bool = False
    shift: ScoreShift | None = None
    copies: Mapping[Path, Path] = field(default_factory=dict)


def calibrate_bundle(
    uri: str | Path,
    output: str | Path,
    good: Sequence[Path],
    bad: Sequence[Path] = (),
    *,
    target_fpr: float | None = None,
    target_pixel_fpr: float | None = None,
    device: str = "auto",
) -> RecalibrationResult:
    """Writes a copy of a bundle with new thresholds, which are computed from new images of good parts.

    Images with the same pixels count once.

    Args:
        uri: address of the bundle.
        output: address of the copy. If it equals `uri`, the bundle is replaced in one step.
        good: image files of good parts. Images that the model was trained on are left out, because they score near zero.
        bad: image files of defective parts. They do not influence the thresholds; they only show the cost of each threshold.
        target_fpr, target_pixel_fpr: shares of good images and of good pixels that may be called bad, between 0 and 1.
            None: the bundle's targets.
        device: see `Inspector.load`.

    Raises:
        DataError: the model was trained on all good images, a file cannot be read or decoded, an image has no finite score, an
            image is both good and bad, a target is out of range, or the copy cannot be written.
        BundleError: the bundle is missing or damaged.
    """
    inspector = Inspector.load(uri, device)
    config = _replace_target_rates(inspector.bundle, target_fpr, target_pixel_fpr)
    copies: dict[Path, Path] = {}
    good_images, bad_images = (_inspect_distinct_images(inspector, paths, copies) for paths in (good, bad))
    pairs = [f"{good_images[key][0]} and {bad_images[key][0]}" for key in good_images if key in bad_images]
    if pairs:
        raise DataError(
            f"{len(pairs)} images are given both as good and as bad ({'; '.join(pairs)}): remove the wrong file of each pair"
        )
    new = [inspection for _, inspection in good_images.values() if not inspection.trained_on]
    if not new:
        raise DataError(
            f"{uri}: the model was trained on all {len(good_images)} good images, so they score near zero: give images "
            "that the model has not seen; or for a model that was joined from several sites, the site's own bundle (--site)"
        )
    scores = [inspection.score for inspection in new]
    builder = CalibrationBuilder("split", config.calibration.target_fpr, config.calibration.target_pixel_fpr)
    builder.add(scores, [inspector.frame.select_scored_values(inspection.anomaly_map) for inspection in new])
    calibration = replace(builder.build_calibration(), precision=describe_precision(config, inspector.device))
    bad_scores = np.array([inspection.score for _, inspection in bad_images.values()])
    fingerprint = _hash_files([path for path, _ in good_images.values()])
    note = {"how": "good images", "num_good": len(new), "num_bad": len(bad_scores), "images_sha256": fingerprint}
    return RecalibrationResult(
        manifest=copy_with_calibration(uri, output, calibration, note),
        calibration=calibration,
        num_trained_on=len(good_images) - len(new),
        curve=compute_trade_off(np.array(scores), bad_scores) if bad else None,
        shift=compare_with_calibration_scores(inspector.bundle.calibration.image_scores, scores),
        copies=copies,
    )


def _replace_target_rates(bundle: Bundle, target_fpr: float | None, target_pixel_fpr: float | None) -> Config:
    """Returns a copy of a bundle's configuration with other target rates.

    Args: target_fpr, target_pixel_fpr: new targets; None: the target of the bundle's calibration.

    The new targets are not checked here.
    """
    current = bundle.calibration
    targets = {
        "target_fpr": current.target_fpr if target_fpr is None else target_fpr,
        "target_pixel_fpr": current.target_pixel_fpr if target_pixel_fpr is None else target_pixel_fpr,
    }
    return bundle.config.model_copy(update={"calibration": bundle.config.calibration.model_copy(update=targets)})


def _inspect_distinct_images(
    inspector: Inspector, paths: Sequence[Path], copies: dict[Path, Path]
) -> dict[str, tuple[Path, Inspection]]:
    """Inspects image files, and returns content hash -> (file, inspection).

    Of several files with the same pixels, only the first one's result is used.

    Args:
        copies: changed in place: gets an entry for each unused file: file -> first file with the same pixels.

    Raises: DataError: as `Inspector.inspect`.
    """
    originals: dict[str, tuple[Path, Inspection]] = {}
    distinct_paths = list(dict.fromkeys(paths))
    for path, (inspection, content_hash) in zip(
        distinct_paths, inspector.inspect_with_hashes(distinct_paths), strict=True
    ):
        original, _ = originals.setdefault(str(content_hash), (path, inspection))
        if original != path:
            copies[path] = original
    return originals


def calibrate_for_site(
    uri: str | Path,
    output: str | Path,
    site: str | Path,
    *,
    target_fpr: float | None = None,
    target_pixel_fpr: float | None = None,
    device: str = "auto",
) -> RecalibrationResult:
    """Writes a copy of a joined bundle with new thresholds for one site, from leave-one-out scores of the site's images.

    A leave-one-out score of an image is its score without its own embedding in the density. No image file is needed, because
    both bundles store the same embeddings of these images.

    Args:
        uri: a bundle that was joined from the bundles of several sites.
        output: see `calibrate_bundle`.
        site: bundle of the site's own images.
        target_fpr, target_pixel_fpr, device: see `calibrate_bundle`.

    Raises:
        BundleError: a bundle is missing, damaged or stores no statistics.
        ConfigError: a manifest has a setting that this version of focus_ray cannot use.
        DataError: the bundle has no image of the site, its density does not support leave-one-out, a target is out of range, or
            the copy cannot be written.
    """
    bundle = Inspector.load(uri, device).bundle
    statistics = read_statistics(uri)
    if statistics.bank is None or not supports_leave_one_out(
        bundle.config.density, bundle.config.model.density_tile_grid
    ):
        raise DataError(
            f"{uri}: a density of kind {bundle.config.density.kind} does not support leave-one-out: give good images of the site"
        )
    rows = find_shared_images(site, statistics)
    if not rows:
        raise DataError(
            f"{uri}: the bundle has no image of {site}: join it first (`focus-ray update {uri} NEW --join {site}`), or give "
            "good images of the site"
        )
    config = _replace_target_rates(bundle, target_fpr, target_pixel_fpr)
    builder = collect_leave_one_out_scores(bundle.detector, statistics, config, images=rows)
    calibration = replace(
        builder.build_calibration(), precision=describe_precision(config, bundle.detector.density.device)
    )
    site_manifest = read_manifest(site)
    note = {"how": "images of a site, each left out", "site": site_manifest["sha256"], "num_good": len(rows)}
    # the metric was learnt from the site's images if the bundle was trained on them, not made with another bundle's network
    learns_shareable_projection = config.density.reduction == "discriminant" and config.density.metric is None
    is_biased = (
        learns_shareable_projection and "network_of" not in site_manifest["data"] and len(rows) <= MAX_NEIGHBOURS
    )
    return RecalibrationResult(copy_with_calibration(uri, output, calibration, note), calibration, 0, None, is_biased)


def set_thresholds(
    uri: str | Path,
    output: str | Path,
    *,
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
    by: str = "",
) -> dict[str, Any]:
    """Writes a copy of a bundle with thresholds that a person chose, and returns its manifest.

    Args:
        uri: address of the bundle.
        output: see `calibrate_bundle`.
        image_threshold, pixel_threshold: None: the bundle's threshold.
        by: name of the person, for the provenance.

    Raises:
        DataError: both thresholds are None, a threshold is not a finite number above 0, or the copy cannot be written.
        BundleError: the bundle is missing or damaged.
    """
    manifest = read_manifest(uri)
    calibration = Calibration.from_dict(manifest["calibration"]).replace_thresholds(image_threshold, pixel_threshold)
    return copy_with_calibration(uri, output, calibration, {"how": "set by hand", "by": by})


def set_target_fpr(uri: str | Path, output: str | Path, target_fpr: float) -> dict[str, Any]:
    """Writes a copy of a bundle whose image threshold has another target rate, and returns its manifest.

    The threshold comes from the scores of good images in the bundle, so it needs no photographs.

    Args:
        uri: address of the bundle.
        output: see `calibrate_bundle`.
        target_fpr: share of good images that may be called bad, between 0 and 1.

    Raises:
        DataError: the target is not between 0 and 1, or the copy cannot be written.
        BundleError: the bundle is missing or damaged.
    """
    calibration = Calibration.from_dict(read_manifest(uri)["calibration"]).replace_target_fpr(target_fpr)
    return copy_with_calibration(uri, output, calibration, {"how": "another target rate from the same scores"})


def copy_with_calibration(
    uri: str | Path, output: str | Path, calibration: Calibration, note: dict[str, Any]
) -> dict[str, Any]:
    """Writes a copy of a bundle with another calibration, and returns the manifest of the copy.

    The provenance in the manifest gets an entry with `note`, the time, and the previous version and thresholds.

    Args:
        output: see `calibrate_bundle`.
        note: facts about the new calibration, for the provenance.

    Raises:
        BundleError: a file of the bundle is missing or damaged.
        DataError: the copy cannot be written.
    """
    previous = read_manifest(uri)
    change = {
        **note,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": previous["sha256"],
        "focus_ray": __version__,
        "image_threshold": previous["calibration"]["image_threshold"],
        "pixel_threshold": previous["calibration"]["pixel_threshold"],
    }
    data = {**previous["data"], "calibrations": [*previous["data"].get("calibrations", []), change]}
    manifest = {**previous, "calibration": calibration.to_dict(), "data": data}
    manifest["sha256"] = compute_manifest_hash(manifest)
    copy_bundle(uri, manifest, output)
    return manifest


def _hash_files(paths: Sequence[Path]) -> str:
    """Returns a SHA-256 of the contents of files. The hash does not depend on the names and the order of the files."""
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
