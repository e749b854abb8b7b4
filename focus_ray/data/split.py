"""Which rows of a category train, validate and calibrate: a rule of a few numbers, applied where rows are read.

Every normal training image has a key, a hash of the seed and its content. Those of the lowest keys calibrate, the next ones
validate, the others train; so a category's split is two cut-offs, whatever the number of its images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from focus_ray.config import Config
from focus_ray.data.read import index_fingerprint, index_version, read_index
from focus_ray.errors import DataError

# held-out images above the threshold, as many as that: its false alarm rate is then between 0.4 and 1.8 times the target (90 %)
_STEADY = 5
NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """The rule of one category, small enough to be sent to any number of workers.

    Attributes:
        fingerprint, version: of the whole category's data; the version's rows stay readable beside later ones.
        num_fit, num_validation, num_holdout: images of each part.
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

    def part_of(self, content_hash: str) -> Literal["fit", "validation", "holdout"]:
        """What a normal training image is for."""
        key = key_of(self.seed, content_hash)
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
        fit_order, holdout_order: rank of each row among all normal training rows in natural order of their ids (img_2 before
            img_10), int64. None takes the place in the lists.
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
            holdout_order=part(self.holdout_order),
        )


@dataclass(frozen=True)
class _NormalImages:
    """Normal training images: row numbers, content hashes and keys, in row order, and places in the order of keys."""

    rows: NDArray[np.int64]
    hashes: Sequence[str]
    keys: Sequence[str]
    order: NDArray[np.int64]


def split_category(config: Config, category: str) -> Split:
    """The rule of a category; a function of the images and the seed alone.

    Raises: DataError: no such category, or too few normal training images.
    """
    return _split(config, category)[0]


def plan_category(config: Config, category: str) -> Plan:
    """The rows by the rule of `split_category`, for who reads them in the same process; the same errors."""
    split, images = _split(config, category)
    return _rows_of(split, images, config.calibration.num_folds)


def key_of(seed: int, content_hash: str) -> str:
    """SHA-256 hex of seed and content: what orders the images of a category, as if drawn at random."""
    return hashlib.sha256(f"{seed}:{content_hash}".encode()).hexdigest()


def short_hash(content_hash: str) -> int:
    """The first 8 bytes of a content hash, as int64."""
    return int.from_bytes(bytes.fromhex(content_hash[:16]), "big", signed=True)


def _normal_images(table: pa.Table, seed: int) -> _NormalImages:
    """Of a whole index."""
    index = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.equal(table["label"], 0)))
    hashes = index["content_hash"].to_pylist()
    keys = [key_of(seed, one) for one in hashes]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return _NormalImages(index["row"].to_numpy(), hashes, keys, order)


def _split(config: Config, category: str) -> tuple[Split, _NormalImages]:
    table = read_index(config.data.uri, category)
    images = _normal_images(table, config.train.seed)
    count = len(images.rows)
    if count < 4:
        raise DataError(f"category {category!r} of {config.data.uri} has {count} normal training images; 4 at least")
    num_holdout = min(count - 2, num_held_out(config, count))
    num_validation = 0
    if config.selection.enabled:
        wanted = min(config.selection.max_images, round(config.selection.fraction * count))
        num_validation = max(2, wanted)
        if count - num_holdout - num_validation < 2:
            raise DataError(
                f"category {category!r} has {count} normal training images, of which {num_holdout} calibrate and "
                f"{num_validation} validate: too few are left; set selection.enabled=false or add images"
            )
    cuts = [images.keys[images.order[place]] for place in (num_holdout, num_holdout + num_validation)]
    # two files of one content have one key, and stand on one side of a cut
    below = [sum(key < cut for key in images.keys) for cut in cuts]
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


def _rows_of(split: Split, images: _NormalImages, num_folds: int) -> Plan:
    place = np.empty(len(images.rows), dtype=np.int64)
    place[images.order] = np.arange(len(images.rows))
    first, kept = split.num_holdout, split.num_holdout + split.num_validation
    hashes = [short_hash(one) for one, number in zip(images.hashes, place, strict=True) if number >= first]
    return Plan(
        fit_rows=images.rows[place >= kept],
        folds=place[place >= kept] % num_folds,
        validation_rows=images.rows[(place >= first) & (place < kept)],
        holdout_rows=images.rows[place < first],
        fingerprint=split.fingerprint,
        version=split.version,
        fit_hashes=np.sort(np.array(hashes, dtype=np.int64)),
    )


def num_held_out(config: Config, num_images: int) -> int:
    """How many of a category's normal images calibrate and do nothing else."""
    calibration, fraction = config.calibration, config.data.holdout_fraction
    held = min(max(1, round(fraction * num_images)), calibration.max_images)
    if calibration.method == "split":
        return held
    steady = fraction > 0 and held * calibration.target_fpr >= _STEADY
    return held if calibration.method == "auto" and (steady or (fraction > 0 and config.train.epochs > 0)) else 0
