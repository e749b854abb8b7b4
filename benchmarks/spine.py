"""The spine's figures: plain baseline accuracy, cost of a fit, inspection throughput against the bare backbone, start-up.

    python -m benchmarks.spine --data MVTEC_ROOT --weights resnet18.pth [--categories bottle screw]

Accuracy is the plain baseline's (configs/padim.yaml): no alignment, nothing trained. Throughput is measured for the plain
baseline and for the default configuration, each against the bare backbone's layers 1 to 3 in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import (
    add_arguments,
    fit_category,
    make_base_settings,
    merge_settings,
    open_data,
    print_json,
    print_table,
    train_and_evaluate,
)
from focus_ray.data.images import decode_batch
from focus_ray.data.read import read_index, read_rows
from focus_ray.density.base import build_density
from focus_ray.density.moments import Moments
from focus_ray.detect.detector import embed_images
from focus_ray.features.backbones.base import build_backbone
from focus_ray.features.network import convert_to_float_images
from focus_ray.fitting.settings import parse_config

ROUNDS = 5


def make_padim_settings() -> dict[str, Any]:
    tree = yaml.safe_load((Path(__file__).parent.parent / "configs" / "padim.yaml").read_text())
    return {
        "model": {key: tree["model"][key] for key in ("image_alignment", "padding")},
        "density": tree["density"],
        "scoring": tree["scoring"],
    }


def measure_density_seconds(tree: dict[str, Any], category: str, device: str) -> dict[str, float]:
    """Seconds of moments and factorisation beyond feature extraction, over all normal training images."""
    config = parse_config(
        {**tree, "calibration": {"method": "cross"}, "data": {**tree["data"], "holdout_fraction": 0.0}}
    )
    result, _ = fit_category(config, category, device)
    rows = read_index(config.data.uri, category, "train")["row"].to_numpy()
    size = config.model.image_size_px
    embeddings = []
    batch: list[bytes] = []
    records = list(read_rows(config.data.uri, category, rows, ("image",)))
    with torch.inference_mode():
        for start in range(0, len(records), 32):
            batch = [record["image"] for record in records[start : start + 32]]
            images = convert_to_float_images(torch.from_numpy(decode_batch(batch, size)), device)
            embeddings.append(embed_images(result.detector.net, result.detector.reduction, images)[0])
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            side, channels = embeddings[0].shape[2], embeddings[0].shape[1]
            moments = Moments(side, side, channels, device)
            for embedding in embeddings:
                moments.add_embeddings(embedding)
            result.statistics.moments = moments
            build_density(config.density, result.statistics)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return {
        "num_images": len(records),
        "places": side * side,
        "channels": channels,
        "seconds": statistics.median(seconds),
    }


def measure_throughput(tree: dict[str, Any], category: str, device: str) -> dict[str, Any]:
    """Images a second, by turns: encoded bytes to inspections, and the bare backbone on ready tensors at its best batch size."""
    config = parse_config(tree)
    _, inspector = fit_category(config, category, device)
    rows = read_index(config.data.uri, category)["row"].to_numpy()
    encoded = [record["image"] for record in read_rows(config.data.uri, category, rows, ("image",))]
    encoded = (encoded * (256 // len(encoded) + 1))[:256]
    backbone = build_backbone(config.model.backbone, config.model.weights).eval().to(device)
    backbone = backbone.to(memory_format=torch.channels_last)
    ready = convert_to_float_images(torch.from_numpy(decode_batch(encoded[:32], config.model.image_size_px)), device)

    def run_bare_backbone(batch_size: int) -> None:
        with torch.inference_mode():
            for _ in range(len(encoded) // 32):
                for part in ready.split(batch_size):
                    backbone(part)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    works = {
        "bare, batches of 32": lambda: run_bare_backbone(32),
        "bare, batches of 8": lambda: run_bare_backbone(8),
        "end to end": lambda: inspector.inspect(encoded),
    }
    samples: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(ROUNDS + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if round_number:  # the first warms up
                samples[name].append(len(encoded) / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    best = max(value for name, value in medians.items() if name.startswith("bare"))
    return {**medians, "share": medians["end to end"] / best, "samples": samples}


def measure_startup() -> dict[str, float]:
    commands = {
        "import focus_ray": [sys.executable, "-c", "import focus_ray"],
        "focus-ray --help": [sys.executable, "-m", "focus_ray.cli", "--help"],
    }
    result = {}
    for name, command in commands.items():
        seconds = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
        result[name] = statistics.median(seconds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    uri, categories = open_data(arguments)
    plain = merge_settings(make_base_settings(arguments, uri), make_padim_settings())
    default = make_base_settings(arguments, uri)

    accuracy = {category: train_and_evaluate(plain, category, arguments.device)[2] for category in categories}
    print("\nPlain baseline (no alignment, nothing trained)\n")
    print_table(
        ("category", "image AUROC", "pixel AUROC", "AUPRO 0.3"),
        ([c, r["image_auroc"], r["pixel_auroc"], r["aupro_0.3"]] for c, r in accuracy.items()),
    )
    cost = measure_density_seconds(plain, categories[0], arguments.device)
    print(f"\nGaussian of {categories[0]} beyond feature extraction\n")
    print_table(tuple(cost), [list(cost.values())])
    speeds = {
        name: measure_throughput(tree, categories[0], arguments.device)
        for name, tree in (("plain", plain), ("default", default))
    }
    print("\nImages a second\n")
    print_table(
        ("configuration", *(name for name in next(iter(speeds.values())) if name != "samples")),
        ([name, *(value for key, value in speed.items() if key != "samples")] for name, speed in speeds.items()),
    )
    starts = measure_startup()
    print("\nStart-up, seconds\n")
    print_table(tuple(starts), [list(starts.values())])
    print()
    print_json("spine", arguments, {"accuracy": accuracy, "density": cost, "throughput": speeds, "startup": starts})


if __name__ == "__main__":
    main()
