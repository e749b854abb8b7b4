"""Tiles against whole images: at the tiles' size, and at the size that all tiles cover.

python -m benchmarks.large_images --data ROOT [ROOT ...] --weights resnet18.pth --image-size-px 128 [--grid 2 2]
"""

from __future__ import annotations

import argparse
import time
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
from focus_ray.features.settings import ModelConfig

METRICS = ("image_auroc", "pixel_auroc", "pixel_average_precision", "aupro_0.3", "aupro_0.05")


def list_image_treatments(size_px: int, grid: list[int]) -> dict[str, dict[str, Any]]:
    """Name -> the model section of a way to look at images; a whole one of another shape than a square is left out."""
    found: dict[str, dict[str, Any]] = {f"{size_px} px, whole": {"image_size_px": size_px}}
    for density in ("per_tile", "shared"):
        tiling = {"grid": grid, "density": density}
        found[f"{grid[0]} x {grid[1]} tiles, {density}"] = {"image_size_px": size_px, "tiling": tiling}
    height, width = ModelConfig(
        image_alignment={"group": "none"}, image_size_px=size_px, tiling=tiling
    ).resized_image_px  # type: ignore[arg-type]
    if height == width:
        whole = height - height % 16
        found[f"{whole} px, whole"] = {"image_size_px": whole}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, several=True)
    parser.add_argument("--grid", type=int, nargs=2, default=[2, 2])
    parser.add_argument("--max-images", type=int, default=96)
    arguments = parser.parse_args()
    rows: list[list[Any]] = []
    for place in arguments.data:
        uri, categories = open_data(argparse.Namespace(**{**vars(arguments), "data": place}))
        for category in categories:
            for name, model in list_image_treatments(arguments.image_size_px, arguments.grid).items():
                tree = merge_settings(
                    make_base_settings(arguments, uri),
                    {"data": {"holdout_fraction": 0.2}, "calibration": {"method": "split"}},
                    {"model": {"image_alignment": {"group": "none"}, **model}},
                    {"density": {"max_images": arguments.max_images}},
                )
                start = time.perf_counter()
                result, _, figures = train_and_evaluate(tree, category, arguments.device)
                fitted = sum(result.seconds.values())
                inspected = time.perf_counter() - start - fitted
                rows.append([category, name, *(figures[key] for key in METRICS), round(fitted), round(inspected)])
    header = ("category", "scored", *METRICS, "fit, s", "read and evaluate, s")
    print_table(header, rows)
    print_json("large_images", arguments, [dict(zip(header, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
