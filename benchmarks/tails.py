"""Compares tail models and batch rules on the scores that `benchmarks.verdicts --output` saved. Fits no model; takes a minute.

    python -m benchmarks.tails DRAWS.jsonl [--target 0.05]

A prior is never judged on categories that it was fitted on: each category is judged with the prior of the others.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import gammaln

from benchmarks.harness import print_table
from focus_ray.detect.tail import NO_PRIOR, SHIPPED_PRIOR, TailPrior, fit_tail

Draw = dict[str, Any]
Threshold = Callable[[Draw, float], float]

HIGH_RATE = 0.15
WEIGHT = 0.5  # of the fitted prior
BATCH_SIZE, NUM_BATCHES = 100, 200  # of the simulation of inspected batches


def sum_relative_excesses(draw: Draw) -> tuple[int, float]:
    """Returns the number of excesses of a draw's tail, and their sum as a multiple of the start."""
    tail = fit_tail(np.sort(draw["image_scores"]), prior=NO_PRIOR)
    assert tail is not None
    degrees = round(1 / tail.shape)
    return degrees, degrees * tail.scale / tail.start


def fit_prior(draws: Sequence[Draw]) -> TailPrior:
    """Fits the prior by its marginal likelihood: sums of m excesses are Gamma(m, theta), theta is inverse-gamma."""
    degrees, sums = map(np.array, zip(*(sum_relative_excesses(draw) for draw in draws), strict=True))

    def negative_log_likelihood(logarithms: NDArray[np.float64]) -> float:
        a, b = np.exp(logarithms)
        terms = a * np.log(b) + gammaln(a + degrees) - gammaln(a) - (a + degrees) * np.log(b + sums)
        return -float(terms.sum())

    fitted = minimize(negative_log_likelihood, [1.0, -1.0], method="Nelder-Mead")
    return TailPrior(*(float(value) for value in np.exp(fitted.x)))


def make_threshold_of_prior(prior: TailPrior) -> TailPrior:
    return TailPrior(WEIGHT * prior.degrees, WEIGHT * prior.total)


def make_threshold_function(prior_of: Callable[[str], TailPrior]) -> Threshold:
    def threshold(draw: Draw, target: float) -> float:
        tail = fit_tail(np.sort(draw["image_scores"]), prior=prior_of(draw["category"]))
        assert tail is not None
        return tail.compute_score_at_share(target)

    return threshold


def find_ideal_threshold(draw: Draw, target: float) -> float:
    """Returns the threshold at which the good images of this draw have the target rate; no calibration can know it."""
    return float(np.quantile(draw["good"], 1 - target))


def measure_threshold_rates(
    draws: Sequence[Draw], threshold: Threshold, target: float
) -> tuple[float, str, float, float]:
    """Returns the mean rate, the worst category, the share of draws above `HIGH_RATE`, and the mean recall.

    Means are over categories, each of which counts its draws alike.
    """
    rates: dict[str, list[float]] = {}
    recalls: dict[str, list[float]] = {}
    for draw in draws:
        limit = threshold(draw, target)
        rates.setdefault(draw["category"], []).append(float(np.mean(np.array(draw["good"]) > limit)))
        recalls.setdefault(draw["category"], []).append(float(np.mean(np.array(draw["bad"]) > limit)))
    means = {category: float(np.mean(values)) for category, values in rates.items()}
    worst = max(means, key=lambda category: means[category])
    high = float(np.mean([rate > HIGH_RATE for values in rates.values() for rate in values]))
    recall = float(np.mean([np.mean(values) for values in recalls.values()]))
    return float(np.mean(list(means.values()))), f"{means[worst]:.2f} ({worst})", high, recall


def interpolate_recall_at_rate(draws: Sequence[Draw], threshold: Threshold, rate: float) -> float:
    """Returns the mean recall at the target whose mean realised rate is `rate`, interpolated between targets."""
    figures = [measure_threshold_rates(draws, threshold, target) for target in np.geomspace(0.005, 0.3, 150)]
    return float(np.interp(rate, [figure[0] for figure in figures], [figure[3] for figure in figures]))


def print_priors(draws: Sequence[Draw], target: float) -> None:
    categories = sorted({draw["category"] for draw in draws})
    left_out = {c: fit_prior([draw for draw in draws if draw["category"] != c]) for c in categories}
    half = {  # a harder test: the prior of five categories, judged on the other five
        part: fit_prior([draw for draw in draws if categories.index(draw["category"]) % 2 != part]) for part in (0, 1)
    }
    everything = fit_prior(draws)
    print(f"prior fitted on all {len(categories)} categories: {everything}; shipped: {SHIPPED_PRIOR}\n")
    methods = {
        "no prior": make_threshold_function(lambda category: NO_PRIOR),
        "prior of the other categories": make_threshold_function(lambda category: left_out[category]),
        "the same, half its weight (as shipped)": make_threshold_function(
            lambda category: make_threshold_of_prior(left_out[category])
        ),
        "prior of the other five, half its weight": make_threshold_function(
            lambda category: make_threshold_of_prior(half[categories.index(category) % 2])
        ),
        "ideal threshold of each draw": find_ideal_threshold,
    }
    rows: list[list[Any]] = []
    for num_images in sorted({draw["images"] for draw in draws}):
        subset = [draw for draw in draws if draw["images"] == num_images]
        rate = measure_threshold_rates(subset, methods["no prior"], target)[0]
        for name, threshold in methods.items():
            recall = interpolate_recall_at_rate(subset, threshold, rate)
            rows.append([num_images, name, len(subset), *measure_threshold_rates(subset, threshold, target), recall])
    header = ("good images", "tail", "draws", "FPR", "worst category", f"above {HIGH_RATE}", "recall")
    print_table((*header, "recall at the FPR without a prior"), rows)


def print_bias(draws: Sequence[Draw]) -> None:
    """Prints how leave-one-out scores differ from scores of new good images: mean over draws, and its standard error."""
    rows: list[list[Any]] = []
    for num_images in sorted({draw["images"] for draw in draws}):
        differences: dict[str, list[float]] = {}
        for draw in (draw for draw in draws if draw["images"] == num_images):
            own, good = np.sort(draw["image_scores"]), np.array(draw["good"])
            differences.setdefault("log ratio of medians", []).append(math.log(np.median(own) / np.median(good)))
            differences.setdefault("log ratio of means", []).append(math.log(own.mean() / good.mean()))
            for limit in (1.2, 1.3, 1.5):
                difference = float(np.mean(own > limit) - np.mean(good > limit))
                differences.setdefault(f"share above {limit}", []).append(difference)
            rate = float(np.mean(good > own[-1])) - 1 / (num_images + 1)
            differences.setdefault("good above the highest, less 1/(n + 1)", []).append(rate)
        for name, values in differences.items():
            rows.append([num_images, name, float(np.mean(values)), float(np.std(values) / math.sqrt(len(values)))])
    print_table(("good images", "leave-one-out against new good images", "mean", "standard error"), rows)


def print_batches(draws: Sequence[Draw], target: float) -> None:
    """Prints fixed thresholds against Benjamini-Hochberg in batches: false alarms and defects of all parts together.

    Each batch takes good and bad scores of one draw at random. `Benjamini-Hochberg` bounds the share of false alarms among
    alarms at the target or at 0.2; `fixed` calls p <= target bad, or p at the target of the same realised rate.
    """
    rng = np.random.default_rng(0)
    rows: list[list[Any]] = []
    for defect_share in (0.01, 0.05, 0.2):
        batches: list[tuple[NDArray[np.float64], NDArray[np.bool_]]] = []
        for _ in range(NUM_BATCHES):
            draw = draws[rng.integers(len(draws))]
            defective = rng.random(BATCH_SIZE) < defect_share
            scores = np.where(defective, rng.choice(draw["bad"], BATCH_SIZE), rng.choice(draw["good"], BATCH_SIZE))
            batches.append((compute_p_values(draw, scores), defective))
        values, defective = (np.concatenate(part) for part in zip(*batches, strict=True))
        for level in (target, 0.2):
            adaptive = np.concatenate([select_benjamini_hochberg(p, level) for p, _ in batches])
            equal_rate = float(np.quantile(values[~defective], adaptive[~defective].mean()))
            for name, called in (
                (f"fixed, p <= {target:g}", values <= target),
                (f"Benjamini-Hochberg at {level:g}", adaptive),
                ("fixed, at the rate of the row above", values <= equal_rate),
            ):
                precision = float(defective[called].mean()) if called.any() else math.nan
                figures = [float(called[~defective].mean()), float(called[defective].mean()), precision]
                if [defect_share, name, *figures] not in rows:
                    rows.append([defect_share, name, *figures])
    print_table(("defects", "rule", "FPR", "recall", "share of alarms that are right"), rows)


def compute_p_values(draw: Draw, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the p-values of scores under the calibration that the shipped prior gives."""
    own = np.sort(draw["image_scores"])
    tail = fit_tail(own)
    assert tail is not None
    counted = (1 + own.size - np.searchsorted(own, scores)) / (own.size + 1)
    return np.where(scores > tail.start, tail.compute_share_above(scores), counted)


def select_benjamini_hochberg(values: NDArray[np.float64], level: float) -> NDArray[np.bool_]:
    """Returns which of n p-values are among the k smallest, k the largest with p_(k) <= level k/n."""
    order = np.sort(values)
    below = np.flatnonzero(order <= level * np.arange(1, order.size + 1) / order.size)
    return values <= order[below[-1]] if below.size else np.zeros(values.shape, dtype=bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draws", type=Path, help="JSON Lines of `benchmarks.verdicts --output`")
    parser.add_argument("--target", type=float, default=0.05)
    arguments = parser.parse_args()
    draws = [json.loads(line) for line in arguments.draws.read_text().splitlines()]
    print_priors(draws, arguments.target)
    print()
    print_bias(draws)
    print()
    print_batches(draws, arguments.target)


if __name__ == "__main__":
    main()
