"""All metrics of one category, over its labelled test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from focus_ray.errors import DataError
from focus_ray.evaluation.metrics import Measured, Metric, NotKept
from focus_ray.evaluation.pixels import PixelBins
from focus_ray.kinds import METRICS

MAX_SIDE_PX = 512  # maps and masks are compared at the mask's own size up to this
EXACT_PIXELS = 128_000_000  # of a category's maps, up to which they are kept: 5 bytes each, 15 while metrics are taken
_MERGE_AT = 32  # images' bins, added at once: that takes as long as adding one


class Labelled(NamedTuple):
    """Labelled images of one category that the model was not trained on, scored, in the order of their records.

    types: N defect types.  ids: N; '' where a record has none.  reduced: whether maps are smaller than their images.
    num_trained_on: images left out because the model was trained on them: their scores say nothing of new parts.
    num_repeats: images that are almost equal to a training image, but not among them: photographs of the same part.
    """

    measured: Measured
    types: tuple[str, ...]
    ids: Sequence[str]
    reduced: bool
    num_trained_on: int = 0
    num_repeats: int = 0

    @property
    def good_scores(self) -> NDArray[np.float64]:
        """Scores of good images."""
        return self.measured.scores[self.measured.labels == 0]


@dataclass(frozen=True)
class Part:
    """Some of a category's labelled images, scored, with their pixels in bins: parts of one category join to `Labelled`.

    labels: (N,) int8.  scores: (N,).  types: N.  reduced, num_repeats: as of `Labelled`.
    trained_on: (N,) bool, whether the model was trained on the image.
    bins: by defect type, "" for good images; without the images that the model was trained on.
    """

    labels: NDArray[np.int8]
    scores: NDArray[np.float64]
    types: tuple[str, ...]
    bins: Mapping[str, PixelBins]
    reduced: bool
    trained_on: NDArray[np.bool_]
    num_repeats: int = 0


class Gathered:
    """Labelled images as they are scored: their maps and masks while these fit, in bins from there on."""

    def __init__(self, exact_pixels: int) -> None:
        """exact_pixels: of all maps together, that may be kept."""
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.types: list[str] = []
        self.trained_on: list[bool] = []
        self.reduced = False
        self.num_repeats = 0
        self._room = exact_pixels
        self._kept: list[tuple[NDArray[np.float32], NDArray[np.bool_] | None, NDArray[np.bool_] | None]] = []
        self._bins: dict[str, PixelBins] | None = None
        self._to_add: list[tuple[str, PixelBins]] = []

    @property
    def binned(self) -> bool:
        return self._bins is not None

    def add(
        self,
        label: int,
        kind: str,
        score: float,
        anomaly_map: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        inside: NDArray[np.bool_] | None,
        trained_on: bool = False,
    ) -> None:
        """One image. kind: its defect type.  mask: None where it is not known.  Arguments as of `Measured` and `Labelled`.

        Raises: DataError: sizes differ, or the map is not finite, where it is put into bins.
        """
        self.labels.append(int(label))
        self.scores.append(float(score))
        self.types.append(kind)
        self.trained_on.append(trained_on)
        self._room -= anomaly_map.size
        if self._room >= 0:
            self._kept.append((anomaly_map, mask, inside))
            return
        if self._bins is None:
            self._bins = {}
            for number, kept in enumerate(self._kept):
                self._put(number, *kept)
            self._kept.clear()
        self._put(len(self.labels) - 1, anomaly_map, mask, inside)

    def _put(
        self,
        number: int,
        anomaly_map: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
        inside: NDArray[np.bool_] | None,
    ) -> None:
        if mask is None or self.trained_on[number]:
            return
        group = self.types[number] if self.labels[number] else ""
        self._to_add.append((group, PixelBins.of_image(mask, anomaly_map, inside, f"image {number}")))
        if len(self._to_add) >= _MERGE_AT:
            self._merge()

    def _merge(self) -> dict[str, PixelBins]:
        assert self._bins is not None
        for group in {group for group, _ in self._to_add}:
            new = [bins for one, bins in self._to_add if one == group]
            self._bins[group] = PixelBins.total([*([self._bins[group]] if group in self._bins else []), *new])
        self._to_add.clear()
        return self._bins

    def part(self) -> Part:
        """Of images that are all in bins."""
        bins = self._merge() if self.binned else {}
        labels, scores = np.asarray(self.labels, dtype=np.int8), np.asarray(self.scores, dtype=np.float64)
        trained_on = np.asarray(self.trained_on, dtype=bool)
        return Part(labels, scores, tuple(self.types), bins, self.reduced, trained_on, self.num_repeats)

    def labelled(self, threshold: float, ids: Sequence[str]) -> Labelled:
        """All images that the model was not trained on.

        Args: threshold: of the image score.  ids: of all images.

        Raises: DataError: there is no such image.
        """
        new = _places_of_new(np.asarray(self.trained_on, dtype=bool))
        if self.binned:
            return joined([self.part()], threshold, ids)
        labels, scores = np.asarray(self.labels, dtype=np.int64), np.asarray(self.scores, dtype=np.float64)
        maps, masks, inside = (list(column) for column in zip(*self._kept, strict=True))
        measured = Measured(labels, scores, masks, maps, threshold, inside)
        num_left_out = len(labels) - len(new)
        if num_left_out:
            measured = measured.only(~np.asarray(self.trained_on, dtype=bool), [])
        types = tuple(self.types[place] for place in new)
        return Labelled(
            measured, types, _chosen_ids(ids, new, num_left_out), self.reduced, num_left_out, self.num_repeats
        )


def joined(parts: Sequence[Part], threshold: float, ids: Sequence[str]) -> Labelled:
    """Parts of one category, in order, as one set, without the images that the model was trained on.

    Args: ids: of all their images.

    Raises: DataError: there is no image that the model was not trained on.
    """
    trained_on = np.concatenate([part.trained_on for part in parts]) if parts else np.zeros(0, dtype=bool)
    new = _places_of_new(trained_on)
    groups = {group for part in parts for group in part.bins}
    measured = Measured(
        labels=np.concatenate([part.labels for part in parts]).astype(np.int64)[new],
        scores=np.concatenate([part.scores for part in parts])[new],
        masks=NotKept(),
        maps=NotKept(),
        threshold=threshold,
        bins={group: PixelBins.total([p.bins[group] for p in parts if group in p.bins]) for group in sorted(groups)},
    )
    all_types = [kind for part in parts for kind in part.types]
    types = tuple(all_types[place] for place in new)
    num_repeats = sum(part.num_repeats for part in parts)
    is_reduced = any(part.reduced for part in parts)
    num_left_out = len(trained_on) - len(new)
    return Labelled(measured, types, _chosen_ids(ids, new, num_left_out), is_reduced, num_left_out, num_repeats)


class _ChosenIds(Sequence[str]):
    """Some of the ids, which are read when one is first asked for."""

    def __init__(self, ids: Sequence[str], places: NDArray[np.int64]) -> None:
        self._ids, self._places = ids, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self._ids[chosen] for chosen in self._places[place].tolist()]
        return self._ids[int(self._places[place])]


def _chosen_ids(ids: Sequence[str], places: NDArray[np.int64], num_left_out: int) -> Sequence[str]:
    return _ChosenIds(ids, places) if num_left_out else ids


def _places_of_new(trained_on: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Places of the images that the model was not trained on. Raises: DataError: there is none."""
    if not len(trained_on):
        raise DataError("there is no test image to evaluate: ingest a set that has some")
    if trained_on.all():
        raise DataError(
            f"all {len(trained_on)} test images are among those that the model was trained on, and score near zero: evaluate "
            "with images that it has not seen"
        )
    return np.flatnonzero(~trained_on)


def describe_training_images(num_trained_on: int, num_images: int) -> str | None:
    """A sentence for people if images were left out of an evaluation because the model was trained on them, else None.

    Args: num_images: of all, those left out included.
    """
    if not num_trained_on:
        return None
    return (
        f"{num_trained_on} of {num_images} test images are among those that the model was trained on. They are left out of all "
        "figures, because their scores say nothing of new parts."
    )


def summarise(
    labels: Sequence[int],
    types: Sequence[str],
    scores: Sequence[float],
    maps: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_] | None],
    threshold: float,
    target_fpr: float,
) -> dict[str, Any]:
    """`figures` of arrays.

    masks: None where an anomalous image has none; such an image counts in image metrics alone.
    """
    measured = Measured(
        np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64), masks, maps, float(threshold)
    )
    return figures(measured, types, target_fpr)


def figures(measured: Measured, types: Sequence[str], target_fpr: float) -> dict[str, Any]:
    """All metrics of one category; a metric that the set cannot give (one class only, no mask) is None.

    So is one that fails on what the set holds, masks that cover whole images for instance: 'reasons' then says why, by the
    metric's name, after its defect's where it is of one defect. Where pixels were counted in bins, 'binned' is True and
    'bounds' holds, by metric, by how much its exact value may differ.
    """
    reasons: dict[str, str] = {}
    labels = measured.labels
    result: dict[str, Any] = {
        "num_normal": int((labels == 0).sum()),
        "num_anomalous": int((labels == 1).sum()),
        "num_masks": measured.num_masks,
        "threshold": measured.threshold,
        "target_fpr": float(target_fpr),
        "binned": measured.bins is not None,
        **{key: _value(METRICS[key], measured, reasons, key) for key in METRICS},
        "bounds": _bounds(measured, list(METRICS)),
    }
    kinds = np.array([kind if label else "" for kind, label in zip(types, labels.tolist(), strict=True)], dtype=object)
    result["defect_types"] = {
        str(kind): _of_one_type(measured, kinds == kind, str(kind), reasons) for kind in sorted(set(kinds[labels == 1]))
    }
    return {**result, "reasons": reasons}


def _value(metric: Metric, measured: Measured, reasons: dict[str, str], where: str) -> float | None:
    try:
        return metric.value(measured)
    except DataError as error:
        reasons[where] = str(error)
        return None


def _bounds(measured: Measured, keys: Sequence[str]) -> dict[str, float]:
    """Of the metrics that are of binned pixels; a metric that cannot be had has none."""
    found: dict[str, float] = {}
    for key in keys:
        bound = METRICS[key].bound
        value = None if bound is None or measured.bins is None else _value(Metric(key, bound), measured, {}, key)
        if value is not None:
            found[key] = value
    return found


def _of_one_type(measured: Measured, chosen: NDArray[np.bool_], kind: str, reasons: dict[str, str]) -> dict[str, Any]:
    parts = {
        "alone": measured.only(chosen, [kind]),
        "with_normals": measured.only(chosen | (measured.labels == 0), [kind, ""]),
    }
    told = {key: METRICS[key] for key in METRICS if METRICS[key].per_defect}
    alone = [key for key, metric in told.items() if metric.per_defect == "alone"]
    return {
        "num_images": int(chosen.sum()),
        **{key: _value(metric, parts[metric.per_defect], reasons, f"{kind}: {key}") for key, metric in told.items()},
        "bounds": _bounds(parts["alone"], alone),
    }


def evaluation_size(height: int, width: int, max_side_px: int) -> tuple[int, int]:
    """The size at which a map and a mask are compared: the image's own, scaled down to `max_side_px` a side at most."""
    scale = min(1.0, max_side_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
