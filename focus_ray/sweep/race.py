"""Decides when a trial is pruned (stopped early) because of a low score compared with other trials.

There are two tests: a race over categories with a paired t-test, and successive halving over steps. Every trial goes through
the categories in the same order. docs/use/sweeps.md explains the assumptions. This module does not import Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from focus_ray.sweep.settings import SweepConfig

PRIOR_DF = 4.0  # degrees of freedom of the prior: race.prior_sd weighs as much as this many categories


def compute_race_p_value(differences: Sequence[float], prior_sd: float) -> float:
    """Returns the p-value of a test whether another trial is better than this trial (one-sided moderated paired t-test).

    The p-value is the probability of score differences like these if both trials were equally good. The variance over categories
    is drawn towards `prior_sd` with a weight of `PRIOR_DF` categories (the moderated t of Smyth 2004). So the test works from
    the first category on, where it uses the prior alone. With many categories it becomes the usual paired t-test.

    Args:
        differences: For each category, the score of the other trial minus the score of this trial.
        prior_sd: Expected standard deviation of the differences.
    """
    from scipy.stats import t as student

    gaps = np.asarray(differences, dtype=np.float64)  # (N categories,)
    df = PRIOR_DF + len(gaps) - 1
    variance = (PRIOR_DF * prior_sd**2 + float(np.square(gaps - gaps.mean()).sum())) / df
    return float(student.sf(gaps.mean() / math.sqrt(variance / len(gaps)), df))


class TrialPruner:
    """Collects the scores of all trials while they run, and decides when a trial must end early (is "pruned").

    Args:
        sweep: Configuration of the sweep.
        categories: Order in which every trial goes through the categories.
        max_steps: Largest number of training steps of any trial; 0 if nothing is trained.

    Attributes:
        scores: Number of a trial -> category -> its final score.
        pruned: Numbers of trials that ended early or were withdrawn. Other trials are not compared with them.
        stop_reason: Reason to end all trials; None while the sweep runs.
        rungs: For each rung (number of steps at which trials are compared), number of a trial -> its score at the rung.
    """

    def __init__(self, sweep: SweepConfig, categories: Sequence[str], max_steps: int) -> None:
        self.race, self.scheduler = sweep.race, sweep.scheduler
        self.categories, self.max_steps = list(categories), max_steps
        self.scores: dict[int, dict[str, float]] = {}
        self.pruned: set[int] = set()
        self.stop_reason: str | None = None
        self.rungs: list[dict[int, float]] = []

    def begin_trial(self, trial: int) -> None:
        """Notes that a trial begins. Deletes its earlier scores, if it ran before and its machine was lost."""
        self.pruned.discard(trial)
        self.scores.pop(trial, None)
        for rung in self.rungs:
            rung.pop(trial, None)

    def report_score(self, trial: int, category: str, step: int, score: float, final: bool) -> str | None:
        """Adds a score of a trial. Returns the reason to end the trial now, or None if it goes on.

        After `end_all_trials`, adds nothing and returns the reason of the stop.

        Args:
            trial: Number of the trial.
            category: Category that the score belongs to.
            step: Number of steps that the network was trained.
            score: The score; higher is better.
            final: True if this is the last score of the category.
        """
        if self.stop_reason is not None:
            return self.stop_reason
        own_scores = self.scores.setdefault(trial, {})
        final_scores = [own_scores[name] for name in self.categories if name in own_scores]
        if final:
            own_scores[category] = score
        is_last = final and len(own_scores) == len(self.categories)
        reason = None
        if not is_last and self.scheduler.kind == "asha":
            reason = self._find_halving_pruning_reason(trial, category, step, float(np.mean([*final_scores, score])))
        if not is_last and reason is None and final and self.race.enabled:
            reason = self._find_race_pruning_reason(trial)
        if reason is not None:
            self.pruned.add(trial)
        return reason

    def exclude_trial(self, trial: int) -> None:
        """Excludes a trial that failed or ended for another reason: the race does not compare other trials with it."""
        self.pruned.add(trial)

    def end_all_trials(self, reason: str) -> None:
        """Ends all trials: each trial ends at its next report, with this reason."""
        self.stop_reason = reason

    def replay_scores(self, trial: int, curves: dict[str, list[tuple[int, float]]]) -> None:
        """Adds the scores of a trial that ran in an earlier process, to resume a sweep. No decision is made about the trial.

        Args:
            trial: Number of the trial.
            curves: Category -> list of (trained steps, score); the last score of a category counts as final.
        """
        self.begin_trial(trial)
        for category in self.categories:
            curve = curves.get(category, [])
            for number, (step, score) in enumerate(curve):
                self.report_score(trial, category, step, score, final=number + 1 == len(curve))
        self.pruned.discard(trial)

    def _find_halving_pruning_reason(self, trial: int, category: str, step: int, score: float) -> str | None:
        """Tests whether asynchronous successive halving prunes a trial. Returns the reason to prune it; None if it goes on.

        The method is ASHA (arXiv 1810.05934, implemented as Optuna's pruner). A rung is a number of steps at which trials are
        compared. A trial that reaches a rung goes on if its score is among the best 1 / reduction_factor of all scores at the
        rung, or is the best.

        Args:
            trial, category, step: As for `report_score`.
            score: Mean score over the categories so far.
        """
        # steps over all categories, so that a rung can lie in any category
        total = self.categories.index(category) * max(1, self.max_steps) + max(1, step)
        factor = self.scheduler.reduction_factor
        rung = sum(trial in scores for scores in self.rungs)
        while total >= self.scheduler.grace_steps * factor**rung:
            if rung == len(self.rungs):
                self.rungs.append({})
            self.rungs[rung][trial] = score
            best_first = sorted(self.rungs[rung].values(), reverse=True)
            if score < best_first[max(1, len(best_first) // factor) - 1]:
                return f"successive halving: {score:.4f} after step {step} of {category} is not among the best at this rung"
            rung += 1
        return None

    def _find_race_pruning_reason(self, trial: int) -> str | None:
        """Tests whether the race prunes a trial that has just finished a category.

        The race compares the trial with the best trial that is not pruned and has scores on the same categories.

        Returns: the reason to prune the trial; None if it goes on.
        """
        own_scores = self.scores[trial]
        if len(own_scores) < self.race.grace_categories:
            return None
        rivals = [
            scores
            for number, scores in self.scores.items()
            if number not in {trial, *self.pruned} and own_scores.keys() <= scores.keys()
        ]
        if not rivals:
            return None
        best = max(rivals, key=lambda scores: float(np.mean([scores[name] for name in own_scores])))
        gaps = [best[name] - own_scores[name] for name in own_scores]
        p_value = compute_race_p_value(gaps, self.race.prior_sd)
        if p_value >= self.race.alpha:
            return None
        return (
            f"race: on {', '.join(own_scores)} {float(np.mean(gaps)):.4f} behind the best trial so far "
            f"(p {p_value:.2g} below race.alpha {self.race.alpha:g})"
        )
