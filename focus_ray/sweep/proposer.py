"""Proposes the points of a search space that trials try."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from focus_ray.seeds import derive_seed
from focus_ray.sweep.settings import Point, SweepConfig, grid_points


def random_points(sweep: SweepConfig) -> list[Point]:
    """Returns `planned_trials` different random points, or fewer if the search space has fewer points.

    A point depends only on the seed, its number and the points before it.
    """
    points: list[Point] = []
    known_texts: set[str] = set()
    rng = np.random.default_rng(derive_seed(sweep.seed, "points"))
    if all(domain.choice is not None for domain in sweep.space.values()):
        all_points = grid_points(sweep)
        return [all_points[number] for number in rng.permutation(len(all_points))[: sweep.planned_trials]]
    for _ in range(1000 * sweep.planned_trials):
        point = {key: domain.draw(rng) for key, domain in sweep.space.items()}
        if (text := json.dumps(point, sort_keys=True)) not in known_texts:
            known_texts.add(text)
            points.append(point)
        if len(points) == sweep.planned_trials:
            break
    return points


class Proposer:
    """Proposes the next point of a sweep. After the results of earlier trials, it continues where an earlier process ended.

    Attributes:
        points: All points in their order; empty for the searcher `optuna`.
        trials: Number of each proposed or ended trial -> its Optuna trial while it runs, else None.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self.sweep = sweep
        self.points = {"grid": grid_points, "random": random_points}.get(sweep.searcher, lambda _: [])(sweep)
        self.trials: dict[int, Any] = {}
        if sweep.searcher == "optuna":
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self.study = optuna.create_study(direction="maximize")

    @property
    def total(self) -> int:
        """Number of trials of the sweep."""
        return self.sweep.planned_trials if self.sweep.searcher == "optuna" else len(self.points)

    def ask(self) -> tuple[int, Point] | None:
        """Proposes the next trial: returns its number and its point, or None if all trials were proposed."""
        number = next((number for number in range(self.total) if number not in self.trials), None)
        if number is None:
            return None
        if self.sweep.searcher != "optuna":
            self.trials[number] = None
            return number, self.points[number]
        import optuna

        # Each number has a sampler of its own: the proposal depends on the earlier results and the number, but not on
        # how often the sweep was resumed.
        self.study.sampler = optuna.samplers.TPESampler(
            seed=derive_seed(self.sweep.seed, "proposal", number),
            n_startup_trials=max(2, min(10, self.total // 3)),
            constant_liar=True,
        )
        trial = self.study.ask(optuna_distributions(self.sweep))
        self.trials[number] = trial
        return number, {key: self._decode(key, value) for key, value in trial.params.items()}

    def tell(self, number: int, point: Point, score: float | None, curve: Sequence[tuple[int, float]] = ()) -> None:
        """Passes the result of a trial to the searcher (Optuna's ask-and-tell interface).

        Args:
            number: Number of the trial.
            point: Settings of the trial.
            score: Score of the trial; None if the trial was pruned.
            curve: (step, score) of all reports of the trial.
        """
        trial = self.trials.get(number)
        if self.sweep.searcher == "optuna":
            import optuna

            state = optuna.trial.TrialState.COMPLETE if score is not None else optuna.trial.TrialState.PRUNED
            if trial is not None:
                for step, value in curve:
                    trial.report(value, step)
                self.study.tell(trial, score, state)
            else:
                self.study.add_trial(
                    optuna.trial.create_trial(
                        params={key: self._encode(key, value) for key, value in point.items()},
                        distributions=optuna_distributions(self.sweep),
                        value=score,
                        state=state,
                        intermediate_values=dict(curve),
                    )
                )
        self.trials[number] = None

    def tell_failure(self, number: int) -> None:
        """Ends a proposed trial that failed. The searcher learns nothing from a failed trial."""
        trial = self.trials.get(number)
        if self.sweep.searcher == "optuna" and trial is not None:
            import optuna

            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self.trials[number] = None

    def _encode(self, key: str, value: Any) -> Any:
        """Returns a value as Optuna stores it: a choice as JSON text, because Optuna takes no lists."""
        return json.dumps(value) if self.sweep.space[key].choice is not None else value

    def _decode(self, key: str, value: Any) -> Any:
        """Returns the configuration's value for a value that Optuna stores (inverse of `_encode`)."""
        return json.loads(value) if self.sweep.space[key].choice is not None else value


def optuna_distributions(sweep: SweepConfig) -> dict[str, Any]:
    """Returns the search space as Optuna distributions. The values of a choice are JSON texts, because Optuna takes no lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, Any] = {}
    for key, domain in sweep.space.items():
        if domain.choice is not None:
            distributions[key] = CategoricalDistribution([json.dumps(value) for value in domain.choice])
        elif domain.is_integer:
            distributions[key] = IntDistribution(int(domain.ends[0]), int(domain.ends[1]), log=domain.is_log)
        else:
            distributions[key] = FloatDistribution(*domain.ends, log=domain.is_log)
    return distributions
