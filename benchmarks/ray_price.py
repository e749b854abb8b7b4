"""What Ray costs: training by gradient with and without Ray Train, and the ways from stored images to batches.

    python -m benchmarks.ray_price --data MVTEC_ROOT --categories bottle --weights resnet18.pth [--streamed] [--s3 URI]

Training is `focus-ray train` of fyd-single.yaml, each time in a new process: in that process alone, and by one Ray Train worker,
with the same number of OpenMP threads. Images a second are those of the intervals' own seconds, without the first; what passes
between intervals (reports, checkpoints) and around the fit (imports, Ray's start and end) stands beside them. The first step's
time is that of the first interval's message less its seconds; Ray's messages are looked for once a second, so it is up
to a second late.
--streamed adds runs that keep no decoded image in memory: by Ray Data, and by this project's own reader. --s3: the same data set,
ingested there; AWS variables in the environment say how.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import add_arguments, make_base_settings, merge_settings, open_data, print_table, save_json
from benchmarks.limits import time_interleaved
from focus_ray.bundle.bundle import read_manifest
from focus_ray.data.images import decode_batch
from focus_ray.data.read import read_index, read_rows
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import build_shard, read_blocks, read_train_batches
from focus_ray.fitting.split import compute_split_plan
from focus_ray.fyd.batch_schedule import BatchSchedule, split_into_intervals
from focus_ray.settings.sections import config_to_yaml

FYD = Path(__file__).resolve().parents[1] / "configs" / "fyd-single.yaml"
BARE, RAY = "in one process", "Ray Train, 1 worker"
COLUMNS = {
    "images_per_s": "images/s",
    "first_interval_s": "first interval, s",
    "first_step_s": "until the first step, s",
    "between_s": "between two intervals, s",
    "around_s": "around the fit, s",
    "wall_s": "all, s",
}


def build_variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> what its configuration has of its own."""
    found = {BARE: {"cluster": {"local": True}}, RAY: {"cluster": {"local": False}}}
    if arguments.streamed:
        unkept = {"data": {"memory_budget_mb": 0.0}}
        found |= {f"{name}, streamed": merge_settings(tree, unkept) for name, tree in found.items()}
    return found


def run_training(config: Config, category: str, threads: int) -> dict[str, float]:
    """One run of the command. Raises: RuntimeError: it failed; with what it said last."""
    file = Path(config.storage) / f"{config.name}.yaml"
    file.write_text(config_to_yaml(config))
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAY_USAGE_STATS_ENABLED": "0"}
    settings.pop("RAY_ADDRESS", None)  # a cluster of its own, whose start is measured
    settings.pop("PYTHONDONTWRITEBYTECODE", None)  # as users run it: no module is compiled anew at each start
    command = [sys.executable, "-m", "focus_ray.cli", "train", str(file)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=settings)
    assert process.stderr is not None
    said: list[str] = []
    told_s: float | None = None
    for line in process.stderr:
        said.append(line)
        if told_s is None and f"{category}: step " in line:
            told_s = time.perf_counter() - start
    if process.wait() or told_s is None:
        raise RuntimeError(f"{config.name} failed ({process.returncode}): {''.join(said)[-1500:]}")
    wall_s = time.perf_counter() - start
    manifest = read_manifest(Path(config.storage) / config.name / "bundles" / category)
    history, stages = manifest["metrics"]["history"], manifest["metrics"]["seconds"]
    batch_size = min(config.train.batch_size, manifest["data"]["num_fit"])
    intervals_s = [entry["seconds"] for entry in history]
    lengths = [len(interval) for interval in split_into_intervals(config.train.steps)]
    return {
        "images_per_s": statistics.median(
            length * batch_size / seconds for length, seconds in zip(lengths[1:], intervals_s[1:], strict=True)
        ),
        "first_interval_s": intervals_s[0],
        "first_step_s": told_s - intervals_s[0],
        "between_s": (stages["train"] - sum(intervals_s)) / len(intervals_s),
        "around_s": wall_s - sum(stages.values()),
        "wall_s": wall_s,
    }


def measure_training(arguments: argparse.Namespace, uri: str, category: str) -> dict[str, list[dict[str, float]]]:
    """Variant -> its runs, which take turns with those of the others."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in build_variants(arguments)}
    train = {"steps": arguments.steps, "batch_size": arguments.batch_size}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        shared = {
            "storage": str(Path(folder).absolute()),
            "data": {"uri": uri if "://" in uri else str(Path(uri).absolute()), "categories": [category]},
            "train": train,
            "cluster": {"use_gpu": arguments.device.startswith("cuda"), "num_workers": 1},
        }
        for repeat in range(arguments.repeats):
            for number, (name, own) in enumerate(build_variants(arguments).items()):
                run = {"name": f"run{repeat}-{number}"}
                tree = merge_settings(
                    yaml.safe_load(FYD.read_text()), make_base_settings(arguments, uri), shared, own, run
                )
                samples[name].append(run_training(parse_config(tree), category, arguments.threads))
                found = samples[name][-1]
                print(
                    f"{repeat + 1}: {name}: {found['images_per_s']:.1f} images/s, {found['wall_s']:.0f} s", flush=True
                )
    return samples


def print_training_table(samples: dict[str, list[dict[str, float]]]) -> None:
    print("\nTraining by gradient\n")
    rows = [[name, *(statistics.median(r[key] for r in runs) for key in COLUMNS)] for name, runs in samples.items()]
    print_table(("", *COLUMNS.values()), rows)
    for name, runs in samples.items():
        if name.startswith(RAY):
            bare = samples[name.replace(RAY, BARE)]
            ratios = [a["images_per_s"] / b["images_per_s"] for a, b in zip(runs, bare, strict=True)]
            longer = [a["wall_s"] - b["wall_s"] for a, b in zip(runs, bare, strict=True)]
            print(
                f"\n{name}: {statistics.median(ratios):.3f} of the images/s in one process, of {[round(r, 3) for r in ratios]}; "
                f"the run takes {statistics.median(longer):.1f} s longer, of {[round(s, 1) for s in longer]}"
            )


class ImageFileDataset(Dataset[Tensor]):
    """What a loader is usually given: files that Pillow opens and brings to a size, antialiased bilinear as ours."""

    def __init__(self, paths: Sequence[Path], side_px: int) -> None:
        self.paths, self.side_px = paths, side_px

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self.paths[number]) as image:
            small = image.convert("RGB").resize((self.side_px, self.side_px), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small))


def consume_batches(batches: Iterable[Any]) -> int:
    """Images of the batches, each of which is looked at."""
    return sum(len(batch) for batch in batches)


def build_data_loaders(config: Config, category: str, rows: Sequence[int], where: str) -> dict[str, Callable[[], int]]:
    """Name -> from a stored data set to batches; returns how many images came."""
    plan = compute_split_plan(config, category)
    uri = config.data.uri
    kept = build_shard(config, category, plan, 0, 1)
    unkept = config.model_copy(update={"data": config.data.model_copy(update={"memory_budget_mb": 0.0})})
    streamed = build_shard(unkept, category, plan, 0, 1)
    schedule = BatchSchedule.plan([len(plan.fit.rows)], 1, config.train.batch_size, config.train.seed)
    steps = range(schedule.count_batches_in_pass())

    def read_pass(shard: Any) -> int:
        return consume_batches(read_train_batches([shard], schedule, steps, partial(read_blocks, unkept)))

    def build() -> int:
        build_shard(config, category, plan, 0, 1)
        return plan.num_images

    return {
        f"bytes read, {where}": lambda: sum(1 for _ in read_rows(uri, category, rows, ("image",))),
        f"shard read into memory, {where}": build,
        f"pass over a shard that is streamed, {where}": lambda: read_pass(streamed),
        f"pass over a shard in memory, {where}": lambda: read_pass(kept),
    }


def measure_data_loading(arguments: argparse.Namespace, uri: str, category: str) -> dict[str, float]:
    """Way -> images a second, medians of rounds that take turns; the first round, which warms up, is left out."""
    tree = merge_settings(make_base_settings(arguments, uri), {"train": {"batch_size": arguments.batch_size}})
    config = parse_config(tree)
    frame, size = load_frame(config, category), arguments.batch_size
    rows = read_index(uri, category, "train")["row"].to_numpy().tolist()
    encoded = [record["image"] for record in read_rows(uri, category, rows, ("image",))]
    parts = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        paths = [Path(folder) / str(number) for number in range(len(encoded))]
        for path, content in zip(paths, encoded, strict=True):
            path.write_bytes(content)
        files = ImageFileDataset(paths, arguments.image_size_px)
        plain = DataLoader(files, size, shuffle=True)
        forked = DataLoader(files, size, shuffle=True, num_workers=2, persistent_workers=True)
        acts: dict[str, Callable[[], int]] = {
            "decoding alone, of bytes in memory": lambda: consume_batches(decode_batch(part, frame) for part in parts),
            "the same, 2 threads": lambda: consume_batches(decode_batch(part, frame, 2) for part in parts),
            "torch's DataLoader over files": lambda: consume_batches(plain),
            "the same, 2 workers": lambda: consume_batches(forked),
            **build_data_loaders(config, category, rows, "local"),
        }
        if arguments.s3:
            there = parse_config(merge_settings(tree, {"data": {"uri": arguments.s3}}))
            acts |= build_data_loaders(there, category, rows, "S3")
        counts = {name: act() for name, act in acts.items()}
        found = time_interleaved(acts, arguments.times)
    return {name: counts[name] / seconds for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--s3", help="the same data set, ingested on S3")
    parser.add_argument("--parts", nargs="+", choices=("train", "data"), default=["train", "data"])
    parser.add_argument("--streamed", action="store_true", help="also train without decoded images in memory")
    parser.add_argument("--steps", type=int, default=20, help="2 at least: the first interval is left out")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OpenMP's, of a training")
    parser.add_argument("--repeats", type=int, default=3, help="of the trainings")
    parser.add_argument("--times", type=int, default=5, help="of the ways of the data")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: 2 at least, because the first interval is left out")
    Path(arguments.work).mkdir(parents=True, exist_ok=True)
    uri, categories = open_data(arguments)
    samples: dict[str, dict[str, Any]] = {}
    for category in categories:
        samples[category] = {}
        print(f"\n{category}\n")
        if "train" in arguments.parts:
            samples[category]["train"] = measure_training(arguments, uri, category)
            print_training_table(samples[category]["train"])
        if "data" in arguments.parts:
            rates = samples[category]["data"] = measure_data_loading(arguments, uri, category)
            alone = next(iter(rates.values()))
            print(f"\nFrom stored images to batches of {arguments.batch_size}\n")
            print_table(("", "images/s", "of decoding alone"), [[n, rate, rate / alone] for n, rate in rates.items()])
    print()
    save_json("ray_price", arguments, samples)


if __name__ == "__main__":
    main()
