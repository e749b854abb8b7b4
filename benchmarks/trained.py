"""Does the training of FYD help? One network is trained over many categories, and compared with the untrained network.

    python -m benchmarks.trained --data ROOT [ROOT ...] --weights resnet18.pth [--seeds 0 1 2] [--arms resnet18 ...]

The categories are divided into two halves. A network is trained on one half, with batches within a category, balanced over
the categories, and then fitted and measured on all categories: those of its half ("in training") and the others ("unseen").
RESULTS.md has the plan: arms, metrics and the rule of the decision. Finished networks are kept in results/trained.jsonl, so that
a later call adds seeds; the tables are over everything in this file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, describe_environment, make_inspector, merge_settings, print_table, read_samples
from benchmarks.intervals import compute_percentile_interval
from focus_ray.data.read import list_categories, read_test_rows
from focus_ray.density.base import choose_evenly_spaced
from focus_ray.features.network import FocusNet, build_network
from focus_ray.fitting.fit import fit
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.split import compute_split_plan
from focus_ray.fyd.batch_schedule import BatchSchedule
from focus_ray.fyd.training import FydTraining, count_batches_to_read, recompute_running_statistics
from focus_ray.ingestion.ingest import ingest

BATCH_SIZE = 16
FILE = RESULTS / "trained.jsonl"
FIGURES = ("image_auroc", "aupro_0.3")
FCA = {"feature_alignment": dict.fromkeys(("layer1", "layer2", "layer3"), "rotation_scale")}
ARMS: dict[str, dict[str, Any]] = {
    "resnet18": {"batch_norm": "frozen"},
    "resnet18 + FCA": {"batch_norm": "frozen", **FCA},
    "efficientnet_lite0": {"batch_norm": "train"},
    "efficientnet_lite0 + FCA": {"batch_norm": "train", **FCA},
    "efficientnet_lite0, frozen": {"batch_norm": "frozen"},
}
DENSITIES: dict[str, dict[str, Any]] = {
    # as PaDiM and RegAD: an absolute ridge, stride 4, unsmoothed features
    "gaussian": {
        "density": {"kind": "gaussian", "reduction": "random", "shrinkage": "0.01 absolute", "map_stride_px": 4},
        "scoring": {"image_score": "maximum"},
    },
    "default": {},
}


def find_categories(roots: Sequence[str], work: Path) -> dict[str, str]:
    """Ingests folders of images that are no data set yet. Returns: category -> URI of its data set, sorted by category."""
    places = {}
    for number, root in enumerate(roots):
        uri = root
        if not any(Path(root).glob("category=*")):
            uri = str(work / f"data{number}")
            if not Path(uri).exists():
                ingest(root, uri, progress=False)
        places.update(dict.fromkeys(list_categories(uri), uri))
    return dict(sorted(places.items()))


def choose_rows(uri: str, category: str, limit: int) -> list[Any]:
    """Returns at most `limit` test rows, evenly chosen among good and among defective images."""
    rows = list(read_test_rows(uri, category))
    groups = [[row for row in rows if bool(row["label"]) == label] for label in (False, True)]
    share = limit / max(limit, len(rows))
    chosen = [
        [group[i] for i in sorted(choose_evenly_spaced(len(group), max(1, round(share * len(group)))))]
        for group in groups
    ]
    return [row for group in chosen for row in group]


class Plant:
    """The images of all categories at one size, in memory.

    Attributes:
        train: category -> (N, H, W, 3) uint8, good images that train the network and fill the density.
        tests: category -> test rows.
    """

    def __init__(self, places: Mapping[str, str], model: Mapping[str, Any], max_train: int, max_test: int) -> None:
        self.places, self.plans, self.tests, self.train = places, {}, {}, {}
        for category, uri in places.items():
            config = parse_config({"data": {"uri": uri}, "model": dict(model)})
            plan = compute_split_plan(config, category)
            chosen = sorted(choose_evenly_spaced(len(plan.fit.rows), max_train))
            self.plans[category] = plan = plan.select_fit_images(chosen)
            self.train[category] = build_shard(config, category, plan, 0, 1).images
            self.tests[category] = choose_rows(uri, category, max_test)


def train_network(config: Config, plant: Plant, categories: Sequence[str]) -> tuple[FocusNet, list[Any]]:
    """Trains a network on some categories. Returns: the network, and the metrics of each interval."""
    train, device = config.train, torch.device("cpu")
    torch.manual_seed(train.seed)
    net = build_network(config.model).to(memory_format=torch.channels_last)
    training = FydTraining(net, device, train)
    images = [plant.train[category] for category in categories]
    schedule = BatchSchedule.plan([len(shares) for shares in images], 1, train.batch_size, train.seed)
    training.build_optimizer_and_schedule(schedule)
    numbers = schedule.iterate_batches(range(count_batches_to_read(train, schedule)))
    batches = (images[category][chosen] for category, chosen in numbers)
    history = []
    for figures in training.run_intervals(batches):
        history.append({name: round(value, 5) for name, value in figures.items()})
        print(history[-1], flush=True)
    recompute_running_statistics(net, batches, device)
    return net.eval(), history


def get_backbone(arm: str) -> str:
    """Returns the backbone of an arm: the first word of its name."""
    return arm.partition(" ")[0].rstrip(",")


def measure_network(
    net: FocusNet, model: Mapping[str, Any], plant: Plant, category: str, density: str, seed: int
) -> dict[str, Any]:
    """Fits one density to the features of a network, and returns its metrics on the test images of a category."""
    settings = {"data": {"uri": plant.places[category]}, "model": dict(model), "train": {"seed": seed}}
    config = parse_config(merge_settings(settings, DENSITIES[density]))
    plan = plant.plans[category]
    shard = build_shard(config, category, plan, 0, 1)
    result = fit(config, shard, len(plan.fit.rows), torch.device("cpu"), net=copy.deepcopy(net))
    figures = make_inspector(config, category, result, "cpu").evaluate(plant.tests[category])
    return {name: figures[name] for name in FIGURES}


def run_arm(arm: str, fold: int | None, seed: int, plant: Plant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains the network of an arm on one half of the categories (None: trains nothing), and measures it on all of them."""
    start = time.perf_counter()
    backbone = get_backbone(arm)
    model = {
        "backbone": backbone,
        "weights": arguments.weights if backbone == "resnet18" else "default",
        "image_size_px": arguments.image_size_px,
        "image_alignment": {"group": "none"},
        **ARMS[arm],
    }
    if fold is None:
        model.pop("feature_alignment", None)
    train = {"seed": seed, "steps": 0 if fold is None else arguments.steps, "batch_size": BATCH_SIZE, "lambda_ica": 0.0}
    config = parse_config(
        {"data": {"uri": "unused"}, "model": model, "train": {**train, "learning_rate": arguments.learning_rate}}
    )
    categories = list(plant.places)
    half = [] if fold is None else categories[fold::2]
    if fold is None:
        net, history = build_network(config.model).eval(), []
    else:
        net, history = train_network(config, plant, half)
    trained_s = time.perf_counter() - start
    figures = {
        category: {density: measure_network(net, model, plant, category, density, seed) for density in DENSITIES}
        for category in categories
    }
    return {
        "arm": arm, "fold": fold, "seed": seed, "steps": 0 if fold is None else arguments.steps,
        "learning_rate": arguments.learning_rate, "image_size_px": arguments.image_size_px, "in_training": half,
        "history": history, "figures": figures, "seconds": [round(trained_s), round(time.perf_counter() - start - trained_s)],
        **describe_environment("cpu"),
    }  # fmt: skip


def compute_differences(
    samples: Sequence[Mapping[str, Any]], arm: str, density: str, name: str, seen: bool
) -> dict[str, float]:
    """Returns category -> mean over seeds of trained minus untrained, for categories in training (`seen`) or the others."""
    baseline = {
        (sample["seed"], get_backbone(sample["arm"])): sample["figures"] for sample in samples if sample["fold"] is None
    }
    differences: dict[str, list[float]] = {}
    for sample in samples:
        before = baseline.get((sample["seed"], get_backbone(arm)))
        if sample["arm"] != arm or sample["fold"] is None or before is None:
            continue
        for category, figures in sample["figures"].items():
            value, reference = figures[density][name], before[category][density][name]
            if (category in sample["in_training"]) == seen and value is not None and reference is not None:
                differences.setdefault(category, []).append(value - reference)
    return {category: statistics.mean(values) for category, values in differences.items()}


def format_difference(differences: Mapping[str, float]) -> str:
    """Returns the mean over categories with a 95 % interval from a bootstrap over the categories."""
    if not differences:
        return "-"
    values = np.array(list(differences.values()))
    low, high = compute_percentile_interval(np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1))
    return f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def print_report(samples: Sequence[Mapping[str, Any]]) -> None:
    """Prints the means of the untrained networks, and the differences that the training makes."""
    rows = []
    for sample in (sample for sample in samples if sample["fold"] is None):
        for density in DENSITIES:
            columns = [[figures[density][name] for figures in sample["figures"].values()] for name in FIGURES]
            means = [statistics.mean(value for value in column if value is not None) for column in columns]
            rows.append([sample["arm"], sample["seed"], density, *means])
    print_table(("untrained", "seed", "density", "image AUROC", "AUPRO 0.3"), rows)
    print()
    rows = []
    for arm, density, seen in itertools.product(ARMS, DENSITIES, (True, False)):
        differences = [compute_differences(samples, arm, density, name, seen) for name in FIGURES]
        if differences[0]:
            kind = "in training" if seen else "unseen"
            rows.append([arm, density, kind, len(differences[0]), *map(format_difference, differences)])
    print_table(("trained - untrained", "density", "categories", "number", "image AUROC", "AUPRO 0.3"), rows)
    print()
    rows = []
    for arm, density in itertools.product(ARMS, DENSITIES):
        unseen = compute_differences(samples, arm, density, "image_auroc", False)
        if unseen:
            rows.append(
                [arm, density, ", ".join(f"{category} {value:+.3f}" for category, value in sorted(unseen.items()))]
            )
    print_table(("arm", "density", "image AUROC of unseen categories, trained - untrained"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="*", default=[], help="folders of images, or data sets; none prints the stored results"
    )
    parser.add_argument("--weights", default="default", help="weights of ResNet-18")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--image-size-px", type=int, default=128)
    parser.add_argument("--max-train", type=int, default=100, help="training images of a category")
    parser.add_argument("--max-test", type=int, default=150, help="test images of a category")
    parser.add_argument("--work", default="scratch/trained")
    arguments = parser.parse_args()
    samples = read_samples(str(FILE))
    if arguments.data:
        places = find_categories(arguments.data, Path(arguments.work))
        plant = Plant(places, {"image_size_px": arguments.image_size_px}, arguments.max_train, arguments.max_test)
        print({category: (len(plant.train[category]), len(plant.tests[category])) for category in places}, flush=True)
        finished = {(sample["arm"], sample["fold"], sample["seed"]) for sample in samples}
        for seed in arguments.seeds:
            arms = {get_backbone(arm): arm for arm in reversed(arguments.arms)}
            for arm, fold in [*((arm, None) for arm in arms), *itertools.product(arguments.arms, (0, 1))]:
                if (arm, fold, seed) in finished:
                    continue
                print(f"== {arm}, half {fold}, seed {seed}", flush=True)
                sample = run_arm(arm, fold, seed, plant, arguments)
                samples.append(sample)
                RESULTS.mkdir(exist_ok=True)
                with FILE.open("a") as file:
                    file.write(json.dumps(sample) + "\n")
    print_report(samples)


if __name__ == "__main__":
    main()
