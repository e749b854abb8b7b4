"""Later changes to a bundle's density, without training: take images in or out, join other sites, or make a site's own bundle.

The network stays as it is, with the aligner and the metric that it was made with. Statistics add, so the result is what a fresh
density pass over the remaining images would give; thresholds are set anew, because the old ones belong to the old density.
An image counts once: a bundle names its images by a hash of their pixels, and what is there already is not taken in again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.bundle.bundle import Bundle, read_bundle, read_statistics, write_bundle
from focus_ray.data.read import data_fingerprint, decode_rows, index_version, read_index
from focus_ray.data.split import plan_category, short_hash
from focus_ray.density.base import Statistics, supports_leave_one_out
from focus_ray.density.moments import Moments
from focus_ray.density.relations import Relations
from focus_ray.density.tiles import split_maps
from focus_ray.errors import BundleError, DataError
from focus_ray.fitting.duplicates import describe_statistics, relate_duplicates
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.leave_one_out import collect_leave_one_out_scores
from focus_ray.fitting.passes import collect_calibration_scores, compute_statistics
from focus_ray.kinds import DENSITIES
from focus_ray.model.batch_norm import prepared_for_inference
from focus_ray.precision import compute_dtype

ONLY = "focus-ray update BUNDLE NEW --only DATA"
# settings that shape an embedding or what is kept of it, which two bundles must have in common beside the network's tensors
_SHARED = {
    "model": ("image_size_px", "resize", "tiling", "padding", "batch_norm"),
    "density": ("kind", "layers", "map_stride_px", "smooth_layers", "coreset_channels"),
}


class _Normals(NamedTuple):
    """Normal training images of a data set: where, and which version of it.

    known: row number -> `short_hash`.  groups: row number -> name of the group, empty if the image is its own group.
    """

    uri: str
    version: str
    known: dict[int, int]
    groups: dict[int, str]

    def among(self, hashes: frozenset[int], there: bool) -> _Normals:
        """Those that are among the hashes, or those that are not."""
        return self._replace(known={row: one for row, one in self.known.items() if (one in hashes) == there})


@dataclass
class _Growing:
    """What a bundle is made of, while it changes.

    known: `short_hash` of the images; empty: not kept.  changes: for the manifest.
    """

    statistics: Statistics
    known: frozenset[int]
    changes: list[dict[str, Any]] = field(default_factory=list)


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
    log: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Writes a changed copy of a bundle.

    Args:
        add, remove: ingested data sets whose normal training images of the category are taken in, or out again. Images that are
            in already are not taken in again, and those that are not in are passed over when others are taken out.
        join: other bundles of the same network, whose statistics are added; images that are in already count once.
        only: an ingested data set whose normal training images take the place of all that the bundle holds: another site's
            bundle of the same network. Goes with none of the others.
        calibrate: an ingested data set whose normal training images of the category set the thresholds, less those that are in
            the density; None leaves each of the images kept out in turn, where the bundle was calibrated so, or is joined or made
            anew and keeps embeddings, or takes the images that the bundle's own data set held out, if that is still what the
            bundle was made from.
        log: told of images that were left out.

    Returns: the new manifest.

    Raises: BundleError: the bundle keeps no statistics, or those to be joined do not share a network, or do not say which
        images they are made of. DataError: no new image to add or join, none to remove or calibrate with, or more removed than
        there are.
    """
    joined = [str(join)] if isinstance(join, (str, Path)) else [str(one) for one in join]
    if only is not None and (add is not None or remove is not None or joined):
        raise DataError(f"--only {only} makes a bundle of these images alone: join others to it in a second step")
    bundle = read_bundle(uri, device)
    provenance = dict(bundle.manifest["data"])
    if only is not None:
        growing = _only(bundle, only)
        growing.statistics.same_part_distance = bundle.same_part_distance
        config = bundle.config.model_copy(update={"data": bundle.config.data.model_copy(update={"uri": only})})
        provenance = {
            "uri": only,
            "fingerprint": data_fingerprint(only, bundle.category),
            "network_of": bundle.version,
        }
    else:
        config = bundle.config
        growing = _Growing(read_statistics(uri), bundle.known, list(provenance.get("updates", [])))
        for other in joined:
            _join(growing, bundle, other)
        if add is not None:
            _add(growing, bundle, add)
        if remove is not None:
            _remove(growing, bundle, remove)
        for change in growing.changes[len(provenance.get("updates", [])) :]:
            if left := change.get("left_out"):
                what, place = next(iter(change.items()))
                there = "none of the bundle" if what == "remove" else "in the bundle already"
                log(f"{what} {place}: {left} of its images {'is' if left == 1 else 'are'} {there}, and left out")
        provenance["updates"] = growing.changes
    statistics = growing.statistics
    statistics.limit_bank(config.density.max_images)
    relate_duplicates(statistics)
    detector = build_detector(config, bundle.detector.net, bundle.detector.reduction, _on(statistics, device))
    anew = bool(joined) or only is not None
    num_held = 0
    if calibrate is None and _can_leave_out(bundle, statistics, anew):
        builder = collect_leave_one_out_scores(detector, statistics, config)
    else:
        held = _calibrating(bundle, calibrate, growing.known, only is not None)
        num_held = len(held.known)
        with prepared_for_inference(bundle.detector.net, compute_dtype(config.model.precision, device)):
            images = _images(bundle, held)
            builder = collect_calibration_scores(detector, images, config.calibration, "split", torch.device(device))
    return write_bundle(
        output,
        config=config,
        category=bundle.category,
        detector=detector,
        statistics=statistics,
        calibration=builder.finish(),
        data={**provenance, "num_fit": statistics.num_images, "num_holdout": num_held},
        metrics=bundle.manifest["metrics"],
        known=sorted(growing.known),
        frame=bundle.frame,
    )


def _can_leave_out(bundle: Bundle, statistics: Statistics, anew: bool) -> bool:
    if statistics.bank is None or not supports_leave_one_out(bundle.config.density, bundle.config.model.shared_grid):
        return False
    return anew or bundle.calibration.method == "leave_one_out"


# ---- a site's own
def _only(bundle: Bundle, source: str) -> _Growing:
    images = _normal_images(source, bundle.category)
    if len(images.known) < 2:
        raise DataError(f"{source}: {len(images.known)} normal training image of {bundle.category!r}; 2 at least")
    return _Growing(_statistics_of(bundle, images), frozenset(images.known.values()))


# ---- join
def _join(growing: _Growing, bundle: Bundle, place: str) -> None:
    """Adds another bundle's images, each that is in both once. Raises: BundleError, DataError: as `update_bundle`."""
    other = read_bundle(place)
    _check_same_network(bundle, other, place)
    for known, name in ((growing.known, "the bundle to be changed"), (other.known, place)):
        if not known:
            raise BundleError(
                f"{name}: does not say which images it was made of, so an image that is in both would count twice: make it anew "
                f"with `{ONLY}`, or train it anew"
            )
    both = growing.known & other.known
    if both == other.known:
        raise DataError(f"{place}: all of its {len(both)} images are in the bundle already: nothing to join")
    theirs = read_statistics(place)
    if both:
        _take_out_shared(theirs, growing.statistics, len(both), place)
    count = theirs.num_images
    growing.statistics.join(theirs)
    growing.known |= other.known
    change = {"join": place, "version": other.version, "num_images": count}
    growing.changes.append({**change, "left_out": len(both)} if both else change)


def _check_same_network(mine: Bundle, other: Bundle, name: str) -> None:
    files = [bundle.manifest["files"]["network"]["sha256"] for bundle in (mine, other)]
    if mine.category != other.category or files[0] != files[1]:
        raise BundleError(
            f"{name}: another category or network than the bundle it is to join; statistics add only where the network is "
            f"the same: start all sites from one bundle, by `{ONLY}` with each site's own images"
        )
    for section, keys in _SHARED.items():
        for key in keys:
            values = [getattr(getattr(bundle.config, section), key) for bundle in (mine, other)]
            if values[0] != values[1]:
                raise BundleError(
                    f"{name}: made with {section}.{key}={values[1]}, the bundle it is to join with {values[0]}: start all sites "
                    f"from one bundle, by `{ONLY}` with each site's own images"
                )
    if not _same_region(mine.frame.region, other.frame.region):
        raise BundleError(
            f"{name}: another region of interest than the bundle it is to join: start both from one bundle"
        )


def _same_region(mine: NDArray[np.bool_] | None, other: NDArray[np.bool_] | None) -> bool:
    if mine is None or other is None:
        return mine is other
    return bool((mine == other).all())


def _take_out_shared(theirs: Statistics, mine: Statistics, count: int, place: str) -> None:
    """Takes the `count` images that both hold out of `theirs`, by their embeddings. Raises: BundleError: some are not kept."""
    shared: list[int] = []
    if theirs.bank is not None and mine.bank is not None:
        shared = _rows_of(theirs.bank, mine.bank)
        if len(shared) < count:  # an image that both sites put in by themselves is equal to rounding
            apart = [number for number in range(len(theirs.bank)) if number not in set(shared)]
            left = _rows_left(theirs.bank[apart], mine.bank, count - len(shared))
            shared = sorted({*shared, *(apart[n] for n in set(range(len(apart))) - set(left))})
    if len(shared) != count:
        raise BundleError(
            f"{place}: {count} of its images are in the bundle already, and the embeddings of {len(shared)} of them are kept, so "
            f"they cannot be taken out: join a bundle of the site's own images, as `{ONLY}` makes it"
        )
    assert theirs.bank is not None
    theirs.moments.remove(_moments_of(theirs, shared))
    gone = set(shared)
    theirs.select_bank_images([number for number in range(len(theirs.bank)) if number not in gone])


def _moments_of(statistics: Statistics, rows: Sequence[int]) -> Moments:
    """Of some images of the bank."""
    like, grid = statistics.moments, statistics.grid
    assert statistics.bank is not None
    found = Moments(like.height, like.width, like.channels)
    for start in range(0, len(rows), 8):
        part = statistics.bank[list(rows[start : start + 8]), :, : like.channels].float().transpose(1, 2)
        places = part.unflatten(2, (like.height * grid[0], like.width * grid[1]))
        found.update(split_maps(places, *grid))
    return found


def rows_in_common(uri: str | Path, statistics: Statistics) -> list[int]:
    """Numbers of the bank's images that another bundle of the same network holds too. Raises: BundleError."""
    bank = read_statistics(uri).bank
    return [] if statistics.bank is None or bank is None else _rows_of(statistics.bank, bank)


def _rows_of(bank: Tensor, others: Tensor) -> list[int]:
    """Numbers of the bank's images whose embeddings are among the others to the last bit, as joining leaves them."""
    known = {_digest(row) for row in others}
    return [number for number, row in enumerate(bank) if _digest(row) in known]


def _digest(row: Tensor) -> bytes:
    return hashlib.sha256(row.contiguous().view(torch.uint8).numpy().tobytes()).digest()


# ---- images in and out
def _add(growing: _Growing, bundle: Bundle, source: str) -> None:
    images = _normal_images(source, bundle.category)
    new, given = images.among(growing.known, there=False), len(images.known)
    if not new.known:
        raise DataError(f"{source}: all of its {given} normal images are in the bundle already: nothing to add")
    growing.statistics.join(_statistics_of(bundle, new))
    if growing.known:
        growing.known |= set(new.known.values())
    growing.changes.append(_change("add", source, len(new.known), given))


def _remove(growing: _Growing, bundle: Bundle, source: str) -> None:
    images = _normal_images(source, bundle.category)
    there, given = images.among(growing.known, there=True) if growing.known else images, len(images.known)
    if not there.known:
        raise DataError(f"{source}: none of its {given} normal images is in the bundle: nothing to remove")
    statistics, count = growing.statistics, len(there.known)
    if count > statistics.num_images - 2:
        raise DataError(f"{source}: {count} images to take out of {statistics.num_images}; at least 2 must remain")
    part = _statistics_of(bundle, there)
    statistics.moments.remove(part.moments)
    if statistics.bank is not None and part.bank is not None:
        statistics.select_bank_images(_rows_left(statistics.bank, part.bank))
    growing.known -= set(there.known.values())
    growing.changes.append(_change("remove", source, count, given))


def _change(what: str, source: str, count: int, given: int) -> dict[str, Any]:
    change: dict[str, Any] = {what: source, "num_images": count}
    return {**change, "left_out": given - count} if given > count else change


def _normal_images(uri: str, category: str) -> _Normals:
    """Raises: DataError: none."""
    index = read_index(uri, category, split="train")
    columns = (index[name].to_pylist() for name in ("row", "label", "content_hash"))
    found = {row: short_hash(content) for row, label, content in zip(*columns, strict=True) if label == 0}
    groups = dict(zip(index["row"].to_pylist(), index["group"].to_pylist(), strict=True))
    if not found:
        raise DataError(f"{uri}: category {category!r} has no normal training image")
    return _Normals(uri, index_version(index), found, groups)


def _images(bundle: Bundle, images: _Normals) -> Iterator[Tensor]:
    rows = list(images.known)
    for batch in decode_rows(images.uri, bundle.category, rows, bundle.frame, version=images.version):
        yield torch.from_numpy(batch)


def _statistics_of(bundle: Bundle, images: _Normals) -> Statistics:
    keep = range(len(images.known)) if DENSITIES[bundle.config.density.kind].keeps_bank else None
    net, reduction, device = bundle.detector.net, bundle.detector.reduction, bundle.detector.density.device
    with prepared_for_inference(net, compute_dtype(bundle.config.model.precision, device)):
        found = _on(compute_statistics(net, reduction, _images(bundle, images), device, keep), "cpu")
    if found.bank is not None:
        found.descriptors = describe_statistics(found, reduction)
        found.relations = _named_relations([images.groups[row] for row in images.known])
    return found


def _named_relations(names: Sequence[str]) -> Relations | None:
    """Relations between images by the names of their groups."""
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(name or f"/{place}", len(numbers)) for place, name in enumerate(names)]
    relations = Relations.from_groups(torch.tensor(groups, dtype=torch.long))
    return None if relations.is_trivial else relations


def _on(statistics: Statistics, device: torch.device | str) -> Statistics:
    moments = statistics.moments
    moments.mean, moments.scatter = moments.mean.to(device), moments.scatter.to(device)
    return statistics


def _rows_left(bank: Tensor, gone: Tensor, most: int | None = None) -> list[int]:
    """Numbers of the bank's images that are none of the given ones; one that was never kept is passed over.

    An image's embedding comes out the same to rounding, of bfloat16 where a machine computes in it, and far from any other's.

    Args: most: so many of the bank's are found, at most; None: any number.
    """
    rows = bank.flatten(1).float()
    keep = torch.ones(len(rows), dtype=torch.bool)
    for one in gone.flatten(1).float():
        if not keep.any() or (most is not None and int((~keep).sum()) == most):
            break
        distance = (rows - one).norm(dim=1)
        distance[~keep] = torch.inf
        nearest = int(distance.argmin())
        if distance[nearest] <= 0.02 * one.norm():
            keep[nearest] = False
    return [int(number) for number in keep.nonzero()]


# ---- calibration
def _calibrating(bundle: Bundle, calibrate: str | None, known: frozenset[int], anew: bool) -> _Normals:
    """The images that calibrate: none that the density has seen."""
    if calibrate is not None:
        given = _normal_images(calibrate, bundle.category)
        new = given.among(known, there=False)
        if not new.known:
            raise DataError(
                f"{calibrate}: all of its {len(given.known)} normal images are in the density, and score near zero: give others"
            )
        return new
    uri = bundle.config.data.uri
    hint = "give --calibrate DATA, an ingested set of normal images that are not in the density"
    if anew:
        raise DataError(f"a density of kind {bundle.config.density.kind} keeps no images to leave out: {hint}")
    if bundle.calibration.method != "split":
        raise DataError(f"the bundle was calibrated by {bundle.calibration.method!r} and holds no images out: {hint}")
    try:
        same = data_fingerprint(uri, bundle.category) == bundle.manifest["data"]["fingerprint"]
    except DataError as error:
        raise DataError(f"the bundle's own held-out images cannot be read ({error}): {hint}") from None
    if not same:
        raise DataError(f"{uri} has changed since the bundle was made, so its held-out images are not known: {hint}")
    held = set(plan_category(bundle.config, bundle.category).holdout_rows.tolist())
    own = _normal_images(uri, bundle.category).among(known, there=False)
    own = own._replace(known={row: one for row, one in own.known.items() if row in held})
    if not own.known:
        raise DataError(f"all images that the bundle held out are in the density by now: {hint}")
    return own
