"""Later changes to a bundle's density, without training: take images in or out, join another site's statistics.

The network stays as it is. Statistics add, so the result is what a fresh density pass over the remaining images would give;
thresholds are set anew, because the old ones belong to the old density.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus_ray.bundle.bundle import Bundle, read_bundle, read_manifest, read_statistics, write_bundle
from focus_ray.data.read import data_fingerprint, decoded_rows, read_index
from focus_ray.data.split import plan_category
from focus_ray.density.base import Statistics
from focus_ray.errors import BundleError, DataError
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.left_out import leave_one_out_pass
from focus_ray.fitting.passes import calibration_pass, statistics_pass
from focus_ray.kinds import DENSITIES
from focus_ray.model.batch_norm import prepared_for_inference
from focus_ray.precision import compute_dtype


def update_bundle(
    uri: str | Path,
    output: str | Path,
    *,
    add: str | None = None,
    remove: str | None = None,
    join: str | None = None,
    calibrate: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Writes a changed copy of a bundle.

    Args:
        add, remove: ingested data sets whose normal training images of the category are taken in, or out again.
        join: another bundle of the same network, whose statistics are added.
        calibrate: an ingested data set whose normal training images of the category set the thresholds; None leaves each of the
            images kept out in turn, where the bundle was calibrated so, or takes the images that the bundle's own data set
            held out, if that is still what the bundle was made from.

    Returns: the new manifest.

    Raises: BundleError: the bundle keeps no statistics, or the two to be joined do not share a network. DataError: no
        image to add, remove or calibrate with, or more removed than there are.
    """
    bundle = read_bundle(uri, device)
    statistics = read_statistics(uri)
    provenance = dict(bundle.manifest["data"])
    changes = list(provenance.get("updates", []))
    if join is not None:
        other = read_manifest(join)
        _check_same_network(bundle.manifest, other, str(join))
        statistics.join(read_statistics(join))
        changes.append({"join": str(join), "version": other["sha256"]})
    dtype = compute_dtype(bundle.config.model.precision, device)
    for source, sign in ((add, 1), (remove, -1)):
        if source is None:
            continue
        rows = _normal_rows(source, bundle.category)
        with prepared_for_inference(bundle.detector.net, dtype):
            part = _statistics_of(bundle, source, rows)
        if sign > 0:
            statistics.join(part)
        else:
            statistics = _without(statistics, part, source)
        changes.append({"add" if sign > 0 else "remove": source, "num_images": len(rows)})
    statistics.keep_at_most(bundle.config.density.max_images)
    detector = build_detector(bundle.config, bundle.detector.net, bundle.detector.reduction, _on(statistics, device))
    held: Sequence[int] = ()
    if calibrate is None and bundle.calibration.method == "leave_one_out" and statistics.bank is not None:
        builder = leave_one_out_pass(detector, statistics, bundle.config)
    else:
        place, held = _calibration_rows(bundle, calibrate)
        images = _images(bundle, place, held)
        with prepared_for_inference(bundle.detector.net, dtype):
            builder = calibration_pass(detector, images, bundle.config.calibration, "split", torch.device(device))
    return write_bundle(
        output,
        config=bundle.config,
        category=bundle.category,
        detector=detector,
        statistics=statistics,
        calibration=builder.finish(),
        data={**provenance, "num_fit": statistics.num_images, "num_holdout": len(held), "updates": changes},
        metrics=bundle.manifest["metrics"],
        frame=bundle.frame,
    )


def _check_same_network(mine: dict[str, Any], other: dict[str, Any], name: str) -> None:
    if (
        mine["category"] != other["category"]
        or mine["files"]["network"]["sha256"] != other["files"]["network"]["sha256"]
    ):
        raise BundleError(
            f"{name}: another category or network than the bundle it is to join; statistics add only where the network is "
            "the same: start both sites from one bundle, and let each add its images"
        )


def _normal_rows(uri: str, category: str) -> list[int]:
    index = read_index(uri, category, split="train")
    rows = [row for row, label in zip(index["row"].to_pylist(), index["label"].to_pylist(), strict=True) if label == 0]
    if not rows:
        raise DataError(f"{uri}: category {category!r} has no normal training image")
    return rows


def _images(bundle: Bundle, uri: str, rows: Sequence[int]) -> Iterator[Tensor]:
    for images in decoded_rows(uri, bundle.category, rows, bundle.frame):
        yield torch.from_numpy(images)


def _statistics_of(bundle: Bundle, uri: str, rows: Sequence[int]) -> Statistics:
    keep = range(len(rows)) if DENSITIES[bundle.config.density.kind].keeps_bank else None
    detector = bundle.detector
    found = statistics_pass(detector.net, detector.reduction, _images(bundle, uri, rows), detector.density.device, keep)
    return _on(found, "cpu")


def _on(statistics: Statistics, device: torch.device | str) -> Statistics:
    moments = statistics.moments
    moments.mean, moments.scatter = moments.mean.to(device), moments.scatter.to(device)
    return statistics


def _without(statistics: Statistics, part: Statistics, source: str) -> Statistics:
    if part.num_images > statistics.num_images - 2:
        raise DataError(
            f"{source}: {part.num_images} images to take out of {statistics.num_images}; at least 2 must remain"
        )
    statistics.moments.remove(part.moments)
    if statistics.bank is not None and part.bank is not None:
        statistics.keep(_rows_left(statistics.bank, part.bank))
    return statistics


def _rows_left(bank: Tensor, gone: Tensor) -> list[int]:
    """Numbers of the bank's images that are none of the given ones; one that was never kept is passed over.

    An image's embedding comes out the same to rounding, of bfloat16 where a machine computes in it, and far from any other's.
    """
    rows = bank.flatten(1).float()
    keep = torch.ones(len(rows), dtype=torch.bool)
    for one in gone.flatten(1).float():
        distance = (rows - one).norm(dim=1)
        distance[~keep] = torch.inf
        nearest = int(distance.argmin())
        if distance[nearest] <= 0.02 * one.norm():
            keep[nearest] = False
    return [int(number) for number in keep.nonzero()]


def _calibration_rows(bundle: Bundle, calibrate: str | None) -> tuple[str, Sequence[int]]:
    if calibrate is not None:
        return calibrate, _normal_rows(calibrate, bundle.category)
    uri = bundle.config.data.uri
    hint = "give --calibrate DATA, an ingested set of normal images that are not in the density"
    if bundle.calibration.method != "split":
        raise DataError(f"the bundle was calibrated by {bundle.calibration.method!r} and holds no images out: {hint}")
    try:
        same = data_fingerprint(uri, bundle.category) == bundle.manifest["data"]["fingerprint"]
    except DataError as error:
        raise DataError(f"the bundle's own held-out images cannot be read ({error}): {hint}") from None
    if not same:
        raise DataError(f"{uri} has changed since the bundle was made, so its held-out images are not known: {hint}")
    return uri, plan_category(bundle.config, bundle.category).holdout_rows.tolist()
