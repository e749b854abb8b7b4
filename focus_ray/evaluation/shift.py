"""Distribution shift: whether new good images score as the images that set the threshold.

A p-value of a good image is uniform while good images look as they did at calibration. Here the scores of the new good images are
compared with the calibration scores by rank, which compares the p-values. A shift towards higher scores costs false alarms, one
towards lower scores costs defects. Ranks are the same under any monotone map, so no distribution of scores is assumed.

Labelled images and a stream of unlabelled images differ. In a stream most images are good, but a few are defects, which score
high. `compare_stream` therefore asks whether images score higher even without the highest tenth of them.
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
from focus_ray.evaluation.calibration import certain_part

Direction = Literal["higher", "lower"]

ALPHA = (
    0.01  # wrong notices, at most, among sets of exchangeable images: an evaluation of 100 categories shows about one
)
# A stream is tested again and again, so its level is lower: benchmarks/shift.py measures wrong notices in 10,000 images
STREAM_ALPHA = 1e-4
MIN_NEW = 5  # a notice about fewer good test images helps nobody
WINDOW = 300  # latest images of a stream that are compared: a shift shows within minutes to hours, defects do not
MIN_STREAM = 50  # of a stream: fewer images can hold a larger share of defects by chance
TEST_EVERY = 25  # images between two tests of a stream; a test takes about a millisecond
DEFECT_SHARE = 0.1  # of a stream, which defects may make without a notice

# Many images show differences that change no verdict. A notice needs a difference that matters: a new score lies above (or
# below) a calibration score in 55 % of all pairs, which moves a rate of 0.05 to 0.07 where scores are normal ...
_MIN_SUPERIORITY = 0.55
# ... or new images lie above the highest tenth of the calibration scores 1.5 times as often as calibration images do
_MIN_TAIL_RATIO = 1.5
_TAIL_SHARE = 0.1  # of the calibration scores: above them lie the scores that cost false alarms
_EXACT_PAIRS = (
    2000  # pairs of scores up to which the distribution of the rank sum is counted; the normal one is close beyond
)

_SMALLEST_TOLD = 1e-4  # p-value: smaller ones mean the same to a reader

_REMEDY = (
    "Light, position or batch may have changed. Recalibrate with `focus-ray calibrate BUNDLE NEW --good FOLDER`, or add such "
    "images with `focus-ray update BUNDLE NEW --add DATA`."
)


@dataclass(frozen=True)
class Shift:
    """Comparison of new scores with calibration scores.

    Attributes:
        num_new: new images that were compared.
        num_calibrating: images that set the threshold.
        p_higher: P(new scores this much higher or more) if both are drawn alike, times the number of tests; at most 1.
        p_lower: the same for lower scores.
        direction: the notice: "higher" costs false alarms, "lower" costs defects; None: no difference that matters was shown.
    """

    num_new: int
    num_calibrating: int
    p_higher: float
    p_lower: float
    direction: Direction | None

    @property
    def p_value(self) -> float:
        """Two-sided. P(p_value <= a) <= a for images drawn alike."""
        return min(self.p_higher, self.p_lower)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "num_new": self.num_new,
            "num_calibrating": self.num_calibrating,
            "p_value": self.p_value,
            "direction": self.direction,
        }


def compare_scores(calibration_scores: ArrayLike, new_scores: ArrayLike) -> Shift | None:
    """Tests whether new good images score as the calibration images, at the level `ALPHA`.

    Two tests with a Bonferroni correction: the rank sum (Mann and Whitney), and for higher scores the number of new scores above
    the highest tenth of the calibration scores, which finds a share of changed images. Scores closer than `calibration.TIE`
    are equal, and count for neither direction.

    Args:
        calibration_scores: (n,), any order.
        new_scores: (m,), of good images that the model was not trained on.

    Returns: None for fewer than `MIN_NEW` new scores.

    Raises: DataError: there is no calibration score, or a score is NaN or infinite.
    """
    calibration, new = _checked(calibration_scores), _checked(new_scores)
    _check_any(calibration)
    if new.size < MIN_NEW:
        return None
    rank_higher, superiority = _rank_sum(new, calibration)
    rank_lower, inferiority = _rank_sum(-new, -calibration)
    tail, ratio = _tail_count(new, calibration)
    p_rank, p_tail, p_lower = (min(1.0, value) for value in (4.0 * rank_higher, 4.0 * tail, 2.0 * rank_lower))
    by_rank = p_rank <= ALPHA and superiority >= _MIN_SUPERIORITY
    by_tail = p_tail <= ALPHA and ratio >= _MIN_TAIL_RATIO
    lower = p_lower <= ALPHA and inferiority >= _MIN_SUPERIORITY
    matters: dict[Direction, bool] = {"higher": by_rank or by_tail, "lower": lower}
    return _shift(new.size, calibration.size, min(p_rank, p_tail), p_lower, matters)


def compare_stream(calibration_scores: ArrayLike, recent_scores: ArrayLike) -> Shift | None:
    """Tests whether a stream's images score like the calibration images, though up to `DEFECT_SHARE` of the stream are defects.

    Without the highest `DEFECT_SHARE` of the stream's scores, the others rank no higher than as many good images do, however high
    the defects score. So the test for higher scores takes the others as the whole stream. Defects only hide lower scores, so the
    test for lower scores takes all.

    Args: as of `compare_scores`, in any order and without labels.

    Returns: None for fewer than `MIN_STREAM` scores.

    Raises: DataError: there is no calibration score, or a score is NaN or infinite.
    """
    calibration, recent = _checked(calibration_scores), _checked(recent_scores)
    _check_any(calibration)
    if recent.size < MIN_STREAM:
        return None
    without_defects = np.sort(recent)[: recent.size - math.ceil(DEFECT_SHARE * recent.size)]
    p_higher = min(1.0, 2.0 * _rank_sum(without_defects, calibration)[0])
    p_lower = min(1.0, 2.0 * _rank_sum(-recent, -calibration)[0])
    # a difference that so few images show at this level is one that matters
    matters: dict[Direction, bool] = {"higher": p_higher <= STREAM_ALPHA, "lower": p_lower <= STREAM_ALPHA}
    return _shift(recent.size, calibration.size, p_higher, p_lower, matters)


def describe_test_shift(shift: Shift) -> str | None:
    """A sentence about good test images, with the remedy; None where there is nothing to tell."""
    return _sentence(shift, f"{shift.num_new} good test images", "", _REMEDY)


def describe_stream_shift(shift: Shift) -> str | None:
    """A sentence about the latest images of a stream, with the remedy; None where there is nothing to tell."""
    even = f" even without the highest {DEFECT_SHARE:.0%} of them" if shift.direction == "higher" else ""
    return _sentence(shift, f"last {shift.num_new} images", even, _REMEDY)


def describe_new_calibration(shift: Shift) -> str | None:
    """A sentence that compares the good images of new thresholds with those of the former ones; None if they score alike."""
    remedy = (
        "Light, position or batch may have changed. The new thresholds fit these images; if defects are missed, add such images "
        "with `focus-ray update BUNDLE NEW --add DATA`."
    )
    return _sentence(shift, f"{shift.num_new} good images", "", remedy)


class RecentScores:
    """The latest `WINDOW` scores of one model's stream, and the result of the last test. Its memory is bounded.

    Attributes:
        shift: of the last test; None before the first.
    """

    def __init__(self) -> None:
        self.shift: Shift | None = None
        self._scores: deque[float] = deque(maxlen=WINDOW)
        self._untested = 0
        self._was_told = False

    def add(self, scores: Sequence[float]) -> bool:
        """Takes the scores of new images, oldest first. Returns: whether a test is due."""
        self._scores.extend(scores)
        self._untested += len(scores)
        return self._untested >= TEST_EVERY and len(self._scores) >= MIN_STREAM

    def take(self) -> list[float]:
        """The latest scores, for a test; the next is due `TEST_EVERY` images later."""
        self._untested = 0
        return list(self._scores)

    def tell(self, shift: Shift | None) -> str | None:
        """Keeps the result of a test.

        Returns: the sentence of a shift that was not told yet: once a shift, until scores are as usual again.
        """
        self.shift = shift
        if shift is None:
            return None
        if shift.p_value > ALPHA:
            self._was_told = False
        sentence = None if self._was_told else describe_stream_shift(shift)
        self._was_told |= sentence is not None
        return sentence


def _shift(
    num_new: int, num_calibrating: int, p_higher: float, p_lower: float, matters: dict[Direction, bool]
) -> Shift:
    """Makes the result of a test. If both directions matter, it reports the direction with the smaller p-value.

    Args: matters: whether the test shows a difference in this direction that is large enough to report.
    """
    p_values = {"higher": p_higher, "lower": p_lower}
    directions = sorted((name for name in matters if matters[name]), key=lambda name: p_values[name])
    return Shift(num_new, num_calibrating, p_higher, p_lower, directions[0] if directions else None)


def _sentence(shift: Shift, images: str, even: str, remedy: str) -> str | None:
    if shift.direction is None:
        return None
    cost = (
        "more good parts may be called bad than intended"
        if shift.direction == "higher"
        else "the threshold may be too high for them, and defects may be missed"
    )
    probability = f"p = {shift.p_value:.2g}" if shift.p_value >= _SMALLEST_TOLD else f"p < {_SMALLEST_TOLD:.4f}"
    return (
        f"The {images} score {shift.direction} than the {shift.num_calibrating} images that set the threshold{even} "
        f"({probability}): {cost}. {remedy}"
    )


def _rank_sum(new: NDArray[np.float64], calibration: NDArray[np.float64]) -> tuple[float, float]:
    """One-sided p-value of the rank sum for new > calibration, and the share of pairs in which that holds, ties not counted."""
    # a tie counts against the alternative: the p-value is exact or too high, never too low
    values = certain_part(new)
    pairs = new.size * calibration.size
    greater = int(np.searchsorted(np.sort(calibration), values, side="left").sum())
    if pairs <= _EXACT_PAIRS:
        from scipy.stats import mannwhitneyu  # a second of imports, which commands that compare nothing can do without

        below_ties = np.nextafter(values, -np.inf)  # scipy would count a tie of two zeros half
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


def _checked(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64).ravel()
    if not np.isfinite(values).all():
        raise DataError(f"scores hold {values[~np.isfinite(values)][0]}; expected finite numbers to compare")
    return values


def _check_any(calibration: NDArray[np.float64]) -> None:
    if not calibration.size:
        raise DataError("there is no calibration score to compare with; expected at least one")
