"""Proposes the settings that the trials of a sweep try. A point of the search space is one choice of all searched settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from focus_ray.seeds import derive_seed
from focus_ray.sweep.settings import Point, SweepConfig, list_grid_points

optuna.logging.set_verbosity(optuna.logging.WARNING)


def draw_random_points(sweep: SweepConfig) -> list[Point]:
    """Returns `num_planned_trials` different random points (choices of settings), or fewer if the search space has fewer points.

    With the same seed and search space, a larger number of planned trials begins with the same points.
    """
    rng = np.random.default_rng(derive_seed(sweep.seed, "points"))
    if all(domain.choice is not None for domain in sweep.space.values()):
        all_points = list_grid_points(sweep)
        return [all_points[number] for number in rng.permutation(len(all_points))[: sweep.num_planned_trials]]
    points: dict[str, Point] = {}  # by their texts, so that each point occurs once
    for _ in range(1000 * sweep.num_planned_trials):
        point = {key: domain.draw_value(rng) for key, domain in sweep.space.items()}
        points.setdefault(json.dumps(point, sort_keys=True), point)
        if len(points) == sweep.num_planned_trials:
            break
    return list(points.values())


class SettingsProposer:
    """Proposes the points (choices of settings) that the trials of one stage of a sweep try.

    To resume a sweep, pass the results of its earlier trials to `record_result` first.

    Attributes:
        points: All points in their order; empty for the searcher `optuna`.
        num_trials: Number of trials of the stage.
        optuna_trials: Number of each proposed or ended trial -> its Optuna trial while it runs, else None.
        study: Results of the trials, from which the searcher `optuna` learns.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self.sweep = sweep
        self.points = {"grid": list_grid_points, "random": draw_random_points, "optuna": lambda _: []}[sweep.searcher](
            sweep
        )
        self.num_trials = len(self.points) if self.points else sweep.num_planned_trials
        self.optuna_trials: dict[int, Any] = {}
        self.study = optuna.create_study(direction="maximize")
        # Optuna's choices are JSON texts, because it takes no lists.
        self._choices = {key for key, domain in sweep.space.items() if domain.choice is not None}
        self._distributions: dict[str, Any] = {}
        for key, domain in sweep.space.items():
            if domain.choice is not None:
                self._distributions[key] = CategoricalDistribution([json.dumps(value) for value in domain.choice])
            else:
                kind = IntDistribution if domain.is_integer else FloatDistribution
                self._distributions[key] = kind(*domain.bounds, log=domain.is_logarithmic)

    def propose_trial(self) -> tuple[int, Point] | None:
        """Proposes the next trial: returns its number and its settings, or None if all trials were proposed."""
        number = next((number for number in range(self.num_trials) if number not in self.optuna_trials), None)
        if number is None:
            return None
        if self.points:
            self.optuna_trials[number] = None
            return number, self.points[number]
        # Each number has a sampler of its own: the proposal depends on the earlier results and the number, but not on
        # how often the sweep was resumed.
        self.study.sampler = optuna.samplers.TPESampler(
            seed=derive_seed(self.sweep.seed, "proposal", number),
            n_startup_trials=max(2, min(10, self.num_trials // 3)),
            constant_liar=True,
        )
        trial = self.optuna_trials[number] = self.study.ask(self._distributions)
        return number, {
            key: json.loads(value) if key in self._choices else value for key, value in trial.params.items()
        }

    def record_result(
        self,
        number: int,
        point: Point,
        score: float | None,
        curve: Sequence[tuple[int, float]] = (),
        failed: bool = False,
    ) -> None:
        """Marks a trial as ended, so that its number is not proposed again. The searcher `optuna` also learns from its result.

        Args:
            number: Number of the trial.
            point: Settings of the trial.
            score: Score of the trial; None if the trial was pruned (stopped early for a low score) or failed.
            curve: (step, score) of all reports of the trial.
            failed: True if the trial failed. A failed trial teaches Optuna nothing.
        """
        trial, self.optuna_trials[number] = self.optuna_trials.get(number), None
        if self.points:
            return
        state = TrialState.FAIL if failed else TrialState.PRUNED if score is None else TrialState.COMPLETE
        if trial is not None:
            for step, value in curve:
                trial.report(value, step)
            self.study.tell(trial, score, state)
            return
        params = {key: json.dumps(value) if key in self._choices else value for key, value in point.items()}
        self.study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=self._distributions,
                value=score,
                state=state,
                intermediate_values=dict(curve),
            )
        )
