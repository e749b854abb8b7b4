"""Changes a bundle's density without training: adds or removes images, joins other sites, or makes a site's own bundle.

The density is the model of the embeddings of normal images. The network, the image alignment and the distance metric stay the
same. Statistics add up, so the result equals a density that is fitted again to the remaining images. Thresholds are set again,
because the old thresholds belong to the old density. An image counts once: a bundle stores a hash of the pixels of each image,
and an image in the density is not added a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from focus_ray.bundle.bundle import Bundle, read_bundle, read_statistics, write_bundle
from focus_ray.data.read import data_fingerprint, decode_rows, index_version, read_index
from focus_ray.density.base import NormalStatistics, supports_leave_one_out
from focus_ray.density.moments import Moments
from focus_ray.density.registry import DENSITIES
from focus_ray.density.relations import ImageRelations
from focus_ray.density.tiles import split_into_tile_maps
from focus_ray.errors import BundleError, DataError
from focus_ray.features.batch_norm import use_inference_backbone
from focus_ray.fitting.duplicates import add_duplicate_relations, compute_bank_descriptors
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.leave_one_out import collect_leave_one_out_scores
from focus_ray.fitting.passes import collect_calibration_scores, compute_image_statistics
from focus_ray.fitting.split import compute_split_plan, shorten_hash
from focus_ray.names import Log
from focus_ray.precision import choose_compute_dtype

ONLY = "focus-ray update BUNDLE NEW --only DATA"
# Two bundles join only if these settings are equal: they decide how an embedding is computed and stored. The tensors of the
# network must be equal too.
_JOINABLE_SETTINGS = (
    *("model.image_size_px", "model.resize", "model.tiling", "model.padding", "model.batch_norm"),
    *("density.kind", "density.layers", "density.map_stride_px", "density.smooth_layers", "density.coreset_channels"),
)


class _NormalImages(NamedTuple):
    """Normal training images of a category in an ingested data set.

    Attributes:
        uri: address of the data set.
        version: version of the category in the data set.
        hashes: row number of the image in the category -> `shorten_hash` of its pixels.
        groups: row number -> group name; images of one physical part have the same name. An empty name: the image is a group
            of its own. It may also have the rows of other images of the data set.
    """

    uri: str
    version: str
    hashes: dict[int, int]
    groups: dict[int, str]

    def select_by_hash(self, hashes: Collection[int], included: bool) -> _NormalImages:
        """Returns the images whose hash is in `hashes`; with included=False, the images whose hash is not in `hashes`."""
        return self._replace(hashes={row: value for row, value in self.hashes.items() if (value in hashes) is included})


@dataclass
class _DensityUpdate:
    """The changing state of an update: statistics and hashes of the images in the density, and a list of the changes.

    Attributes:
        statistics: statistics of the images in the density.
        fit_hashes: `shorten_hash` of the images in the density; empty if the bundle does not store hashes.
        changes: provenance entries for the manifest, one for each change.
        log: receives a message about ignored images.
    """

    statistics: NormalStatistics
    fit_hashes: frozenset[int]
    changes: list[dict[str, Any]] = field(default_factory=list)
    log: Log = lambda message: None

    def add_change(self, action: str, source: str, num_images: int, num_ignored: int, **facts: Any) -> None:
        """Adds an entry to `changes`. If images of the source were ignored, also logs their number.

        Args:
            action: add, remove or join.
            source: address of the data set or of the other bundle.
            num_images: number of added or removed images.
            num_ignored: number of images of the source that were already in the bundle, or for remove not in the bundle.
            facts: further values for the entry.
        """
        change = {action: source, **facts, "num_images": num_images}
        if num_ignored:
            change["left_out"] = num_ignored
            reason = "not in the bundle" if action == "remove" else "already in the bundle"
            self.log(f"{action} {source}: {num_ignored} {'image' if num_ignored == 1 else 'images'} left out: {reason}")
        self.changes.append(change)


def update_bundle(
    uri: str | Path,
    output: str | Path,
    *,
    add: str | None = None,
    remove: str | None = None,
    join: str | Path | Sequence[str | Path] = (),
    only: str | None = None,
    calibrate: str | None = None,
    device: torch.device | str = "cpu",
    log: Log = lambda message: None,
) -> dict[str, Any]:
    """Writes a changed copy of a bundle, and returns its manifest.

    The changes are made in the order join, add, remove. A bundle without hashes of its images cannot recognise them: then all
    images of `add` are added, and all images of `remove` are subtracted.

    Args:
        uri: address of the bundle.
        output: address of the changed copy. If it equals `uri`, the bundle is replaced in one step.
        add: an ingested data set. Its normal training images of the category are added, unless the density has them already.
        remove: an ingested data set. Its normal training images of the category are removed; images that are not in the
            density are ignored.
        join: other bundles with the same network. Their statistics are added; an image in both bundles counts once.
        only: an ingested data set. Its normal training images replace all images of the bundle. The result is a bundle of
            another site with the same network. `only` cannot be combined with add, remove and join.
        calibrate: an ingested data set. Its normal training images that are not in the density set the thresholds. None: the
            thresholds come from leave-one-out scores of the stored embeddings if the density supports leave-one-out, and if
            the bundle was calibrated this way or images were joined or replaced. In all other cases they come from the holdout
            images of the bundle's own data set, which must not have changed.
        log: receives a message about ignored images.

    Raises:
        BundleError: a bundle is missing, damaged or stores no statistics, or a bundle to join does not fit: it has another
            network, setting or region, one of the two bundles has no image hashes, or a shared image cannot be subtracted.
        ConfigError: a manifest has a setting that this version of focus_ray cannot use.
        DataError: `only` is combined with another change, a data set cannot be read, or the copy cannot be written.
        DataError: there is no new image to add or join, no image to remove or to calibrate with, or fewer than 2 images would
            remain.
    """
    joined = [str(join)] if isinstance(join, (str, Path)) else [str(address) for address in join]
    bundle = read_bundle(uri, device)
    config, data = bundle.config, bundle.manifest["data"]
    provenance: dict[str, Any]
    if only is not None:
        if add is not None or remove is not None or joined:
            raise DataError(
                f"--only {only} makes a bundle of these images alone: join, add or remove images in a second update of the "
                "new bundle"
            )
        update = _replace_images(bundle, only)
        config = config.model_copy(update={"data": config.data.model_copy(update={"uri": only})})
        fingerprint = data_fingerprint(only, bundle.category)
        provenance = {"uri": only, "fingerprint": fingerprint, "network_of": bundle.version}
    else:
        update = _DensityUpdate(read_statistics(uri), bundle.fit_hashes, log=log)
        for other in joined:
            _merge_bundle(update, bundle, other)
        if add is not None:
            _add_images(update, bundle, add)
        if remove is not None:
            _remove_images(update, bundle, remove)
        provenance = {**data, "updates": [*data.get("updates", []), *update.changes]}
    statistics = update.statistics
    statistics.limit_bank_size(config.density.max_images)
    add_duplicate_relations(statistics)
    detector = build_detector(config, bundle.detector.net, bundle.detector.reduction, _move_moments(statistics, device))
    has_new_sources = bool(joined) or only is not None
    num_holdout = 0
    if calibrate is None and _calibrates_by_leave_one_out(bundle, statistics, has_new_sources):
        builder = collect_leave_one_out_scores(detector, statistics, config)
    else:
        holdout = _choose_calibration_images(bundle, calibrate, update.fit_hashes, only is not None)
        num_holdout = len(holdout.hashes)
        with use_inference_backbone(bundle.detector.net, choose_compute_dtype(config.model.precision, device)):
            images = _decode_images(bundle, holdout)
            builder = collect_calibration_scores(detector, images, config.calibration, "split")
    return write_bundle(
        output,
        config=config,
        category=bundle.category,
        detector=detector,
        statistics=statistics,
        calibration=builder.build_calibration(),
        data={**provenance, "num_fit": statistics.num_images, "num_holdout": num_holdout},
        metrics=bundle.manifest["metrics"],
        fit_hashes=sorted(update.fit_hashes),
        frame=bundle.frame,
    )


def _calibrates_by_leave_one_out(bundle: Bundle, statistics: NormalStatistics, has_new_sources: bool) -> bool:
    """Returns whether leave-one-out scores set the thresholds if `update_bundle` gets no data set for the calibration.

    Args:
        statistics: statistics of the changed density.
        has_new_sources: whether images were joined or replaced.
    """
    if statistics.bank is None or not supports_leave_one_out(
        bundle.config.density, bundle.config.model.density_tile_grid
    ):
        return False
    return has_new_sources or bundle.calibration.method == "leave_one_out"


# ---- replacing all images
def _replace_images(bundle: Bundle, source: str) -> _DensityUpdate:
    """Starts an update with the statistics of the normal images of the data set `source` instead of the bundle's images.

    Raises: DataError: the data set cannot be read, or the category has fewer than 2 normal training images in it.
    """
    images = _list_normal_images(source, bundle.category)
    if len(images.hashes) < 2:
        raise DataError(
            f"{source}: category {bundle.category!r} has {len(images.hashes)} normal training image, expected at least 2"
        )
    statistics = _compute_statistics(bundle, images)
    statistics.same_part_distance = bundle.same_part_distance
    return _DensityUpdate(statistics, frozenset(images.hashes.values()))


# ---- joining bundles
def _merge_bundle(update: _DensityUpdate, bundle: Bundle, place: str) -> None:
    """Adds the images of the bundle at `place` to `update`, in place. An image in both bundles counts once.

    Raises: BundleError, ConfigError, DataError: see `update_bundle`.
    """
    other = read_bundle(place)
    _check_joinable(bundle, other, place)
    for hashes, name in ((update.fit_hashes, "the bundle to be changed"), (other.fit_hashes, place)):
        if not hashes:
            raise BundleError(
                f"{name}: the bundle stores no hashes of its images, so an image in both bundles would count twice: make the "
                f"bundle again with `{ONLY}`, or train it again"
            )
    shared_hashes = update.fit_hashes & other.fit_hashes
    if shared_hashes == other.fit_hashes:
        raise DataError(f"{place}: all of its {len(shared_hashes)} images are in the bundle already: nothing to join")
    other_statistics = read_statistics(place)
    if shared_hashes:
        _remove_shared_images(other_statistics, update.statistics, len(shared_hashes), place)
    count = other_statistics.num_images
    update.statistics.join(other_statistics)
    update.fit_hashes |= other.fit_hashes
    update.add_change("join", place, count, len(shared_hashes), version=other.version)


def _check_joinable(bundle: Bundle, other: Bundle, name: str) -> None:
    """Checks that category, network, the settings `_JOINABLE_SETTINGS` and the region of interest of two bundles are equal.

    Args: name: address of `other`, for messages.

    Raises: BundleError: category, network, a setting or the region differs.
    """
    advice = f"start all sites from the same bundle, with `{ONLY}` and each site's own images"
    files = [entry.manifest["files"]["network"]["sha256"] for entry in (bundle, other)]
    if bundle.category != other.category or files[0] != files[1]:
        raise BundleError(
            f"{name}: this bundle has another category or network than the bundle to be changed, so their statistics do not "
            f"add: {advice}"
        )
    for key in _JOINABLE_SETTINGS:
        value, other_value = attrgetter(key)(bundle.config), attrgetter(key)(other.config)
        if value != other_value:
            raise BundleError(
                f"{name}: this bundle was made with {key}={other_value}, but the bundle to be changed with {value}: {advice}"
            )
    if not np.array_equal(np.asarray(bundle.frame.region), np.asarray(other.frame.region)):  # None: the whole image
        raise BundleError(f"{name}: this bundle has another region of interest than the bundle to be changed: {advice}")


def _remove_shared_images(other: NormalStatistics, statistics: NormalStatistics, count: int, place: str) -> None:
    """Removes from the statistics `other`, in place, the images that `statistics` contains too.

    Two stored embeddings belong to the same image if they are equal except for rounding.

    Args:
        count: number of shared images, which the caller knows from their hashes.
        place: address of the other bundle, for messages.

    Raises: BundleError: `other` stores no embeddings, or not exactly `count` shared images are found.
    """
    shared: set[int] = set()
    if other.bank is not None and statistics.bank is not None:
        # images that came from an earlier join have identical embeddings
        shared = set(_find_equal_embeddings(other.bank, statistics.bank))
        # both sites computed the embedding of the same image: it is equal except for rounding
        candidates = [number for number in range(len(other.bank)) if number not in shared]
        unmatched = _find_unmatched_embeddings(other.bank[candidates], statistics.bank, count - len(shared))
        shared |= {candidate for number, candidate in enumerate(candidates) if number not in set(unmatched)}
    if other.bank is None or len(shared) != count:
        raise BundleError(
            f"{place}: {count} of its images are in the bundle already, but only {len(shared)} of their embeddings are stored, "
            f"so these images cannot be subtracted: join a bundle of the site's own images, made with `{ONLY}`"
        )
    other.moments.remove(_compute_moments(other, sorted(shared)))
    other.select_bank_images([number for number in range(len(other.bank)) if number not in shared])


def _compute_moments(statistics: NormalStatistics, rows: Sequence[int]) -> Moments:
    """Computes the moments (count, mean, scatter) of some images from their stored embeddings, `statistics.bank`.

    Args: rows: indices of the images in the bank.
    """
    all_moments, grid = statistics.moments, statistics.grid
    assert statistics.bank is not None
    moments = Moments(all_moments.height, all_moments.width, all_moments.channels)
    for start in range(0, len(rows), 8):  # 8 images at a time bound the memory
        # (8, H * W, C) -> (8, C, H * W) -> (8, C, H, W)
        part = statistics.bank[list(rows[start : start + 8]), :, : all_moments.channels].float().transpose(1, 2)
        maps = part.unflatten(2, (all_moments.height * grid[0], all_moments.width * grid[1]))
        moments.add_embeddings(split_into_tile_maps(maps, *grid))
    return moments


def find_shared_images(uri: str | Path, statistics: NormalStatistics) -> list[int]:
    """Returns the indices of the images in `statistics.bank` whose embedding the bundle at `uri` stores too, bit for bit.

    A bank holds the stored embeddings of normal images. The bundle must have the same network as the statistics. The result is
    empty if the bundle or the statistics have no bank.

    Raises:
        BundleError: the bundle is missing, damaged or stores no statistics.
        ConfigError: the manifest has a setting that this version of focus_ray cannot use.
    """
    bank = read_statistics(uri).bank
    return [] if statistics.bank is None or bank is None else _find_equal_embeddings(statistics.bank, bank)


def _find_equal_embeddings(bank: Tensor, other_bank: Tensor) -> list[int]:
    """Returns the indices of the embeddings in `bank` that also occur in `other_bank`, bit for bit.

    Args: bank, other_bank: embeddings of N images, (N, L, C), with L locations and C channels. N may differ.
    """
    digests = {_hash_tensor(row) for row in other_bank}
    return [number for number, row in enumerate(bank) if _hash_tensor(row) in digests]


def _hash_tensor(row: Tensor) -> bytes:
    """Returns the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(row.contiguous().view(torch.uint8).numpy().tobytes()).digest()


# ---- adding and removing images
def _add_images(update: _DensityUpdate, bundle: Bundle, source: str) -> None:
    """Adds to `update`, in place, the normal images of the data set `source` that are not in the density yet.

    Without hashes in the bundle, all images are added.

    Raises: DataError: the data set cannot be read, or there is no image to add.
    """
    images = _list_normal_images(source, bundle.category)
    new, num_images = images.select_by_hash(update.fit_hashes, included=False), len(images.hashes)
    if not new.hashes:
        raise DataError(f"{source}: all of its {num_images} normal images are in the bundle already: nothing to add")
    update.statistics.join(_compute_statistics(bundle, new))
    if update.fit_hashes:
        update.fit_hashes |= set(new.hashes.values())
    update.add_change("add", source, len(new.hashes), num_images - len(new.hashes))


def _remove_images(update: _DensityUpdate, bundle: Bundle, source: str) -> None:
    """Removes from `update`, in place, the normal images of the data set `source` that are in the density.

    Without hashes in the bundle, all normal images of `source` are subtracted.

    Raises: DataError: the data set cannot be read or has no normal image, none of its normal images is in the density, or fewer
        than 2 images would remain.
    """
    images = _list_normal_images(source, bundle.category)
    included = images.select_by_hash(update.fit_hashes, included=True) if update.fit_hashes else images
    num_images = len(images.hashes)
    if not included.hashes:
        raise DataError(f"{source}: none of its {num_images} normal images is in the bundle: nothing to remove")
    statistics, count = update.statistics, len(included.hashes)
    if count > statistics.num_images - 2:
        raise DataError(
            f"{source}: {count} of {statistics.num_images} images would be removed, but at least 2 must remain"
        )
    part = _compute_statistics(bundle, included)
    statistics.moments.remove(part.moments)
    if statistics.bank is not None and part.bank is not None:
        statistics.select_bank_images(_find_unmatched_embeddings(statistics.bank, part.bank))
    update.fit_hashes -= set(included.hashes.values())
    update.add_change("remove", source, count, num_images - count)


def _list_normal_images(uri: str, category: str) -> _NormalImages:
    """Reads row numbers and hashes of a category's normal training images, and the groups of all training images; no pixels.

    Raises: DataError: the data set cannot be read, or the category has no normal training image.
    """
    index = read_index(uri, category, split="train")
    columns = (index[name].to_pylist() for name in ("row", "label", "content_hash"))
    hashes = {row: shorten_hash(content_hash) for row, label, content_hash in zip(*columns, strict=True) if label == 0}
    groups = dict(zip(index["row"].to_pylist(), index["group"].to_pylist(), strict=True))
    if not hashes:
        raise DataError(f"{uri}: category {category!r} has no normal training image")
    return _NormalImages(uri, index_version(index), hashes, groups)


def _decode_images(bundle: Bundle, images: _NormalImages) -> Iterator[Tensor]:
    """Generator: yields the images in batches, uint8 (B, H, W, 3 or 4), resized to the bundle's frame.

    Raises: DataError: an image cannot be read or decoded.
    """
    rows = list(images.hashes)
    for batch in decode_rows(images.uri, bundle.category, rows, bundle.frame, version=images.version):
        yield torch.from_numpy(batch)


def _compute_statistics(bundle: Bundle, images: _NormalImages) -> NormalStatistics:
    """Computes the statistics of images with the bundle's network, on the device of the bundle, and returns them in RAM.

    If the density needs stored embeddings, the statistics also have the embeddings of all images, descriptors, and relations
    between images of one group.
    """
    bank_images = range(len(images.hashes)) if DENSITIES[bundle.config.density.kind].keeps_bank else None
    net, reduction, device = bundle.detector.net, bundle.detector.reduction, bundle.detector.density.device
    with use_inference_backbone(net, choose_compute_dtype(bundle.config.model.precision, device)):
        batches = _decode_images(bundle, images)
        statistics = _move_moments(compute_image_statistics(net, reduction, batches, device, bank_images), "cpu")
    if statistics.bank is not None:
        statistics.descriptors = compute_bank_descriptors(statistics, reduction)
        statistics.relations = _relate_groups([images.groups[row] for row in images.hashes])
    return statistics


def _relate_groups(names: Sequence[str]) -> ImageRelations | None:
    """Relates images with the same group name; returns None if no two images are related.

    Args: names: group name of each image. An image with an empty name is related to no other image.
    """
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(name or f"/{index}", len(numbers)) for index, name in enumerate(names)]
    relations = ImageRelations.from_groups(torch.tensor(groups, dtype=torch.long))
    return None if relations.has_no_related_images else relations


def _move_moments(statistics: NormalStatistics, device: torch.device | str) -> NormalStatistics:
    """Moves the moments of statistics to a device in place, and returns the statistics."""
    moments = statistics.moments
    moments.mean, moments.scatter = moments.mean.to(device), moments.scatter.to(device)
    return statistics


def _find_unmatched_embeddings(bank: Tensor, removed: Tensor, max_matches: int | None = None) -> list[int]:
    """Returns the indices of the embeddings in `bank` that match no embedding in `removed`.

    Two embeddings match if their distance is at most 2 % of the norm of the embedding in `removed`. Embeddings of the same
    image differ only by rounding, with bfloat16 too, and are far from the embeddings of other images. Each embedding in `bank`
    matches at most once. An embedding in `removed` without a match is ignored.

    Args:
        bank: embeddings of N images, (N, L, C), with L locations and C channels.
        removed: embeddings of M images to find, (M, L, C).
        max_matches: stop after this number of matches; None: no limit.
    """
    rows = bank.flatten(1).float()
    is_unmatched = torch.ones(len(rows), dtype=torch.bool)
    for embedding in removed.flatten(1).float():
        if not is_unmatched.any() or (max_matches is not None and int((~is_unmatched).sum()) == max_matches):
            break
        distance = (rows - embedding).norm(dim=1)
        distance[~is_unmatched] = torch.inf  # every image of the bank matches once
        nearest = int(distance.argmin())
        if distance[nearest] <= 0.02 * embedding.norm():
            is_unmatched[nearest] = False
    return [int(number) for number in is_unmatched.nonzero()]


# ---- calibration
def _choose_calibration_images(
    bundle: Bundle, calibrate: str | None, fit_hashes: frozenset[int], is_replaced: bool
) -> _NormalImages:
    """Returns the normal images that set the thresholds: images that are not in the density.

    Args:
        calibrate: address of the data set whose normal training images calibrate; None: the holdout images of the bundle's own
            data set.
        fit_hashes: `shorten_hash` of the images in the density.
        is_replaced: whether all images of the bundle were replaced by images of another data set.

    Raises:
        DataError: with `calibrate`: the data set cannot be read, or all of its normal images are in the density.
        DataError: without `calibrate`: `is_replaced` is True, the bundle was calibrated without holdout images, its data set
            has changed or cannot be read, or all holdout images are in the density now.
    """
    if calibrate is not None:
        images = _list_normal_images(calibrate, bundle.category)
        new = images.select_by_hash(fit_hashes, included=False)
        if not new.hashes:
            raise DataError(
                f"{calibrate}: all of its {len(images.hashes)} normal images are in the density and score near zero: "
                "give other images"
            )
        return new
    uri = bundle.config.data.uri
    hint = "give --calibrate DATA, an ingested set of normal images that are not in the density"
    if is_replaced:
        raise DataError(f"a density of kind {bundle.config.density.kind} does not support leave-one-out: {hint}")
    if bundle.calibration.method != "split":
        raise DataError(f"the bundle was calibrated by {bundle.calibration.method!r} and has no holdout images: {hint}")
    try:
        is_unchanged = data_fingerprint(uri, bundle.category) == bundle.manifest["data"]["fingerprint"]
    except DataError as error:
        raise DataError(f"the bundle's own held-out images cannot be read ({error}): {hint}") from None
    if not is_unchanged:
        raise DataError(f"{uri} has changed since the bundle was made, so its holdout images are unknown: {hint}")
    holdout_rows = set(compute_split_plan(bundle.config, bundle.category).holdout.rows.tolist())
    holdout = _list_normal_images(uri, bundle.category).select_by_hash(fit_hashes, included=False)
    holdout = holdout._replace(hashes={row: value for row, value in holdout.hashes.items() if row in holdout_rows})
    if not holdout.hashes:
        raise DataError(f"all holdout images of the bundle are in the density now: {hint}")
    return holdout
