"""The tail model: rates and probabilities in simulation, units, groups, and what the prior does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from focus_ray.detect.calibration import CalibrationBuilder
from focus_ray.detect.tail import MIN_SCORES, NO_PRIOR, SHIPPED_PRIOR, TailPrior, fit_tail

NUM_DRAWS = 3000


def simulate(rng: np.random.Generator, n: int, prior: TailPrior) -> tuple[np.ndarray, float, float]:
    """Returns n scores with an exponential tail above the start 1, the true share above the start, and the true scale.

    The scale comes from the prior; without a prior it is 0.2.
    """
    scale = prior.total / rng.gamma(prior.degrees) if prior.degrees else 0.2
    exponential = np.sort(rng.exponential(size=n))
    start = exponential[n - max(MIN_SCORES - 1, math.ceil(n / 2))]
    return 1 + scale * (exponential - start), math.exp(-start), scale


@pytest.mark.parametrize("prior", [NO_PRIOR, SHIPPED_PRIOR], ids=["no prior", "shipped prior"])
@pytest.mark.parametrize(("n", "target"), [(4, 0.05), (10, 0.05), (20, 0.05), (40, 0.01)])
def test_rates_and_their_probabilities_are_right_where_tails_are_exponential(n, target, prior):
    rng, rates, risks = np.random.default_rng(0), np.empty(NUM_DRAWS), []
    for draw in range(NUM_DRAWS):
        scores, share, scale = simulate(rng, n, prior)
        tail = fit_tail(scores, prior=prior)
        threshold = tail.compute_score_at_share(target)
        rates[draw] = share * math.exp(-(threshold - 1) / scale)
        if len(risks) < 100:  # nearly the same of each draw
            risks.append(tail.compute_probability_fpr_exceeds(2 * target, threshold, n))
    assert np.mean(rates) == pytest.approx(target, abs=4 * np.std(rates) / math.sqrt(NUM_DRAWS))
    assert np.mean(rates > 2 * target) == pytest.approx(np.mean(risks), abs=0.025)
    assert np.mean(rates > target / 2) == pytest.approx(
        tail.compute_probability_fpr_exceeds(target / 2, threshold, n), abs=0.03
    )


def test_a_calibration_states_probability_and_interval_of_the_rate_with_the_shipped_prior():
    scores, _, _ = simulate(np.random.default_rng(1), 20, SHIPPED_PRIOR)
    builder = CalibrationBuilder("leave_one_out", 0.05, 0.001)
    builder.add(scores, np.zeros((20, 2, 2)))
    calibration, tail = builder.build_calibration(), fit_tail(scores)
    threshold = tail.compute_score_at_share(0.05)
    assert calibration.image_threshold == threshold
    risk = tail.compute_probability_fpr_exceeds(0.1, threshold, 20)
    assert calibration.probability_fpr_exceeds_twice_target == risk
    for bound, probability in zip(calibration.compute_fpr_interval(), (0.95, 0.05), strict=True):
        assert calibration.compute_probability_fpr_exceeds(bound) == pytest.approx(probability, abs=1e-3)


def test_the_unit_of_the_scores_does_not_matter():
    scores = np.sort(np.random.default_rng(0).gamma(50.0, size=12))
    large, small = (fit_tail(factor * scores).compute_score_at_share(0.05) for factor in (1000, 1))
    assert large == pytest.approx(1000 * small, rel=1e-12)


def test_the_prior_draws_thresholds_of_few_scores_together():
    draws = np.sort(np.random.default_rng(0).gamma(50.0, size=(500, 10))) / 50
    without, shipped = (
        np.std([fit_tail(scores, prior=prior).compute_score_at_share(0.05) for scores in draws])
        for prior in (NO_PRIOR, SHIPPED_PRIOR)
    )
    assert shipped < 0.8 * without
