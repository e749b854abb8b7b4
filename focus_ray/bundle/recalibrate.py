"""New thresholds for a bundle, without training: from new good images, from those of one site that it is made of, or set by a
person. The tensors stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focus_ray import __version__
from focus_ray.bundle.bundle import copy_bundle, manifest_hash, read_manifest, read_statistics
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.update import rows_in_common
from focus_ray.density.base import supports_leave_one_out
from focus_ray.errors import DataError
from focus_ray.evaluation.calibration import Calibration, CalibrationBuilder
from focus_ray.evaluation.inspection import Inspection
from focus_ray.evaluation.shift import Shift, compare_scores
from focus_ray.evaluation.trade_off import TradeOff, trade_off
from focus_ray.fitting.leave_one_out import collect_leave_one_out_scores
from focus_ray.fitting.projection import MAX_NEIGHBOURS
from focus_ray.precision import describe_precision


@dataclass(frozen=True)
class Recalibrated:
    """manifest: of the new bundle.  calibration: its.  num_known: good images left out, being what the density was made of.
    curve: where bad images were given; None otherwise.  taught: whether the metric was learnt from the very images that
    calibrate, so few that it lowers their scores.  shift: of the good images' scores from the former calibration scores; None
    for too few good images, or where none were given.  copies: the images left out because their pixels are those of another
    image, which is the value."""

    manifest: dict[str, Any]
    calibration: Calibration
    num_known: int
    curve: TradeOff | None
    taught: bool = False
    shift: Shift | None = None
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
) -> Recalibrated:
    """Writes a copy of a bundle whose thresholds come from these good images.

    Args:
        output: may be the bundle itself: it is replaced in one step.
        good: image files that the density has not seen; those that it has are left out, since they score near zero.
        bad: image files of defective parts: nothing is set by them, they show what a threshold costs.
            Images with the same pixels count once, both among the good and among the bad ones.
        target_fpr, target_pixel_fpr: None keeps the bundle's.

    Raises: DataError: no usable good image, or a file cannot be read; an image is both good and bad; a share out of range.
        BundleError: no such bundle.
    """
    inspector = Inspector.load(uri, device)
    old = inspector.bundle.calibration
    builder = CalibrationBuilder(
        "split",
        old.target_fpr if target_fpr is None else target_fpr,
        old.target_pixel_fpr if target_pixel_fpr is None else target_pixel_fpr,
    )
    copies: dict[Path, Path] = {}
    originals = {"good": _inspect_once(inspector, good, copies), "bad": _inspect_once(inspector, bad, copies)}
    _refuse_contradictions(originals["good"], originals["bad"])
    found, bad_found = ([one for _, one in originals[kind].values()] for kind in ("good", "bad"))
    new = [one for one in found if not one.trained_on]
    if not new:
        raise DataError(
            f"{uri}: all {len(found)} good images are among those that the model was trained on, and score near zero: "
            "give images that it has not seen, or of a model joined of several sites the site's own bundle (--site)"
        )
    shift = compare_scores(old.image_scores, [one.score for one in new])
    builder.add([one.score for one in new], [inspector.frame.scored_values(one.anomaly_map) for one in new])
    calibration = replace(builder.finish(), precision=describe_precision(inspector.bundle.config, inspector.device))
    curve = None
    if bad:
        curve = trade_off(np.array([one.score for one in new]), np.array([one.score for one in bad_found]))
    fingerprint = _fingerprint([path for path, _ in originals["good"].values()])
    note = {"how": "good images", "num_good": len(new), "num_bad": len(bad_found), "images_sha256": fingerprint}
    manifest = rewrite(uri, output, calibration, note)
    return Recalibrated(manifest, calibration, len(found) - len(new), curve, shift=shift, copies=copies)


def _inspect_once(
    inspector: Inspector, paths: Sequence[Path], copies: dict[Path, Path]
) -> dict[str, tuple[Path, Inspection]]:
    """Inspects image files, and keeps the first of those with the same pixels; the others go to `copies`.

    Returns: content hash -> the file that counts, and its inspection.
    """
    originals: dict[str, tuple[Path, Inspection]] = {}
    distinct = list(dict.fromkeys(paths))
    for path, (inspection, content) in zip(distinct, inspector.inspect_hashed(distinct), strict=True):
        original, _ = originals.setdefault(content, (path, inspection))
        if original != path:
            copies[path] = original
    return originals


def _refuse_contradictions(
    good: Mapping[str, tuple[Path, Inspection]], bad: Mapping[str, tuple[Path, Inspection]]
) -> None:
    """Raises: DataError: an image is among the good and among the bad ones; the files are named."""
    pairs = [f"{good[content][0]} and {bad[content][0]}" for content in good if content in bad]
    if pairs:
        raise DataError(
            f"{len(pairs)} images are given both as good and as bad ({'; '.join(pairs)}): remove the wrong one of each"
        )


def calibrate_for_site(
    uri: str | Path,
    output: str | Path,
    site: str | Path,
    *,
    target_fpr: float | None = None,
    target_pixel_fpr: float | None = None,
    device: str = "auto",
) -> Recalibrated:
    """Writes a copy of a bundle whose thresholds come from the images of one of the sites that it was joined of, each left out.

    No image is needed: both bundles hold the same embeddings of them.

    Args:
        output, target_fpr, target_pixel_fpr: as of `calibrate_bundle`.  site: the bundle of the site's own images.

    Raises: BundleError: no such bundle, or one keeps no statistics.  DataError: none of the site's images is in the bundle, or
        its density keeps no embeddings or cannot leave one out; a share out of range.
    """
    bundle = Inspector.load(uri, device).bundle
    statistics = read_statistics(uri)
    if statistics.bank is None or not supports_leave_one_out(bundle.config.density, bundle.config.model.shared_grid):
        raise DataError(
            f"{uri}: a density of kind {bundle.config.density.kind} keeps no images to leave out: give good images of the site"
        )
    rows = rows_in_common(site, statistics)
    if not rows:
        raise DataError(
            f"{uri}: holds none of the images of {site}: join it first (`focus-ray update {uri} NEW --join {site}`), or give "
            "good images of the site"
        )
    old = bundle.calibration
    targets = {
        "target_fpr": old.target_fpr if target_fpr is None else target_fpr,
        "target_pixel_fpr": old.target_pixel_fpr if target_pixel_fpr is None else target_pixel_fpr,
    }
    asked = bundle.config.calibration.model_copy(update=targets)
    config = bundle.config.model_copy(update={"calibration": asked})
    builder = collect_leave_one_out_scores(bundle.detector, statistics, config, images=rows)
    calibration = replace(builder.finish(), precision=describe_precision(config, bundle.detector.density.device))
    made = read_manifest(site)
    note = {"how": "images of a site, each left out", "site": made["sha256"], "num_good": len(rows)}
    own_metric = config.density.reduction == "discriminant" and config.density.metric is None
    taught = own_metric and "network_of" not in made["data"] and len(rows) <= MAX_NEIGHBOURS
    return Recalibrated(rewrite(uri, output, calibration, note), calibration, 0, None, taught)


def set_thresholds(
    uri: str | Path,
    output: str | Path,
    *,
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
    by: str = "",
) -> dict[str, Any]:
    """Writes a copy of a bundle with thresholds that a person chose; None keeps one. Returns: its manifest.

    Args: by: who, for people.

    Raises: DataError: neither is given, or one is not a finite number above 0.
    """
    manifest = read_manifest(uri)
    calibration = Calibration.from_dict(manifest["calibration"]).with_thresholds(image_threshold, pixel_threshold)
    return rewrite(uri, output, calibration, {"how": "set by hand", "by": by})


def rewrite(uri: str | Path, output: str | Path, calibration: Calibration, note: dict[str, Any]) -> dict[str, Any]:
    """A copy of a bundle with another calibration; what it was calibrated by before stays in its provenance.

    Raises: BundleError: a file of the bundle is missing or damaged.
    """
    former = read_manifest(uri)
    changes = list(former["data"].get("calibrations", []))
    changes.append(
        {
            **note,
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "version": former["sha256"],
            "focus_ray": __version__,
            "image_threshold": former["calibration"]["image_threshold"],
            "pixel_threshold": former["calibration"]["pixel_threshold"],
        }
    )
    manifest = {
        **former,
        "calibration": calibration.to_dict(),
        "data": {**former["data"], "calibrations": changes},
    }
    manifest["sha256"] = manifest_hash(manifest)
    copy_bundle(uri, manifest, output)
    return manifest


def _fingerprint(paths: Sequence[Path]) -> str:
    """Of the files' contents, whatever their names and order."""
    digests: NDArray[np.bytes_] = np.sort([hashlib.sha256(path.read_bytes()).hexdigest().encode() for path in paths])
    return hashlib.sha256(b"\n".join(digests.tolist())).hexdigest()
