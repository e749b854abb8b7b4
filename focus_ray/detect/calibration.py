"""Module that computes thresholds and p-values from the scores of normal images.

The density (the model of normal embeddings) has not seen these normal images, or leaves each image out while the image is
scored. Test images are never used. docs/learn/verdicts.md explains which guarantees hold with which number of images.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from scipy.special import betainc

from focus_ray.detect.tail import ScoreTail, fit_tail
from focus_ray.errors import DataError
from focus_ray.metrics.ties import exceeds_threshold, subtract_rounding_error

Method = Literal["split", "cross", "leave_one_out"]

# Relative. bfloat16 instead of float32 changed image scores of real images by at most 0.6 %, and maxima of maps by 1.4 %.
PRECISION_SHIFT = 0.015

# With fewer scores above the threshold, the model of the tail sets the threshold, because it varies less. For the method
# "split" it does so only where counting cannot reach the target, because it would lose the guarantee.
_MIN_SCORES_ABOVE = 5
_INTERVAL_MASS = 0.9  # probability of the interval of the false alarm rate
_ROUNDING = 1e-12  # relative rounding error of a sum of pixel shares such as 1/50176, when it is compared with a budget


@dataclass(frozen=True)
class Calibration:
    """Scores of n normal images and the thresholds computed from them. An image or pixel above its threshold is anomalous.

    Attributes:
        method: how the images were scored. "split": images that were held out of training and density. "leave_one_out":
            each training image with its own embedding left out of the density. "cross": each training image with a density
            of the images of the other cross-validation folds.
        image_scores: n scores of normal images, ascending.
        target_fpr: share of good images that may be called bad.
        image_threshold: threshold of the image scores.
        image_guaranteed: whether P(a good image is called bad) <= target_fpr holds for exchangeable images. This needs
            "split" with n >= 1/target_fpr - 1 independent images, or as many groups, all of the same size.
        target_pixel_fpr: share of the pixels of a good image that may be called bad, on average over images.
        pixel_threshold: threshold of the anomaly maps.
        pixel_guaranteed: whether this share is <= target_pixel_fpr in expectation over held-out and future images. This needs
            "split" with n >= 1/target_pixel_fpr - 1 independent images. With fewer images the threshold is the plain
            quantile, and `pixel_fpr_bound` holds for "split".
        tail: model of the highest scores, which gives threshold and small p-values. It is used if n < 1/target_fpr - 1, because
            then scores cannot show the target rate. Except for "split", it is also used if counting would leave fewer than 5
            scores at or above the threshold. None: scores are counted. With three images or fewer, the tail is None and the
            highest score is the threshold, with the rate `min_measurable_fpr` if this is above target_fpr.
        by_hand: whether a person set a threshold. After a new image threshold, target_fpr is estimated from the good images.
        num_groups: number of independent groups among the n images; a group has the photographs of one physical part, or
            neighbours of a slowly changing sequence. None: every image is independent. All statements about uncertainty count
            groups, because several photographs of a part say little more than a single photograph.
        precision: number format of the computation of the scores (`precision.describe_precision`); None: unknown, or a person
            set a threshold.
        converted_from: the original precision, if `convert_to_precision` converted the thresholds; otherwise None.

    Raises: DataError: method, a target, `num_groups`, a score or a threshold is not valid, or the scores are not ascending.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # of `from_dict`

    method: Method
    image_scores: tuple[float, ...]
    target_fpr: float
    image_threshold: float
    image_guaranteed: bool
    target_pixel_fpr: float
    pixel_threshold: float
    pixel_guaranteed: bool
    tail: ScoreTail | None = None
    by_hand: bool = False
    num_groups: int | None = None
    precision: str | None = None
    converted_from: str | None = None

    def __post_init__(self) -> None:
        _check_method_and_shares(self.method, target_fpr=self.target_fpr, target_pixel_fpr=self.target_pixel_fpr)
        if not self.image_scores:
            raise DataError("image_scores is empty; calibration needs at least one held-out normal image")
        if self.num_groups is not None and not 1 <= self.num_groups <= self.num_images:
            raise DataError(f"num_groups={self.num_groups}; expected 1 to {self.num_images}, the number of images")
        numbers = np.array([*self.image_scores, self.image_threshold, self.pixel_threshold], dtype=np.float64)
        if not np.isfinite(numbers).all():
            raise DataError("a calibration score or threshold is NaN or infinite; expected finite numbers")
        if np.any(np.diff(numbers[:-2]) < 0):
            raise DataError("image_scores are not in ascending order; they were changed since the calibration was made")

    @property
    def num_images(self) -> int:
        """n, the number of scored normal images."""
        return len(self.image_scores)

    @property
    def num_independent_samples(self) -> int:
        """Number of independent observations: of groups, or of images if there are no groups."""
        return self.num_images if self.num_groups is None else self.num_groups

    @cached_property
    def _score_array(self) -> NDArray[np.float64]:
        """`image_scores` as an array, cached for the p-values."""
        return np.asarray(self.image_scores)

    @property
    def min_measurable_fpr(self) -> float:
        """1/(n + 1), the smallest false positive rate that n independent images can show."""
        return 1.0 / (self.num_independent_samples + 1)

    @property
    def effective_fpr(self) -> float:
        """False positive rate of the image threshold: target_fpr with a tail, else max(target_fpr, min_measurable_fpr)."""
        return self.target_fpr if self.tail is not None else max(self.target_fpr, self.min_measurable_fpr)

    @property
    def pixel_fpr_bound(self) -> float:
        """Upper bound on the expected share of the pixels of a good image that are called bad.

        It holds for the method "split" and exchangeable images. With t = target_pixel_fpr, the bound is t if `pixel_guaranteed`
        is True. Otherwise it is (n t + 1)/(n + 1) for n groups, which the plain quantile at t satisfies.
        """
        if self.pixel_guaranteed:
            return self.target_pixel_fpr
        return (self.num_independent_samples * self.target_pixel_fpr + 1.0) / (self.num_independent_samples + 1)

    def compute_probability_fpr_exceeds(self, rate: float) -> float:
        """Returns the probability that the long-run false alarm rate of the image threshold exceeds `rate`.

        The threshold depends on which n independent images were drawn, and so does its rate. Without a tail, the threshold is
        the m-th highest score, so its rate follows Beta(m, n + 1 - m) with m = floor(target_fpr (n + 1)), at least 1. With a
        tail and a threshold at or above its start, see `ScoreTail.compute_probability_fpr_exceeds`; this assumes that real
        tails are exponential.
        """
        if not 0.0 < rate < 1.0:
            return float(rate <= 0.0)
        if self.tail is not None and self.image_threshold >= self.tail.start:
            return self.tail.compute_probability_fpr_exceeds(rate, self.image_threshold, self.num_independent_samples)
        return _compute_order_statistic_exceedance(rate, self.num_independent_samples, self.target_fpr)

    @property
    def probability_fpr_exceeds_twice_target(self) -> float:
        """Probability that the long-run false alarm rate of the image threshold is above 2 * target_fpr."""
        return self.compute_probability_fpr_exceeds(2 * self.target_fpr)

    def compute_fpr_interval(self) -> tuple[float, float]:
        """Returns the central interval that holds the long-run false alarm rate with probability 0.9.

        The rate has the distribution that `compute_probability_fpr_exceeds` describes.
        """
        return _compute_central_interval(self.compute_probability_fpr_exceeds)

    def compute_conformal_p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Computes the conformal p-value of each score, which is small if the image differs from the normal images.

        p = (1 + number of normal scores >= score) / (n + 1). Scores that differ by at most `ties.TIE` (relative) count as equal.
        With g groups, each of the n scores counts g/n, and n + 1 becomes g + 1. If the images are exchangeable, P(p <= a) <= a
        for a new normal image and any a (Vovk et al., Algorithmic Learning in a Random World, 2005). With a tail, the tail gives
        the p-values of scores above the start of the tail. Last, p is moved to the side of `effective_fpr` that agrees with the
        verdict: `p <= effective_fpr` holds if and only if `is_anomalous` returns True.

        Args:
            scores: any shape.

        Returns: same shape as scores, in (0, 1].

        Raises: DataError: a score is NaN.
        """
        values = subtract_rounding_error(_check_no_nan(scores))
        below = np.searchsorted(self._score_array, values, side="left")
        n, groups = self.num_images, self.num_independent_samples
        p_values = np.asarray((1.0 + (n - below) * groups / n) / (groups + 1))
        if self.tail is not None:
            p_values = np.where(values > self.tail.start, self.tail.compute_share_above(values), p_values)
        # At the threshold, the tail gives the target rate only up to rounding. The verdict decides the side of the level.
        just_above = np.nextafter(self.effective_fpr, 2.0)
        return np.where(
            values > self.image_threshold,
            np.minimum(p_values, self.effective_fpr),
            np.maximum(p_values, just_above),
        )

    def is_anomalous(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Returns whether each score exceeds image_threshold by more than the relative tolerance `ties.TIE`.

        Args: scores: any shape; the result has the same shape.

        Raises: DataError: a score is NaN.
        """
        return exceeds_threshold(_check_no_nan(scores), self.image_threshold)

    def replace_thresholds(self, image: float | None, pixel: float | None) -> Calibration:
        """Returns a copy with thresholds that a person chose. `convert_to_precision` does not change them.

        A new image threshold also replaces target_fpr by an estimate from the good images.

        Args: image, pixel: new image threshold and new pixel threshold; None: unchanged.

        Raises: DataError: both are None, or a threshold is not a finite number above 0.
        """
        thresholds = [value for value in (image, pixel) if value is not None]
        if not thresholds:
            raise DataError("no threshold to set: give an image threshold, a pixel threshold or both")
        if not all(math.isfinite(value) and value > 0 for value in thresholds):
            raise DataError(f"thresholds {thresholds}; expected finite numbers above 0")
        calibration = replace(self, by_hand=True, precision=None)
        if pixel is not None:
            calibration = replace(calibration, pixel_threshold=float(pixel), pixel_guaranteed=False)
        if image is None:
            return calibration
        if self.tail is not None and image > self.tail.start:
            share_above = float(self.tail.compute_share_above(image))
        else:
            num_above, groups = sum(score > image for score in self.image_scores), self.num_independent_samples
            share_above = (1 + num_above * groups / self.num_images) / (groups + 1)
        share_above = min(max(share_above, 1e-9), 1 - 1e-9)
        return replace(calibration, image_threshold=float(image), target_fpr=share_above, image_guaranteed=False)

    def replace_target_fpr(self, target_fpr: float) -> Calibration:
        """Returns a copy with the image threshold for another target rate, from the same scores of good images.

        The sizes of groups are not stored. So with groups, a calibration without a guarantee stays without a guarantee.

        Raises: DataError: the target is not between 0 and 1.
        """
        _check_method_and_shares(self.method, target_fpr=target_fpr, target_pixel_fpr=self.target_pixel_fpr)
        threshold, is_attained, tail = _compute_image_threshold(
            self._score_array, self.num_independent_samples, self.method, target_fpr
        )
        is_guaranteed = is_attained and self.method == "split" and (self.image_guaranteed or self.num_groups is None)
        return replace(
            self,
            target_fpr=target_fpr,
            image_threshold=threshold,
            image_guaranteed=is_guaranteed,
            tail=tail,
            by_hand=False,
        )

    def convert_to_precision(self, precision: str) -> Calibration:
        """Returns a calibration with thresholds that are safe for scores of another precision (number format).

        Another number format changes a score by up to the share `PRECISION_SHIFT`. Scores, thresholds and tail are raised by
        this share, so that no good image is called bad because of the number format. If the precision of this calibration is
        unknown or is already `precision`, the calibration itself is returned.
        """
        if self.precision is None or self.precision == precision:
            return self
        factor = 1 + PRECISION_SHIFT
        tail = self.tail and self.tail._replace(start=self.tail.start * factor, scale=self.tail.scale * factor)
        return replace(
            self,
            image_scores=tuple(score * factor for score in self.image_scores),
            image_threshold=self.image_threshold * factor,
            pixel_threshold=self.pixel_threshold * factor,
            tail=tail,
            precision=precision,
            converted_from=self.converted_from or self.precision,
        )

    def describe_limits(self) -> list[str]:
        """Returns sentences that tell the user the limits of the thresholds; an empty list if there are no such limits."""
        n, sentences = self.num_independent_samples, []
        grouped = n < self.num_images
        images = f"{self.num_images} photographs of about {n} part{'s' if n > 1 else ''}"
        good_images = images if grouped else f"{n} good photograph{'s' if n > 1 else ''}"
        unit = "parts" if grouped else "good photographs"
        if self.converted_from is not None:
            sentences.append(
                f"The thresholds come from {self.converted_from} scores, but this machine computes in {self.precision}. Scores "
                f"may differ by {PRECISION_SHIFT:.1%}, so the thresholds are raised by this share. Calibrate on this machine to "
                "avoid it."
            )
        if self.by_hand:
            sentences.append(
                f"A threshold was set by hand; by the {good_images}, about {self.target_fpr:.2g} of good parts lie above it."
            )
        num_steady = math.ceil(_MIN_SCORES_ABOVE / self.target_fpr)
        left_out = {"leave_one_out": "its part" if grouped else "itself", "cross": "its fold"}.get(self.method)
        if not self.by_hand and (left_out is not None or n < num_steady):
            how = f", each scored with {left_out} left out" if left_out is not None else ""
            if self.tail is None and n < _count_images_needed(self.target_fpr):
                how += "; it is their highest score"
            sentences.append(f"The threshold comes from {good_images}{how}.")
        if not self.by_hand and n < num_steady:
            low, high = self.compute_fpr_interval()
            lower, higher = _compute_central_interval(
                lambda rate: _compute_order_statistic_exceedance(rate, num_steady, self.target_fpr)
            )
            interval, narrower = (
                f"{_format_percent(a)} and {_format_percent(b)}" for a, b in ((low, high), (lower, higher))
            )
            sentences.append(
                f"With so few, the real false alarm rate may lie between {interval} (target {_format_percent(self.target_fpr)}). "
                f"{num_steady} {unit} would narrow this to between {narrower}."
            )
        num_needed_for_pixels = _count_images_needed(self.target_pixel_fpr)
        if not self.pixel_guaranteed and n < num_needed_for_pixels:
            sentences.append(
                f"Outlined areas are only a guide: for a pixel rate of {_format_percent(self.target_pixel_fpr)} they need "
                f"{num_needed_for_pixels} {unit}."
            )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Returns all attributes, by name, as JSON types. `from_dict` makes an equal calibration from the result."""
        return {
            **asdict(self),
            "image_scores": list(self.image_scores),
            "tail": self.tail and self.tail._asdict(),
        }

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> Calibration:
        """Makes a calibration from the result of `to_dict`. A missing attribute gets its default, for older bundles.

        Raises: DataError: a key is unknown, a key without a default is missing, or a value is wrong.
        """
        try:
            return TypeAdapter(Calibration).validate_json(json.dumps(tree))
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"calibration: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class _ScoredNormalImage(NamedTuple):
    """A scored normal image.

    score: image score.
    group: group number; None: the image is independent of all others.
    top: (n,), highest pixel scores, in any order.
    num_pixels: number of all scored pixels of the image.
    """

    score: float
    group: int | None
    top: NDArray[Any]
    num_pixels: int


class CalibrationBuilder:
    """Collects scores and anomaly maps of normal images batch by batch, and computes a `Calibration` from them.

    Builders of several workers can be merged. The builder stores only a share of the pixel scores of each image, the highest
    ones, so RAM is bounded. This share, `kept_fraction`, is 100 * target_pixel_fpr, but at least 0.01 and at most 1. The pixel
    threshold is exact unless all stored pixels of an image lie above it, which cannot happen with fewer than 100 images. With
    more images, such an image counts as completely above the threshold. So the threshold can only be too high, and the guarantee
    still holds.
    """

    def __init__(self, method: Method, target_fpr: float, target_pixel_fpr: float) -> None:
        """
        Args: method, target_fpr, target_pixel_fpr: see `Calibration`.

        Raises: DataError: the method is unknown, or a target is not between 0 and 1, both excluded.
        """
        _check_method_and_shares(method, target_fpr=target_fpr, target_pixel_fpr=target_pixel_fpr)
        self.method: Method = method
        self.target_fpr, self.target_pixel_fpr = target_fpr, target_pixel_fpr
        self.kept_fraction = min(1.0, max(0.01, 100.0 * target_pixel_fpr))
        self._images: list[_ScoredNormalImage] = []

    @property
    def num_images(self) -> int:
        """Number of added images."""
        return len(self._images)

    def add(
        self, scores: ArrayLike, maps: NDArray[Any] | Sequence[NDArray[Any]], groups: NDArray[np.int64] | None = None
    ) -> None:
        """Adds a batch of normal images.

        Args:
            scores: (B,) image scores.
            maps: (B, H, W) anomaly maps, or B arrays (H, W) that may differ in size.
            groups: (B,) group numbers. Images with the same number show the same physical part, also across batches and merged
                builders. None: every image of the batch is independent.

        Raises: DataError: counts differ, a map is empty, or a value is NaN or infinite. Then no image is added.
        """
        values = np.asarray(scores, dtype=np.float64)
        if not (len(values) == len(maps) == len(values if groups is None else groups)):
            raise DataError(f"{len(values)} scores for {len(maps)} maps; expected one score and one group per map")
        if not np.isfinite(values).all():
            raise DataError(f"calibration scores contain {values[~np.isfinite(values)][0]}; expected finite numbers")
        for index, image in enumerate(maps):
            if not image.size or not np.isfinite(image).all():
                raise DataError(f"calibration map {index} is empty or not finite; expected finite numbers")
        numbers = [None] * len(values) if groups is None else groups.tolist()
        for score, group, image in zip(values.tolist(), numbers, maps, strict=True):
            first_kept = image.size - math.ceil(image.size * self.kept_fraction)
            top = np.partition(image.ravel(), first_kept)[first_kept:].copy()
            self._images.append(_ScoredNormalImage(score, group, top, image.size))

    def merge(self, other: CalibrationBuilder) -> CalibrationBuilder:
        """Returns a new builder with the images of two builders that have the same settings (this is not checked).

        The calibration of the new builder does not depend on the order of the images.
        """
        merged = CalibrationBuilder(self.method, self.target_fpr, self.target_pixel_fpr)
        merged._images = self._images + other._images
        return merged

    def build_calibration(self) -> Calibration:
        """Computes the calibration from all added images, with unknown precision. Raises: DataError: no image was added."""
        if not self._images:
            raise DataError(
                "there is no normal image for the calibration; set data.holdout_fraction above 0, or "
                "calibration.method=leave_one_out"
            )
        image_scores = np.sort(np.array([image.score for image in self._images]))
        sizes = Counter(image.group for image in self._images)
        num_independent = sizes.pop(None, 0)  # images without a group
        num_groups = len(sizes) + num_independent
        image_threshold, image_attained, tail = _compute_image_threshold(
            image_scores, num_groups, self.method, self.target_fpr
        )
        # The guarantee needs exchangeable groups. Groups count equally only if all have the same size.
        has_equal_groups = len({*sizes.values(), *([1] if num_independent else [])}) == 1
        are_all_independent = num_groups == self.num_images
        pixel_threshold, pixel_attained = self._compute_pixel_threshold()
        return Calibration(
            method=self.method,
            image_scores=tuple(image_scores.tolist()),
            target_fpr=self.target_fpr,
            image_threshold=image_threshold,
            image_guaranteed=image_attained and self.method == "split" and has_equal_groups,
            target_pixel_fpr=self.target_pixel_fpr,
            pixel_threshold=pixel_threshold,
            pixel_guaranteed=pixel_attained and self.method == "split" and are_all_independent,
            tail=tail,
            num_groups=None if are_all_independent else num_groups,
        )

    def _compute_pixel_threshold(self) -> tuple[float, bool]:
        """Computes the pixel threshold by conformal risk control (arXiv 2208.02814) with a loss bounded by 1.

        R(lambda) is the mean over the n images of the share of pixels above lambda. The threshold is the smallest lambda with
        (n R(lambda) + 1)/(n + 1) <= target_pixel_fpr. If n is too small for this condition, it is the smallest lambda with
        R(lambda) <= target_pixel_fpr.

        Returns: threshold, and whether the first condition holds.
        """
        n, target = self.num_images, self.target_pixel_fpr
        budget = target * (n + 1) - 1.0  # upper limit of n R(lambda)
        attained = budget >= 0.0
        if not attained:
            budget = n * target
        values = np.concatenate([image.top for image in self._images])
        num_stored = np.array([image.top.size for image in self._images])
        num_pixels = np.array([image.num_pixels for image in self._images])
        shares = np.repeat(1.0 / num_pixels, num_stored)
        # Below the lowest stored score of an image, the share above is unknown. It counts as 1.
        floors = np.array([image.top.min() for image in self._images], dtype=values.dtype)
        unknown_shares = 1.0 - num_stored / num_pixels
        values, shares = np.concatenate([values, floors]), np.concatenate([shares, unknown_shares])
        order = np.argsort(-values, kind="stable")
        values, above = values[order], np.cumsum(shares[order])
        last_of_ties = np.flatnonzero(np.append(values[1:] != values[:-1], True))
        # distinct scores, descending, and n R(lambda) just below each score
        values, above = values[last_of_ties], above[last_of_ties]
        affordable = int(np.searchsorted(above, budget * (1.0 + _ROUNDING), side="right"))
        return float(values[min(affordable, values.size - 1)]), attained


def _compute_image_threshold(
    image_scores: NDArray[np.float64], num_groups: int, method: Method, target_fpr: float
) -> tuple[float, bool, ScoreTail | None]:
    """Computes the image threshold from ascending scores (n,) of good images, which show `num_groups` independent parts.

    Returns: the threshold, whether the scores are enough to count it, and the tail if a model of the highest scores gives it.
    """
    # The threshold is the ceil((1 - a)(n + 1))-th smallest score for the target a, or the highest score if n is too small.
    # Then score > threshold holds if and only if p <= a. The rank is found by comparing p-values with a as floats, so
    # rounding cannot contradict this.
    num_extreme = _count_scores_allowed_at_or_above(image_scores.size, num_groups, target_fpr)
    is_attained = num_extreme > 0
    is_counted = is_attained and (
        method == "split" or _count_scores_allowed_at_or_above(num_groups, num_groups, target_fpr) >= _MIN_SCORES_ABOVE
    )
    tail = None if is_counted else fit_tail(image_scores, num_groups)
    threshold = float(image_scores[-max(1, num_extreme)]) if tail is None else tail.compute_score_at_share(target_fpr)
    return threshold, is_attained, tail


def _count_scores_allowed_at_or_above(num_images: int, num_groups: int, target_fpr: float) -> int:
    """Returns how many scores may lie at or above a counted threshold with the given target rate; 0 if not even one.

    This is the largest m with (1 + (m - 1) g/n)/(g + 1) <= target_fpr for n images in g groups. With g = n, the condition is
    m/(n + 1) <= target_fpr.
    """

    def p_value(m: int) -> float:
        return (1 + (m - 1) * num_groups / num_images) / (num_groups + 1)

    m = max(0, 1 + int((target_fpr * (num_groups + 1) - 1) * num_images / num_groups))
    while m < num_images and p_value(m + 1) <= target_fpr:
        m += 1
    while m and p_value(m) > target_fpr:
        m -= 1
    return m


def _count_images_needed(target: float) -> int:
    """Returns the smallest number n >= 1 of independent images with 1/(n + 1) <= target."""
    n = max(1, math.ceil(1.0 / target) - 2)
    while 1.0 / (n + 1) > target:
        n += 1
    return n


def _compute_order_statistic_exceedance(rate: float, n: int, target_fpr: float) -> float:
    """Returns the probability that the long-run rate of normal scores above a counted threshold exceeds `rate`.

    The threshold is the m-th highest of n scores, m = max(1, floor(target_fpr (n + 1))); its rate follows Beta(m, n + 1 - m).
    """
    m = max(1, _count_scores_allowed_at_or_above(n, n, target_fpr))
    return float(1 - betainc(m, n + 1 - m, rate))


def _compute_central_interval(probability_above: Callable[[float], float]) -> tuple[float, float]:
    """Returns the central interval that contains a rate in [0, 1] with probability `_INTERVAL_MASS`.

    Args: probability_above: function that returns the probability that the rate is above a value.
    """
    bounds = []
    for share in ((1 + _INTERVAL_MASS) / 2, (1 - _INTERVAL_MASS) / 2):
        low, high = 0.0, 1.0
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (middle, high) if probability_above(middle) > share else (low, middle)
        bounds.append(low)
    return bounds[0], bounds[1]


def _check_no_nan(scores: ArrayLike) -> NDArray[np.float64]:
    """Converts scores to a float64 array. Raises: DataError: a score is NaN."""
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        raise DataError("a score is NaN; expected a number: check the image and the weights of the model for NaN")
    return values


def _check_method_and_shares(method: str, **shares: float) -> None:
    """Checks a calibration method and shares.

    Args: shares: name of a setting -> its value.

    Raises: DataError: the method is unknown, or a share is not between 0 and 1, both excluded.
    """
    if method not in get_args(Method):
        raise DataError(f"method={method!r}; expected one of {', '.join(get_args(Method))}")
    for name, value in shares.items():
        if not 0.0 < value < 1.0:
            raise DataError(f"{name}={value}; expected a share between 0 and 1, both excluded")


def _format_percent(share: float) -> str:
    """Formats a share as a percentage with up to two digits, such as "4.5 %"."""
    return f"{100 * share:.2g} %"
