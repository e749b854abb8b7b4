"""Module that splits the normal images of a category into fit, validation and held-out images.

Fit images train the network and fill the density, validation images choose between networks, held-out images calibrate the
thresholds. Every normal training image has a key: a hash of the seed and the image content, or of the seed and the group if the
image has one. The images with the lowest keys are held out, the next images validate, and the others are fit images. So a split
is defined by two limits of the keys, and all images of a group are in the same subset ("part" in names). A row is the position
of an image in the stored data of the category.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from focus_ray.data.read import compute_index_fingerprint, index_version, read_index
from focus_ray.errors import DataError
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config

# If at least this many held-out images are expected above the threshold, the false alarm rate is between 0.4 and 1.8 times the
# target (90 % interval).
_MIN_EXPECTED_ALARMS = 5
_MAX_LISTED_IMAGES = 20  # images that an error message lists
NUM_CALIBRATION_FOLDS = 5  # of calibration.method=cross
# With 4096 calibration images, the rate of a threshold for 0.05 lies between 0.044 and 0.056 in 9 of 10 cases. A worker keeps up
# to 10 % of the map of each image.
MAX_CALIBRATION_IMAGES = 4096
MAX_VALIDATION_IMAGES = 64  # images that choose alignment and training length
NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class SplitRule:
    """The rule that splits the images of one category. It is small, so it can be sent to any number of workers.

    Attributes:
        seed: seed of the keys of the images, see `compute_split_key`.
        fingerprint: hash that identifies the images of the category.
        version: name of the stored version of the category's data for which the rule was made. A replaced version stays readable
            for a day.
        num_fit, num_validation, num_holdout: number of images (not groups) in each subset.
        validation_from, fit_from: limits of the keys, hex. An image whose key is below `validation_from` is held out. Any other
            image whose key is below `fit_from` validates. All other images are fit images.
    """

    category: str
    seed: int
    fingerprint: str
    version: str
    num_fit: int
    num_validation: int
    num_holdout: int
    validation_from: str
    fit_from: str

    @property
    def num_images(self) -> int:
        """The number of fit, validation and held-out images together."""
        return self.num_fit + self.num_validation + self.num_holdout

    def find_subset(self, content_hash: str, group: str = "") -> Literal["fit", "validation", "holdout"]:
        """Returns whether a normal training image is a fit, validation or held-out image.

        Args:
            content_hash: hash of the image content.
            group: group of the image; empty if the image is its own group.
        """
        key = compute_split_key(self.seed, content_hash, group)
        return "holdout" if key < self.validation_from else "validation" if key < self.fit_from else "fit"

    def build_plan(self, config: Config) -> SplitPlan:
        """Applies the rule to the stored version of the category, and returns the images of each subset.

        Raises: DataError: this version does not exist any more.
        """
        table = read_index(config.data.uri, self.category, version=self.version)
        return _apply_split_rule(self, _collect_normal_images(table, self.seed))


@dataclass(frozen=True, eq=False)
class SplitRows:
    """The images of one subset of a split (fit, validation or held-out), or the share of one worker.

    Attributes:
        rows: (n,) int64, row numbers in the stored data of the category.
        groups: (n,) int64, group numbers. Two rows have equal numbers if and only if they are in the same named group. A row
            without a group has a unique number. The numbers start at 0, in the order of first appearance among all normal
            training rows.
        order: (n,) int64, rank of each row among all normal training rows in natural order of their ids (img_2 before img_10).
    """

    rows: NDArray[np.int64]
    groups: NDArray[np.int64]
    order: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, selection: NDArray[Any] | slice) -> SplitRows:
        """Returns a new object with some of the images.

        Args: selection: positions of the images, a bool mask of all images, or a slice.
        """
        return SplitRows(self.rows[selection], self.groups[selection], self.order[selection])

    def join(self, other: SplitRows) -> SplitRows:
        """Returns a new object with these images, followed by the images of `other`."""
        columns = ((self.rows, other.rows), (self.groups, other.groups), (self.order, other.order))
        return SplitRows(*map(np.concatenate, columns))


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """The fit, validation and held-out images of a category, or the share of one worker.

    The rows of each subset are ascending, except after `merge_validation_into_fit`.

    Attributes:
        folds: (n,) int64, fold number of each fit image, for cross calibration. All images of a group have the same fold.
        fingerprint: hash that identifies the images of the whole category.
        version: name of the stored version of the category's data; None: the current version.
        fit_hashes: `shorten_hash` of the fit and validation images, int64, sorted; empty in the share of a worker.
    """

    fit: SplitRows
    folds: NDArray[np.int64]
    validation: SplitRows
    holdout: SplitRows
    fingerprint: str
    version: str | None = None
    fit_hashes: NDArray[np.int64] = field(default_factory=lambda: NO_ROWS)

    @property
    def num_images(self) -> int:
        """The number of fit, validation and held-out images together."""
        return len(self.fit) + len(self.validation) + len(self.holdout)

    def select_fit_images(self, positions: NDArray[np.int64] | Sequence[int]) -> SplitPlan:
        """Returns a plan with only some of the fit images. Args: positions: positions of these images among the fit images."""
        chosen = np.asarray(positions, dtype=np.int64)
        return replace(self, fit=self.fit.take(chosen), folds=self.folds[chosen])

    def merge_validation_into_fit(self) -> SplitPlan:
        """Returns a plan in which the validation images are fit images too, after the others, and no image validates."""
        num_folds = int(self.folds.max(initial=0)) + 1
        return replace(
            self,
            fit=self.fit.join(self.validation),
            folds=np.concatenate([self.folds, self.validation.groups % num_folds]),
            validation=self.validation.take(NO_ROWS),
        )

    def drop_holdout(self) -> SplitPlan:
        """Returns a plan without held-out images."""
        return replace(self, holdout=self.holdout.take(NO_ROWS))

    def get_worker_share(self, rank: int, num_workers: int) -> SplitPlan:
        """Returns the share of one worker: a contiguous section of each subset. Every image is in exactly one share.

        The images of a group may be spread over several workers.

        Args: rank: number of the worker, from 0.
        """

        def slice_of_worker(length: int) -> slice:
            """Returns the positions of the worker's section in a subset of `length` images."""
            return slice(length * rank // num_workers, length * (rank + 1) // num_workers)

        return replace(
            self,
            fit=self.fit.take(slice_of_worker(len(self.fit))),
            folds=self.folds[slice_of_worker(len(self.folds))],
            validation=self.validation.take(slice_of_worker(len(self.validation))),
            holdout=self.holdout.take(slice_of_worker(len(self.holdout))),
            fit_hashes=NO_ROWS,
        )


@dataclass(frozen=True)
class _NormalImages:
    """The N normal training images of a category, in the order of their rows and in G groups.

    Attributes:
        images: the rows, groups and ranks of the N images.
        hashes: (N,) content hashes.
        group_keys: (G,) split key of each group.
        group_sizes: (G,) number of images in each group.
    """

    images: SplitRows
    hashes: Sequence[str]
    group_keys: NDArray[np.str_]
    group_sizes: NDArray[np.int64]


def compute_split_rule(config: Config, category: str) -> SplitRule:
    """Computes the split rule of a category. It depends only on the images, the seed and the settings.

    Raises: DataError: the category does not exist, it has too few normal training images, the region of interest cannot be used,
        or some images have a size at which no pixel would be inspected.
    """
    return _compute_rule_and_images(config, category)[0]


def compute_split_plan(config: Config, category: str) -> SplitPlan:
    """Splits a category by the rule of `compute_split_rule`, and returns the images of each subset.

    Raises: DataError: see `compute_split_rule`.
    """
    split, normal = _compute_rule_and_images(config, category)
    return _apply_split_rule(split, normal)


def compute_split_key(seed: int, content_hash: str, group: str = "") -> str:
    """Computes the key by which images are split: the SHA-256 in hex of seed and group, or of seed and content hash.

    Sorting by this key puts the groups into a random order that depends only on the seed.
    """
    text = f"{seed}:group:{group}" if group else f"{seed}:{content_hash}"
    return hashlib.sha256(text.encode()).hexdigest()


def shorten_hash(content_hash: str) -> int:
    """Converts the first 8 bytes of a hex content hash to a signed 64-bit integer."""
    return int.from_bytes(bytes.fromhex(content_hash[:16]), "big", signed=True)


def _collect_normal_images(table: pa.Table, seed: int) -> _NormalImages:
    """Returns the normal training images of a category, with groups, ranks and keys.

    Args:
        table: index of all training and test images of the category.
        seed: seed of the keys.
    """
    index = _filter_normal_rows(table)
    hashes = index["content_hash"].to_pylist()
    numbers: dict[str, int] = {}
    groups, keys = [], []
    for content_hash, name in zip(hashes, index["group"].to_pylist(), strict=True):
        if name not in numbers:
            keys.append(compute_split_key(seed, content_hash, name))
            if name:
                numbers[name] = len(keys) - 1
        groups.append(numbers.get(name, len(keys) - 1))
    group_numbers = np.array(groups, dtype=np.int64)
    images = SplitRows(index["row"].to_numpy(), group_numbers, _compute_natural_ranks(index["id"]))
    return _NormalImages(images, hashes, np.array(keys, dtype=np.str_), np.bincount(group_numbers, minlength=len(keys)))


def _filter_normal_rows(table: pa.Table) -> pa.Table:
    """Returns the part of an index table that lists the normal training images."""
    return table.filter(pc.and_(pc.equal(table["split"], "train"), pc.equal(table["label"], 0)))


def _compute_natural_ranks(ids: pa.ChunkedArray) -> NDArray[np.int64]:
    """Returns the rank (N,) of each id in natural order: digits compare by their value, so img_2 comes before img_10."""

    def prefix_length(match: re.Match[str]) -> str:
        """Returns the digits of a number without leading zeros, after the count of these digits (three characters)."""
        digits = match.group().lstrip("0")
        return f"{len(digits):03}{digits}"  # the number with more digits is larger, so the length comes first

    keys = [(re.sub("[0-9]+", prefix_length, name), name) for name in ids.to_pylist()]
    in_order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return np.argsort(in_order)  # the inverse permutation


def _compute_rule_and_images(config: Config, category: str) -> tuple[SplitRule, _NormalImages]:
    """Computes the rule of `compute_split_rule`, and returns it with the normal training images of the category.

    Raises: DataError: see `compute_split_rule`.
    """
    table = read_index(config.data.uri, category)
    normal = _collect_normal_images(table, config.train.seed)
    _check_image_sizes(config, category, table)
    count, num_groups = len(normal.images), len(normal.group_keys)
    parts = " parts" if num_groups < count else ""
    count_text = f"{count} normal training images" + (f" of {num_groups}{parts}" if parts else "")
    if num_groups < 4:
        raise DataError(f"category {category!r} of {config.data.uri} has {count_text}; at least 4{parts} are needed")
    in_order = np.argsort(normal.group_keys, kind="stable")
    sizes = normal.group_sizes[in_order]
    # From here on the counts are groups: twenty photographs of two parts count as two.
    num_holdout = min(num_groups - 2, choose_num_holdout(config, num_groups))
    num_holdout = _count_groups_within_limit(sizes, num_holdout, MAX_CALIBRATION_IMAGES, 1)
    num_validation = 0
    if config.selection.enabled:
        num_requested = min(MAX_VALIDATION_IMAGES, round(config.selection.fraction * num_groups))
        num_validation = _count_groups_within_limit(
            sizes[num_holdout:], max(2, num_requested), MAX_VALIDATION_IMAGES, 2
        )
        if num_groups - num_holdout - num_validation < 2:
            raise DataError(
                f"category {category!r} has {count_text}: {num_holdout}{parts} calibrate and {num_validation}{parts} validate, "
                "so fewer than 2 remain for training; set selection.fraction=0 or add images"
            )
    limits = [str(normal.group_keys[in_order[rank]]) for rank in (num_holdout, num_holdout + num_validation)]
    # Count the images below each key limit. Two files with the same content have the same key, so they are in the same part.
    num_below = [int(normal.group_sizes[normal.group_keys < limit].sum()) for limit in limits]
    split = SplitRule(
        category,
        config.train.seed,
        compute_index_fingerprint(table),
        index_version(table),
        num_fit=count - num_below[1],
        num_validation=num_below[1] - num_below[0],
        num_holdout=num_below[0],
        validation_from=limits[0],
        fit_from=limits[1],
    )
    return split, normal


def _check_image_sizes(config: Config, category: str, table: pa.Table) -> None:
    """Checks that at least one pixel of each normal training image would be inspected.

    Raises: DataError: some images have a size at which no pixel would be inspected; the message names these images. Or the
        region of interest of the category cannot be used.
    """
    frame = load_frame(config, category)
    if not frame.has_scored_channel:
        return
    index = _filter_normal_rows(table)
    sizes = list(zip(index["width"].to_pylist(), index["height"].to_pylist(), strict=True))
    reasons = {}
    for size in sorted(set(sizes)):
        try:
            frame.require_scored_pixels(*size)
        except DataError as error:
            reasons[size] = str(error)
    if reasons:
        unusable = [(name, size) for name, size in zip(index["id"].to_pylist(), sizes, strict=True) if size in reasons]
        names = ", ".join(name for name, _ in unusable[:_MAX_LISTED_IMAGES])
        more = f" and {len(unusable) - _MAX_LISTED_IMAGES} more" if len(unusable) > _MAX_LISTED_IMAGES else ""
        raise DataError(
            f"{len(unusable)} of {len(sizes)} normal training images of category {category!r} cannot be trained on: "
            f"{names}{more}. {unusable[0][0]}: {reasons[unusable[0][1]]}. Or remove these images from the data set"
        )


def _count_groups_within_limit(sizes: NDArray[np.int64], num_groups: int, max_images: int, min_groups: int) -> int:
    """Returns the largest number of groups, at most `num_groups`, that together contain at most `max_images` images.

    The result is not below the smaller of `min_groups` and `num_groups`, even if these groups contain more images.

    Args: sizes: (G,) number of images of each group, in the order in which the groups are taken.
    """
    fitting = int(np.searchsorted(np.cumsum(sizes[:num_groups]), max_images, side="right"))
    return max(fitting, min(min_groups, num_groups))


def _apply_split_rule(split: SplitRule, normal: _NormalImages) -> SplitPlan:
    """Applies a rule to the normal training images of a category, and returns the images of each subset."""
    groups = normal.images.groups
    group_ranks = np.argsort(np.argsort(normal.group_keys, kind="stable"))
    keys = normal.group_keys[groups]  # (N,)
    is_fit, is_holdout = keys >= split.fit_from, keys < split.validation_from
    hashes = [shorten_hash(normal.hashes[position]) for position in np.flatnonzero(~is_holdout).tolist()]
    return SplitPlan(
        normal.images.take(is_fit),
        group_ranks[groups[is_fit]] % NUM_CALIBRATION_FOLDS,
        normal.images.take(~(is_fit | is_holdout)),
        normal.images.take(is_holdout),
        split.fingerprint,
        split.version,
        np.sort(np.array(hashes, dtype=np.int64)),
    )


def choose_num_holdout(config: Config, num_images: int) -> int:
    """Returns how many normal images of a category are held out: they are used for the calibration only.

    The result is 0 if the calibration uses training images instead.

    Args: num_images: number of normal images. If the images have groups, pass the number of groups; the result is then a number
        of groups as well.
    """
    calibration, fraction = config.calibration, config.data.holdout_fraction
    num_holdout = min(max(1, round(fraction * num_images)), MAX_CALIBRATION_IMAGES)
    if calibration.method == "split":
        return num_holdout
    # Method auto holds images out if they are enough for a reliable threshold, or if the network is trained.
    is_reliable = fraction > 0 and num_holdout * calibration.target_fpr >= _MIN_EXPECTED_ALARMS
    is_trained = fraction > 0 and config.train.steps > 0
    return num_holdout if calibration.method == "auto" and (is_reliable or is_trained) else 0
