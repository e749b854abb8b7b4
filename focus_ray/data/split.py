"""Which rows of a category train, validate and calibrate: a rule of a few numbers, applied where rows are read.

Every normal training image has a key: a hash of the seed and its content, or of the seed and its group if it has one. Images
with the lowest keys calibrate, the next ones validate, the others train. So a category's split is two cut-offs, whatever the
number of its images, and all images of a group are in one part.
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

from focus_ray.config import Config
from focus_ray.data.read import index_fingerprint, index_version, read_index
from focus_ray.data.regions import frame_of
from focus_ray.errors import DataError

# held-out images above the threshold, as many as that: its false alarm rate is then between 0.4 and 1.8 times the target (90 %)
_STEADY = 5
_NAMED = 20  # images that an error lists
NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """The rule of one category, small enough to be sent to any number of workers.

    Attributes:
        fingerprint, version: of the whole category's data; the version's rows stay readable beside later ones.
        num_fit, num_validation, num_holdout: images of each part, not groups.
        validation_from, fit_from: keys, hex. Below the first an image calibrates, below the second it validates, and else it
            trains.
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
        """Of all parts."""
        return self.num_fit + self.num_validation + self.num_holdout

    def part_of(self, content_hash: str, group: str = "") -> Literal["fit", "validation", "holdout"]:
        """Returns the part that a normal training image belongs to.

        Args: group: of the image's row; empty if the image is its own group.
        """
        key = key_of(self.seed, content_hash, group)
        return "holdout" if key < self.validation_from else "validation" if key < self.fit_from else "fit"

    def plan(self, config: Config) -> Plan:
        """The rows, from the category's index. Raises: DataError: the version that the rule was made for is gone."""
        table = read_index(config.data.uri, self.category, version=self.version)
        return _rows_of(self, _normal_images(table, self.seed), config.calibration.num_folds)


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows that a rule gives, or a worker's share of them.

    Two rows have equal group numbers if and only if they are in the same named group; a row without a group has a number of its
    own. Numbers count from 0 in the order of first appearance among all normal training rows.

    Attributes:
        fit_rows, validation_rows, holdout_rows: int64, ascending row numbers in the version of the data.
        folds: fold number of each fit row, for cross calibration. All rows of a group have the same fold.
        fingerprint, version: of the whole category's data.
        fit_hashes: `short_hash` of the fit and validation rows, int64, sorted.
        fit_groups, validation_groups, holdout_groups: group number of each row of that list, int64. None numbers the rows of
            the three lists one after the other, so that each row is its own group.
        fit_order, validation_order, holdout_order: rank of each row among all normal training rows in natural order of their
            ids (img_2 before img_10), int64. None takes the place in the lists.
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
        own = np.arange(num_fit + num_validation + num_holdout, dtype=np.int64)
        fit, validation, holdout = np.split(own, [num_fit, num_fit + num_validation])
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
            assert length == len(values), f"{name} has {length} entries for {len(values)} rows: use Plan.take_fit"

    @property
    def num_images(self) -> int:
        """All rows, whatever for."""
        return len(self.fit_rows) + len(self.validation_rows) + len(self.holdout_rows)

    def take_fit(self, places: NDArray[np.int64] | Sequence[int]) -> Plan:
        """Returns the plan with only some of its fit rows.

        Args: places: ascending positions in `fit_rows`.
        """
        chosen = np.asarray(places, dtype=np.int64)
        return replace(
            self,
            fit_rows=self.fit_rows[chosen],
            folds=self.folds[chosen],
            fit_groups=self.fit_groups[chosen],
            fit_order=self.fit_order[chosen],
        )

    def with_validation(self) -> Plan:
        """Returns the plan whose validation rows are fit rows too, in the order of rows, and no validation rows are left."""
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

    def without_holdout(self) -> Plan:
        """Returns the plan without its holdout rows."""
        return replace(self, holdout_rows=NO_ROWS, holdout_groups=NO_ROWS, holdout_order=NO_ROWS)

    def share(self, rank: int, num_workers: int) -> Plan:
        """Returns one worker's contiguous part of each list; every row is in exactly one worker's part.

        The rows of a group may be spread over several workers.
        """

        def part(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return values[len(values) * rank // num_workers : len(values) * (rank + 1) // num_workers]

        return Plan(
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
    """Normal training images of a category, in row order.

    rows: (N,) row numbers.  hashes: content hashes.  groups: (N,) group numbers in the order of first appearance.  ids: (N,)
    group_keys: (G,) key of each group.  sizes: (G,) images of each group.  group_places: (G,) rank of each group by its key.
    """

    rows: NDArray[np.int64]
    hashes: Sequence[str]
    groups: NDArray[np.int64]
    ids: pa.ChunkedArray
    group_keys: Sequence[str]
    sizes: NDArray[np.int64]
    group_places: NDArray[np.int64]


def split_category(config: Config, category: str) -> Split:
    """The rule of a category; a function of the images and the seed alone.

    Raises: DataError: no such category, too few normal training images, or images of which nothing would be inspected.
    """
    return _split(config, category)[0]


def plan_category(config: Config, category: str) -> Plan:
    """The rows by the rule of `split_category`, for who reads them in the same process; the same errors."""
    split, images = _split(config, category)
    return _rows_of(split, images, config.calibration.num_folds)


def key_of(seed: int, content_hash: str, group: str = "") -> str:
    """Returns the SHA-256 hex of seed and group, or of seed and content if there is no group: a random order of groups."""
    text = f"{seed}:group:{group}" if group else f"{seed}:{content_hash}"
    return hashlib.sha256(text.encode()).hexdigest()


def short_hash(content_hash: str) -> int:
    """The first 8 bytes of a content hash, as int64."""
    return int.from_bytes(bytes.fromhex(content_hash[:16]), "big", signed=True)


def _normal_images(table: pa.Table, seed: int) -> _NormalImages:
    """Returns the normal training images of a whole index."""
    index = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.equal(table["label"], 0)))
    hashes, names = index["content_hash"].to_pylist(), index["group"].to_pylist()
    numbers: dict[str, int] = {}
    groups, keys = [], []
    for content_hash, name in zip(hashes, names, strict=True):
        if name not in numbers:
            keys.append(key_of(seed, content_hash, name))
            if name:
                numbers[name] = len(keys) - 1
        groups.append(numbers.get(name, len(keys) - 1))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    places = np.empty(len(keys), dtype=np.int64)
    places[order] = np.arange(len(keys))
    sizes = np.bincount(np.array(groups, dtype=np.int64), minlength=len(keys))
    return _NormalImages(
        index["row"].to_numpy(),
        hashes,
        np.array(groups, dtype=np.int64),
        index["id"],
        keys,
        sizes.astype(np.int64),
        places,
    )


def _natural_ranks(ids: pa.ChunkedArray) -> NDArray[np.int64]:
    """Returns the rank of each id in natural order: numbers compare by value, so img_2 comes before img_10."""

    def with_length(match: re.Match[str]) -> str:
        digits = match.group().lstrip("0")
        return f"{len(digits):03}{digits}"  # of two numbers the one with more digits is larger

    keys = [(re.sub("[0-9]+", with_length, name), name) for name in ids.to_pylist()]
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return ranks


def _split(config: Config, category: str) -> tuple[Split, _NormalImages]:
    table = read_index(config.data.uri, category)
    images = _normal_images(table, config.train.seed)
    _check_sizes(config, category, table)
    count, num_groups = len(images.rows), len(images.group_keys)
    parts = " parts" if num_groups < count else ""
    shown = f"{count} normal training images" + (f" of {num_groups}{parts}" if parts else "")
    if num_groups < 4:
        raise DataError(f"category {category!r} of {config.data.uri} has {shown}; 4{parts} at least")
    in_order = np.argsort(images.group_places)
    sizes = images.sizes[in_order]
    # the counts from here on are of groups: twenty photographs of two parts are worth two
    holdout = min(num_groups - 2, num_held_out(config, num_groups))
    holdout = _at_most(sizes, holdout, config.calibration.max_images, 1)
    validation = 0
    if config.selection.enabled:
        wanted = min(config.selection.max_images, round(config.selection.fraction * num_groups))
        validation = _at_most(sizes[holdout:], max(2, wanted), config.selection.max_images, 2)
        if num_groups - holdout - validation < 2:
            raise DataError(
                f"category {category!r} has {shown}, of which {holdout}{parts} calibrate and {validation}{parts} "
                "validate: too few are left; set selection.enabled=false or add images"
            )
    cuts = [images.group_keys[in_order[place]] for place in (holdout, holdout + validation)]
    # two files of one content have one key, and stand on one side of a cut
    below = [
        sum(int(size) for key, size in zip(images.group_keys, images.sizes, strict=True) if key < cut) for cut in cuts
    ]
    return (
        Split(
            category,
            config.train.seed,
            index_fingerprint(table),
            index_version(table),
            num_fit=count - below[1],
            num_validation=below[1] - below[0],
            num_holdout=below[0],
            validation_from=cuts[0],
            fit_from=cuts[1],
        ),
        images,
    )


def _check_sizes(config: Config, category: str, table: pa.Table) -> None:
    """Raises: DataError: normal training images have sizes of which nothing would be inspected; names them."""
    frame = frame_of(config, category)
    if not frame.marks:
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
        names = ", ".join(name for name, _ in unusable[:_NAMED])
        more = f" and {len(unusable) - _NAMED} more" if len(unusable) > _NAMED else ""
        raise DataError(
            f"{len(unusable)} of {len(sizes)} normal training images of category {category!r} cannot be trained on: "
            f"{names}{more}. {unusable[0][0]}: {reasons[unusable[0][1]]}. Or remove these images from the data"
        )


def _at_most(sizes: NDArray[np.int64], num_groups: int, max_images: int, fewest: int) -> int:
    """Returns how many of the first `num_groups` groups hold at most `max_images` images, but not below `fewest` groups."""
    fitting = int(np.searchsorted(np.cumsum(sizes[:num_groups]), max_images, side="right"))
    return max(fitting, min(fewest, num_groups))


def _rows_of(split: Split, images: _NormalImages, num_folds: int) -> Plan:
    places = images.group_places[images.groups]
    first, kept = (sum(key < cut for key in images.group_keys) for cut in (split.validation_from, split.fit_from))
    fit, holdout = places >= kept, places < first
    validation = ~(fit | holdout)
    natural = _natural_ranks(images.ids)
    hashes = [short_hash(one) for one, held in zip(images.hashes, holdout, strict=True) if not held]
    return Plan(
        fit_rows=images.rows[fit],
        folds=places[fit] % num_folds,
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
    """Returns how many of a category's normal images calibrate and do nothing else.

    Args: num_images: of the category; the number of groups where images have groups, and the result then counts groups too.
    """
    calibration, fraction = config.calibration, config.data.holdout_fraction
    held = min(max(1, round(fraction * num_images)), calibration.max_images)
    if calibration.method == "split":
        return held
    steady = fraction > 0 and held * calibration.target_fpr >= _STEADY
    return held if calibration.method == "auto" and (steady or (fraction > 0 and config.train.epochs > 0)) else 0
