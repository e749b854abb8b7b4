"""What each part of the method earns: baseline, + fine loss, + FCA, + ICA, all; and the loss's own ablations.

    python -m benchmarks.ablation --data MVTEC_ROOT --weights resnet18.pth --seeds 0 1 2 [--epochs 50]

Takes every category it is given, with no per-category constant; the same splits, seeds and density for every variant.
`selected` is training as a user gets it: alignment and epoch chosen by held-out normal images with synthetic defects.
Full length is --epochs 50 on a GPU; the default of 4 epochs is the size for two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict
from typing import Any

from benchmarks.harness import (
    add_arguments,
    make_base_settings,
    merge_settings,
    open_data,
    print_json,
    print_table,
    train_and_evaluate,
)
from focus_ray.density.registry import DENSITIES

ICA = {"model": {"image_alignment": {"group": "rotation_translation"}}}
NO_ICA = {"model": {"image_alignment": {"group": "none"}}}
FCA = {"model": {"feature_alignment": dict.fromkeys(("layer1", "layer2", "layer3"), "rotation_scale")}}
LITERAL_ICA = {"model": {"image_alignment": {"group": "rotation_translation", "method": "localisation"}}}
FIGURES = ("image_auroc", "pixel_auroc", "aupro_0.3")


def build_variants(epochs: int, learning_rate: float) -> dict[str, dict[str, Any]]:
    fine = {"train": {"epochs": epochs, "learning_rate": learning_rate}}
    everything = merge_settings(ICA, FCA, fine)
    return {
        "baseline": NO_ICA,
        "+ fine loss": merge_settings(NO_ICA, fine),
        "+ fine loss + FCA": merge_settings(NO_ICA, FCA, fine),
        "+ ICA": ICA,
        "+ ICA + fine loss": merge_settings(ICA, fine),
        "all": everything,
        "fine loss + ICA by gradient": merge_settings(LITERAL_ICA, fine),
        "selected": merge_settings(everything, {"selection": {"fraction": 0.1}}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--density", choices=tuple(DENSITIES), default="nearest")
    parser.add_argument("--variants", nargs="+", help="only these")
    arguments = parser.parse_args()
    uri, categories = open_data(arguments)
    chosen = build_variants(arguments.epochs, arguments.learning_rate)
    unknown = sorted(set(arguments.variants or []) - set(chosen))
    if unknown:
        parser.error(f"no variant {unknown}; there are {list(chosen)}")
    density = {"kind": arguments.density, "pooling": 0.5, "reduction": "semi_orthogonal", "coreset": 0}
    plain = {
        "model": {"padding": "zeros"},
        "scoring": {"image_score": "maximum"},
        "density": density,
    }  # FYD, nothing added
    samples = []
    for name in arguments.variants or chosen:
        for category in categories:
            for seed in arguments.seeds:
                tree = merge_settings(
                    make_base_settings(arguments, uri), chosen[name], plain, {"train": {"seed": seed}}
                )
                start = time.perf_counter()
                result, _, figures = train_and_evaluate(tree, category, arguments.device)
                sample = {
                    "variant": name,
                    "category": category,
                    "seed": seed,
                    **{key: figures[key] for key in (*FIGURES, "false_positive_rate", "recall")},
                    **asdict(result.notes),
                    "seconds": time.perf_counter() - start,
                }
                samples.append(sample)
                print(
                    f"{name} / {category} / seed {seed}: " + ", ".join(f"{k} {figures[k]:.4f}" for k in FIGURES),
                    flush=True,
                )
    print()
    rows = []
    for name in arguments.variants or chosen:
        for category in categories:
            group = [sample for sample in samples if sample["variant"] == name and sample["category"] == category]
            cells = []
            for key in FIGURES:
                values = [sample[key] for sample in group]
                spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread}")
            rows.append([name, category, *cells])
    print_table(("variant", "category", "image AUROC", "pixel AUROC", "AUPRO 0.3"), rows)
    print()
    print_json("ablation", arguments, samples)


if __name__ == "__main__":
    main()
