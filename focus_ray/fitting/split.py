"""Splits the normal images of a category into fit, validation and held-out images by a rule of a few numbers.

Every normal training image has a key: a hash of the seed and the image content, or of the seed and the group if the image has
one. The images with the lowest keys are held out for calibration, the next ones validate, and the others are fit images. So the
split of a category consists of two key limits, independent of the number of images, and all images of a group are in one part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from focus_ray.data.read import index_fingerprint, index_version, read_index
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
MAX_VALIDATION_IMAGES = 64  # images that judge alignment and epochs
NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """The rule that splits one category. It is small, so it can be sent to any number of workers.

    Attributes:
        seed: seed of the keys of the images, see `split_key`.
        fingerprint: fingerprint of the images of the category, see `data_fingerprint`.
        version: name of the version of the category for which the rule was made. A replaced version stays readable for a day.
        num_fit, num_validation, num_holdout: number of images (not groups) in each part.
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
        """The number of images in all parts."""
        return self.num_fit + self.num_validation + self.num_holdout

    def part_of(self, content_hash: str, group: str = "") -> Literal["fit", "validation", "holdout"]:
        """Returns the part that a normal training image belongs to.

        Args:
            content_hash: hash of the image content.
            group: group of the image; empty if the image is its own group.
        """
        key = split_key(self.seed, content_hash, group)
        return "holdout" if key < self.validation_from else "validation" if key < self.fit_from else "fit"

    def plan(self, config: Config) -> SplitPlan:
        """Applies the rule to the index of the category. Raises: DataError: the version of the rule does not exist any more."""
        table = read_index(config.data.uri, self.category, version=self.version)
        return _apply_split(self, _normal_images(table, self.seed))


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """The row numbers of the fit, validation and held-out images of a category, or the share of one worker.

    Two rows have equal group numbers if and only if they are in the same named group. A row without a group has a unique number.
    Group numbers start at 0, in the order of first appearance among all normal training rows.

    Attributes:
        fit_rows, validation_rows, holdout_rows: int64, ascending row numbers in the version of the data.
        folds: fold number of each fit row, for cross calibration. All rows of a group have the same fold.
        fingerprint: fingerprint of the images of the whole category.
        version: name of the version of the category; None: the current version.
        fit_hashes: `short_hash` of the fit and validation rows, int64, sorted.
        fit_groups, validation_groups, holdout_groups: group number of each row, int64. The default numbers the rows of the three
            lists one after the other, so that each row is its own group.
        fit_order, validation_order, holdout_order: rank of each row among all normal training rows in natural order of their
            ids (img_2 before img_10), int64. The default is the position in the three lists.
    """

    fit_rows: NDArray[np.int64]
    folds: NDArray[np.int64]
    validation_rows: NDArray[np.int64]
    holdout_rows: NDArray[np.int64]
    fingerprint: str
    version: str | None = None
    fit_hashes: NDArray[np.int64] = field(default_factory=lambda: NO_ROWS)
    fit_groups: NDArray[np.int64] = None  # type: ignore[assignment]  # filled below
    validation_groups: NDArray[np.int64] = None  # type: ignore[assignment]
    holdout_groups: NDArray[np.int64] = None  # type: ignore[assignment]
    fit_order: NDArray[np.int64] = None  # type: ignore[assignment]
    validation_order: NDArray[np.int64] = None  # type: ignore[assignment]
    holdout_order: NDArray[np.int64] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        num_fit, num_validation, num_holdout = len(self.fit_rows), len(self.validation_rows), len(self.holdout_rows)
        positions = np.arange(num_fit + num_validation + num_holdout, dtype=np.int64)
        fit, validation, holdout = np.split(positions, [num_fit, num_fit + num_validation])
        defaults = {
            "fit_groups": fit,
            "validation_groups": validation,
            "holdout_groups": holdout,
            "fit_order": fit,
            "validation_order": validation,
            "holdout_order": holdout,
        }
        for name, values in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values)
            length = len(getattr(self, name))
            assert length == len(values), f"{name} has {length} entries for {len(values)} rows: use SplitPlan.take_fit"

    @property
    def num_images(self) -> int:
        """The number of rows in the three lists."""
        return len(self.fit_rows) + len(self.validation_rows) + len(self.holdout_rows)

    def take_fit(self, positions: NDArray[np.int64] | Sequence[int]) -> SplitPlan:
        """Returns the plan with only some of its fit rows.

        Args: positions: ascending positions in `fit_rows`.
        """
        chosen = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            fit_rows=self.fit_rows[chosen],
            folds=self.folds[chosen],
            fit_groups=self.fit_groups[chosen],
            fit_order=self.fit_order[chosen],
        )

    def with_validation(self) -> SplitPlan:
        """Returns a plan whose fit rows include the validation rows, in row order. The new plan has no validation rows."""
        rows = np.concatenate([self.fit_rows, self.validation_rows])
        in_order = np.argsort(rows, kind="stable")
        num_folds = int(self.folds.max(initial=0)) + 1
        folds = np.concatenate([self.folds, self.validation_groups % num_folds])
        return replace(
            self,
            fit_rows=rows[in_order],
            folds=folds[in_order],
            fit_groups=np.concatenate([self.fit_groups, self.validation_groups])[in_order],
            fit_order=np.concatenate([self.fit_order, self.validation_order])[in_order],
            validation_rows=NO_ROWS,
            validation_groups=NO_ROWS,
            validation_order=NO_ROWS,
        )

    def without_holdout(self) -> SplitPlan:
        """Returns the plan without its holdout rows."""
        return replace(self, holdout_rows=NO_ROWS, holdout_groups=NO_ROWS, holdout_order=NO_ROWS)

    def share(self, rank: int, num_workers: int) -> SplitPlan:
        """Returns the share of one worker: a contiguous part of each list. Every row is in the share of exactly one worker.

        The rows of a group may be spread over several workers.

        Args: rank: number of the worker, from 0.
        """

        def part(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return values[len(values) * rank // num_workers : len(values) * (rank + 1) // num_workers]

        return SplitPlan(
            part(self.fit_rows),
            part(self.folds),
            part(self.validation_rows),
            part(self.holdout_rows),
            self.fingerprint,
            self.version,
            fit_groups=part(self.fit_groups),
            validation_groups=part(self.validation_groups),
            holdout_groups=part(self.holdout_groups),
            fit_order=part(self.fit_order),
            validation_order=part(self.validation_order),
            holdout_order=part(self.holdout_order),
        )


@dataclass(frozen=True)
class _NormalImages:
    """The N normal training images of a category in row order, in G groups.

    Attributes:
        rows: (N,) row numbers.
        hashes: (N,) content hashes.
        groups: (N,) group numbers, from 0 in the order of first appearance.
        ids: (N,) row ids.
        group_keys: (G,) split key of each group.
        group_sizes: (G,) number of images in each group.
        group_ranks: (G,) rank of each group in the order of the keys.
    """

    rows: NDArray[np.int64]
    hashes: Sequence[str]
    groups: NDArray[np.int64]
    ids: pa.ChunkedArray
    group_keys: Sequence[str]
    group_sizes: NDArray[np.int64]
    group_ranks: NDArray[np.int64]


def split_category(config: Config, category: str) -> Split:
    """Returns the split rule of a category. It depends only on the images, the seed and the settings.

    Raises: DataError: the category does not exist, it has too few normal training images, or some images have a size at which
        no pixel would be inspected.
    """
    return _compute_split(config, category)[0]


def plan_category(config: Config, category: str) -> SplitPlan:
    """Returns the rows of each part of a category, by the rule of `split_category`.

    Raises: DataError: see `split_category`.
    """
    split, images = _compute_split(config, category)
    return _apply_split(split, images)


def split_key(seed: int, content_hash: str, group: str = "") -> str:
    """Returns the SHA-256 hex of seed and group, or of seed and content if there is no group.

    Sorting by this key puts the groups into a random order that depends only on the seed.
    """
    text = f"{seed}:group:{group}" if group else f"{seed}:{content_hash}"
    return hashlib.sha256(text.encode()).hexdigest()


def short_hash(content_hash: str) -> int:
    """Returns the first 8 bytes of a hex content hash as a signed 64-bit integer."""
    return int.from_bytes(bytes.fromhex(content_hash[:16]), "big", signed=True)


def _normal_images(table: pa.Table, seed: int) -> _NormalImages:
    """Returns the normal training images of an index. table: the index of both splits."""
    index = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.equal(table["label"], 0)))
    hashes, names = index["content_hash"].to_pylist(), index["group"].to_pylist()
    numbers: dict[str, int] = {}
    groups, keys = [], []
    for content_hash, name in zip(hashes, names, strict=True):
        if name not in numbers:
            keys.append(split_key(seed, content_hash, name))
            if name:
                numbers[name] = len(keys) - 1
        groups.append(numbers.get(name, len(keys) - 1))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys))
    sizes = np.bincount(np.array(groups, dtype=np.int64), minlength=len(keys))
    return _NormalImages(
        index["row"].to_numpy(),
        hashes,
        np.array(groups, dtype=np.int64),
        index["id"],
        keys,
        sizes.astype(np.int64),
        ranks,
    )


def _natural_ranks(ids: pa.ChunkedArray) -> NDArray[np.int64]:
    """Returns the rank of each id in natural order: numbers compare by value, so img_2 comes before img_10."""

    def with_length(match: re.Match[str]) -> str:
        digits = match.group().lstrip("0")
        return f"{len(digits):03}{digits}"  # the number with more digits is larger, so the length comes first

    keys = [(re.sub("[0-9]+", with_length, name), name) for name in ids.to_pylist()]
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return ranks


def _compute_split(config: Config, category: str) -> tuple[Split, _NormalImages]:
    """Returns the rule of `split_category`, and the normal training images of the category."""
    table = read_index(config.data.uri, category)
    images = _normal_images(table, config.train.seed)
    _check_sizes(config, category, table)
    count, num_groups = len(images.rows), len(images.group_keys)
    parts = " parts" if num_groups < count else ""
    count_text = f"{count} normal training images" + (f" of {num_groups}{parts}" if parts else "")
    if num_groups < 4:
        raise DataError(f"category {category!r} of {config.data.uri} has {count_text}; at least 4{parts} are needed")
    in_order = np.argsort(images.group_ranks)
    sizes = images.group_sizes[in_order]
    # From here on the counts are groups: twenty photographs of two parts count as two.
    num_holdout = min(num_groups - 2, num_held_out(config, num_groups))
    num_holdout = _limit_groups(sizes, num_holdout, MAX_CALIBRATION_IMAGES, 1)
    num_validation = 0
    if config.selection.enabled:
        num_requested = min(MAX_VALIDATION_IMAGES, round(config.selection.fraction * num_groups))
        num_validation = _limit_groups(sizes[num_holdout:], max(2, num_requested), MAX_VALIDATION_IMAGES, 2)
        if num_groups - num_holdout - num_validation < 2:
            raise DataError(
                f"category {category!r} has {count_text}: {num_holdout}{parts} calibrate and {num_validation}{parts} validate, "
                "so fewer than 2 remain for training; set selection.enabled=false or add images"
            )
    limits = [images.group_keys[in_order[rank]] for rank in (num_holdout, num_holdout + num_validation)]
    # Count the images below each key limit. Two files with the same content have the same key, so they are in the same part.
    num_below = [
        sum(int(size) for key, size in zip(images.group_keys, images.group_sizes, strict=True) if key < limit)
        for limit in limits
    ]
    return (
        Split(
            category,
            config.train.seed,
            index_fingerprint(table),
            index_version(table),
            num_fit=count - num_below[1],
            num_validation=num_below[1] - num_below[0],
            num_holdout=num_below[0],
            validation_from=limits[0],
            fit_from=limits[1],
        ),
        images,
    )


def _check_sizes(config: Config, category: str, table: pa.Table) -> None:
    """Checks that at least one pixel of each normal training image would be inspected.

    Raises: DataError: some images have a size at which no pixel would be inspected. The message names these images.
    """
    frame = load_frame(config, category)
    if not frame.has_scored_channel:
        return
    index = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.equal(table["label"], 0)))
    sizes = list(zip(index["width"].to_pylist(), index["height"].to_pylist(), strict=True))
    reasons = {}
    for size in sorted(set(sizes)):
        try:
            frame.check_size(*size)
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


def _limit_groups(sizes: NDArray[np.int64], num_groups: int, max_images: int, min_groups: int) -> int:
    """Reduces a number of groups until these groups contain at most `max_images` images, but not below `min_groups`.

    Args: sizes: (G,) number of images of each group, in the order in which the groups are taken.
    """
    fitting = int(np.searchsorted(np.cumsum(sizes[:num_groups]), max_images, side="right"))
    return max(fitting, min(min_groups, num_groups))


def _apply_split(split: Split, images: _NormalImages) -> SplitPlan:
    """Applies a rule to normal training images, and returns the rows, folds, groups and ranks of each part."""
    ranks = images.group_ranks[images.groups]  # (N,) rank of each image's group in the order of the keys
    first_validation, first_fit = (
        sum(key < limit for key in images.group_keys) for limit in (split.validation_from, split.fit_from)
    )
    fit, holdout = ranks >= first_fit, ranks < first_validation
    validation = ~(fit | holdout)
    natural = _natural_ranks(images.ids)
    hashes = [
        short_hash(content_hash)
        for content_hash, is_held_out in zip(images.hashes, holdout, strict=True)
        if not is_held_out
    ]
    return SplitPlan(
        fit_rows=images.rows[fit],
        folds=ranks[fit] % NUM_CALIBRATION_FOLDS,
        validation_rows=images.rows[validation],
        holdout_rows=images.rows[holdout],
        fingerprint=split.fingerprint,
        version=split.version,
        fit_hashes=np.sort(np.array(hashes, dtype=np.int64)),
        fit_groups=images.groups[fit],
        validation_groups=images.groups[validation],
        holdout_groups=images.groups[holdout],
        fit_order=natural[fit],
        validation_order=natural[validation],
        holdout_order=natural[holdout],
    )


def num_held_out(config: Config, num_images: int) -> int:
    """Returns how many normal images of a category are held out, i.e. calibrate and do nothing else.

    Args: num_images: number of normal images. If the images have groups, pass the number of groups; the result is then a number
        of groups as well.
    """
    calibration, fraction = config.calibration, config.data.holdout_fraction
    num_holdout = min(max(1, round(fraction * num_images)), MAX_CALIBRATION_IMAGES)
    if calibration.method == "split":
        return num_holdout
    # Method auto holds images out if they are enough for a reliable threshold, or if the network is trained.
    is_reliable = fraction > 0 and num_holdout * calibration.target_fpr >= _MIN_EXPECTED_ALARMS
    is_trained = fraction > 0 and config.train.epochs > 0
    return num_holdout if calibration.method == "auto" and (is_reliable or is_trained) else 0
