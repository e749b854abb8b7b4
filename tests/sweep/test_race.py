"""When a trial has lost: the moderated paired test, successive halving, and that a replayed race decides alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from focus_ray.sweep.race import PRIOR_DF, Judge, p_value_of_loss
from focus_ray.sweep.settings import SweepConfig, parse_sweep

CATEGORIES = ["a", "b", "c"]


def sweep_of(**keys: Any) -> SweepConfig:
    return parse_sweep(
        {"base": {"data": {"uri": "x"}}, "space": {"density.window": [1, 3]}, "searcher": "grid", **keys}
    )


def run(judge: Judge, trial: int, scores: list[float], epochs: int = 1) -> tuple[int, str | None]:
    """Reports until told to stop. Returns: the number of reports, and why it was cut."""
    judge.begin(trial)
    count = 0
    for category, score in zip(judge.categories, scores, strict=True):
        for epoch in range(1, epochs + 1):
            count += 1
            reason = judge.report(trial, category, epoch, score, epoch == epochs)
            if reason is not None:
                return count, reason
    return count, None


def test_with_many_categories_it_is_the_paired_t_test() -> None:
    gaps = np.random.default_rng(0).normal(0.004, 0.03, 2000)
    expected = stats.ttest_1samp(gaps, 0.0, alternative="greater").pvalue
    assert p_value_of_loss(gaps.tolist(), 0.03) == pytest.approx(expected, rel=0.02)


def test_on_one_category_it_is_a_t_test_with_the_prior_alone() -> None:
    assert p_value_of_loss([0.06], 0.03) == pytest.approx(stats.t.sf(2.0, PRIOR_DF))


def test_a_trial_as_good_as_the_best_is_rarely_cut() -> None:
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.0, 0.03, (4000, 3))
    cut = np.mean([any(p_value_of_loss(row[:k].tolist(), 0.03) < 0.05 for k in (1, 2)) for row in gaps])
    assert cut < 0.1  # two looks at 0.05 each


def test_a_clear_loser_ends_after_the_first_category_and_the_winner_goes_on() -> None:
    judge = Judge(sweep_of(race={"enabled": True}), CATEGORIES, 0)
    assert run(judge, 0, [0.9, 0.9, 0.9]) == (3, None)
    count, reason = run(judge, 1, [0.7, 0.99, 0.99])
    assert count == 1
    assert reason is not None
    assert reason.startswith("race: on a 0.2000 behind the best so far (p ")
    assert run(judge, 2, [0.95, 0.9, 0.9]) == (3, None)


def test_a_small_loss_is_borne_until_it_repeats() -> None:
    judge = Judge(sweep_of(race={"enabled": True}), CATEGORIES, 0)
    run(judge, 0, [0.9, 0.9, 0.9])
    assert run(judge, 1, [0.85, 0.85, 0.9])[0] == 2


def test_nothing_is_cut_within_the_grace_or_on_the_last_category_or_without_a_race() -> None:
    judge = Judge(sweep_of(race={"enabled": True, "grace_categories": 3}), CATEGORIES, 0)
    run(judge, 0, [0.9, 0.9, 0.9])
    assert run(judge, 1, [0.1, 0.1, 0.1]) == (3, None)
    judge = Judge(sweep_of(), CATEGORIES, 0)
    run(judge, 0, [0.9, 0.9, 0.9])
    assert run(judge, 1, [0.1, 0.1, 0.1]) == (3, None)


def test_a_trial_that_was_cut_or_withdrawn_is_no_longer_held_against_others() -> None:
    judge = Judge(sweep_of(race={"enabled": True}), CATEGORIES, 0)
    run(judge, 0, [0.99, 0.9, 0.9])
    judge.withdraw(0)
    assert run(judge, 1, [0.8, 0.9, 0.9]) == (3, None)


def test_halving_lets_the_best_third_past_a_rung() -> None:
    judge = Judge(sweep_of(scheduler={"kind": "asha", "reduction_factor": 3}), ["a"], 9)
    reports = [run(judge, trial, [score], epochs=9)[0] for trial, score in enumerate([0.5, 0.6, 0.4, 0.7, 0.45, 0.3])]
    assert reports == [9, 9, 1, 9, 1, 1]


def test_a_trial_begun_again_does_not_compete_with_its_former_self() -> None:
    """A lost node's trial does worse at first the second time: nobody else is there to cut it."""
    judge = Judge(sweep_of(scheduler={"kind": "asha", "reduction_factor": 2}), ["a"], 9)
    judge.begin(0)
    assert judge.report(0, "a", 1, 0.9, False) is None
    judge.begin(0)
    assert judge.report(0, "a", 1, 0.5, False) is None
    # what others reported still counts, in the rungs in which they did
    judge.begin(1)
    assert judge.report(1, "a", 1, 0.8, False) is None
    judge.begin(0)
    assert judge.report(0, "a", 1, 0.5, False) is not None
    judge.begin(0)
    assert judge.report(0, "a", 1, 0.85, False) is None


def test_halving_counts_epochs_over_categories() -> None:
    judge = Judge(sweep_of(scheduler={"kind": "asha", "grace_epochs": 4}), ["a", "b"], 3)
    run(judge, 0, [0.9, 0.9], epochs=3)
    count, reason = run(judge, 1, [0.5, 0.5], epochs=3)
    assert count == 4
    assert reason == "successive halving: 0.5000 after epoch 1 of b is not among the best at this rung"


def test_a_trial_that_begins_again_forgets_what_it_said() -> None:
    judge = Judge(sweep_of(race={"enabled": True}, scheduler={"kind": "asha"}), CATEGORIES, 0)
    run(judge, 0, [0.9, 0.9, 0.9])
    run(judge, 1, [0.1, 0.9, 0.9])
    assert run(judge, 1, [0.95, 0.95, 0.95]) == (3, None)


@pytest.mark.parametrize("keys", [{"race": {"enabled": True}}, {"scheduler": {"kind": "asha", "grace_epochs": 2}}])
def test_a_replayed_race_decides_as_the_first_one(keys: dict[str, Any]) -> None:
    scores = np.random.default_rng(3).uniform(0.6, 0.95, (20, 3)).round(3).tolist()
    whole = Judge(sweep_of(**keys), CATEGORIES, 2)
    expected = [run(whole, trial, row, epochs=2) for trial, row in enumerate(scores)]
    again = Judge(sweep_of(**keys), CATEGORIES, 2)
    for trial in range(10):
        left = expected[trial][0]
        curves: dict[str, list[tuple[int, float]]] = {}
        for category, score in zip(CATEGORIES, scores[trial], strict=True):
            curves[category] = [(epoch, score) for epoch in (1, 2)[:left]]
            left = max(0, left - 2)
        again.replay(trial, {name: curve for name, curve in curves.items() if curve})
        if expected[trial][1] is not None:
            again.withdraw(trial)
    assert [run(again, trial, scores[trial], epochs=2) for trial in range(10, 20)] == expected[10:]


def test_a_stopped_sweep_ends_every_trial_at_its_next_score() -> None:
    judge = Judge(sweep_of(), CATEGORIES, 0)
    judge.stop("enough")
    assert run(judge, 0, [0.9, 0.9, 0.9]) == (1, "enough")
