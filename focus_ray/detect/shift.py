"""Module that detects distribution shift: tests whether new good images score like the images that set the threshold.

A calibration image is a normal image whose score helped to set the threshold; a calibration score is the score of such an image.
The p-value of a good image is uniform as long as good images look as they did at calibration. The tests compare new scores with
calibration scores by rank, which is the same as comparing p-values. A shift towards higher scores causes false alarms. A shift
towards lower scores causes missed defects. Ranks do not change under a monotone map, so the tests assume no distribution.

Labelled images and a stream of unlabelled images differ: in a stream most images are good, but a few are defects with high
scores. So `compare_stream_with_calibration` tests whether images score higher even without the highest tenth of the scores.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from focus_ray.errors import DataError
from focus_ray.metrics.ties import subtract_rounding_error

Direction = Literal["higher", "lower"]

# Largest rate of wrong notices on exchangeable images: an evaluation of 100 categories shows about one.
ALPHA = 0.01
# A stream is tested many times, so its level is lower: benchmarks/shift.py measures wrong notices in 10,000 images.
STREAM_ALPHA = 1e-4
MIN_NEW = 5  # a notice about fewer good test images is of no use
WINDOW = 300  # number of latest images of a stream that are compared
MIN_STREAM = 50  # fewer images of a stream can contain a larger share of defects by chance
TEST_EVERY = 25  # number of images between two tests of a stream; a test takes about a millisecond
DEFECT_SHARE = 0.1  # largest share of defects in a stream that causes no notice

# With many images, even differences that change no verdict are significant. So a notice also needs a large difference: a new
# score lies above (or below) a calibration score in 55 % of all pairs. With normal scores, this changes a rate of 0.05 to 0.07.
_MIN_SUPERIORITY = 0.55
# Alternatively, new images lie in the highest tenth of the calibration scores 1.5 times as often as calibration images.
_MIN_TAIL_RATIO = 1.5
_TAIL_SHARE = 0.1  # share of the calibration scores whose values count as high; false alarms come from there
_EXACT_PAIRS = 2000  # with more pairs of scores, the normal distribution approximates the rank sum well

_SMALLEST_SHOWN_P = 1e-4  # smaller p-values mean the same to a reader

_REMEDY = (
    "Light, position or batch may have changed. Recalibrate with `focus-ray calibrate BUNDLE NEW --good FOLDER`, or add such "
    "images with `focus-ray update BUNDLE NEW --add DATA`."
)


@dataclass(frozen=True)
class ScoreShift:
    """Result of a comparison of the scores of new images with the scores of the images that set the threshold.

    Attributes:
        num_new: number of new images.
        num_calibrating: number of images that set the threshold.
        p_higher: p-value for "new scores are higher", corrected for the number of tests, at most 1.
        p_lower: p-value for "new scores are lower", corrected for the number of tests, at most 1.
        direction: direction of a shift that is significant and large enough to report; "higher" causes false alarms, "lower"
            causes missed defects. None: there is no such shift.
    """

    num_new: int
    num_calibrating: int
    p_higher: float
    p_lower: float
    direction: Direction | None

    @property
    def p_value(self) -> float:
        """Two-sided p-value: P(p_value <= a) <= a for exchangeable images."""
        return min(self.p_higher, self.p_lower)

    def to_dict(self) -> dict[str, Any]:
        """Returns num_new, num_calibrating, p_value and direction as JSON types, by name."""
        return {
            "num_new": self.num_new,
            "num_calibrating": self.num_calibrating,
            "p_value": self.p_value,
            "direction": self.direction,
        }


def compare_with_calibration_scores(calibration_scores: ArrayLike, new_scores: ArrayLike) -> ScoreShift | None:
    """Tests whether new good images score like the calibration images, at the level `ALPHA`.

    Two tests are combined with a Bonferroni correction. The first test is the rank sum (Mann and Whitney), for both directions.
    The second test detects higher scores of a few images: it counts the new scores above the highest tenth of the calibration
    scores. Scores that differ by at most `ties.TIE` (relative) are equal, and are evidence for neither direction.

    Args:
        calibration_scores: (n,), n >= 1, scores of the images that set the threshold, in any order.
        new_scores: (m,), scores of good images that the model was not trained on, in any order.

    Returns: the comparison; None for fewer than `MIN_NEW` new scores.

    Raises: DataError: a score is NaN or infinite.
    """
    calibration, new = _to_finite_vector(calibration_scores), _to_finite_vector(new_scores)
    if new.size < MIN_NEW:
        return None
    rank_higher, superiority = _test_rank_sum(new, calibration)
    rank_lower, inferiority = _test_rank_sum(-new, -calibration)
    tail, ratio = _test_tail_count(new, calibration)
    p_rank, p_tail, p_lower = (min(1.0, value) for value in (4.0 * rank_higher, 4.0 * tail, 2.0 * rank_lower))
    is_rank_shift = p_rank <= ALPHA and superiority >= _MIN_SUPERIORITY
    is_tail_shift = p_tail <= ALPHA and ratio >= _MIN_TAIL_RATIO
    is_lower = p_lower <= ALPHA and inferiority >= _MIN_SUPERIORITY
    return _choose_shift_direction(
        new.size, calibration.size, min(p_rank, p_tail), p_lower, is_rank_shift or is_tail_shift, is_lower
    )


def compare_stream_with_calibration(calibration_scores: ArrayLike, recent_scores: ArrayLike) -> ScoreShift | None:
    """Tests whether a stream scores like the calibration images, although up to `DEFECT_SHARE` of its images are defects.

    The test for higher scores omits the highest `DEFECT_SHARE` of the stream. The remaining scores rank no higher than the same
    number of good images, so defects cause no notice. Defects can only hide lower scores, so the test for lower scores uses all
    scores.

    The level is `STREAM_ALPHA`, because a stream is tested many times.

    Args:
        calibration_scores: (n,), n >= 1, scores of the images that set the threshold, in any order.
        recent_scores: (m,), scores of the latest images of the stream, good or defective, in any order.

    Returns: the comparison; None for fewer than `MIN_STREAM` scores.

    Raises: DataError: a score is NaN or infinite.
    """
    calibration, recent = _to_finite_vector(calibration_scores), _to_finite_vector(recent_scores)
    if recent.size < MIN_STREAM:
        return None
    without_defects = np.sort(recent)[: recent.size - math.ceil(DEFECT_SHARE * recent.size)]
    p_higher = min(1.0, 2.0 * _test_rank_sum(without_defects, calibration)[0])
    p_lower = min(1.0, 2.0 * _test_rank_sum(-recent, -calibration)[0])
    # a difference that is significant at this low level with at most WINDOW images is also relevant
    is_higher, is_lower = p_higher <= STREAM_ALPHA, p_lower <= STREAM_ALPHA
    return _choose_shift_direction(recent.size, calibration.size, p_higher, p_lower, is_higher, is_lower)


def describe_test_shift(shift: ScoreShift) -> str | None:
    """Returns a message about a shift of good test images, with advice; None if `shift.direction` is None."""
    return _compose_shift_message(shift, f"{shift.num_new} good test images", "", _REMEDY)


def describe_stream_shift(shift: ScoreShift) -> str | None:
    """Returns a message about a shift of the latest images of a stream, with advice; None if `shift.direction` is None."""
    remark = f" even without the highest {DEFECT_SHARE:.0%} of them" if shift.direction == "higher" else ""
    return _compose_shift_message(shift, f"last {shift.num_new} images", remark, _REMEDY)


def describe_new_calibration_shift(shift: ScoreShift) -> str | None:
    """Returns a message about a shift of the good images of a new calibration, compared with an old calibration.

    Returns: the message, with advice; None if `shift.direction` is None.
    """
    remedy = (
        "Light, position or batch may have changed. The new thresholds fit these images; if defects are missed, add such images "
        "with `focus-ray update BUNDLE NEW --add DATA`."
    )
    return _compose_shift_message(shift, f"{shift.num_new} good images", "", remedy)


class StreamShiftMonitor:
    """Stores the latest `WINDOW` scores of a model's stream of images, and the result of the last test for a shift.

    Attributes:
        shift: result of the last test; None before the first test.
    """

    def __init__(self) -> None:
        self.shift: ScoreShift | None = None
        self._scores: deque[float] = deque(maxlen=WINDOW)
        self._untested = 0
        self._was_reported = False

    def add(self, scores: Sequence[float]) -> bool:
        """Adds the scores of new images, oldest first, and returns whether a test is due.

        A test is due if `TEST_EVERY` images came since the last test, and at least `MIN_STREAM` scores are stored.
        """
        self._scores.extend(scores)
        self._untested += len(scores)
        return self._untested >= TEST_EVERY and len(self._scores) >= MIN_STREAM

    def take_scores_for_test(self) -> list[float]:
        """Returns the stored scores for a test, and restarts the count of `TEST_EVERY` images until the next test."""
        self._untested = 0
        return list(self._scores)

    def report_shift_once(self, shift: ScoreShift | None) -> str | None:
        """Stores the result of a test, and returns a message if the test found a new shift.

        Args: shift: result of the test; None if there were too few scores.

        Returns: the message, with advice. It is returned once, and again only after a test with a p-value above `ALPHA`. None if
            there is no shift or the shift was already reported.
        """
        self.shift = shift
        if shift is None:
            return None
        if shift.p_value > ALPHA:
            self._was_reported = False
        sentence = None if self._was_reported else describe_stream_shift(shift)
        self._was_reported |= sentence is not None
        return sentence


def _choose_shift_direction(
    num_new: int, num_calibrating: int, p_higher: float, p_lower: float, is_higher: bool, is_lower: bool
) -> ScoreShift:
    """Makes the result of a test. If a shift in both directions is relevant, it reports the one with the smaller p-value.

    Args: is_higher, is_lower: whether the shift in this direction is significant and large enough to report.
    """
    direction: Direction | None = None
    if is_higher and not (is_lower and p_lower < p_higher):
        direction = "higher"
    elif is_lower:
        direction = "lower"
    return ScoreShift(num_new, num_calibrating, p_higher, p_lower, direction)


def _compose_shift_message(shift: ScoreShift, images: str, remark: str, remedy: str) -> str | None:
    """Returns a message about a shift; None if `shift.direction` is None.

    Args:
        images: describes the new images, for instance "12 good test images".
        remark: text after the number of images that set the threshold.
        remedy: advice at the end of the message.
    """
    if shift.direction is None:
        return None
    cost = (
        "more good parts may be called bad than intended"
        if shift.direction == "higher"
        else "the threshold may be too high for them, and defects may be missed"
    )
    probability = f"p = {shift.p_value:.2g}" if shift.p_value >= _SMALLEST_SHOWN_P else f"p < {_SMALLEST_SHOWN_P:.4f}"
    return (
        f"The {images} score {shift.direction} than the {shift.num_calibrating} images that set the threshold{remark} "
        f"({probability}): {cost}. {remedy}"
    )


def _test_rank_sum(new: NDArray[np.float64], calibration: NDArray[np.float64]) -> tuple[float, float]:
    """Tests by the rank sum whether new scores are higher than calibration scores.

    Returns: the one-sided p-value, and the share of pairs (new, calibration) in which the new score is higher.
    """
    # a tie counts against the alternative, so the p-value is exact or too high, never too low
    values = subtract_rounding_error(new)
    pairs = new.size * calibration.size
    greater = int(np.searchsorted(np.sort(calibration), values, side="left").sum())
    if pairs <= _EXACT_PAIRS:
        from scipy.stats import mannwhitneyu  # takes a second to import, and most commands do not need it

        below_ties = np.nextafter(values, -np.inf)  # otherwise scipy would count a tie of two zeros half
        p_value = float(mannwhitneyu(below_ties, calibration, alternative="greater", method="exact").pvalue)
    else:
        deviation = math.sqrt(pairs * (new.size + calibration.size + 1) / 12)
        p_value = float(ndtr(-(greater - 0.5 - pairs / 2) / deviation))
    return p_value, greater / pairs


def _test_tail_count(new: NDArray[np.float64], calibration: NDArray[np.float64]) -> tuple[float, float]:
    """Tests whether too many of m new scores lie above a limit: the r-th highest of n calibration scores, r about a tenth of n.

    If k or more new scores lie above the limit, at least k of the highest k + r - 1 of all scores are new. If new and old scores
    have the same distribution, the number of new scores among the highest k + r - 1 is hypergeometric.

    Returns: the one-sided p-value, and the share of new scores above the limit divided by the expected share r/(n + 1). Without
        a new score above the limit, 1 and 0.
    """
    from scipy.stats import hypergeom

    n, m = calibration.size, new.size
    rank = max(1, int(_TAIL_SHARE * (n + 1)))
    above = int(np.count_nonzero(subtract_rounding_error(new) > np.sort(calibration)[n - rank]))
    if not above:
        return 1.0, 0.0
    p_value = float(hypergeom.sf(above - 1, n + m, m, above + rank - 1))
    return p_value, (above / m) / (rank / (n + 1))


def _to_finite_vector(scores: ArrayLike) -> NDArray[np.float64]:
    """Converts scores of any shape to a float64 vector. Raises: DataError: a score is NaN or infinite."""
    values = np.asarray(scores, dtype=np.float64).ravel()
    if not np.isfinite(values).all():
        raise DataError(f"scores contain {values[~np.isfinite(values)][0]}; expected finite numbers to compare")
    return values
