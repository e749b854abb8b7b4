"""Detects distribution shift: tests whether new good images score like the images that set the threshold.

The p-value of a good image is uniform as long as good images look as they did at calibration. The tests compare new scores with
calibration scores by rank, which is the same as comparing p-values. A shift towards higher scores causes false alarms. A shift
towards lower scores causes missed defects. Ranks do not change under a monotone map, so the tests assume no distribution.

Labelled images and a stream of unlabelled images differ: in a stream most images are good, but a few are defects with high
scores. So `compare_stream` tests whether images score higher even without the highest tenth of the scores.
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
from focus_ray.metrics.ties import certain_part

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
class Shift:
    """Comparison of new scores with calibration scores.

    Attributes:
        num_new: number of new images.
        num_calibrating: number of images that set the threshold.
        p_higher: p-value of the test for higher new scores, times the number of tests, at most 1.
        p_lower: p-value of the test for lower new scores, times the number of tests, at most 1.
        direction: direction of a relevant shift; "higher" causes false alarms, "lower" causes missed defects. None: no relevant
            shift.
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
        """Returns the result as JSON types."""
        return {
            "num_new": self.num_new,
            "num_calibrating": self.num_calibrating,
            "p_value": self.p_value,
            "direction": self.direction,
        }


def compare_scores(calibration_scores: ArrayLike, new_scores: ArrayLike) -> Shift | None:
    """Tests whether new good images score like the calibration images, at the level `ALPHA`.

    Two tests are combined with a Bonferroni correction: the rank sum (Mann and Whitney), and for higher scores the number of
    new scores in the highest tenth of the calibration scores, which detects changes of a few images. Scores closer than
    `ties.TIE` count as equal, and count for neither direction.

    Args:
        calibration_scores: (n,), n >= 1, any order.
        new_scores: (m,), scores of good images that the model was not trained on.

    Returns: None for fewer than `MIN_NEW` new scores.

    Raises: DataError: a score is NaN or infinite.
    """
    calibration, new = _to_finite_vector(calibration_scores), _to_finite_vector(new_scores)
    if new.size < MIN_NEW:
        return None
    rank_higher, superiority = _rank_sum(new, calibration)
    rank_lower, inferiority = _rank_sum(-new, -calibration)
    tail, ratio = _tail_count(new, calibration)
    p_rank, p_tail, p_lower = (min(1.0, value) for value in (4.0 * rank_higher, 4.0 * tail, 2.0 * rank_lower))
    is_rank_shift = p_rank <= ALPHA and superiority >= _MIN_SUPERIORITY
    is_tail_shift = p_tail <= ALPHA and ratio >= _MIN_TAIL_RATIO
    is_lower = p_lower <= ALPHA and inferiority >= _MIN_SUPERIORITY
    return _make_shift(
        new.size, calibration.size, min(p_rank, p_tail), p_lower, is_rank_shift or is_tail_shift, is_lower
    )


def compare_stream(calibration_scores: ArrayLike, recent_scores: ArrayLike) -> Shift | None:
    """Tests whether a stream scores like the calibration images, although up to `DEFECT_SHARE` of its images are defects.

    The test for higher scores omits the highest `DEFECT_SHARE` of the stream. The remaining scores rank no higher than the same
    number of good images, so defects cause no notice. Defects can only hide lower scores, so the test for lower scores uses all
    scores.

    Args: as in `compare_scores`, in any order and without labels.

    Returns: None for fewer than `MIN_STREAM` scores.

    Raises: DataError: a score is NaN or infinite.
    """
    calibration, recent = _to_finite_vector(calibration_scores), _to_finite_vector(recent_scores)
    if recent.size < MIN_STREAM:
        return None
    without_defects = np.sort(recent)[: recent.size - math.ceil(DEFECT_SHARE * recent.size)]
    p_higher = min(1.0, 2.0 * _rank_sum(without_defects, calibration)[0])
    p_lower = min(1.0, 2.0 * _rank_sum(-recent, -calibration)[0])
    # a difference that is significant at this low level with at most WINDOW images is also relevant
    is_higher, is_lower = p_higher <= STREAM_ALPHA, p_lower <= STREAM_ALPHA
    return _make_shift(recent.size, calibration.size, p_higher, p_lower, is_higher, is_lower)


def describe_test_shift(shift: Shift) -> str | None:
    """Returns a sentence about a shift of good test images, with advice; None without a relevant shift."""
    return _shift_sentence(shift, f"{shift.num_new} good test images", "", _REMEDY)


def describe_stream_shift(shift: Shift) -> str | None:
    """Returns a sentence about a shift of the latest images of a stream, with advice; None without a relevant shift."""
    remark = f" even without the highest {DEFECT_SHARE:.0%} of them" if shift.direction == "higher" else ""
    return _shift_sentence(shift, f"last {shift.num_new} images", remark, _REMEDY)


def describe_new_calibration(shift: Shift) -> str | None:
    """Returns a sentence about a shift from the good images of an old calibration to those of a new one; None without a shift."""
    remedy = (
        "Light, position or batch may have changed. The new thresholds fit these images; if defects are missed, add such images "
        "with `focus-ray update BUNDLE NEW --add DATA`."
    )
    return _shift_sentence(shift, f"{shift.num_new} good images", "", remedy)


class RecentScores:
    """The latest `WINDOW` scores of the stream of a model, and the result of the last test.

    Attributes:
        shift: result of the last test; None before the first test.
    """

    def __init__(self) -> None:
        self.shift: Shift | None = None
        self._scores: deque[float] = deque(maxlen=WINDOW)
        self._untested = 0
        self._was_reported = False

    def add(self, scores: Sequence[float]) -> bool:
        """Adds the scores of new images, oldest first. Returns whether a test is due."""
        self._scores.extend(scores)
        self._untested += len(scores)
        return self._untested >= TEST_EVERY and len(self._scores) >= MIN_STREAM

    def take(self) -> list[float]:
        """Returns the latest scores for a test. The next test is due `TEST_EVERY` images later."""
        self._untested = 0
        return list(self._scores)

    def report_once(self, shift: Shift | None) -> str | None:
        """Stores the result of a test.

        Returns: a sentence about a new shift. It is returned once, and again only after scores were normal in between; otherwise
            None.
        """
        self.shift = shift
        if shift is None:
            return None
        if shift.p_value > ALPHA:
            self._was_reported = False
        sentence = None if self._was_reported else describe_stream_shift(shift)
        self._was_reported |= sentence is not None
        return sentence


def _make_shift(
    num_new: int, num_calibrating: int, p_higher: float, p_lower: float, is_higher: bool, is_lower: bool
) -> Shift:
    """Makes the result of a test. If both directions are relevant, it reports the direction with the smaller p-value.

    Args: is_higher, is_lower: whether the shift in this direction is significant and large enough to report.
    """
    direction: Direction | None = None
    if is_higher and not (is_lower and p_lower < p_higher):
        direction = "higher"
    elif is_lower:
        direction = "lower"
    return Shift(num_new, num_calibrating, p_higher, p_lower, direction)


def _shift_sentence(shift: Shift, images: str, remark: str, remedy: str) -> str | None:
    """Returns the notice of a shift; None without a relevant shift. remark: text after the number of images."""
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


def _rank_sum(new: NDArray[np.float64], calibration: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the one-sided p-value of the rank sum for new > calibration, and the share of pairs with new > calibration."""
    # a tie counts against the alternative, so the p-value is exact or too high, never too low
    values = certain_part(new)
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


def _tail_count(new: NDArray[np.float64], calibration: NDArray[np.float64]) -> tuple[float, float]:
    """Tests how many of m new scores lie above the r-th highest of n calibration scores; r is about a tenth of n.

    If k or more new scores lie there, at least k of the highest k + r - 1 of all scores are new. For scores drawn alike, that
    number is hypergeometric.

    Returns: the one-sided p-value, and the share of new scores above the limit divided by r/(n + 1), the share of calibration
        scores there.
    """
    from scipy.stats import hypergeom

    n, m = calibration.size, new.size
    rank = max(1, int(_TAIL_SHARE * (n + 1)))
    above = int(np.count_nonzero(certain_part(new) > np.sort(calibration)[n - rank]))
    if not above:
        return 1.0, 0.0
    p_value = float(hypergeom.sf(above - 1, n + m, m, above + rank - 1))
    return p_value, (above / m) / (rank / (n + 1))


def _to_finite_vector(scores: ArrayLike) -> NDArray[np.float64]:
    """Returns scores as a vector. Raises: DataError: a score is NaN or infinite."""
    values = np.asarray(scores, dtype=np.float64).ravel()
    if not np.isfinite(values).all():
        raise DataError(f"scores contain {values[~np.isfinite(values)][0]}; expected finite numbers to compare")
    return values
