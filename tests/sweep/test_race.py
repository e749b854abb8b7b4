"""The pruning of trials: the moderated paired test, successive halving, and a replayed race that decides the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from focus_ray.sweep.race import PRIOR_DF, Judge, loss_p_value
from focus_ray.sweep.settings import SweepConfig, parse_sweep

CATEGORIES = ["a", "b", "c"]


def make_sweep(**keys: Any) -> SweepConfig:
    """Returns a small grid sweep with other settings in `keys`."""
    return parse_sweep(
        {"base": {"data": {"uri": "x"}}, "space": {"density.window": [1, 3]}, "searcher": "grid", **keys}
    )


def report_scores(judge: Judge, trial: int, scores: list[float], epochs: int = 1) -> tuple[int, str | None]:
    """Reports the scores of a trial until it is pruned. Returns the number of reports and the reason of the pruning."""
    judge.begin(trial)
    count = 0
    for category, score in zip(judge.categories, scores, strict=True):
        for epoch in range(1, epochs + 1):
            count += 1
            reason = judge.report(trial, category, epoch, score, epoch == epochs)
            if reason is not None:
                return count, reason
    return count, None


def test_with_many_categories_the_p_value_is_that_of_the_paired_t_test() -> None:
    gaps = np.random.default_rng(0).normal(0.004, 0.03, 2000)
    expected = stats.ttest_1samp(gaps, 0.0, alternative="greater").pvalue
    assert loss_p_value(gaps.tolist(), 0.03) == pytest.approx(expected, rel=0.02)


def test_on_one_category_the_p_value_uses_the_prior_alone() -> None:
    assert loss_p_value([0.06], 0.03) == pytest.approx(stats.t.sf(2.0, PRIOR_DF))


def test_a_trial_as_good_as_the_best_is_rarely_pruned() -> None:
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.0, 0.03, (4000, 3))
    pruned_share = np.mean([any(loss_p_value(row[:k].tolist(), 0.03) < 0.05 for k in (1, 2)) for row in gaps])
    assert pruned_share < 0.1  # two tests with a risk of 0.05 each


def test_a_clear_loser_ends_after_the_first_category_and_the_winner_goes_on() -> None:
    judge = Judge(make_sweep(race={"enabled": True}), CATEGORIES, 0)
    assert report_scores(judge, 0, [0.9, 0.9, 0.9]) == (3, None)
    count, reason = report_scores(judge, 1, [0.7, 0.99, 0.99])
    assert count == 1
    assert reason is not None
    assert reason.startswith("race: on a 0.2000 behind")
    assert report_scores(judge, 2, [0.95, 0.9, 0.9]) == (3, None)


def test_a_small_loss_prunes_only_when_it_repeats() -> None:
    judge = Judge(make_sweep(race={"enabled": True}), CATEGORIES, 0)
    report_scores(judge, 0, [0.9, 0.9, 0.9])
    assert report_scores(judge, 1, [0.85, 0.85, 0.9])[0] == 2


def test_no_trial_is_pruned_in_the_grace_period_on_the_last_category_or_without_a_race() -> None:
    judge = Judge(make_sweep(race={"enabled": True, "grace_categories": 3}), CATEGORIES, 0)
    report_scores(judge, 0, [0.9, 0.9, 0.9])
    assert report_scores(judge, 1, [0.1, 0.1, 0.1]) == (3, None)
    judge = Judge(make_sweep(), CATEGORIES, 0)
    report_scores(judge, 0, [0.9, 0.9, 0.9])
    assert report_scores(judge, 1, [0.1, 0.1, 0.1]) == (3, None)


def test_trials_are_not_compared_with_a_withdrawn_trial() -> None:
    judge = Judge(make_sweep(race={"enabled": True}), CATEGORIES, 0)
    report_scores(judge, 0, [0.99, 0.9, 0.9])
    judge.withdraw(0)
    assert report_scores(judge, 1, [0.8, 0.9, 0.9]) == (3, None)


def test_halving_keeps_the_best_third_at_a_rung() -> None:
    judge = Judge(make_sweep(scheduler={"kind": "asha", "reduction_factor": 3}), ["a"], 9)
    reports = [
        report_scores(judge, trial, [score], epochs=9)[0] for trial, score in enumerate([0.5, 0.6, 0.4, 0.7, 0.45, 0.3])
    ]
    assert reports == [9, 9, 1, 9, 1, 1]


def test_a_restarted_trial_does_not_compete_with_its_first_run() -> None:
    """The trial of a lost node has lower scores in its second run; without other trials it must not be pruned."""
    judge = Judge(make_sweep(scheduler={"kind": "asha", "reduction_factor": 2}), ["a"], 9)
    judge.begin(0)
    assert judge.report(0, "a", 1, 0.9, False) is None
    judge.begin(0)
    assert judge.report(0, "a", 1, 0.5, False) is None
    # The reports of other trials still count at their rungs.
    judge.begin(1)
    assert judge.report(1, "a", 1, 0.8, False) is None
    judge.begin(0)
    assert judge.report(0, "a", 1, 0.5, False) is not None
    judge.begin(0)
    assert judge.report(0, "a", 1, 0.85, False) is None


def test_halving_counts_epochs_over_categories() -> None:
    judge = Judge(make_sweep(scheduler={"kind": "asha", "grace_epochs": 4}), ["a", "b"], 3)
    report_scores(judge, 0, [0.9, 0.9], epochs=3)
    count, reason = report_scores(judge, 1, [0.5, 0.5], epochs=3)
    assert count == 4
    assert reason is not None
    assert reason.startswith("successive halving: 0.5000 after epoch 1 of b")


def test_a_restarted_trial_drops_its_earlier_scores() -> None:
    judge = Judge(make_sweep(race={"enabled": True}, scheduler={"kind": "asha"}), CATEGORIES, 0)
    report_scores(judge, 0, [0.9, 0.9, 0.9])
    report_scores(judge, 1, [0.1, 0.9, 0.9])
    assert report_scores(judge, 1, [0.95, 0.95, 0.95]) == (3, None)


@pytest.mark.parametrize("keys", [{"race": {"enabled": True}}, {"scheduler": {"kind": "asha", "grace_epochs": 2}}])
def test_a_replayed_race_decides_as_the_first_race(keys: dict[str, Any]) -> None:
    scores = np.random.default_rng(3).uniform(0.6, 0.95, (20, 3)).round(3).tolist()
    first_judge = Judge(make_sweep(**keys), CATEGORIES, 2)
    expected = [report_scores(first_judge, trial, row, epochs=2) for trial, row in enumerate(scores)]
    replayed_judge = Judge(make_sweep(**keys), CATEGORIES, 2)
    for trial in range(10):
        num_left = expected[trial][0]
        curves: dict[str, list[tuple[int, float]]] = {}
        for category, score in zip(CATEGORIES, scores[trial], strict=True):
            curves[category] = [(epoch, score) for epoch in (1, 2)[:num_left]]
            num_left = max(0, num_left - 2)
        replayed_judge.replay(trial, {name: curve for name, curve in curves.items() if curve})
        if expected[trial][1] is not None:
            replayed_judge.withdraw(trial)
    assert [report_scores(replayed_judge, trial, scores[trial], epochs=2) for trial in range(10, 20)] == expected[10:]


def test_a_stopped_sweep_ends_every_trial_at_its_next_score() -> None:
    judge = Judge(make_sweep(), CATEGORIES, 0)
    judge.stop("enough")
    assert report_scores(judge, 0, [0.9, 0.9, 0.9]) == (1, "enough")
