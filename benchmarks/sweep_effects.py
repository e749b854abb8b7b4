"""What changes the score of a sweep: the effect of each searched setting, with an interval.

    python -m benchmarks.sweep_effects SWEEP_FOLDER

For a range, the effect is the mean score of the trials above the median value minus that of the others; for a list, the mean
score of the trials with a value minus that of the others. The 95 % intervals are bootstraps over the finished trials, so use a
sweep with searcher=random: other searchers prefer some values to others, and the trials are then no independent samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.harness import print_table
from benchmarks.intervals import compute_percentile_interval

NUM_DRAWS = 10_000


def compute_effect(
    scores: NDArray[np.float64], is_high: NDArray[np.bool_], seed: int = 0
) -> tuple[float, float, float]:
    """Returns the difference of two mean scores, and its 95 % interval.

    Args:
        scores: (N,), score of each trial.
        is_high: (N,), trials of the first mean; the others give the second mean.
    """
    random = np.random.default_rng(seed)
    draws = [random.choice(part, (NUM_DRAWS, len(part))).mean(axis=1) for part in (scores[is_high], scores[~is_high])]
    return float(scores[is_high].mean() - scores[~is_high].mean()), *compute_percentile_interval(draws[0] - draws[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="folder of a finished sweep")
    arguments = parser.parse_args()
    table = pq.read_table(Path(arguments.sweep) / "trials.parquet").to_pandas()
    trials = table[(table["status"] == "finished") & table["score"].notna()]
    scores = trials["score"].to_numpy(float)
    rows = []
    for column in sorted(name for name in trials if name.startswith("param:")):
        values, setting = trials[column], column.removeprefix("param:")
        is_number = values.map(lambda value: isinstance(value, (int, float))).all()
        groups = {f"above {values.median():.4g}": (values > values.median()).to_numpy()} if is_number else {}
        if not is_number:
            groups = {str(value).strip('"'): (values == value).to_numpy() for value in sorted(set(values))}
        for group, is_high in groups.items():
            if 0 < is_high.sum() < len(scores):
                effect, low, high = compute_effect(scores, is_high)
                rows.append([setting, group, int(is_high.sum()), f"{effect:+.4f} ({low:+.4f} to {high:+.4f})"])
    print(
        f"{len(scores)} finished trials, score {scores.mean():.4f} on average, {scores.min():.4f} to {scores.max():.4f}"
    )
    print_table(("setting", "value", "trials", "score of these trials minus that of the others"), rows)


if __name__ == "__main__":
    main()
