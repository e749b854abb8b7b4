"""Which rows of a category train, validate and calibrate: a rule of a few numbers, applied where rows are read.

Every normal training image has a key, a hash of the seed and its content. Those of the lowest keys calibrate, the next ones
validate, the others train; so a category's split is two cut-offs, whatever the number of its images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
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

    fit_rows, validation_rows, holdout_rows: int64, ascending row numbers in the version of the data.
    folds: of the fit rows, for cross calibration.  fingerprint, version: of the whole category's data.
    fit_hashes: of the fit and validation rows, `short_hash`, int64, sorted.
    """

    fit_rows: NDArray[np.int64]
    folds: NDArray[np.int64]
    validation_rows: NDArray[np.int64]
    holdout_rows: NDArray[np.int64]
    fingerprint: str
    version: str | None = None
    fit_hashes: NDArray[np.int64] = field(default_factory=lambda: NO_ROWS)

    @property
    def num_images(self) -> int:
        """All rows, whatever for."""
        return len(self.fit_rows) + len(self.validation_rows) + len(self.holdout_rows)

    def share(self, rank: int, num_workers: int) -> Plan:
        """One worker's contiguous part of each list; every row is in exactly one worker's."""

        def part(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return values[len(values) * rank // num_workers : len(values) * (rank + 1) // num_workers]

        return Plan(
            part(self.fit_rows),
            part(self.folds),
            part(self.validation_rows),
            part(self.holdout_rows),
            self.fingerprint,
            self.version,
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
