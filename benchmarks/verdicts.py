"""How often verdicts are right: realised false alarm rate and recall against the target, over random draws of few good images.

    python -m benchmarks.verdicts --data ROOT [ROOT ...] --weights resnet18.pth [--images 10 20 40] [--draws 4]

Each draw takes so many good images of a category at random, of its training and its test images alike, so that those left, which
the rate is measured on, are exchangeable with them. Methods are values of calibration.method.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import add_arguments, base_tree, merged, open_data, print_json, print_table
from focus_ray.config import parse_config
from focus_ray.data.read import decoded_rows, read_index
from focus_ray.data.shards import MemoryShard
from focus_ray.fitting.fit import fit
from focus_ray.fitting.scoring import Detector
from focus_ray.seeds import derived_seed

MOST_BAD, MOST_GOOD = 40, 60  # test images of a draw
HELD_OUT = 0.2  # for `split`


def load(uri: str, category: str, label: int, size_px: int) -> Tensor:
    """All images (N, S, S, 3) of one label, training and test."""
    index = read_index(uri, category)
    rows = [row for row, one in zip(index["row"].to_pylist(), index["label"].to_pylist(), strict=True) if one == label]
    return torch.from_numpy(np.concatenate(list(decoded_rows(uri, category, rows, size_px))))


def scores(detector: Detector, images: Tensor) -> np.ndarray[Any, Any]:
    return np.concatenate([detector(part).score.cpu().numpy() for part in images.split(16)])


def draw(tree: dict[str, Any], method: str, num_images: int, good: Tensor, bad: Tensor, seed: int) -> dict[str, Any]:
    """One fit on `num_images` good images drawn at random, and its verdicts on others."""
    config = parse_config(merged(tree, {"train": {"seed": seed}, "calibration": {"method": method}}))
    order = torch.randperm(len(good), generator=torch.Generator().manual_seed(derived_seed(seed, "draw", num_images)))
    taken, others = good[order[:num_images]], good[order[num_images:]][:MOST_GOOD]
    num_held = max(1, round(HELD_OUT * num_images)) if method == "split" else 0
    folds = torch.arange(num_images - num_held) % config.calibration.num_folds
    shard = MemoryShard(taken[num_held:], taken[:num_held], folds)
    found = fit(config, shard, num_images - num_held, torch.device("cpu"))
    calibration = found.calibration
    on_good, on_bad = scores(found.detector, others), scores(found.detector, bad[:: max(1, len(bad) // MOST_BAD)])
    return {
        "fpr": float(calibration.is_anomalous(on_good).mean()),
        "recall": float(calibration.is_anomalous(on_bad).mean()),
        "calibrating": calibration.num_images,
        "modelled": calibration.tail is not None,
        "image_scores": list(calibration.image_scores),
        "good": on_good.tolist(),
        "bad": on_bad.tolist(),
    }


def table(samples: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Rows of images and method: means over categories of rate and recall, and the highest rate of a category."""
    rows: list[list[Any]] = []
    for num_images in sorted({sample["images"] for sample in samples}):
        for method in dict.fromkeys(sample["method"] for sample in samples):
            mine = [s for s in samples if (s["images"], s["method"]) == (num_images, method)]
            if not mine:
                continue
            by_category = {
                name: [s for s in mine if s["category"] == name] for name in dict.fromkeys(s["category"] for s in mine)
            }
            rates = {name: statistics.mean(s["fpr"] for s in group) for name, group in by_category.items()}
            recalls = [statistics.mean(s["recall"] for s in group) for group in by_category.values()]
            worst = max(rates, key=lambda name: rates[name])
            above = statistics.mean(sample["fpr"] > 0.15 for sample in mine)
            rows.append(
                [
                    num_images,
                    method,
                    len(by_category),
                    len(mine),
                    statistics.mean(rates.values()),
                    f"{rates[worst]:.2f} ({worst})",
                    above,
                    statistics.mean(recalls),
                ]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, several=True)
    parser.set_defaults(image_size_px=256)
    parser.add_argument("--images", nargs="+", type=int, default=[10, 20, 40])
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["split", "auto"])
    parser.add_argument(
        "--output", help="JSON Lines: a line a draw, as it ends; draws that are there are not run again"
    )
    arguments = parser.parse_args()
    samples: list[dict[str, Any]] = []
    if arguments.output and Path(arguments.output).is_file():
        samples = [json.loads(line) for line in Path(arguments.output).read_text().splitlines()]
    done = {(s["category"], s["method"], s["images"], s["seed"]) for s in samples}
    sets = []
    for number, root in enumerate(arguments.data):
        one = argparse.Namespace(**{**vars(arguments), "data": root, "work": f"{arguments.work}/verdicts-{number}"})
        uri, categories = open_data(one)
        sets += [(uri, category) for category in categories]
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for seed in range(arguments.draws):  # outermost: a run that is cut short has seen every category
        for uri, category in sets:
            for num_images in arguments.images:
                for method in arguments.methods:
                    if (category, method, num_images, seed) in done:
                        continue
                    if category not in kept:
                        size = arguments.image_size_px
                        kept[category] = load(uri, category, 0, size), load(uri, category, 1, size)
                    good, bad = kept[category]
                    if num_images > len(good) - 12:
                        continue
                    found = draw(base_tree(arguments, uri), method, num_images, good, bad, seed)
                    sample = {"category": category, "method": method, "images": num_images, "seed": seed, **found}
                    samples.append(sample)
                    if arguments.output:
                        with Path(arguments.output).open("a") as sink:
                            sink.write(json.dumps(sample) + "\n")
                    print(
                        f"{category} / {method} / {num_images} / {seed}: fpr {found['fpr']:.3f}, recall {found['recall']:.3f}",
                        flush=True,
                    )
    print()
    header = (
        "good images",
        "method",
        "categories",
        "draws",
        "FPR",
        "highest of a category",
        "draws above 0.15",
        "recall",
    )
    print_table(header, table(samples))
    print()
    print_json(
        "verdicts",
        arguments,
        [{k: v for k, v in s.items() if k not in ("image_scores", "good", "bad")} for s in samples],
    )


if __name__ == "__main__":
    main()
