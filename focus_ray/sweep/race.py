"""Decides when a trial is pruned: by a race over categories with a paired test, and by successive halving over epochs.

Every trial goes through the categories in the same order. docs/use/sweeps.md explains the assumptions. This module does
not import Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from focus_ray.sweep.settings import RaceConfig, SweepConfig

PRIOR_DF = 4.0  # degrees of freedom of the prior: race.prior_sd weighs as much as this many categories


def loss_p_value(differences: Sequence[float], prior_sd: float) -> float:
    """Returns the one-sided p-value of a moderated paired t-test: is the other trial better?

    The p-value is the probability of gaps like these if both trials were equally good. The variance over categories is
    drawn towards `prior_sd` with a weight of `PRIOR_DF` categories (the moderated t of Smyth 2004). So the test works from
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


class Judge:
    """Receives the scores of all trials as they are computed, and decides when a trial must end.

    Args:
        sweep: Configuration of the sweep.
        categories: Order in which every trial goes through the categories.
        max_epochs: Largest number of training epochs of any trial; 0 if nothing is trained.

    Attributes:
        scores: Trial -> category -> its final score.
        pruned: Trials that were pruned or withdrawn. Other trials are not compared with them.
        stop_reason: Reason to end all trials; None while the sweep runs.
        reports: Trial -> (score, step) of all its reports, for successive halving.
        optuna_trials: Trial -> its trial in the Optuna study, for successive halving.
    """

    def __init__(self, sweep: SweepConfig, categories: Sequence[str], max_epochs: int) -> None:
        self.race: RaceConfig = sweep.race
        self.categories, self.max_epochs = list(categories), max_epochs
        self.scores: dict[int, dict[str, float]] = {}
        self.pruned: set[int] = set()
        self.stop_reason: str | None = None
        self.scheduler = sweep.scheduler
        self.reports: dict[int, list[tuple[float, int]]] = {}
        self.optuna_trials: dict[int, Any] = {}
        self.study: Any = self._new_study()

    def _new_study(self) -> Any:
        """Returns an Optuna study that prunes by successive halving; None if the scheduler is `none`."""
        if self.scheduler.kind != "asha":
            return None
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=self.scheduler.grace_epochs, reduction_factor=self.scheduler.reduction_factor
        )
        return optuna.create_study(direction="maximize", pruner=pruner)

    def begin(self, trial: int) -> None:
        """Begins a trial. If the trial ran before and its machine was lost, its earlier reports are dropped."""
        self.scores.pop(trial, None)
        self.pruned.discard(trial)
        if self.study is None:
            return
        if self.reports.pop(trial, None):  # Optuna cannot delete reports: make a new study
            self.study, self.optuna_trials = self._new_study(), {}
            for other, reports in self.reports.items():
                self.optuna_trials[other] = self.study.ask()
                for score, step in reports:
                    self.optuna_trials[other].report(score, step)
                    self.optuna_trials[other].should_prune()
        self.reports[trial] = []
        self.optuna_trials[trial] = self.study.ask()

    def report(self, trial: int, category: str, epoch: int, score: float, final: bool) -> str | None:
        """Records a score of a trial and decides whether the trial goes on.

        Args:
            trial: Number of the trial.
            category: Category that was judged.
            epoch: Number of epochs that the network was trained.
            score: The score; higher is better.
            final: True if this is the last score of the category.

        Returns:
            The reason to end the trial now; None if it goes on.
        """
        if self.stop_reason is not None:
            return self.stop_reason
        own_scores = self.scores.setdefault(trial, {})
        final_scores = [own_scores[name] for name in self.categories if name in own_scores]
        if final:
            own_scores[category] = score
        is_last = final and len(own_scores) == len(self.categories)
        reason = None
        if not is_last:
            reason = self._test_halving(trial, category, epoch, float(np.mean([*final_scores, score])))
            if reason is None and final and self.race.enabled:
                reason = self._test_race(trial)
        if reason is not None:
            self.pruned.add(trial)
        return reason

    def withdraw(self, trial: int) -> None:
        """Stops comparing other trials with a trial that ended for another reason, for instance a failure."""
        self.pruned.add(trial)

    def stop(self, reason: str) -> None:
        """Ends every trial at its next report."""
        self.stop_reason = reason

    def replay(self, trial: int, curves: dict[str, list[tuple[int, float]]]) -> None:
        """Restores the reports of a trial from an earlier process. Ignores decisions: the earlier process made them."""
        self.begin(trial)
        for category in self.categories:
            curve = curves.get(category, [])
            for number, (epoch, score) in enumerate(curve):
                self.report(trial, category, epoch, score, final=number + 1 == len(curve))
        self.pruned.discard(trial)

    def _test_halving(self, trial: int, category: str, epoch: int, score: float) -> str | None:
        """Adds a score to the trial's reports and tests whether successive halving prunes the trial at this score.

        Returns the reason to prune the trial; None if it goes on. The arguments are those of `report`, but `score` is the
        mean over the categories so far.
        """
        if self.study is None:
            return None
        if trial not in self.optuna_trials:
            self.begin(trial)
        # Steps count epochs over all categories, so that a rung can lie in any category.
        step = self.categories.index(category) * max(1, self.max_epochs) + max(1, epoch)
        self.reports[trial].append((score, step))
        self.optuna_trials[trial].report(score, step)
        if not self.optuna_trials[trial].should_prune():
            return None
        return f"successive halving: {score:.4f} after epoch {epoch} of {category} is not among the best at this rung"

    def _test_race(self, trial: int) -> str | None:
        """Tests whether the race prunes a trial that has just finished a category.

        Compares the trial with the best trial that is not pruned and has scores on the same categories. Returns the
        reason to prune the trial; None if it goes on.
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
        p_value = loss_p_value(gaps, self.race.prior_sd)
        if p_value >= self.race.alpha:
            return None
        return (
            f"race: on {', '.join(own_scores)} {float(np.mean(gaps)):.4f} behind the best trial so far "
            f"(p {p_value:.2g} below race.alpha {self.race.alpha:g})"
        )
