"""How often a distribution shift is told wrongly, and how large a shift is found.

    python -m benchmarks.shift [--verdicts DRAWS.jsonl] [--draws 1000] [--streams 100]

Labelled sets: n calibration scores and m new good scores, drawn alike (wrong notices), or with the new scores times a factor.
Streams: 10,000 images, tested as the service and `watch` do, with and without defects among them. With --verdicts: scores that
`benchmarks.verdicts --output` wrote, of real categories. Their good images were drawn at random, so the others are exchangeable.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from benchmarks.harness import print_json, print_table
from focus_ray.detect.shift import StreamShiftMonitor, compare_stream_with_calibration, compare_with_calibration_scores
from focus_ray.reporting.caveats import Share

Scores = NDArray[np.float64]
NUM_CALIBRATING, NUM_NEW = (10, 20, 60, 200), (5, 12, 40, 200)
STREAM_CALIBRATING = (10, 60, 200, 1000)
STREAM_IMAGES, STREAM_BATCH = 10_000, 25
SPREAD = 0.08  # of the logarithm of scores, about the median over the real categories
DISTRIBUTIONS: Mapping[str, Callable[[Generator, int], Scores]] = {
    "normal": lambda random, count: 1 + 0.1 * random.normal(size=count),
    "lognormal": lambda random, count: np.exp(SPREAD * random.normal(size=count)),
    "exponential": lambda random, count: 1 + 0.1 * random.exponential(size=count),
    "heavy (t, 3)": lambda random, count: 5 + 0.1 * random.standard_t(3, size=count),
}
CHANGES: Mapping[str, Callable[[Generator, Scores], Scores]] = {
    "x 1": lambda random, scores: scores,
    "x 1.05": lambda random, scores: 1.05 * scores,
    "x 1.1": lambda random, scores: 1.1 * scores,
    "x 1.2": lambda random, scores: 1.2 * scores,
    "x 1.5": lambda random, scores: 1.5 * scores,
    "a fifth x 1.5": lambda random, scores: np.where(random.random(scores.size) < 0.2, 1.5, 1.0) * scores,
    "x 0.9": lambda random, scores: 0.9 * scores,
}


def find_notice_direction(calibration: Scores, new: Scores) -> str | None:
    shift = compare_with_calibration_scores(calibration, new)
    return None if shift is None else shift.direction


def measure_wrong_notices(draws: int) -> list[list[Any]]:
    """Rows of n, m and the share of exchangeable draws with a notice, for each distribution."""
    random, rows = np.random.default_rng(0), []
    for n in NUM_CALIBRATING:
        for m in NUM_NEW:
            shares = [
                np.mean([find_notice_direction(draw(random, n), draw(random, m)) is not None for _ in range(draws)])
                for draw in DISTRIBUTIONS.values()
            ]
            rows.append([n, m, *(float(share) for share in shares)])
    return rows


def measure_found_shifts(draws: int) -> list[list[Any]]:
    """Rows of n, m and the share of changed draws whose notice has the right direction, for each change."""
    random, rows = np.random.default_rng(1), []
    draw = DISTRIBUTIONS["lognormal"]
    for n in NUM_CALIBRATING:
        for m in NUM_NEW:
            row: list[Any] = [n, m]
            for name, change in list(CHANGES.items())[1:]:
                expected = "lower" if name == "x 0.9" else "higher"
                found = [find_notice_direction(draw(random, n), change(random, draw(random, m))) for _ in range(draws)]
                row.append(float(np.mean([direction == expected for direction in found])))
            rows.append(row)
    return rows


def count_images_until_notice(calibration: Scores, stream: Scores) -> int | None:
    """Images of a stream after which the first notice came; None: none came."""
    recent = StreamShiftMonitor()
    for end in range(STREAM_BATCH, stream.size + 1, STREAM_BATCH):
        due = recent.add(stream[end - STREAM_BATCH : end].tolist())
        if due and recent.report_shift_once(
            compare_stream_with_calibration(calibration, recent.take_scores_for_test())
        ):
            return end
    return None


def measure_stream_notices(count: int) -> list[list[Any]]:
    """Rows of n and share of defects: streams with a wrong notice, then the median of images until a shift by 1.2 is told."""
    random, rows = np.random.default_rng(2), []
    draw = DISTRIBUTIONS["lognormal"]
    for n in STREAM_CALIBRATING:
        for defects in (0.0, 0.05, 0.1):
            wrong, until = [], []
            for _ in range(count):
                calibration, stream = draw(random, n), draw(random, STREAM_IMAGES)
                stream[random.random(stream.size) < defects] *= 3
                wrong.append(count_images_until_notice(calibration, stream) is not None)
                found = count_images_until_notice(calibration, 1.2 * stream[:2000])
                until.append(np.inf if found is None else found)
            median = float(np.median(until))
            rows.append([n, defects, float(np.mean(wrong)), None if np.isinf(median) else int(median)])
    return rows


def measure_real_draws(samples: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of images: draws, share with a notice for each change, and share whose rate is above the target beyond chance."""
    random, rows = np.random.default_rng(3), []
    for images in sorted({sample["images"] for sample in samples}):
        chosen = [sample for sample in samples if sample["images"] == images]
        row: list[Any] = [images, len({sample["category"] for sample in chosen}), len(chosen)]
        for change in CHANGES.values():
            found = [
                find_notice_direction(np.array(s["image_scores"]), change(random, np.array(s["good"]))) for s in chosen
            ]
            row.append(float(np.mean([direction is not None for direction in found])))
        rates = [Share(round(sample["fpr"] * len(sample["good"])), len(sample["good"])) for sample in chosen]
        row.append(float(np.mean([rate.bounds[0] > 0.05 for rate in rates])))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", help="JSON Lines of benchmarks.verdicts; only draws of the method `auto` count")
    parser.add_argument("--draws", type=int, default=1000, help="for each cell of the tables of sets (default: 1000)")
    parser.add_argument("--streams", type=int, default=100, help="for each row of the last table (default: 100)")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    tables: dict[str, list[list[Any]]] = {}

    def print_rows(name: str, header: Sequence[str], rows: list[list[Any]]) -> None:
        tables[name] = rows
        print(f"\n{name}\n")
        print_table(header, rows)

    if arguments.verdicts:
        lines = Path(arguments.verdicts).read_text().splitlines()
        samples = [sample for sample in map(json.loads, lines) if sample["method"] == "auto"]
        header = ["good images", "categories", "draws", *CHANGES, "rate above 0.05 beyond chance"]
        print_rows("real draws: share with a notice", header, measure_real_draws(samples))
    sizes = ["calibrating", "new"]
    print_rows("wrong notices", [*sizes, *DISTRIBUTIONS], measure_wrong_notices(arguments.draws))
    print_rows("shifts found", [*sizes, *list(CHANGES)[1:]], measure_found_shifts(max(1, arguments.draws // 2)))
    header = ["calibrating", "defects", "streams of 10,000 with a wrong notice", "images until x 1.2 is told"]
    print_rows("streams", header, measure_stream_notices(arguments.streams))
    print()
    print_json("shift", arguments, tables)


if __name__ == "__main__":
    main()
