"""When a trial has lost: a race over categories by a moderated paired test, and successive halving over epochs. No Ray.

A trial is judged category by category, in one order for all. docs/use/sweeps.md says what each rule assumes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from focus_ray.sweep.settings import RaceConfig, SweepConfig

PRIOR_DF = 4.0  # how many categories' worth of belief stands behind race.prior_sd


def p_value_of_loss(differences: Sequence[float], prior_sd: float) -> float:
    """How likely gaps like these would be if the trial were as good as the other one, on one side.

    A paired t-test over categories whose variance is drawn towards `prior_sd` as by `PRIOR_DF` more categories
    (the moderated t of Smyth 2004): it speaks from the first category on, when it leans on the prior alone, and becomes
    the plain paired test as categories add up.

    Args:
        differences: the other's score less the trial's, one a category.
    """
    from scipy.stats import t as student

    gaps = np.asarray(differences, dtype=np.float64)
    df = PRIOR_DF + len(gaps) - 1
    variance = (PRIOR_DF * prior_sd**2 + float(np.square(gaps - gaps.mean()).sum())) / df
    return float(student.sf(gaps.mean() / math.sqrt(variance / len(gaps)), df))


class Judge:
    """Hears every trial's scores in the order in which they come, and says when one is to end.

    Args:
        categories: in the order in which every trial is judged.
        max_epochs: the most that any trial trains; 0 where nothing trains.
    """

    def __init__(self, sweep: SweepConfig, categories: Sequence[str], max_epochs: int) -> None:
        self.race: RaceConfig = sweep.race
        self.categories, self.max_epochs = list(categories), max_epochs
        self.scores: dict[int, dict[str, float]] = {}  # of a trial: what it ended each category with
        self.cut: set[int] = set()
        self.stopping: str | None = None
        self.scheduler = sweep.scheduler
        self.heard: dict[int, list[tuple[float, int]]] = {}  # of a trial: score and step, in the order of all
        self.trials: dict[int, Any] = {}
        self.study: Any = self._new_study()

    def _new_study(self) -> Any:
        if self.scheduler.kind != "asha":
            return None
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=self.scheduler.grace_epochs, reduction_factor=self.scheduler.reduction_factor
        )
        return optuna.create_study(direction="maximize", pruner=pruner)

    def begin(self, trial: int) -> None:
        """A trial starts, or starts again after its machine was lost: what it said before no longer counts."""
        self.scores.pop(trial, None)
        self.cut.discard(trial)
        if self.study is None:
            return
        if self.heard.pop(trial, None):  # a study forgets nothing, so that the trial would compete with its former self
            self.study, self.trials = self._new_study(), {}
            for other, heard in self.heard.items():
                self.trials[other] = self.study.ask()
                for score, step in heard:
                    self.trials[other].report(score, step)
                    self.trials[other].should_prune()
        self.heard[trial] = []
        self.trials[trial] = self.study.ask()

    def report(self, trial: int, category: str, epoch: int, score: float, final: bool) -> str | None:
        """Takes in a score.

        Args:
            epoch: how many epochs the network was trained.  final: whether the category ends with this score.

        Returns: why the trial is to end now; None: go on.
        """
        if self.stopping is not None:
            return self.stopping
        mine = self.scores.setdefault(trial, {})
        done = [mine[name] for name in self.categories if name in mine]
        if final:
            mine[category] = score
        is_last = final and len(mine) == len(self.categories)
        reason = None
        if not is_last:
            reason = self._halve(trial, category, epoch, float(np.mean([*done, score])))
            if reason is None and final and self.race.enabled:
                reason = self._lost(trial)
        if reason is not None:
            self.cut.add(trial)
        return reason

    def withdraw(self, trial: int) -> None:
        """A trial ended for a reason of its own: others are no longer held against it."""
        self.cut.add(trial)

    def stop(self, reason: str) -> None:
        """Ends every trial at its next report."""
        self.stopping = reason

    def replay(self, trial: int, curves: dict[str, list[tuple[int, float]]]) -> None:
        """Takes in what a trial of an earlier process reported; the verdicts were given then."""
        self.begin(trial)
        for category in self.categories:
            curve = curves.get(category, [])
            for number, (epoch, score) in enumerate(curve):
                self.report(trial, category, epoch, score, final=number + 1 == len(curve))
        self.cut.discard(trial)

    def _halve(self, trial: int, category: str, epoch: int, score: float) -> str | None:
        if self.study is None:
            return None
        if trial not in self.trials:
            self.begin(trial)
        step = self.categories.index(category) * max(1, self.max_epochs) + max(1, epoch)
        self.heard[trial].append((score, step))
        self.trials[trial].report(score, step)
        if not self.trials[trial].should_prune():
            return None
        return f"successive halving: {score:.4f} after epoch {epoch} of {category} is not among the best at this rung"

    def _lost(self, trial: int) -> str | None:
        """The race over categories."""
        mine = self.scores[trial]
        if len(mine) < self.race.grace_categories:
            return None
        others = [
            scores
            for number, scores in self.scores.items()
            if number not in {trial, *self.cut} and mine.keys() <= scores.keys()
        ]
        if not others:
            return None
        best = max(others, key=lambda scores: float(np.mean([scores[name] for name in mine])))
        gaps = [best[name] - mine[name] for name in mine]
        p_value = p_value_of_loss(gaps, self.race.prior_sd)
        if p_value >= self.race.alpha:
            return None
        return (
            f"race: on {', '.join(mine)} {float(np.mean(gaps)):.4f} behind the best so far "
            f"(p {p_value:.2g} below race.alpha {self.race.alpha:g})"
        )
