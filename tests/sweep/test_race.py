"""The pruning of trials: the moderated paired test, successive halving, and a replayed race that decides the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from scipy import stats

from focus_ray.sweep.race import PRIOR_DF, TrialPruner, compute_race_p_value
from focus_ray.sweep.settings import parse_sweep_config

CATEGORIES = ["a", "b", "c"]
RACE = {"race": {"enabled": True}}


def make_pruner(max_steps: int = 0, categories: list[str] = CATEGORIES, **keys: Any) -> TrialPruner:
    """Returns the judge of a small grid sweep with other settings in `keys`."""
    tree = {"base": {"data": {"uri": "x"}}, "space": {"density.window": [1, 3]}, "searcher": "grid", **keys}
    return TrialPruner(parse_sweep_config(tree), categories, max_steps)


def report_scores(pruner: TrialPruner, trial: int, scores: list[float], steps: int = 1) -> tuple[int, str | None]:
    """Reports the scores of a trial until it is pruned. Returns the number of reports and the reason of the pruning."""
    pruner.begin_trial(trial)
    reports = [
        (name, score, step) for name, score in zip(pruner.categories, scores, strict=True) for step in range(steps)
    ]
    for count, (category, score, step) in enumerate(reports, start=1):
        reason = pruner.report_score(trial, category, step + 1, score, step + 1 == steps)
        if reason is not None:
            return count, reason
    return len(reports), None


def test_with_many_categories_the_p_value_is_that_of_the_paired_t_test() -> None:
    gaps = np.random.default_rng(0).normal(0.004, 0.03, 2000)
    expected = stats.ttest_1samp(gaps, 0.0, alternative="greater").pvalue
    assert compute_race_p_value(gaps.tolist(), 0.03) == pytest.approx(expected, rel=0.02)


def test_on_one_category_the_p_value_uses_the_prior_alone() -> None:
    assert compute_race_p_value([0.06], 0.03) == pytest.approx(stats.t.sf(2.0, PRIOR_DF))


def test_a_trial_as_good_as_the_best_is_rarely_pruned() -> None:
    gaps = np.random.default_rng(1).normal(0.0, 0.03, (4000, 3))
    pruned_share = np.mean([any(compute_race_p_value(row[:k].tolist(), 0.03) < 0.05 for k in (1, 2)) for row in gaps])
    assert pruned_share < 0.1  # two tests with a risk of 0.05 each


@pytest.mark.parametrize(
    ("race", "scores", "num_reports"),
    [
        ({"enabled": True}, [0.7, 0.99, 0.99], 1),  # a clear loser ends after the first category
        ({"enabled": True}, [0.95, 0.9, 0.9], 3),
        ({"enabled": True}, [0.85, 0.85, 0.9], 2),  # a small loss prunes only when it repeats
        ({"enabled": True, "grace_categories": 3}, [0.1, 0.1, 0.1], 3),  # no trial is pruned on the last category
        ({"enabled": False}, [0.1, 0.1, 0.1], 3),
    ],
)
def test_a_trial_that_loses_clearly_ends_early(race: dict[str, Any], scores: list[float], num_reports: int) -> None:
    pruner = make_pruner(race=race)
    assert report_scores(pruner, 0, [0.9, 0.9, 0.9]) == (3, None)
    count, reason = report_scores(pruner, 1, scores)
    assert (count, str(reason).startswith("race: on a")) == (num_reports, num_reports < 3)


def test_trials_are_not_compared_with_a_withdrawn_trial() -> None:
    pruner = make_pruner(**RACE)
    report_scores(pruner, 0, [0.99, 0.9, 0.9])
    pruner.exclude_trial(0)
    assert report_scores(pruner, 1, [0.8, 0.9, 0.9]) == (3, None)


@pytest.mark.parametrize(("grace_steps", "reduction_factor"), [(1, 2), (1, 3), (2, 4)])
def test_halving_prunes_as_optunas_pruner_does(grace_steps: int, reduction_factor: int) -> None:
    scheduler = {"kind": "asha", "grace_steps": grace_steps, "reduction_factor": reduction_factor}
    pruner = make_pruner(20, ["a", "b"], scheduler=scheduler)
    optuna_pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=grace_steps, reduction_factor=reduction_factor)
    study = optuna.create_study(direction="maximize", pruner=optuna_pruner)
    rng = np.random.default_rng(0)
    num_pruned = 0
    for number in range(60):
        trial = study.ask()
        pruner.begin_trial(number)
        for step in range(1, 40):
            score = round(rng.uniform(), 2)
            category, own_step = ("a", step) if step <= 20 else ("b", step - 20)
            trial.report(score, step)
            is_pruned = pruner._find_halving_pruning_reason(number, category, own_step, score) is not None
            assert is_pruned == trial.should_prune()
            if is_pruned:
                num_pruned += 1
                break
    assert 20 < num_pruned < 60


def test_halving_counts_steps_over_categories() -> None:
    pruner = make_pruner(3, ["a", "b"], scheduler={"kind": "asha", "grace_steps": 4})
    report_scores(pruner, 0, [0.9, 0.9], steps=3)
    count, reason = report_scores(pruner, 1, [0.5, 0.5], steps=3)
    assert (count, "step 1 of b" in str(reason)) == (4, True)


def test_a_restarted_trial_does_not_compete_with_its_first_run() -> None:
    """The trial of a lost node has lower scores in its second run; without other trials it must not be pruned."""
    pruner = make_pruner(9, ["a"], scheduler={"kind": "asha", "grace_steps": 1, "reduction_factor": 2})
    for trial, score, is_pruned in [
        (0, 0.9, False),
        (0, 0.5, False),
        (1, 0.8, False),
        (0, 0.5, True),
        (0, 0.85, False),
    ]:
        pruner.begin_trial(trial)
        assert (pruner.report_score(trial, "a", 1, score, False) is not None) == is_pruned
    pruner = make_pruner(**RACE)
    report_scores(pruner, 0, [0.9, 0.9, 0.9])
    report_scores(pruner, 1, [0.1, 0.9, 0.9])
    assert report_scores(pruner, 1, [0.95, 0.95, 0.95]) == (3, None)


@pytest.mark.parametrize("keys", [RACE, {"scheduler": {"kind": "asha", "grace_steps": 2}}])
def test_a_replayed_race_decides_as_the_first_race(keys: dict[str, Any]) -> None:
    scores = np.random.default_rng(3).uniform(0.6, 0.95, (20, 3)).round(3).tolist()
    first_pruner, replayed_pruner = make_pruner(2, **keys), make_pruner(2, **keys)
    expected = [report_scores(first_pruner, trial, row, steps=2) for trial, row in enumerate(scores)]
    for trial, (count, reason) in enumerate(expected[:10]):
        curves = {
            category: [(step, score) for step in (1, 2) if 2 * index + step <= count]
            for index, (category, score) in enumerate(zip(CATEGORIES, scores[trial], strict=True))
        }
        replayed_pruner.replay_scores(trial, {name: curve for name, curve in curves.items() if curve})
        if reason is not None:
            replayed_pruner.exclude_trial(trial)
    assert [report_scores(replayed_pruner, trial, scores[trial], steps=2) for trial in range(10, 20)] == expected[10:]


def test_a_stopped_sweep_ends_every_trial_at_its_next_score() -> None:
    pruner = make_pruner()
    pruner.end_all_trials("enough")
    assert report_scores(pruner, 0, [0.9, 0.9, 0.9]) == (1, "enough")
