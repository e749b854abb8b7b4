"""Which point of a space comes next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from focus_ray.seeds import derive_seed
from focus_ray.sweep.settings import Point, SweepConfig, grid_points


def random_points(sweep: SweepConfig) -> list[Point]:
    """`planned_trials` points, none twice; point n depends on the seed and n and what came before alone."""
    points: list[Point] = []
    seen: set[str] = set()
    rng = np.random.default_rng(derive_seed(sweep.seed, "points"))
    if all(domain.choice is not None for domain in sweep.space.values()):
        whole = grid_points(sweep)
        return [whole[number] for number in rng.permutation(len(whole))[: sweep.planned_trials]]
    for _ in range(1000 * sweep.planned_trials):
        point = {key: domain.draw(rng) for key, domain in sweep.space.items()}
        if (text := json.dumps(point, sort_keys=True)) not in seen:
            seen.add(text)
            points.append(point)
        if len(points) == sweep.planned_trials:
            break
    return points


class Proposer:
    """Which point comes next; told of outcomes, it goes on from where an earlier process ended."""

    def __init__(self, sweep: SweepConfig) -> None:
        self.sweep = sweep
        self.known = {"grid": grid_points, "random": random_points}.get(sweep.searcher, lambda _: [])(sweep)
        self.asked: dict[int, Any] = {}  # numbers that were given out, or are done
        if sweep.searcher == "optuna":
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self.study = optuna.create_study(direction="maximize")

    @property
    def total(self) -> int:
        return self.sweep.planned_trials if self.sweep.searcher == "optuna" else len(self.known)

    def ask(self) -> tuple[int, Point] | None:
        """The next trial's number and point; None when all were given out."""
        number = next((number for number in range(self.total) if number not in self.asked), None)
        if number is None:
            return None
        if self.sweep.searcher != "optuna":
            self.asked[number] = None
            return number, self.known[number]
        import optuna

        # a sampler for each number: what it proposes depends on the outcomes so far and the number, not on how often
        # the sweep was taken up again
        self.study.sampler = optuna.samplers.TPESampler(
            seed=derive_seed(self.sweep.seed, "proposal", number),
            n_startup_trials=max(2, min(10, self.total // 3)),
            constant_liar=True,
        )
        trial = self.study.ask(distributions(self.sweep))
        self.asked[number] = trial
        return number, {key: self._decode(key, value) for key, value in trial.params.items()}

    def tell(self, number: int, point: Point, score: float | None, curve: Sequence[tuple[int, float]] = ()) -> None:
        """A trial's outcome: its score; or None where it was ended early, with (step, score) as far as it came."""
        trial = self.asked.get(number)
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
                        distributions=distributions(self.sweep),
                        value=score,
                        state=state,
                        intermediate_values=dict(curve),
                    )
                )
        self.asked[number] = None

    def fail(self, number: int) -> None:
        """A trial that gave nothing to learn from."""
        trial = self.asked.get(number)
        if self.sweep.searcher == "optuna" and trial is not None:
            import optuna

            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self.asked[number] = None

    def _encode(self, key: str, value: Any) -> Any:
        return json.dumps(value) if self.sweep.space[key].choice is not None else value

    def _decode(self, key: str, value: Any) -> Any:
        return json.loads(value) if self.sweep.space[key].choice is not None else value


def distributions(sweep: SweepConfig) -> dict[str, Any]:
    """The space in Optuna's words; a choice's values as JSON, since Optuna takes no lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, domain in sweep.space.items():
        if domain.choice is not None:
            found[key] = CategoricalDistribution([json.dumps(value) for value in domain.choice])
        elif domain.is_integer:
            found[key] = IntDistribution(int(domain.ends[0]), int(domain.ends[1]), log=domain.is_log)
        else:
            found[key] = FloatDistribution(*domain.ends, log=domain.is_log)
    return found
