"""How often verdicts are right: realised false alarm rate and recall against the target, over random draws of few good images.

    python -m benchmarks.verdicts --data ROOT [ROOT ...] --weights resnet18.pth [--images 10 20 40] [--draws 4]

Each draw takes so many good images of a category at random, of its training and its test images alike, so that those left, which
the rate is measured on, are exchangeable with them. Methods are values of calibration.method.

Two further experiments have training images that resemble each other more than new parts do:

    --photographs-per-part 1 2 4   photographs each drawn part several times, with small shifts and noise; test images once
    --sequence                     overlapping crops of the drawn images, as a strip that is photographed step by step
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bursts import crop_at_random, crop_in_steps, simulate_photographs
from benchmarks.harness import (
    add_arguments,
    make_base_settings,
    merge_settings,
    open_data,
    print_json,
    print_table,
    read_samples,
)
from focus_ray.data.read import decode_rows, read_index
from focus_ray.detect.detector import Detector
from focus_ray.fitting.fit import fit
from focus_ray.fitting.settings import parse_config
from focus_ray.fitting.shards import MemoryShard
from focus_ray.fitting.split import NUM_CALIBRATION_FOLDS
from focus_ray.seeds import derive_seed

MOST_BAD, MOST_GOOD = 40, 60  # test images of a draw
HELD_OUT = 0.2  # for `split`
PLAIN, SEQUENCE = "images as they are", "sequence of crops"
STEP_PX = 8  # of a sequence

View = int | str  # photographs of each part, or PLAIN or SEQUENCE


def load_images(uri: str, category: str, label: int, size_px: int) -> Tensor:
    """All images (N, S, S, 3) of one label, training and test."""
    index = read_index(uri, category)
    rows = [row for row, one in zip(index["row"].to_pylist(), index["label"].to_pylist(), strict=True) if one == label]
    return torch.from_numpy(np.concatenate(list(decode_rows(uri, category, rows, size_px))))


def compute_scores(detector: Detector, images: Tensor) -> np.ndarray[Any, Any]:
    return np.concatenate([detector(part).score.cpu().numpy() for part in images.split(16)])


def choose_crop_side(size_px: int) -> int:
    """Side of the crops of a sequence: three quarters of the image, as a multiple of 16 px that the network takes."""
    return size_px * 3 // 4 // 16 * 16


def format_view(view: View) -> str:
    """Text of a view for tables and JSON."""
    return f"{view} per part" if isinstance(view, int) else view


def simulate_view(images: Tensor, view: View, seed: int, perturbation: Mapping[str, Any], training: bool) -> Tensor:
    """What the camera makes of parts (N, H, W, C): the views of a part follow each other. A test image has one view."""
    side_px = choose_crop_side(images.shape[2])
    if isinstance(view, int):
        return simulate_photographs(images, view if training else 1, seed, **perturbation)
    if view == SEQUENCE:
        return crop_in_steps(images, side_px, STEP_PX) if training else crop_at_random(images, side_px, seed)
    return images


def fit_and_judge_draw(
    tree: dict[str, Any],
    method: str,
    num_parts: int,
    good: Tensor,
    bad: Tensor,
    seed: int,
    view: View = PLAIN,
    perturbation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fits one model on `num_parts` good images drawn at random, and judges others.

    Args:
        good, bad: (N, H, W, 3) uint8, all good and all defective images.
        view: how the drawn parts and the test images are photographed.
        perturbation: arguments of `simulate_photographs`.

    Returns:
        Realised false positive rate and recall, and the scores that they come from.
    """
    order = torch.randperm(len(good), generator=torch.Generator().manual_seed(derive_seed(seed, "draw", num_parts)))
    perturbation = perturbation or {}
    parts, new_parts = good[order[:num_parts]], good[order[num_parts:]][:MOST_GOOD]
    defects = bad[:: max(1, len(bad) // MOST_BAD)]
    training = simulate_view(parts, view, derive_seed(seed, "training"), perturbation, training=True)
    tests = [
        simulate_view(images, view, derive_seed(seed, "test", label), perturbation, training=False)
        for label, images in enumerate((new_parts, defects))
    ]
    config = parse_config(
        merge_settings(
            tree,
            {
                "train": {"seed": seed},
                "calibration": {"method": method},
                "model": {"image_size_px": training.shape[2]},
            },
        )
    )
    # all views of a part are held out together
    num_held = max(1, round(HELD_OUT * num_parts)) * (len(training) // num_parts) if method == "split" else 0
    num_fit = len(training) - num_held
    folds = torch.arange(num_fit) % NUM_CALIBRATION_FOLDS
    shard = MemoryShard(training[num_held:], training[:num_held], folds)
    found = fit(config, shard, num_fit, torch.device("cpu"))
    calibration = found.calibration
    on_good, on_bad = (compute_scores(found.detector, images) for images in tests)
    return {
        "fpr": float(calibration.is_anomalous(on_good).mean()),
        "recall": float(calibration.is_anomalous(on_bad).mean()),
        "calibrating": calibration.num_images,
        "modelled": calibration.tail is not None,
        "image_scores": list(calibration.image_scores),
        "good": on_good.tolist(),
        "bad": on_bad.tolist(),
    }


def make_table(samples: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Rows of images, view and method: means over categories of rate and recall, and the highest rate of a category."""
    rows: list[list[Any]] = []
    keys = dict.fromkeys((s["images"], s["view"], s["method"]) for s in samples)
    for key in sorted(keys, key=lambda key: key[0]):
        group = [s for s in samples if (s["images"], s["view"], s["method"]) == key]
        by_category = {
            name: [s for s in group if s["category"] == name] for name in dict.fromkeys(s["category"] for s in group)
        }
        rates = {name: statistics.mean(s["fpr"] for s in draws) for name, draws in by_category.items()}
        recalls = [statistics.mean(s["recall"] for s in draws) for draws in by_category.values()]
        worst = max(rates, key=lambda name: rates[name])
        rows.append(
            [
                *key,
                len(by_category),
                len(group),
                statistics.mean(rates.values()),
                f"{rates[worst]:.2f} ({worst})",
                statistics.mean(sample["fpr"] > 0.15 for sample in group),
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
    parser.add_argument(
        "--photographs-per-part",
        nargs="+",
        type=int,
        default=[],
        metavar="COUNT",
        help="photograph each of the --images parts this often, in place of taking images as they are",
    )
    parser.add_argument("--shift-px", type=int, default=1, help="largest shift of a photograph in x and in y, pixels")
    parser.add_argument("--noise", type=float, default=2.0, help="standard deviation of its noise, grey levels")
    parser.add_argument("--brightness", type=float, default=0.0, help="largest relative change of its brightness")
    parser.add_argument(
        "--sequence",
        action="store_true",
        help=f"train on crops of three quarters of the side, {STEP_PX} px apart, all of each of the --images images",
    )
    arguments = parser.parse_args()
    perturbation = {name: getattr(arguments, name) for name in ("shift_px", "noise", "brightness")}
    views: list[View] = [*arguments.photographs_per_part, *([SEQUENCE] if arguments.sequence else [])] or [PLAIN]
    samples = [{"view": PLAIN, **sample} for sample in read_samples(arguments.output)]
    others = [s["perturbation"] for s in samples if s.get("perturbation", perturbation) != perturbation]
    if others:
        parser.error(
            f"--output has photographs made with {others[0]}, not with {perturbation}: choose another --output"
        )
    done = {(s["category"], s["method"], s["images"], s["view"], s["seed"]) for s in samples}
    sets = []
    for number, root in enumerate(arguments.data):
        one = argparse.Namespace(**{**vars(arguments), "data": root, "work": f"{arguments.work}/verdicts-{number}"})
        uri, categories = open_data(one)
        sets += [(uri, category) for category in categories]
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for seed in range(arguments.draws):  # outermost: a run that is cut short has seen every category
        for uri, category in sets:
            for num_images, view, method in itertools.product(arguments.images, views, arguments.methods):
                shown = format_view(view)
                if (category, method, num_images, shown, seed) in done:
                    continue
                if category not in kept:
                    size = arguments.image_size_px
                    kept[category] = load_images(uri, category, 0, size), load_images(uri, category, 1, size)
                good, bad = kept[category]
                if num_images > len(good) - 12:
                    continue
                found = fit_and_judge_draw(
                    make_base_settings(arguments, uri), method, num_images, good, bad, seed, view, perturbation
                )
                key = {"category": category, "method": method, "images": num_images, "view": shown, "seed": seed}
                sample = {**key, **({"perturbation": perturbation} if isinstance(view, int) else {}), **found}
                samples.append(sample)
                if arguments.output:
                    with Path(arguments.output).open("a") as sink:
                        sink.write(json.dumps(sample) + "\n")
                print(
                    f"{category} / {method} / {num_images} / {shown} / {seed}: "
                    f"fpr {found['fpr']:.3f}, recall {found['recall']:.3f}",
                    flush=True,
                )
    print()
    header = (
        "good images",
        "photographs",
        "method",
        "categories",
        "draws",
        "FPR",
        "highest of a category",
        "draws above 0.15",
        "recall",
    )
    print_table(header, make_table(samples))
    print()
    print_json(
        "verdicts",
        arguments,
        [{k: v for k, v in s.items() if k not in ("image_scores", "good", "bad")} for s in samples],
    )


if __name__ == "__main__":
    main()
