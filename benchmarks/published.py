"""Runs all categories of a data set on the cluster and prints ours beside the published figures.

`python -m benchmarks.mvtec` and `python -m benchmarks.btad` are its two front doors.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import add_arguments, make_base_settings, merge_settings, open_data, print_json, print_table
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import read_test_rows
from focus_ray.fitting.settings import load_config, parse_config
from focus_ray.reporting.tables import compute_mean_metrics
from focus_ray.training.training import train


def main(name: str, description: str, published: Mapping[str, Mapping[str, tuple[float | None, float | None]]]) -> None:
    """
    Args:
        published: method -> category, or 'mean' -> (image AUROC, pixel AUROC), in per cent.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--config", help="YAML whose settings are taken instead of the defaults")
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--storage", default=None, help="where runs go: a path or s3:// URI (default: WORK/runs)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    uri, categories = open_data(arguments)
    chosen: dict[str, Any] = {}
    if arguments.config:
        chosen = load_config(arguments.config, [f"data.uri={uri}"]).model_dump(mode="json")
    tree = merge_settings(
        chosen,
        make_base_settings(arguments, uri),
        {
            "name": f"{name}-seed{arguments.seed}",
            "storage": arguments.storage or str(Path(arguments.work) / "runs"),
            "data": {"categories": categories},
            "train": {"seed": arguments.seed},
            "cluster": {"num_workers": arguments.num_workers},
        },
    )
    bundles = train(parse_config(tree), resume=arguments.resume, log=lambda message: print(message, flush=True))
    results = {}
    for category, bundle in bundles.items():
        results[category] = Inspector.load(bundle).evaluate(read_test_rows(uri, category))
    print()
    header = ["category", "ours image", "ours pixel", "ours AUPRO 0.3"]
    header += [f"{method} {part}" for method in published for part in ("image", "pixel")]
    rows = []
    for category, result in {**results, f"mean of {len(results)}": compute_mean_metrics(results)}.items():
        row = [category, *(_format_percent(result[key]) for key in ("image_auroc", "pixel_auroc", "aupro_0.3"))]
        for figures in published.values():
            row += [_format_percent(value, 1.0) for value in figures.get(category.split()[0], (None, None))]
        rows.append(row)
    print_table(header, rows)
    print(
        "\nPublished figures are from the papers named in docs/learn/method.md, at their own image sizes and settings; a "
        "published mean is over all categories of the data set, ours over those that were run."
    )
    print_json(name, arguments, results)


def _format_percent(value: float | None, factor: float = 100.0) -> str:
    return "-" if value is None else f"{value * factor:.1f}"
