"""Which rows of a category train, validate and calibrate, and which of them are a worker's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from focus_ray.config import Config
from focus_ray.data.read import index_fingerprint, read_index
from focus_ray.errors import DataError

# held-out images above the threshold, as many as that: its false alarm rate is then between 0.4 and 1.8 times the target (90 %)
_STEADY = 5


@dataclass(frozen=True)
class Plan:
    """Which rows of a category train and which are held out, or a worker's share of them.

    fit_rows, validation_rows, holdout_rows: ascending row numbers.  folds: of the fit rows, for cross calibration.
    fingerprint: of the whole category's data.  fit_hashes: content hashes of the fit and validation rows.
    """

    fit_rows: tuple[int, ...]
    folds: tuple[int, ...]
    validation_rows: tuple[int, ...]
    holdout_rows: tuple[int, ...]
    fingerprint: str
    fit_hashes: tuple[str, ...] = ()

    @property
    def num_images(self) -> int:
        """All rows, whatever for."""
        return len(self.fit_rows) + len(self.validation_rows) + len(self.holdout_rows)

    def share(self, rank: int, num_workers: int) -> Plan:
        """One worker's contiguous part of each list; every row is in exactly one worker's."""

        def part(values: tuple[int, ...]) -> tuple[int, ...]:
            return values[len(values) * rank // num_workers : len(values) * (rank + 1) // num_workers]

        return Plan(
            part(self.fit_rows),
            part(self.folds),
            part(self.validation_rows),
            part(self.holdout_rows),
            self.fingerprint,
        )


def plan_category(config: Config, category: str) -> Plan:
    """The plan of a category; a function of the images and the seed alone.

    Raises: DataError: no such category, or too few normal training images.
    """
    whole = read_index(config.data.uri, category)
    index = whole.filter(pc.equal(whole["split"], "train"))
    labels = index["label"].to_numpy()
    rows = index["row"].to_numpy()[labels == 0]
    hashes = [h for h, label in zip(index["content_hash"].to_pylist(), labels, strict=True) if label == 0]
    if len(rows) < 4:
        raise DataError(
            f"category {category!r} of {config.data.uri} has {len(rows)} normal training images; 4 at least"
        )
    ranked = sorted(
        range(len(rows)), key=lambda i: hashlib.sha256(f"{config.train.seed}:{hashes[i]}".encode()).digest()
    )
    num_holdout = min(len(rows) - 2, num_held_out(config, len(rows)))
    num_validation = 0
    if config.selection.enabled:
        wanted = min(config.selection.max_images, round(config.selection.fraction * len(rows)))
        num_validation = max(2, wanted)
        if len(rows) - num_holdout - num_validation < 2:
            raise DataError(
                f"category {category!r} has {len(rows)} normal training images, of which {num_holdout} calibrate and "
                f"{num_validation} validate: too few are left; set selection.enabled=false or add images"
            )
    place = np.empty(len(rows), dtype=np.int64)
    place[ranked] = np.arange(len(rows))
    kept = place >= num_holdout + num_validation
    validation = (place >= num_holdout) & ~kept
    return Plan(
        fit_rows=tuple(rows[kept].tolist()),
        folds=tuple((place[kept] % config.calibration.num_folds).tolist()),
        validation_rows=tuple(rows[validation].tolist()),
        holdout_rows=tuple(rows[place < num_holdout].tolist()),
        fingerprint=index_fingerprint(whole),
        fit_hashes=tuple(sorted(one for one, number in zip(hashes, place, strict=True) if number >= num_holdout)),
    )


def num_held_out(config: Config, num_images: int) -> int:
    """How many of a category's normal images calibrate and do nothing else."""
    calibration, fraction = config.calibration, config.data.holdout_fraction
    held = max(1, round(fraction * num_images))
    if calibration.method == "split":
        return held
    steady = fraction > 0 and held * calibration.target_fpr >= _STEADY
    return held if calibration.method == "auto" and (steady or (fraction > 0 and config.train.epochs > 0)) else 0
