"""What sharing frozen work and racing over categories save in a sweep, on one private cluster.

    python -m benchmarks.sweep --data MVTEC_ROOT --categories bottle hazelnut_toy --weights resnet18.pth [--parts ...]

sharing: a grid over density settings only, with every trial making its own images and features, and with both made once.
work: the first one without Ray, in CPU seconds: what the machine is otherwise busy with does not enter.
race: a grid over learning rates, good and ruinous, in full and with the race over categories and successive halving over
steps. Costs are wall-clock of the sweep without Ray's start, and the steps trained; both ways run one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.harness import add_arguments, make_base_settings, merge_settings, open_data, print_json, print_table
from focus_ray.cluster.connect import connect_to_ray
from focus_ray.sweep.driver import run_sweep
from focus_ray.sweep.settings import list_grid_points, parse_sweep_config
from focus_ray.sweep.trial import clear_trial_caches, score_category
from focus_ray.sweep.trial_inputs import compute_frozen_features, load_category_images, split_for_scoring

DENSITY_SPACE = {
    "density.num_channels": [25, 50, 100, 150, 200, 300],
    "density.shrinkage": [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0],
}
RATES_SPACE = {"train.learning_rate": [1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0]}


def run_measured_sweep(base: dict[str, Any], space: dict[str, Any], name: str, **settings: Any) -> dict[str, Any]:
    """One sweep. Returns: its costs and its best."""
    config = parse_sweep_config({"base": base, "space": space, "searcher": "grid", "name": name, **settings})
    start = time.perf_counter()
    outcome = run_sweep(config, log=lambda message: print(message, file=sys.stderr, flush=True))
    seconds = time.perf_counter() - start
    if outcome.failed:
        sys.exit(f"{name}: {len(outcome.failed)} trials failed: {outcome.failed[0].reason}")
    best = outcome.best[None]
    return {
        "sweep": name,
        "seconds": seconds,
        "steps": sum(record.steps for record in outcome.records),
        "trials": len(outcome.records),
        "cut": sum(record.status == "cut" for record in outcome.records),
        "best": best.point,
        "score": best.score,
        "scores": {record.number: record.score for record in outcome.records},
    }


def run_grid_without_ray(
    base: dict[str, Any], space: dict[str, Any], categories: list[str], device: str
) -> list[dict[str, Any]]:
    """The same grid in this process, without Ray, in CPU seconds of the work alone: other work on the machine does not
    count. Every trial makes its own images and features; then all take those that are made once."""
    config = parse_sweep_config({"base": base, "space": space, "searcher": "grid"})
    reference = config.make_trial_config()
    size_px, points, on = reference.model.image_size_px, list_grid_points(config), torch.device(device)
    plans = {
        category: split_for_scoring(reference, category, "validation").build_plan(reference) for category in categories
    }
    samples = []
    for share in (False, True):
        clear_trial_caches()
        start = time.process_time()
        images: dict[str, Any] = {}
        features: dict[str, Any] = {}
        scores = []
        for point in points:
            settings, found = config.make_trial_config(point), []
            for category, plan in plans.items():
                if not share or category not in images:
                    images[category] = load_category_images(reference, category, plan, "validation", size_px)
                if share and category not in features:
                    features[category] = compute_frozen_features(reference, images[category], on)
                made = features.get(category)
                found.append(
                    score_category(settings, category, images[category], "validation", on, features=made).score
                )
            scores.append(statistics.mean(score for score in found if score is not None))
        seconds = time.process_time() - start
        best = max(range(len(points)), key=lambda number: scores[number])
        samples.append(
            {
                "sweep": "work shared" if share else "work unshared",
                "seconds": seconds,
                "steps": 0,
                "trials": len(points),
                "cut": 0,
                "best": points[best],
                "score": scores[best],
                "scores": scores,
            }
        )
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=3, help="of the race")
    parser.add_argument("--race-size-px", type=int, default=96)
    parser.add_argument("--parts", nargs="+", choices=("work", "sharing", "race"), default=["work", "sharing", "race"])
    parser.add_argument("--every", type=int, default=1, help="of the density settings' values, for the part 'work'")
    arguments = parser.parse_args()
    uri, categories = open_data(arguments)
    base = make_base_settings(arguments, uri)
    storage = f"{arguments.work}/sweeps-{time.time():.0f}"
    base = merge_settings(
        base, {"storage": storage, "data": {"categories": categories}, "cluster": {"use_gpu": "auto"}}
    )
    base = merge_settings(
        base, {"density": {"reduction": "semi_orthogonal", "coreset": 0}}
    )  # whose features trials can share
    samples = []
    if "work" in arguments.parts:
        space = {key: values[:: arguments.every] for key, values in DENSITY_SPACE.items()}
        samples += run_grid_without_ray(base, space, categories, arguments.device)
    if {"sharing", "race"} & set(arguments.parts):
        connect_to_ray()
    if "sharing" in arguments.parts:
        samples += [
            run_measured_sweep(base, DENSITY_SPACE, "unshared", share_work=False),
            run_measured_sweep(base, DENSITY_SPACE, "shared"),
        ]
    if "race" in arguments.parts:
        trained = merge_settings(
            base,
            {
                "model": {"image_size_px": arguments.race_size_px, "image_alignment": {"group": "none"}},
                "train": {"steps": arguments.steps, "batch_size": 16},
            },
        )
        samples += [
            run_measured_sweep(trained, RATES_SPACE, "full"),
            run_measured_sweep(trained, RATES_SPACE, "raced", race={"enabled": True}, scheduler={"kind": "asha"}),
        ]
    print()
    header = ("sweep", "trials", "cut", "steps", "seconds", "best", "score", "cost against the one above")
    rows = []
    for number, sample in enumerate(samples):
        key = "steps" if sample["steps"] else "seconds"
        ratio = f"{sample[key] / samples[number - 1][key]:.0%} of its {key}" if number % 2 else ""
        sample["ratio"] = sample[key] / samples[number - 1][key] if number % 2 else None
        rows.append(
            [
                sample["sweep"],
                sample["trials"],
                sample["cut"],
                sample["steps"],
                f"{sample['seconds']:.1f}",
                json.dumps(sample["best"]),
                sample["score"],
                ratio,
            ]
        )
    print_table(header, rows)
    print()
    print_json("sweep", arguments, samples)


if __name__ == "__main__":
    main()
