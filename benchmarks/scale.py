"""What a fit and an inspection cost as images become more, larger, or of more categories: time, memory, and how they grow.

    python -m benchmarks.scale --data MVTEC_CATEGORY --weights resnet18.pth [--long] [--repeats 3]

Every measurement is a process of its own. Seconds leave out its imports and the making of its images; memory is the highest
resident one above that after the imports, and so has the decoded images in it. More images than there are come of the same ones,
shifted a little. A last row gives exponents, of a straight line through the logarithms: 1 is linear, 0 is flat.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import make_base_settings_of, merge_settings, print_table, save_json
from benchmarks.peers.common import MemoryPeak, measure_median_ms, read_memory_mb
from focus_ray.bundle.bundle import write_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import decode_image
from focus_ray.data.importers.base import list_image_files
from focus_ray.fitting.fit import fit
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import MemoryShard
from focus_ray.fitting.split import NUM_CALIBRATION_FOLDS, choose_num_holdout
from focus_ray.samples.write import draw_sample, save_png

ROOT = Path(__file__).resolve().parents[1]
SHIFT_PX = 4
DRAWN = 24  # images, where none are given
LARGEST_PX = 512  # of an image in one piece; larger ones are cut into tiles
# axis -> its unit of cost: what the exponents are over
AXES = {"images": "num_images", "size": "megapixels", "categories": "num_categories"}


def make_config(asked: dict[str, Any]) -> Config:
    """The default; nothing is aligned where sizes are compared, for tiles cannot be."""
    side, tiles = asked["side_px"], -(-asked["side_px"] // LARGEST_PX)
    tree = make_base_settings_of("unused", asked["weights"], side // tiles, asked["backbone"])
    if asked["axis"] == "size":
        tree = merge_settings(tree, {"model": {"image_alignment": {"group": "none"}}})
    if tiles > 1:
        tree = merge_settings(tree, {"model": {"tiling": {"grid": [tiles, tiles], "overlap": 0.0}}})
    return parse_config(tree, is_fitted=True)  # tiles without overlap, so that sizes compare


def make_images(files: Sequence[str], count: int, config: Config, turns: int) -> NDArray[np.uint8]:
    """(count, H, W, 3): the files' images by quarter turns, so that a category has a look of its own; then again, shifted."""
    height, width = config.model.resized_image_px
    rng = np.random.default_rng(turns)
    images = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        if number < len(files):
            images[number] = np.rot90(decode_image(Path(files[number]).read_bytes(), height), turns)
            continue
        down, right = rng.integers(0, 2 * SHIFT_PX + 1, 2)
        wide = np.pad(images[number % len(files)], ((SHIFT_PX, SHIFT_PX), (SHIFT_PX, SHIFT_PX), (0, 0)), "reflect")
        images[number] = wide[down : down + height, right : right + width]
    return images


def fit_categories(asked: dict[str, Any]) -> dict[str, Any]:
    """Fits the categories one after the other, as a training without Ray does, and writes their bundles."""
    config, count, base = make_config(asked), asked["num_images"], read_memory_mb()
    seconds = 0.0
    held = choose_num_holdout(config, count)
    method = ""
    with MemoryPeak() as peak:
        for number in range(asked["num_categories"]):
            images = torch.from_numpy(make_images(asked["files"], count, config, number))
            start = time.perf_counter()
            folds = torch.arange(count - held) % NUM_CALIBRATION_FOLDS
            found = fit(config, MemoryShard(images[held:], images[:held], folds), count - held, torch.device("cpu"))
            seconds += time.perf_counter() - start
            method = found.calibration.method
            write_bundle(
                Path(asked["place"]) / f"part{number}",
                config=config,
                category=f"part{number}",
                detector=found.detector,
                statistics=found.statistics,
                calibration=found.calibration,
                data={"uri": "made", "fingerprint": "", "num_fit": count - held, "num_holdout": held},
                metrics={},
            )
            del images, found
    return {"fit_s": seconds, "fit_mb": peak.highest - base, "calibration": method}


def inspect_categories(asked: dict[str, Any]) -> dict[str, Any]:
    """Loads the categories' bundles, keeps all of them, and inspects with each in turn."""
    base = read_memory_mb()
    with MemoryPeak() as peak:
        start = time.perf_counter()
        places = [Path(asked["place"]) / f"part{number}" for number in range(asked["num_categories"])]
        inspectors = [Inspector.load(place, "cpu") for place in places]
        load_s = time.perf_counter() - start
        batch = make_images(asked["files"], asked["batch"], inspectors[0].bundle.config, 0)

        def inspect(images: NDArray[np.uint8]) -> None:
            for inspector in inspectors:
                inspector.score(images)

        many_ms = measure_median_ms(lambda: inspect(batch), asked["times"]) / len(batch) / len(inspectors)
        one_ms = measure_median_ms(lambda: inspect(batch[:1]), asked["times"]) / len(inspectors)
    return {"load_s": load_s, "inspect_ms": many_ms, "one_ms": one_ms, "inspect_mb": peak.highest - base}


def run_in_process(what: str, asked: dict[str, Any]) -> dict[str, Any]:
    """fit or inspect in a process of its own. Raises: RuntimeError: it failed; with what it said last."""
    spec = Path(asked["place"]) / "asked.json"
    spec.write_text(json.dumps(asked))
    command = [sys.executable, "-m", "benchmarks.scale", "--one", what, str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{what} of {asked['axis']} failed ({done.returncode}): {done.stderr.strip()[-1500:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measure_size(asked: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        here = {**asked, "place": place}
        found = {**run_in_process("fit", here), **run_in_process("inspect", here)}
    images = asked["num_images"] * asked["num_categories"]
    return {
        **{key: asked[key] for key in ("axis", "num_images", "side_px", "num_categories")},
        "megapixels": asked["side_px"] ** 2 / 1e6,
        **found,
        "fit_ms_an_image": 1e3 * found["fit_s"] / images,
        "images_mb": asked["num_images"] * asked["side_px"] ** 2 * 3 / 2**20,
    }


COLUMNS = {
    "fit_s": "fit, s",
    "fit_ms_an_image": "fit, ms an image",
    "fit_mb": "fit, MB",
    "images_mb": "decoded images of a category, MB",
    "load_s": "load, s",
    "inspect_ms": "inspection in batches, ms an image",
    "one_ms": "of one image, ms",
    "inspect_mb": "inspection, MB",
}


def compute_median_row(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Repeats of one measurement -> the medians of its figures."""
    return {**runs[0], **{key: statistics.median(run[key] for run in runs) for key in COLUMNS}}


def compute_growth_exponent(rows: Sequence[dict[str, Any]], over: str, key: str) -> float | None:
    """Of the figure's growth over the axis; None of less than two points, or where the figure is 0."""
    if len({row[over] for row in rows}) < 2 or min(row[key] for row in rows) <= 0:
        return None
    return float(np.polyfit(np.log([row[over] for row in rows]), np.log([row[key] for row in rows]), 1)[0])


def print_axis_table(axis: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{axis}\n")
    names = [f"{r['num_images']} of {r['side_px']} px, categories {r['num_categories']}" for r in rows]
    cells = [[name, row["calibration"], *(row[key] for key in COLUMNS)] for name, row in zip(names, rows, strict=True)]
    growth = [compute_growth_exponent(rows, AXES[axis], key) for key in COLUMNS]
    header = ("images", "calibration", *COLUMNS.values())
    print_table(header, [*cells, [f"exponent over {AXES[axis]}", "", *growth]])


def list_measurements(arguments: argparse.Namespace, files: Sequence[str]) -> list[dict[str, Any]]:
    shared = {
        "files": list(files),
        "weights": arguments.weights,
        "backbone": arguments.backbone,
        "batch": arguments.batch,
        "times": arguments.times,
    }
    side, few = arguments.image_size_px, arguments.few
    counts = [*arguments.num_images, *([1000] if arguments.long else [])]
    points = {
        "images": [(count, side, 1) for count in counts],
        "size": [(few, one, 1) for one in arguments.sizes_px],
        "categories": [(few, side, many) for many in arguments.num_categories],
    }
    keys = ("num_images", "side_px", "num_categories")
    return [
        {**shared, "axis": axis, **dict(zip(keys, point, strict=True))}
        for axis in arguments.axes
        for point in points[axis]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "SPEC"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help="a category's folder, in MVTec's shape; without it, parts are drawn")
    parser.add_argument("--weights", default="random", help="model.weights")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--num-images", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--long", action="store_true", help="also 1000 images")
    parser.add_argument("--sizes-px", type=int, nargs="+", default=[224, 256, 320, 512, 1024])
    parser.add_argument("--num-categories", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--image-size-px", type=int, default=256, help="where sizes are not compared")
    parser.add_argument("--few", type=int, default=50, help="images a category, where their number is not compared")
    parser.add_argument("--batch", type=int, default=8, help="images inspected at once")
    parser.add_argument("--times", type=int, default=5, help="inspections timed")
    parser.add_argument("--repeats", type=int, default=1, help="of everything, in turns")
    arguments = parser.parse_args()
    if arguments.one:
        importlib.import_module("torchvision.models")  # 150 MB that the first backbone would bring
        act = {"fit": fit_categories, "inspect": inspect_categories}[arguments.one[0]]
        print(json.dumps(act(json.loads(Path(arguments.one[1]).read_text()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            for number in range(DRAWN):
                save_png(draw_sample("gear", 0, "train", number)[0], Path(folder) / f"{number:03}.png")
        good = Path(folder) if arguments.data is None else arguments.data.absolute() / "train" / "good"
        asked = list_measurements(arguments, [str(path) for path in list_image_files(good)])
        runs: list[list[dict[str, Any]]] = [[] for _ in asked]
        for repeat in range(arguments.repeats):
            for one, found in zip(asked, runs, strict=True):
                found.append(measure_size(one))
                done = found[-1]
                print(
                    f"{repeat + 1}: {done['num_images']} images, {done['side_px']} px, categories {done['num_categories']}: "
                    f"fit {done['fit_s']:.1f} s, {done['fit_mb']:.0f} MB",
                    flush=True,
                )
    for axis in arguments.axes:
        print_axis_table(
            axis, [compute_median_row(found) for one, found in zip(asked, runs, strict=True) if one["axis"] == axis]
        )
    print()
    arguments.device, arguments.data = "cpu", arguments.data and str(arguments.data)
    save_json("scale", arguments, [run for found in runs for run in found])


if __name__ == "__main__":
    main()
